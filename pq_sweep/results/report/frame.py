"""The comparison of all jobs as a table: figures, how they compare with the uncompressed one, and the Pareto front."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from pq_sweep.results.comparison import Estimate, drop, is_uncompressed, payback, reference, speedup
from pq_sweep.results.decision import on_front
from pq_sweep.results.rows import DONE, Row, batch_sizes
from pq_sweep.results.sweeps import Sweep

# Columns that a reader may want now and then; the page hides them at first.
DETAILS = (
    "top-5 %", "drop p", "sparsity", "params", "MACs", "memory MB", "energy J/image", "compute share",
    "pays after images", "runs", "range of top-1 %", "zstd MB", "bits/weight", "compared with",
)  # fmt: skip
# Columns that say what a job is; the page hides those that are the same for all jobs.
NAMES = (
    "model",
    "dataset",
    "pruner",
    "amount",
    "recovery",
    "quantizer",
    "runtime",
    "device",
    "status",
    "seed",
    "protocol",
)


def comparison(sweep: Sweep, objectives: list[str]) -> pd.DataFrame:
    """Return one line per job, in the order of the jobs; what is not known is empty."""
    sizes = batch_sizes(sweep.rows)
    best = on_front(sweep, objectives, sizes[0] if sizes else 1)
    lines = [_line(row, sweep, sizes) | {"Pareto": "yes" if row["job"] in best else ""} for row in sweep.rows]
    frame = pd.DataFrame(lines)
    ordered = ["job", "Pareto", *(name for name in frame.columns if name not in ("job", "Pareto"))]
    return frame[ordered].dropna(axis="columns", how="all")


def _line(row: Row, sweep: Sweep, sizes: list[int]) -> dict[str, Any]:
    """Return one job's line of the table."""
    unpruned = row.get("pruner", "none") == "none"
    line = {
        "model": row.get("model"),
        "dataset": row.get("dataset"),
        "pruner": row.get("pruner"),
        "amount": None if unpruned else row.get("amount"),
        "recovery": row.get("recovery"),
        "quantizer": row.get("quantizer"),
        **{key: row.get(key, "") for key in sweep.options},
        "runtime": row.get("runtime"),
        "device": row.get("device_name", row.get("device")),
        "status": row["status"],
        "job": row["job"],
        "seed": row.get("seed"),
        "protocol": row.get("protocol"),
    }
    return line | (_figures(row, sweep, sizes) if row["status"] in DONE else {})


def _figures(row: Row, sweep: Sweep, sizes: list[int]) -> dict[str, Any]:
    other = reference(row, sweep)
    lost = drop(row)
    figures: dict[str, Any] = {
        "top-1 %": _times(row.get("accuracy"), 100),
        "top-5 %": _times(row.get("accuracy_top5"), 100),
        "drop points": lost and lost.value,
        "drop 95 %": lost and interval(lost),
        "drop p": row.get("accuracy_drop_p"),
    }
    for batch in sizes:
        faster = speedup(row, other, batch)
        figures |= {
            f"ms b{batch}": row.get(f"latency_ms/b{batch}"),
            f"p99 ms b{batch}": row.get(f"latency_p99_ms/b{batch}"),
            f"speed-up b{batch}": faster and faster.value,
            f"speed-up 95 % b{batch}": faster and interval(faster),
        }
    return figures | {
        "size MB": row.get("engine_size_mb"),
        "size ratio": _ratio(other, row, "engine_size_mb"),
        "zstd MB": row.get("engine_size_zstd_mb"),
        "packed MB": _times(row.get("packed_bytes"), 1e-6),
        "BOPs %": _times(row.get("rel_bops"), 100),
        "bits/weight": row.get("weight_bits"),
        "sparsity": row.get("sparsity"),
        "params": row.get("params"),
        "MACs": row.get("macs"),
        "memory MB": row.get("peak_memory_mb"),
        "memory ratio": None if row.get("simulated") else _ratio(other, row, "peak_memory_mb"),
        "energy J/image": row.get(f"energy_per_image_j/b{sizes[0]}") if sizes else None,
        "compute share": row.get(f"compute_share/b{sizes[-1]}") if sizes else None,
        "prep s": row.get("prep_time_s"),
        "pays after images": _finite(payback(row, other, sizes[0]) if sizes else None),
        "unstable": row.get("unstable") or None,
        "simulated": row.get("simulated") or None,
        **_repeats(row),
        "compared with": None if other is None or is_uncompressed(row) else other["job"],
    }


def _repeats(row: Row) -> dict[str, Any]:
    """Return how often a job ran, and the range of its accuracy."""
    if "range" not in row or "accuracy" not in row["range"]:
        return {}
    low, high = row["range"]["accuracy"]
    return {"runs": len(row["runs"]), "range of top-1 %": f"{low * 100:.2f} to {high * 100:.2f}"}


def interval(found: Estimate) -> str | None:
    """Return the ends of an interval in words."""
    return "{:.2f} to {:.2f}".format(*found.interval) if found.interval else None


def _ratio(other: Row | None, row: Row, column: str) -> float | None:
    """Return how many times smaller a figure is than that of the uncompressed model."""
    before, now = (other or {}).get(column), row.get(column)
    return before / now if before and now else None


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with four digits of every figure, which is more than measurements are good for."""
    return frame.map(short)


def short(value: Any, digits: int = 4) -> Any:
    """Return a number rounded to `digits` significant digits, and anything else as it is."""
    return float(f"{value:.{digits}g}") if isinstance(value, float) and math.isfinite(value) else value
