"""The table of results as CSV, PQ Bench's columns first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pq_sweep.core.files import write_table
from pq_sweep.core.folder import SweepFolder
from pq_sweep.results.rows import Row, batch_sizes
from pq_sweep.results.sweeps import Sweep

# PQ Bench's columns (Schulze 2024, tables 1 and 2), at the first batch size; accuracy in %, sizes in MB (10^6 bytes).
PQ_BENCH = (
    "Model", "Pruner", "Quantizer", "Dataset", "Amount", "Accuracy", "Inf. Time (ms)", "Original Size",
    "Compressed Size", "Batch Size", "Prep Time (s)",
)  # fmt: skip

# What rows hold for comparisons alone.
HIDDEN = ("given", "components")


def write_csv(sweep: Sweep) -> Path:
    """Write `results.csv` into the sweep's folder: a row per job, PQ Bench's columns first."""
    rows = [
        _pq_bench(row) | {key: _cell(value) for key, value in row.items() if key not in HIDDEN} for row in sweep.rows
    ]
    columns = dict.fromkeys([*PQ_BENCH, *(key for row in rows for key in row)])
    path = SweepFolder(sweep.folder).table
    write_table(path, rows, columns)
    return path


def _cell(value: Any) -> Any:
    """Return a value as one cell of the CSV."""
    return "; ".join(value) if isinstance(value, list) else value


def _pq_bench(row: Row) -> Row:
    """Return the columns of PQ Bench; "-" stands for a technique not used, an empty cell for a missing figure."""
    sizes = batch_sizes([row])
    first = sizes[0] if sizes else ""
    unpruned = row.get("pruner") == "none"
    values = (
        row.get("model", ""),
        "-" if unpruned else row.get("pruner", ""),
        "-" if row.get("quantizer") == "none" else row.get("quantizer", ""),
        row.get("dataset", ""),
        "-" if unpruned else row.get("amount", ""),
        row["accuracy"] * 100 if "accuracy" in row else "",
        row.get(f"latency_ms/b{first}", ""),
        row.get("original_size_mb", ""),
        row.get("engine_size_mb", ""),
        first,
        row.get("prep_time_s", ""),
    )
    return dict(zip(PQ_BENCH, values, strict=True))
