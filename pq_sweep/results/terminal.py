"""Results drawn in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pq_sweep.core.folder import SweepFolder
from pq_sweep.core.result import NOISY_LOAD
from pq_sweep.results.comparison import comparable, reference, speedup
from pq_sweep.results.decision import OBJECTIVES, on_front
from pq_sweep.results.rows import DONE, Row, batch_sizes
from pq_sweep.results.sweeps import Sweep

if TYPE_CHECKING:
    from rich.table import Table

TEXTS = ("job", "model", "dataset", "pruner", "quantizer", "runtime", "device", "node")


def tables(sweep: Sweep, width: int) -> list[Table]:
    """Draw the rows in `width` characters without cutting anything off.

    If the table does not fit, columns that say the same in every row go into its title. If it is still too wide, it is
    split into several tables, each with the columns that tell the jobs apart.
    """
    sizes = batch_sizes(sweep.rows)
    faster = speedups(sweep)
    heading = f"speed-up\nb{sizes[0]}" if faster else ""
    reused = any("reused" in row for row in sweep.rows)
    best = on_front(sweep, OBJECTIVES, sizes[0]) if sizes else set()
    rows = [
        _cells(row, sizes, sweep.options)
        | ({heading: faster.get(row["job"], "-")} if faster else {})
        | ({"Pareto\nfront": "yes" if row["job"] in best else ""} if best else {})
        | ({"reused": row.get("reused", "")} if reused else {})
        for row in sweep.rows
    ]
    columns = {
        name: [row.get(name, "-") for row in rows] for name in dict.fromkeys(name for row in rows for name in row)
    }
    title = f"{sweep.folder}: {sweep.summary}"
    if _width(columns) > width and len(rows) > 1:
        same = [name for name in TEXTS if len(set(columns.get(name, ()))) == 1]
        title = ", ".join([title, *(f"{name} {columns.pop(name)[0]}" for name in same)])
    names = {*TEXTS, *map(_heading, sweep.options)}
    keys = {name: cells for name, cells in columns.items() if name in names}
    parts = [dict(keys)]
    for name, cells in columns.items():
        if name in keys:
            continue
        if _width(parts[-1] | {name: cells}) > width and len(parts[-1]) > len(keys):
            parts.append(dict(keys))
        parts[-1][name] = cells
    unfinished = [row["status"] not in DONE for row in sweep.rows]
    return [_draw(part, title if part is parts[0] else None, unfinished) for part in parts]


def speedups(sweep: Sweep) -> dict[str, str]:
    """Return how many times faster than the uncompressed model a job is at the smallest batch size, by job."""
    size = min(batch_sizes(sweep.rows), default=0)
    found = {row["job"]: speedup(row, reference(row, sweep), size) for row in sweep.rows}
    return {job: f"{faster.value:.2f}" for job, faster in found.items() if faster}


def _draw(columns: dict[str, list[str]], title: str | None, marked: list[bool]) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=Text(title) if title else None, title_justify="left", header_style="bold")
    for name in columns:
        drawn.add_column(name, justify="left" if name in TEXTS else "right", no_wrap=name not in TEXTS, overflow="fold")
    for cells, mark in zip(zip(*columns.values(), strict=True), marked, strict=True):
        drawn.add_row(*(Text(cell) for cell in cells), style="yellow" if mark else None)
    return drawn


def _width(columns: dict[str, list[str]]) -> int:
    """Return the characters that a table of these columns takes."""
    lines = ([*name.split("\n"), *cells] for name, cells in columns.items())
    return sum(max(map(len, column)) + 3 for column in lines) + 1


def show(sweep: Sweep) -> None:
    """Print the table, the failed and missing jobs, and warnings about the others."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    for drawn in tables(sweep, console.width):
        console.print(drawn)
    for line in [
        *_unfinished(sweep),
        *_built(sweep),
        *_disturbed(sweep),
        *_unsettled(sweep),
        *_on_cpu(sweep),
        *_unaccelerated(sweep),
        *_simulated(sweep),
        *_notes(sweep),
        *_elsewhere(sweep),
        *_left_out(sweep),
    ]:
        console.print(line, markup=False, soft_wrap=True)


def _unfinished(sweep: Sweep) -> Iterator[str]:
    """Say for each job that did not finish where it stopped and why."""
    for row in sweep.rows:
        job = f"job {row['job']} ({row['name']})"
        if row["status"] == "failed":
            log = SweepFolder(sweep.folder).job(row["job"]).log
            yield f"{job} failed at {row['stage']}: {row['error']}" + (f" Traceback: {log}" if log.exists() else "")
            yield from (f"    {line}" for line in row.get("stderr", ())[-5:])
        elif row["status"] not in DONE:
            yield f"{job} is {row['status']}" + (f", stage {row['stage']}" if row["stage"] else "")


def _built(sweep: Sweep) -> Iterator[str]:
    """Say which jobs did not run, and what they were built for."""
    jobs: dict[str, list[str]] = {}
    for row in sweep.rows:
        if row["status"] == "built":
            jobs.setdefault(row.get("built_for", ""), []).append(row["job"])
    if jobs:
        each = [", ".join(names) + (f" (compute capability {what})" if what else "") for what, names in jobs.items()]
        yield f"built for another machine and not run, so without accuracy and latency: job {', '.join(each)}"


def _disturbed(sweep: Sweep) -> Iterator[str]:
    """Warn of latency that was measured while other processes were busy."""
    loads = {row["job"]: row["load_of_others"] for row in sweep.rows if row.get("load_of_others", 0) > NOISY_LOAD}
    if loads:
        jobs = ", ".join(f"{job} ({load:.1f} cores)" for job, load in loads.items())
        yield f"latency is not to be trusted where other processes were busy meanwhile: job {jobs}"


def _unsettled(sweep: Sweep) -> Iterator[str]:
    """Name the jobs whose median latency is not settled."""
    jobs = [f"{row['job']} ({row['unstable']})" for row in sweep.rows if row.get("unstable")]
    if jobs:
        yield (
            "unstable latency, by batch size, as the median's interval is too wide, its halves drift, its quartiles"
            f" spread, or repeats in fresh processes differ: job {', '.join(jobs)}"
        )


def _on_cpu(sweep: Sweep) -> Iterator[str]:
    """Name the jobs that ran on the CPU although SLURM gave them a GPU."""
    jobs = [row["job"] for row in sweep.rows if row.get("gpus_allotted") and row.get("device") == "cpu"]
    if jobs:
        yield f"SLURM allotted GPUs that were not used, as the jobs ran on device=cpu: job {', '.join(jobs)}"


def _unaccelerated(sweep: Sweep) -> Iterator[str]:
    """Say for which operations the devices have no fast units, and in which jobs that matters."""
    pairs = [(sentence, row["job"]) for row in sweep.rows for sentence in row.get("hardware", ())]
    for sentence, jobs in _by_reason(pairs):
        yield f"{sentence.rstrip('.')}: job {jobs}"


def _simulated(sweep: Sweep) -> Iterator[str]:
    """Say which jobs computed in another precision than their own, so that their latency is left out of comparisons."""
    pairs = [(row["simulated"], row["job"]) for row in sweep.rows if row.get("simulated")]
    for sentence, jobs in _by_reason(pairs):
        yield f"simulated: {sentence.rstrip('.')}: job {jobs}"


def _notes(sweep: Sweep) -> Iterator[str]:
    """Say what was done to networks and images before they were measured, and in which jobs."""
    pairs = [(sentence, row["job"]) for row in sweep.rows for sentence in row.get("notes", ())]
    for sentence, jobs in _by_reason(pairs):
        yield f"{sentence.rstrip('.')}: job {jobs}"


def _elsewhere(sweep: Sweep) -> Iterator[str]:
    """Say for which jobs there is no speed-up because the uncompressed model ran on another device."""
    compared = [(row, other) for row in sweep.rows if (other := reference(row, sweep))]
    pairs = [(why, row["job"]) for row, other in compared if (why := comparable(row, other))]
    for why, jobs in _by_reason(pairs):
        yield f"no speed-up where the uncompressed model ran on another device, as {why}: job {jobs}"


def _by_reason(pairs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield each reason once with all of its jobs."""
    for reason in dict.fromkeys(reason for reason, _ in pairs):
        yield reason, ", ".join(job for other, job in pairs if other == reason)


def _left_out(sweep: Sweep) -> Iterator[str]:
    """Say how many images could not be used."""
    counts = {row["dataset"]: row["images_left_out"] for row in sweep.rows if row.get("images_left_out")}
    for dataset, count in counts.items():
        yield f"{count} images of {dataset} were left out as unusable; result.json names each (images, left_out)"


def _heading(option: str) -> str:
    """Return an option in two short lines."""
    return option.replace(".", "\n", 1)


def _cells(row: Row, sizes: list[int], options: tuple[str, ...]) -> dict[str, str]:
    """Format a row for the table, by column."""

    def number(key: str, form: str, scale: float = 1) -> str:
        return format(row[key] * scale, form) if key in row else "-"

    recovery = row.get("recovery", "none")
    texts = {name: str(row.get(name, "-")) for name in TEXTS if name != "node"}
    texts["quantizer"] += " (simulated)" if row.get("simulated") else ""
    texts["pruner"] += "" if recovery == "none" else f" + {recovery}"
    latency = {
        f"ms b{size}\np50/p99": f"{number(f'latency_ms/b{size}', '.3f')}/{number(f'latency_p99_ms/b{size}', '.3f')}"
        for size in sizes
    }
    largest = max(sizes, default=1)
    texts |= {"node": f"{row.get('partition', '')} {row['node']}".strip()} if row.get("node") else {}
    texts |= {_heading(key): str(row[key]) for key in options}
    return texts | {
        "amount": "-" if row.get("pruner") == "none" or row.get("amount") is None else str(row["amount"]),
        "top-1 %": number("accuracy", ".2f", 100) if row["status"] == "finished" else row["status"],
        "drop\npoints": number("accuracy_drop_points", ".2f"),
        **latency,
        f"images/s\nb{largest}": number(f"throughput/b{largest}", ",.0f"),
        "original\nMB": number("original_size_mb", ".3f"),
        "size\nMB": number("engine_size_mb", ".3f"),
        "sparsity": number("sparsity", ".3f"),
        "params\nthousand": number("params", ",.1f", 1e-3),
        "prep s": number("prep_time_s", ".2f"),
    }
