"""Sweep folders as rows.

The folders are the source of truth, so this works at any time: during a sweep, after a crash, on another machine.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from pq_sweep.core.folder import JobFolder, SweepFolder, is_job
from pq_sweep.core.groups import option_of
from pq_sweep.results.origin import known
from pq_sweep.results.rows import DONE, Row, read_row
from pq_sweep.types import UserError

# Options that make another run of the same job.
REPEATING = ("seed", "repeat")
BESIDE_GROUPS = (*REPEATING, "order")


@dataclass(frozen=True, eq=False)
class Sweep:
    """One sweep folder, the rows of its jobs, and the options besides `amount` in which they differ.

    A sweep is equal only to itself, so that what was worked out for it can be looked up.
    """

    folder: Path
    rows: list[Row]
    options: tuple[str, ...] = ()

    def count(self, *statuses: str) -> int:
        """Count the jobs with one of the statuses: finished, built, failed, running, pending or missing."""
        return sum(row["status"] in statuses for row in self.rows)

    @property
    def summary(self) -> str:
        """Return how many jobs are done, only built, failed, running, pending and missing."""
        named = {"finished": "done", **{name: name for name in ("built", "failed", "running", "pending", "missing")}}
        return ", ".join(
            f"{self.count(status)} {name}" for status, name in named.items() if self.count(status) or name == "done"
        )


def read_sweep(folder: Path, states: dict[str, Row] | None = None) -> Sweep:
    """Read the jobs that `sweep.json` announces, and any other job folder that has a result or an error.

    `states` are what SLURM's queue says about jobs that are not over, by folder; they replace what the folders say.
    """
    files = SweepFolder(folder)
    manifest = files.read_manifest()
    announced = {job["folder"]: job for job in manifest.get("jobs") or []}
    extra = sorted(files.over() - announced.keys(), key=_natural)
    rows = [
        _since(manifest, read_row(files.job(name), job)) | {"given": _options(job)}
        for name in [*announced, *extra]
        for job in [known(files.job(name), announced.get(name))]
    ]
    rows = [row if row["status"] in DONE else row | (states or {}).get(row["job"], {}) for row in rows]
    return gather(folder, rows)


def _since(manifest: Row, row: Row) -> Row:
    """Mark a job as reused if it started before the sweep was last started, and so did not run again."""
    return row | ({"reused": "yes"} if row.get("started", math.inf) < manifest.get("started", -math.inf) else {})


def gather(folder: Path, rows: list[Row]) -> Sweep:
    """Return jobs as one sweep; the options in which they differ become columns."""
    given = [row["given"] for row in rows]
    swept = tuple(key for key in dict.fromkeys(chain(*given)) if len({options.get(key) for options in given}) > 1)
    return Sweep(folder, [row | {key: row["given"].get(key, "") for key in swept} for row in rows], swept)


def merge(sweeps: list[Sweep]) -> Sweep:
    """Return the jobs of several sweeps as one, told apart by their folders; a single one stays as it is."""
    if len(sweeps) == 1:
        return sweeps[0]
    return gather(Path(), [row | {"job": row["folder"]} for sweep in sweeps for row in sweep.rows])


def _options(job: Row) -> dict[str, str]:
    """Return the options that a job was given, such as {"pruner.n": "2"}; amounts have a column of their own."""
    pairs = ((option_of(word), word.partition("=")[2]) for word in job.get("overrides", ()))
    return {key: value for key, value in pairs if ("." in key or key in BESIDE_GROUPS) and key != "pruner.amount"}


def read_job(folder: Path) -> Row:
    """Read one job of a sweep, without the others."""
    files = JobFolder(folder)
    announced = next((job for job in files.sweep.announced() if job["folder"] == files.name), None)
    return read_row(files, known(files, announced))


def find_sweeps(folders: list[Path]) -> list[Sweep]:
    """Read the sweeps in the folders, below them, or above them if a job's folder is given."""
    return [read_sweep(folder) for folder in find_folders(folders)]


def find_folders(folders: list[Path]) -> list[Path]:
    """Find the folders of the sweeps in the given folders, below them, or above a given job's folder."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; give a sweep folder such as multirun/<date>/<time>.")
        given = folder.parent if is_job(folder) else folder
        names = {Path(path): files for path, _, files in os.walk(given)}
        inside = {path for path, files in names.items() if SweepFolder(path).manifest.name in files}
        inside |= {path.parent for path, files in names.items() if JobFolder(path).result.name in files}
        if not inside:
            raise UserError(
                f"{folder} holds no sweep and no result.json; give a sweep folder such as multirun/<date>/<time>."
            )
        found |= {path.resolve(): path for path in sorted(inside)}
    return list(found.values())


def _natural(name: str) -> tuple[int, str]:
    return (int(name), name) if name.isdigit() else (sys.maxsize, name)
