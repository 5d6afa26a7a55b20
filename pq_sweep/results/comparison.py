"""A job compared with the uncompressed model on the same data, runtime and device: how much faster, at what cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median
from typing import Any

from pq_sweep.core.groups import COMPRESSING
from pq_sweep.results.rows import DONE, Row
from pq_sweep.results.sweeps import REPEATING, Sweep


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, which is None where it is not known."""

    value: float
    interval: tuple[float, float] | None = None


def comparable(row: Row, other: Row) -> str | None:
    """Say why the latencies of two finished jobs must not be compared, or return None if one device ran both.

    A GPU is identified by its UUID, since two GPUs of one name differ by some percent, and a CPU by its name and host.
    """
    if _device(row) == _device(other):
        return None
    return f"{_device(row)} is not {_device(other)}"


def _device(row: Row) -> str:
    """Name the very device that a job ran on."""
    which = row["gpu_uuid"] or f"of {row['host']}"
    return f"{row['device_name']} {which}"


def reference(row: Row, sweep: Sweep) -> Row | None:
    """Return the job of a sweep to compare a row with: the uncompressed one that is the same in all else.

    If there are several, one on the same device is preferred, then one with the same seed. Returns None if there is
    none, or if the row is uncompressed itself.
    """
    if row["status"] not in DONE or is_uncompressed(row):
        return None
    found = _references(sweep).get(_shared(row, sweep), [])

    def distance(other: Row) -> tuple[bool, ...]:
        return comparable(row, other) is not None, *(row.get(key) != other.get(key) for key in REPEATING)

    return min(found, key=distance, default=None)


@lru_cache(maxsize=4)
def _references(sweep: Sweep) -> dict[tuple[Any, ...], list[Row]]:
    """Return the jobs that compressed nothing, by the values that a job to compare has to share with them."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sweep.rows:
        if row["status"] in DONE and is_uncompressed(row):
            found.setdefault(_shared(row, sweep), []).append(row)
    return found


def _shared(row: Row, sweep: Sweep) -> tuple[Any, ...]:
    same = ("status", "model", "dataset", "runtime", "protocol", *filter(_is_of_both, sweep.options))
    return tuple(row.get(key) for key in same)


def _is_of_both(option: str) -> bool:
    """Say whether an option concerns the uncompressed model too."""
    return option.partition(".")[0] not in (*COMPRESSING, *REPEATING)


def unreferenced(sweep: Sweep) -> list[Row]:
    """Return the finished jobs that compressed something and have no uncompressed job to be compared with."""
    finished = [row for row in sweep.rows if row["status"] == "finished" and not is_uncompressed(row)]
    return [row for row in finished if reference(row, sweep) is None]


def is_uncompressed(row: Row) -> bool:
    """Say whether nothing was pruned, recovered or quantized in a job."""
    return all(row.get(group) == "none" for group in COMPRESSING)


def speedup(row: Row, other: Row | None, batch: int) -> Estimate | None:
    """Return how many times faster a job is than the uncompressed one, or None if that cannot be said.

    It cannot of a job that simulates its precision in another one.

    If both were timed in turn, the ratio is that of the pairs, which is known more precisely than that of two jobs'
    medians. The interval of the latter is the worst case: it comes from the far ends of both medians' intervals.
    """
    if row.get("simulated"):
        return None
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


def drop(row: Row) -> Estimate | None:
    """Return the points of accuracy that a job lost against the uncompressed model on the same images, if known."""
    if "accuracy_drop_points" not in row:
        return None
    return Estimate(row["accuracy_drop_points"], _interval(row, "accuracy_drop_ci95_{}_points"))


def payback(row: Row, other: Row | None, batch: int) -> float | None:
    """Return the number of images after which preparation time is earned back: infinity if never, None if unknown."""
    faster = speedup(row, other, batch)
    if faster is None:
        return None
    saved_s = row[f"latency_ms/b{batch}"] / 1e3 * (faster.value - 1) / batch
    return float(row["prep_time_s"]) / saved_s if saved_s > 0 else math.inf


def aggregate(sweep: Sweep) -> Sweep:
    """Join the runs of one job that differ in nothing but `seed` or `repeat`, or that several sweeps repeat.

    Each figure becomes the median of the runs. In the joined row, `range` holds the smallest and the largest value of
    each figure, and `runs` the folders. The ends of an interval are the outermost of all runs, since the choice of
    seeds adds to the uncertainty of the images.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in sweep.rows:
        groups.setdefault(_identity(row, sweep), []).append(row)
    return replace(sweep, rows=[_joined(runs) for runs in groups.values()])


def _identity(row: Row, sweep: Sweep) -> tuple[str, ...]:
    """Return what is the same in all runs of a job; a job that did not finish stands for itself."""
    if row["status"] != "finished":
        return (row["job"],)
    keys = ["model", "dataset", *COMPRESSING, "amount", "runtime", "protocol", "components", *sweep.options]
    return *(str(row.get(key)) for key in keys if key not in REPEATING), _device(row)


def _joined(runs: list[Row]) -> Row:
    first = runs[0]
    if len(runs) == 1:
        return first | {"runs": [first["folder"]]}
    columns = {key: [row[key] for row in runs if key in row] for key in first if _is_figure(first[key])}
    kept = {key: values for key, values in columns.items() if all(map(_is_figure, values))}
    return first | {
        **{key: _middle(key)(values) for key, values in kept.items()},
        "runs": [row["folder"] for row in runs],
        "range": {key: (min(values), max(values)) for key, values in kept.items()},
        "unstable": "; ".join(dict.fromkeys(row["unstable"] for row in runs if row["unstable"])),
        "hardware": _lines("hardware", runs),
        "notes": _lines("notes", runs),
    }


def _lines(column: str, runs: list[Row]) -> list[str]:
    """Return the sentences in a column of several runs, each once."""
    return list(dict.fromkeys(line for row in runs for line in row.get(column, ())))


def _is_figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _middle(column: str) -> Callable[[list[float]], float]:
    """Return the function that joins the values of several runs in a column."""
    if "ci95_low" in column:
        return min
    if "ci95_high" in column or column == "accuracy_drop_p":
        return max
    return median
