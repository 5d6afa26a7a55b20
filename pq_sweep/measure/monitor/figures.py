"""Figures of which some cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from pq_sweep.measure.monitor.nvml import Absent


def gather(figures: Mapping[str, Callable[[], Any]], unavailable: dict[str, str]) -> dict[str, Any]:
    """Return the figures that can be had, and write down why not for the others."""
    found = {}
    for name, figure in figures.items():
        try:
            found[name] = figure()
        except Absent as reason:
            unavailable[name] = str(reason)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, the median and the greatest."""
    return {"min": min(values), "median": median(values), "max": max(values)}
