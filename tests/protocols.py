"""A measuring protocol of a test's own."""

from __future__ import annotations

import math
from typing import Any

from pq_sweep.measure.timing import Protocol


def protocol(**options: Any) -> Protocol:
    """Return a protocol that takes no longer than its iterations."""
    still = {"name": "test", "batch_sizes": [1], "eval_batch_size": 64, "threads": None}
    warmup = {"warmup_iterations": 0, "warmup_s": 0.0, "window": None, "agreement": 0.0, "warmup_max_s": 0.0}
    sampling = {
        "min_iterations": 1,
        "iterations": 1,
        "min_s": 0.0,
        "max_s": None,
        "interval": math.inf,
        "paired": False,
        "repeats": 1,
        "retries": 0,
    }
    return Protocol(**still | warmup | sampling | options)
