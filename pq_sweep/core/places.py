"""What files and folders look like from outside, by which one can tell whether they were changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

# Entries of a folder up to which each of them counts. Asking a network file system about more would take minutes.
ENTRIES = 100_000
# What jobs themselves leave behind, and what nobody takes for data.
LEFT_BEHIND = ("multirun", "mlartifacts", "__pycache__", "mlflow.db", "mlflow.db.lock", "mlflow.db-journal")
SWEEP = "sweep.json"


def place_of(text: str) -> Path:
    """Return the file or folder that a user names, perhaps by `~` or a variable of the environment."""
    return Path(os.path.expandvars(text)).expanduser()


def named_in_code(text: str, code: Path) -> Iterator[str]:
    """Yield the files and folders of data that a text in a file of code may name, here or beside that file.

    A word alone names no folder, and a folder around the code or the working folder is a place, not what is there.
    """
    around = {code, *code.parents, *Path.cwd().parents, Path.cwd()}
    for named in dict.fromkeys((text, str(code.parent / text))):
        with suppress(OSError, ValueError, RuntimeError):  # too long, a NUL, no such user's home
            place = place_of(named).absolute()
            if place not in around and (place.is_file() or ("/" in text.strip("/") and place.is_dir())):
                yield named


def state_of(text: str) -> Any:
    """Return values that change when a file or folder does, or None if there is none.

    A file counts by its size and time; a folder by the relative names, sizes and times of all that is in it, or, if it
    has more than ENTRIES, by its folders down to two levels with their times.
    """
    with suppress(OSError, ValueError, RuntimeError):  # too long, a NUL, no such user's home
        place = place_of(text)
        if place.is_file():
            stat = place.stat()
            return [stat.st_size, stat.st_mtime_ns]
        if text and place.is_dir() and place.parent != place and not (place / SWEEP).exists():
            return _folder(place.absolute())
    return None


def forget_folders() -> None:
    """Look at folders anew the next time."""
    _folder.cache_clear()


@cache
def _folder(root: Path) -> str:
    """Return a hash of what is in a folder; looking at a large one takes most of a second, so it is remembered."""
    found = list(islice(_entries(root, "", frozenset()), ENTRIES + 1))
    whole = found if len(found) <= ENTRIES else _outline(root)
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _entries(folder: Path, below: str, above: frozenset[tuple[int, int]]) -> Iterator[list[Any]]:
    """Yield name, size and time of each file and the name of each folder, through links that lead to no loop."""
    stat = folder.stat()
    if (this := (stat.st_dev, stat.st_ino)) in above:
        return
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name in LEFT_BEHIND:
                continue
            name = f"{below}{entry.name}"
            with suppress(OSError):  # gone meanwhile, a link to nowhere, or not for this user
                if not entry.is_dir():
                    yield [name, (state := entry.stat()).st_size, state.st_mtime_ns]
                elif not entry.name.startswith(".") and not Path(entry.path, SWEEP).exists():
                    yield [name, -1, 0]
                    yield from _entries(Path(entry.path), f"{name}/", above | {this})


def _outline(root: Path) -> list[list[Any]]:
    """Return the folders down to two levels below `root` and when something was last added to or taken from each."""
    below = [path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir()]
    return [[str(path.relative_to(root)), -1, path.stat().st_mtime_ns] for path in sorted([root, *below])]
