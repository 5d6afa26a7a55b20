"""Commands that run a job or a sweep again, or an uncompressed job that is missing."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from pq_sweep.core.folder import JobFolder, SweepFolder
from pq_sweep.core.groups import COMPRESSING, FOLDER_OPTIONS, group_of, option_of
from pq_sweep.results.comparison import unreferenced
from pq_sweep.results.origin import known
from pq_sweep.results.rows import Row
from pq_sweep.results.sweeps import Sweep
from pq_sweep.types import UserError


def command(row: Row) -> str:
    """Return the command that makes a job's model again."""
    manifest = _sweep_folder(row).read_manifest()
    return _command(manifest, _overrides(manifest, row))


def baselines(sweep: Sweep) -> list[str]:
    """Return the commands that run the uncompressed jobs which are missing for a comparison."""
    manifest = cache(SweepFolder.read_manifest)  # many jobs share one
    found = [_baseline(manifest(_sweep_folder(row)), row) for row in unreferenced(sweep)]
    return list(dict.fromkeys(found))


def _baseline(manifest: Row, row: Row) -> str:
    kept = [word for word in _overrides(manifest, row) if group_of(word) not in COMPRESSING]
    return _command(manifest, [*kept, *(f"{group}=none" for group in COMPRESSING)])


def _sweep_folder(row: Row) -> SweepFolder:
    return JobFolder(Path(row["folder"])).sweep


def _overrides(manifest: Row, row: Row) -> list[str]:
    folder = JobFolder(Path(row["folder"]))
    announced = next((job for job in manifest.get("jobs") or () if job["folder"] == folder.name), None)
    return list(known(folder, announced).get("overrides", ()))


def _command(manifest: Row, overrides: list[str]) -> str:
    arguments = manifest.get("arguments") or ["launch.py"]
    return shlex.join(["python", Path(arguments[0]).name, *_config_folders(arguments), *overrides])


def _config_folders(arguments: list[str]) -> Iterator[str]:
    """Yield the options that say where further components are."""
    for number, argument in enumerate(arguments):
        if argument.startswith(("--config-dir", "-cd")):
            yield argument
            if "=" not in argument:
                yield arguments[number + 1]


def start_again(folder: Path) -> int:
    """Start a sweep again by its own command, in its folder, and return the exit code; finished jobs stay."""
    manifest = SweepFolder(folder).read_manifest()
    given = manifest.get("arguments", ())
    arguments = [word for word in given if option_of(word) not in FOLDER_OPTIONS and word != "resume=false"]
    if not arguments or any("***" in word for word in arguments):
        raise UserError(
            f"{folder} cannot be started again from here: its command is not known, or held a password; repeat the"
            f" command with hydra.sweep.dir={folder}."
        )
    if not Path(manifest["working_folder"]).is_dir():
        raise UserError(
            f"{folder} cannot be started again from here: {manifest['working_folder']}, where its command was given, is"
            f" no longer there; repeat the command elsewhere with hydra.sweep.dir={folder.absolute()}."
        )
    # Overrides have to stand together, with options only before or after them.
    place = next((number for number, word in enumerate(arguments[1:], 1) if "=" in word.lstrip("-")), len(arguments))
    arguments.insert(place, f"hydra.sweep.dir={folder.absolute()}")
    return subprocess.run([sys.executable, *arguments], cwd=manifest["working_folder"], check=False).returncode
