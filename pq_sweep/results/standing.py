"""How a sweep stands, by the folders of its jobs, and by SLURM's queue if they were submitted to it."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pq_sweep.core.files import read_json, tail, write_json
from pq_sweep.core.folder import JobFolder, SweepFolder
from pq_sweep.results import slurm
from pq_sweep.results.slurm import Ended, Queued
from pq_sweep.results.sweeps import Sweep, read_sweep
from pq_sweep.types import Record

# How long a file may take to be seen on another host; network file systems look again after a minute at the latest.
GRACE_S = 75.0

# A watcher looks at least every LONGEST_PAUSE_S. Another host may see that a minute later, and the queue may be slow.
WATCHED_S = 120.0


@dataclass
class Watch:
    """What is going on in a sweep; each `look` reads its folders and the queue again."""

    folder: Path
    grace_s: float = GRACE_S
    # Whether there will be another look: without one, a job that has been silent for long enough is dead.
    patient: bool = True
    gone_since: dict[str, float] = field(default_factory=dict)
    queue: dict[str, Queued] = field(default_factory=dict)
    answers: bool = True

    @property
    def files(self) -> SweepFolder:
        """Return the sweep's folder by the names of its files."""
        return SweepFolder(self.folder)

    def look(self) -> Sweep:
        """Read the sweep, and write `error.json` for every job that SLURM ended without one."""
        submitted = (read_json(self.files.submitted) or {}).get("jobs", {})
        if submitted:
            self._ask_queue()
        states = {name: state for name, job in submitted.items() if (state := self._state(name, job))}
        return read_sweep(self.folder, states)

    def _ask_queue(self) -> None:
        """Ask for the jobs of the sweep's owner; while SLURM does not answer, its last answer holds."""
        queue = slurm.queue(self.folder.stat().st_uid)
        self.answers = queue is not None
        if queue is not None:
            self.queue = queue

    def _state(self, name: str, job: Record) -> Record | None:
        """Return the state of a job that is not over, or None if the job's files say everything."""
        if (self.folder / job["pickle"]).exists():
            self._settle(name, job, None)
            return None
        queued = self.queue.get(job["id"])
        if queued is not None:
            self.gone_since.pop(name, None)
            waiting = queued.state in ("PENDING", "CONFIGURING", "REQUEUED", "SPECIAL_EXIT")
            detail = {"node": queued.node, "reason": queued.reason if waiting else "", "error": ""}
            return {"status": "pending" if waiting else "running", **detail}
        if not self.answers and not _settled(self.files.job(name)):
            return {"status": "running", "reason": "SLURM does not answer"}
        return self._gone(name, job)

    def _gone(self, name: str, job: Record) -> Record | None:
        """Judge a job that is not in the queue and left no sign of its end."""
        if self.files.job(name).result.exists() or _settled(self.files.job(name)):
            return None
        ended = slurm.ended(job["id"])
        if not ended.final and self._seconds_gone(name, job) < self.grace_s:
            return {"status": "running", "reason": "left the queue"}
        self._settle(name, job, ended)
        return None

    def _seconds_gone(self, name: str, job: Record) -> float:
        """Return how long a job has been out of the queue or, for a single look, silent."""
        if self.patient:
            return time.monotonic() - self.gone_since.setdefault(name, time.monotonic())
        own = self.files.job(name)
        signs = (own.status, own.log, self.folder / job["stderr"])
        return time.time() - max([job["submitted"], *(path.stat().st_mtime for path in signs if path.exists())])

    def _settle(self, name: str, job: Record, ended: Ended | None) -> None:
        """Write down how a job ended if it did not do so itself, or only wrote that it was told to stop."""
        own = self.files.job(name)
        if _settled(own) or (ended is None and own.read_error()):
            return
        reason = ended.explain(job["id"]) if ended else "The job could not start; see the end of its stderr."
        facts = asdict(ended or Ended("FAILED"))
        record_loss(own, job, reason, {"slurm_job": job["id"]} | facts)


def record_loss(folder: JobFolder, job: Record, reason: str, slurm: dict[str, str] | None = None) -> None:
    """Leave an `error.json` for a job that ended without a result: the reason and the end of its stderr.

    `job` is the record of its submission.
    """
    if not folder.sweep.manifest.exists() or folder.result.exists():
        return
    error, status = folder.read_error(), read_json(folder.status) or {}
    started = status.get("since") or job["submitted"]
    found = {"type": "Lost", "stage": status.get("stage", "start"), "started": started, "traceback": ""}
    record = found | (error or {})
    record["message"] = f"{error['message'].rstrip('.')}. {reason}" if error else reason
    record["slurm"] = record.get("slurm", {}) | (slurm or {})
    record["stderr"] = tail(folder.sweep.path / job["stderr"])
    folder.write_error(record)


def _settled(folder: JobFolder) -> bool:
    """Say whether SLURM's reason is already in a job's `error.json`."""
    return "state" in ((folder.read_error() or {}).get("slurm") or {})


def is_logged(job: JobFolder) -> bool:
    """Say whether a watcher of the sweep logs this job, which is over, so that the job itself need not.

    Both times come from the file system, as the clocks of hosts differ.
    """
    try:
        return job.path.stat().st_mtime - job.sweep.watched.stat().st_mtime < WATCHED_S
    except OSError:
        return False


def remember(folder: Path, jobs: dict[str, Record]) -> None:
    """Add jobs to the record of what the sweep submitted."""
    path = SweepFolder(folder).submitted
    known = read_json(path) or {"jobs": {}}
    write_json(path, {"host": os.uname().nodename, "jobs": known["jobs"] | jobs})
