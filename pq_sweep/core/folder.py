"""What the folder of a job holds, and how to find out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pq_sweep.core.files import read_json, write_json

log = logging.getLogger(__name__)


def error_files(folder: Path) -> tuple[Path, Path]:
    """Return where the reason of a job's failure is written: into its folder or, if that is full, beside it."""
    return folder / "error.json", folder.with_name(f"{folder.name}.error.json")


def read_error(folder: Path) -> dict[str, Any] | None:
    """Return why a job failed, or None if it is not known to have."""
    return next((error for path in error_files(folder) if (error := read_json(path))), None)


PROGRESS = "progress.json"


def write_error(folder: Path, record: dict[str, Any]) -> None:
    """Write why a job failed; the very reason may be that nothing can be written into its folder, or anywhere."""
    for path in error_files(folder):
        try:
            path.parent.mkdir(exist_ok=True)
            write_json(path, record)
            return
        except OSError as error:
            log.error("%s cannot be written: %s", path, error)


def forget_error(folder: Path) -> None:
    """Remove what an earlier try of a job failed of."""
    for path in error_files(folder):
        path.unlink(missing_ok=True)


def finished(folder: Path, fingerprint: str) -> bool:
    """Say whether a job's folder holds the result of just this job."""
    return (read_json(folder / "result.json") or {}).get("fingerprint") == fingerprint
