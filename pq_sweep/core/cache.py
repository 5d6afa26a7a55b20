"""What one job made and others need too, kept across jobs and sweeps.

An entry is a folder `<kind>/<digest of all that it depends on>` with the files that were made and `record.json`: what
it depends on, what making it returned and how long it took, and the SHA-256 of each file. A rename puts it in place,
so it is whole or not there. Its files are hashed again whenever they are taken out, so damage on the disk is noticed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.core.environment import cache_home, versions
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.fingerprint import code, digest, file_hash, files_state, resolved, unfollowed
from pq_sweep.types import UserError, choose

if TYPE_CHECKING:
    from omegaconf import DictConfig


log = logging.getLogger(__name__)

RECORD = "record.json"
LIMIT_GB = 20.0  # PQ_SWEEP_CACHE_GB sets another
CHECK_EVERY = 50  # a process checks the size of the whole cache once for so many entries that it adds
ABANDONED_S = 86400.0  # what a killed process left half written is removed after this time


def home() -> Path:
    """Return the folder of all entries."""
    return cache_home() / "stages"


@dataclass
class Cache:
    """Entries of a job: each depends on what is `common` to all of them, such as the code, and on what it names."""

    common: dict[str, Any]
    added: int = field(default=0, init=False)

    def rest_on(self, about: dict[str, Any]) -> None:
        """Let all entries from now on depend on more."""
        self.common |= about

    @contextmanager
    def alone(self, kind: str, about: dict[str, Any]) -> Iterator[None]:
        """Let one process at a time make an entry, so that others find it made; without room for a lock, none waits."""
        from filelock import FileLock

        lock = self._place(kind, about).with_suffix(".lock")
        held = FileLock(lock)
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            held.acquire()
        except OSError as error:
            log.warning("the cache %s cannot be written (%s): each job makes its own", lock.parent, error.strerror)
        try:
            yield
        finally:
            held.release()

    def take(self, kind: str, about: dict[str, Any], folder: Path) -> dict[str, Any] | None:
        """Copy the files of an entry into a folder and return its record, or None if there is no whole one."""
        entry = self._place(kind, about)
        record: dict[str, Any] | None = read_json(entry / RECORD)
        if record is None or record["about"] != self._whole(about):
            return None
        for name, expected in record["files"].items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):
                shutil.copyfile(entry / name, target)
            if not target.is_file() or file_hash(target) != expected["sha256"]:
                log.warning("%s in the cache is damaged, so it is made again", entry)
                for copied in record["files"]:
                    (folder / copied).unlink(missing_ok=True)
                shutil.rmtree(entry, ignore_errors=True)
                return None
        with suppress(OSError):  # a cache that may only be read
            os.utime(entry / RECORD)  # when it was last used
        return record

    def put(self, kind: str, about: dict[str, Any], folder: Path, made: dict[str, Any], names: list[str]) -> None:
        """Keep files of a folder with a record of how they were made; without room for them, the job goes on."""
        entry = self._place(kind, about)
        aside = entry.with_name(f".{entry.name}.{os.uname().nodename}.{os.getpid()}")
        try:
            files = {}
            for name in names:
                (aside / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, aside / name)
                files[name] = {"bytes": (aside / name).stat().st_size, "sha256": file_hash(folder / name)}
            aside.mkdir(parents=True, exist_ok=True)
            write_json(aside / RECORD, {"kind": kind, "about": self._whole(about), "files": files, **made})
            shutil.rmtree(entry, ignore_errors=True)
            aside.rename(entry)
        except OSError as error:
            log.warning("%s is not kept in the cache %s: %s", kind, entry.parent, error.strerror or error)
            shutil.rmtree(aside, ignore_errors=True)
        if self.added % CHECK_EVERY == 0:
            shrink(int(limit_gb() * 1e9))
        self.added += 1

    def _whole(self, about: dict[str, Any]) -> dict[str, Any]:
        """Return all that an entry depends on, in the form that reading a record gives."""
        # An object that JSON does not know stands there by its address, so that it never matches an entry.
        whole: dict[str, Any] = json.loads(json.dumps(self.common | about, default=repr))
        return whole

    def _place(self, kind: str, about: dict[str, Any]) -> Path:
        return home() / kind / digest(self._whole(about))


def open_cache(cfg: DictConfig) -> Cache | None:
    """Return the cache for a job, or None if it is off, or if nobody can tell whether the job's code is the same.

    All entries depend on the job's code and versions, and on the model with the files that its options name.
    """
    if choose("cache", str(cfg.cache), ("on", "off")) == "off":
        return None
    options = resolved(cfg)
    if unfollowed(options):
        return None
    ours = str(options["model"]["_target_"]).startswith("pq_sweep.")  # weights of these are hashed
    model = {name: value for name, value in options["model"].items() if not (ours and name == "weights")}
    files = files_state({"model": model})
    return Cache({"code": code(options), "versions": versions(), "model": model, "files": files})


@dataclass(frozen=True)
class Entry:
    """What `ls` shows of an entry: bytes of its files, and when it was last used."""

    folder: Path
    size: int
    used: float

    @property
    def kind(self) -> str:
        """Return what kind of outcome the entry holds, such as "ranges"."""
        return self.folder.parent.name


def entries() -> list[Entry]:
    """Return all whole entries, the one that has been unused for longest first."""
    found = []
    for record in home().glob(f"*/[!.]*/{RECORD}"):
        with suppress(OSError):  # removed by another process meanwhile
            files = (path for path in record.parent.rglob("*") if path.is_file())
            found.append(Entry(record.parent, sum(path.stat().st_size for path in files), record.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def shrink(most: int, unused_s: float | None = None) -> list[Entry]:
    """Remove entries unused for `unused_s`, then those unused for longest until at most `most` bytes are left.

    Return the entries that were removed.
    """
    now, found = time.time(), entries()
    total, removed = sum(entry.size for entry in found), []
    for entry in found:
        if total > most or (unused_s is not None and now - entry.used > unused_s):
            shutil.rmtree(entry.folder, ignore_errors=True)
            total -= entry.size
            removed.append(entry)
    for aside in home().glob("*/.*"):
        with suppress(OSError):
            if now - aside.stat().st_mtime > ABANDONED_S:
                shutil.rmtree(aside)
    return removed


def limit_gb() -> float:
    """Return how many gigabytes all entries may have together."""
    given = os.environ.get("PQ_SWEEP_CACHE_GB", str(LIMIT_GB))
    try:
        limit = float(given)
    except ValueError:
        limit = -1
    if not limit >= 0:
        raise UserError(
            f"PQ_SWEEP_CACHE_GB={given} is not valid; give how many gigabytes the cache may take, such as 20."
        )
    return limit
