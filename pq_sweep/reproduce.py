"""Commands that run a job again, or the uncompressed one that it lacks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pq_sweep.comparison import COMPRESSING, unreferenced
from pq_sweep.results import Sweep
from pq_sweep.rows import Row, read_json


def command(row: Row) -> str:
    """Return the command that makes a job's model again."""
    manifest = _manifest(_sweep_folder(row))
    return _command(manifest, _overrides(manifest, row))


def baselines(sweep: Sweep) -> list[str]:
    """Return the commands that run the uncompressed jobs which are missing for a comparison."""
    manifest = cache(_manifest)  # of many jobs one
    found = [_baseline(manifest(_sweep_folder(row)), row) for row in unreferenced(sweep)]
    return list(dict.fromkeys(found))


def _baseline(manifest: Row, row: Row) -> str:
    kept = [word for word in _overrides(manifest, row) if re.split(r"[.=@]", word.lstrip("+~"))[0] not in COMPRESSING]
    return _command(manifest, [*kept, *(f"{group}=none" for group in COMPRESSING)])


def _sweep_folder(row: Row) -> Path:
    return Path(row["folder"]).parent


def _manifest(folder: Path) -> Row:
    return read_json(folder / "sweep.json") or {}


def _overrides(manifest: Row, row: Row) -> list[str]:
    jobs = manifest.get("jobs") or ()
    return next((job["overrides"] for job in jobs if job["folder"] == Path(row["folder"]).name), [])


def _command(manifest: Row, overrides: list[str]) -> str:
    arguments = manifest.get("arguments") or ["launch.py"]
    return shlex.join(["python", Path(arguments[0]).name, *_config_folders(arguments), *overrides])


def _config_folders(arguments: list[str]) -> Iterator[str]:
    """Yield the options that say where further components are."""
    for number, argument in enumerate(arguments):
        if argument.startswith("--config-dir"):
            yield argument
            if "=" not in argument:
                yield arguments[number + 1]
