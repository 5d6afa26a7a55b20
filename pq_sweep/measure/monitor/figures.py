"""Figures, some of which may not be available."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from pq_sweep.measure.monitor.nvml import Absent


def gather(figures: Mapping[str, Callable[[], Any]], unavailable: dict[str, str]) -> dict[str, Any]:
    """Return the figures that are available, and write into `unavailable` why the others are not."""
    found = {}
    for name, figure in figures.items():
        try:
            found[name] = figure()
        except Absent as reason:
            unavailable[name] = str(reason)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the smallest value, the median and the largest."""
    return {"min": min(values), "median": median(values), "max": max(values)}
