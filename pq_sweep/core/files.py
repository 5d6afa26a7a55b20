"""How all parts read and write files: JSON and tables that are whole or not there, and the end of a long text."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or None if there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError):
        return None


# A list of numbers, which is written on one line.
NUMBERS = re.compile(r"\[\n[-+.,eE\d\s]*\]")


def write_json(path: Path, content: Any) -> None:
    """Write plain values, lists of numbers on one line; raise ValueError for NaN and infinity."""
    text = json.dumps(content, indent=1, allow_nan=False)
    write_text(path, NUMBERS.sub(lambda match: " ".join(match.group().split()), text) + "\n")


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], columns: Iterable[str] = ()) -> None:
    """Write rows as CSV with a heading: the given columns, or all keys in the order in which they first come."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(columns) or list(dict.fromkeys(key for row in rows for key in row)), restval="")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader sees the whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with aside.open("w", newline="") as file:  # keeps line ends as they are, on every system
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError:  # the disk is full
        aside.unlink(missing_ok=True)
        raise


TAIL_LINES = 15


def tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a file that may be long, or may not be there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_000))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


SHARED = re.compile(r"(fuse\.)?(nfs|lustre|gpfs|beegfs|cifs|smb|ceph|gluster|afs|9p|panfs|pvfs|orangefs|wekafs|sshfs)")


def shared_file_system(path: Path, mounts: str | None = None) -> str:
    """Return the type of the network file system that holds a path, or "" if it is a local one."""
    text = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    found, kind = "", ""
    for line in text.splitlines():
        about, _, device = line.partition(" - ")
        point = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), about.split(" ")[4])
        if len(point) >= len(found) and path.is_relative_to(point):  # the last of several mounts hides the others
            found, kind = point, device.split(" ")[0]
    return kind if SHARED.match(kind) else ""
