"""A job beside the uncompressed model of the same data, runtime and device: how much faster, and at what cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pq_sweep.results import Row, Sweep

COMPRESSING = ("pruner", "recovery", "quantizer")


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, which is None where it is not known."""

    value: float
    interval: tuple[float, float] | None = None


def comparable(row: Row, other: Row) -> str | None:
    """Say why the latencies of two finished jobs must not be compared, or None if they may: one device ran both.

    A GPU is known by its UUID, as two of one name differ by some percent; a CPU by its name and host.
    """
    if _device(row) == _device(other):
        return None
    return f"{_device(row)} is not {_device(other)}"


def _device(row: Row) -> str:
    """Name the one device that a job ran on."""
    which = row["gpu_uuid"] or f"of {row['host']}"
    return f"{row['device_name']} {which}"


def reference(row: Row, sweep: Sweep) -> Row | None:
    """Return the finished job of a sweep to compare a row with: the uncompressed one that is the same in all else.

    Of several, one of the same device is chosen if there is one; None if there is none, or the row is one itself.
    """
    if row["status"] != "finished" or _is_uncompressed(row):
        return None
    same = ["model", "dataset", "runtime", *(key for key in sweep.options if key.partition(".")[0] not in COMPRESSING)]
    found = [
        other
        for other in sweep.rows
        if other["status"] == "finished"
        and _is_uncompressed(other)
        and all(row.get(key) == other.get(key) for key in same)
    ]
    return min(found, key=lambda other: comparable(row, other) is not None, default=None)


def _is_uncompressed(row: Row) -> bool:
    return all(row.get(group) == "none" for group in COMPRESSING)


def speedup(row: Row, other: Row | None, batch: int) -> Estimate | None:
    """Return how many times faster a job is than the uncompressed one, or None if that cannot be said.

    Where both were timed in turn, the ratio of the pairs is better known than that of the medians of two jobs. The
    interval of the latter is that of the worst case: the ends of both of their intervals.
    """
    if (paired := f"speedup/b{batch}") in row:
        return Estimate(row[paired], _interval(row, f"speedup_ci95_{{}}/b{batch}"))
    latency, ends = f"latency_ms/b{batch}", f"latency_ci95_{{}}_ms/b{batch}"
    if other is None or latency not in row or latency not in other or comparable(row, other):
        return None
    own, others = _interval(row, ends), _interval(other, ends)
    interval = (others[0] / own[1], others[1] / own[0]) if own and others else None
    return Estimate(other[latency] / row[latency], interval)


def _interval(row: Row, name: str) -> tuple[float, float] | None:
    """Return the ends of an interval that has two columns, `name` with low and high."""
    low, high = (row.get(name.format(end)) for end in ("low", "high"))
    return (low, high) if low is not None and high is not None else None


def drop(row: Row) -> Estimate:
    """Return the points of accuracy that a job lost against the uncompressed model on the same images."""
    return Estimate(row["accuracy_drop_points"], _interval(row, "accuracy_drop_ci95_{}_points"))


def payback(row: Row, other: Row | None, batch: int) -> float | None:
    """Return after how many images the time of preparation is earned back: infinity if never, None if unknown."""
    faster = speedup(row, other, batch)
    if faster is None:
        return None
    saved_s = row[f"latency_ms/b{batch}"] / 1e3 * (faster.value - 1) / batch
    return float(row["prep_time_s"]) / saved_s if saved_s > 0 else math.inf
