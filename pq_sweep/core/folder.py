"""The folders of a sweep and of a job: one name for every file in them, and what it means that a file is there.

`docs/results.md` says what is in each file.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.opened import unchanged

log = logging.getLogger(__name__)

# Either of these files in a job's folder shows that the job is over.
OVER = ("result.json", "error.json")


class Inside:
    """The path of a file or folder, given its name within the folder of the object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: JobFolder | SweepFolder | BaselineFolder, kind: type[Any]) -> Path:
        return owner.path / self.name


@dataclass(frozen=True)
class JobFolder:
    """The files that one job leaves; `result` comes last, as the sign that all is there."""

    path: Path

    result = Inside("result.json")
    status = Inside("status.json")
    progress = Inside("progress.json")
    config = Inside(".hydra/config.yaml")
    log = Inside("job.log")
    pruning = Inside("pruning.json")
    layers = Inside("layers.json")
    opened = Inside("opened.json")
    predictions = Inside("predictions.npy")
    samples = Inside("samples.npz")
    precisions = Inside("precisions.svg")
    representations = Inside("representations.csv")
    representations_drawn = Inside("representations.svg")
    model = Inside("model.onnx")
    weights = Inside("model.pt")
    traced = Inside("traced.onnx")
    exported = Inside("export.onnx")
    engine = Inside("engine")
    dense = Inside("dense")
    store_lock = Inside(".mlflow.lock")

    @property
    def name(self) -> str:
        """Return the job's name in its sweep."""
        return self.path.name

    @property
    def sweep(self) -> SweepFolder:
        """Return the folder of the job's sweep."""
        return SweepFolder(self.path.parent)

    @property
    def errors(self) -> tuple[Path, Path]:
        """Return where the reason of a failure is written: into the folder or, if that is full, beside it."""
        return self.path / "error.json", self.path.with_name(f"{self.path.name}.error.json")

    def kept(self, name: str) -> Path:
        """Return where a part's tensors are kept until the job is finished."""
        return self.path / f"{name}.kept.pt"

    def finished(self, fingerprint: str) -> bool:
        """Say whether the folder holds the result of just this job, and the files that it opened are still the same."""
        found = read_json(self.result)
        same = isinstance(found, dict) and found.get("fingerprint") == fingerprint
        return same and unchanged(read_json(self.opened))

    def read_error(self) -> dict[str, Any] | None:
        """Return why the job failed, or None if no failure is known."""
        return next((error for path in self.errors if (error := read_json(path))), None)

    def write_error(self, record: dict[str, Any]) -> None:
        """Write why the job failed, if that can be done: perhaps it failed because nothing can be written here."""
        for path in self.errors:
            try:
                path.parent.mkdir(exist_ok=True)
                write_json(path, record)
                return
            except OSError as error:
                log.error("%s cannot be written: %s", path, error)

    def forget_error(self) -> None:
        """Remove the error of an earlier try."""
        for path in self.errors:
            path.unlink(missing_ok=True)

    def forget_progress(self) -> None:
        """Remove what was only needed to continue the job."""
        for kept in [*self.path.glob("*.kept.pt"), self.progress]:
            kept.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what another job left here, so that nothing of it is taken for this one's."""
        self.forget_progress()
        for path in (self.pruning, self.opened, self.predictions, self.precisions, self.representations,
                     self.representations_drawn, self.samples, self.traced, self.exported, self.weights,
                     self.model):  # fmt: skip
            path.unlink(missing_ok=True)
        for folder in (self.engine, self.dense):
            shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class SweepFolder:
    """What a sweep leaves beside the folders of its jobs."""

    path: Path

    manifest = Inside("sweep.json")
    submitted = Inside("submitted.json")
    table = Inside("results.csv")
    baselines = Inside("baseline")
    watched = Inside(".watched")
    submit_lock = Inside(".submit.lock")
    store_lock = Inside(".mlflow.lock")
    begun = Inside(".mlflow")

    def job(self, name: str) -> JobFolder:
        """Return the folder of a job."""
        return JobFolder(self.path / name)

    def read_manifest(self) -> dict[str, Any]:
        """Return what was announced of the sweep; it is empty if there is no `sweep.json`, or a damaged one."""
        found = read_json(self.manifest)
        if isinstance(found, dict):
            return found
        if self.manifest.exists():
            _warn_of_damage(self.manifest)
        return {}

    def announced(self) -> list[dict[str, Any]]:
        """Return what was announced of each job."""
        return self.read_manifest().get("jobs") or []

    def over(self) -> set[str]:
        """Return the names of the jobs that have a result or an error in their folders."""
        found = (path for sign in OVER for path in self.path.glob(f"*/{sign}"))
        return {path.parent.name for path in found}


@cache
def _warn_of_damage(manifest: Path) -> None:
    """Say once that a `sweep.json` is damaged."""
    log.warning(
        "%s is damaged, so jobs without a result are not known; repeat the sweep's command in its folder.", manifest
    )


def is_job(folder: Path) -> bool:
    """Say whether a folder belongs to a job that is over."""
    return any((folder / sign).exists() for sign in OVER)


@dataclass(frozen=True)
class BaselineFolder:
    """The uncompressed model of a sweep on one kind of node and device."""

    path: Path

    figures = Inside("baseline.json")
    weights = Inside("model.pt")
    predictions = Inside("predictions.npy")
    layers = Inside("layers.json")
    images = Inside("images.csv")
    lock = Inside("lock")
