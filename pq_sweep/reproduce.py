"""Commands that run a job again, or the uncompressed one that it lacks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from pq_sweep.comparison import COMPRESSING, unreferenced
from pq_sweep.results import Sweep
from pq_sweep.rows import Row, read_json


def command(row: Row) -> str:
    """Return the command that makes a job's model again."""
    return _command(row, _overrides(row))


def baselines(sweep: Sweep) -> list[str]:
    """Return the commands that run the uncompressed jobs which are missing for a comparison."""
    found = [_baseline(row) for row in unreferenced(sweep)]
    return list(dict.fromkeys(found))


def _baseline(row: Row) -> str:
    kept = [word for word in _overrides(row) if re.split(r"[.=@]", word.lstrip("+~"))[0] not in COMPRESSING]
    return _command(row, [*kept, *(f"{group}=none" for group in COMPRESSING)])


def _manifest(row: Row) -> Row:
    manifest: Row = read_json(Path(row["folder"]).parent / "sweep.json") or {}
    return manifest


def _overrides(row: Row) -> list[str]:
    jobs = _manifest(row).get("jobs") or ()
    return next((job["overrides"] for job in jobs if job["folder"] == Path(row["folder"]).name), [])


def _command(row: Row, overrides: list[str]) -> str:
    arguments = _manifest(row).get("arguments") or ["launch.py"]
    return shlex.join(["python", Path(arguments[0]).name, *_config_folders(arguments), *overrides])


def _config_folders(arguments: list[str]) -> Iterator[str]:
    """Yield the options that say where further components are."""
    for number, argument in enumerate(arguments):
        if argument.startswith("--config-dir"):
            yield argument
            if "=" not in argument:
                yield arguments[number + 1]
