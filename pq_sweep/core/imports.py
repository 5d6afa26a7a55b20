"""Importing large packages in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(package: str) -> Iterator[None]:
    """Import a package for the first time without the garbage collector, which would look at all it makes, repeatedly.

    What is there afterwards stays out of its later rounds, the last of which comes when the process ends: for
    `import torch` 1.4 s less of 3.6 s.
    """
    if package in sys.modules:
        yield
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
