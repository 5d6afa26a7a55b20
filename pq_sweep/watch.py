"""Watching the jobs of a sweep from outside: by their folders, and by SLURM's queue if they were submitted to it.

Nothing here is needed for the jobs to go on. Any process on any host that sees the folder can watch, several at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep import slurm
from pq_sweep.progress import write_error, write_json
from pq_sweep.results import Sweep, read_sweep
from pq_sweep.rows import read_error, read_json
from pq_sweep.slurm import Ended, Queued

if TYPE_CHECKING:
    from rich.table import Table

SUBMITTED = "submitted.json"
WATCHED = ".watched"  # in a sweep's folder, touched at each look by who logs its jobs
# How long a file may take to be seen on another host; network file systems look again after a minute at the latest.
GRACE_S = 75.0
LONGEST_PAUSE_S = 20.0
TAIL_LINES = 15
# Who watches looks at least every LONGEST_PAUSE_S; a minute more until another host sees it, and some for a slow queue.
WATCHED_S = 120.0
SHOWN = 30  # rows of the live table: the rest is counted


@dataclass
class Watch:
    """What is going on in a sweep; `look` again and again, each time with fresh eyes."""

    folder: Path
    grace_s: float = GRACE_S
    # Whether there will be another look: without one, a job that has been silent for long enough is dead.
    patient: bool = True
    gone_since: dict[str, float] = field(default_factory=dict)
    queue: dict[str, Queued] = field(default_factory=dict)
    answers: bool = True

    def look(self) -> Sweep:
        """Read the sweep, and write `error.json` for every job that SLURM ended without one."""
        submitted = (read_json(self.folder / SUBMITTED) or {}).get("jobs", {})
        if submitted:
            self._ask_queue()
        states = {name: state for name, job in submitted.items() if (state := self._state(name, job))}
        return read_sweep(self.folder, states)

    def _ask_queue(self) -> None:
        """Ask for the jobs of whoever owns the sweep; while SLURM does not answer, what it said last holds."""
        queue = slurm.queue(self.folder.stat().st_uid)
        self.answers = queue is not None
        if queue is not None:
            self.queue = queue

    def _state(self, name: str, job: dict[str, Any]) -> dict[str, Any] | None:
        """Return the row of a job that is not over, or None if its files say all there is to say."""
        if (self.folder / job["pickle"]).exists():
            self._settle(name, job, None)
            return None
        queued = self.queue.get(job["id"])
        if queued is not None:
            self.gone_since.pop(name, None)
            waiting = queued.state in ("PENDING", "CONFIGURING", "REQUEUED", "SPECIAL_EXIT")
            detail = {"node": queued.node, "reason": queued.reason if waiting else "", "error": ""}
            return {"status": "pending" if waiting else "running", **detail}
        if not self.answers and not _settled(self.folder / name):
            return {"status": "running", "reason": "SLURM does not answer"}
        return self._gone(name, job)

    def _gone(self, name: str, job: dict[str, Any]) -> dict[str, Any] | None:
        """Judge a job that is not in the queue and did not say goodbye."""
        if (self.folder / name / "result.json").exists() or _settled(self.folder / name):
            return None
        ended = slurm.ended(job["id"])
        if not ended.final and self._seconds_gone(name, job) < self.grace_s:
            return {"status": "running", "reason": "left the queue"}
        self._settle(name, job, ended)
        return None

    def _seconds_gone(self, name: str, job: dict[str, Any]) -> float:
        """Return for how long a job has not been in the queue, as far as one can know."""
        if self.patient:
            return time.monotonic() - self.gone_since.setdefault(name, time.monotonic())
        signs = (self.folder / name / "status.json", self.folder / name / "job.log", self.folder / job["stderr"])
        return time.time() - max([job["submitted"], *(path.stat().st_mtime for path in signs if path.exists())])

    def _settle(self, name: str, job: dict[str, Any], ended: Ended | None) -> None:
        """Write down how a job ended that left no word of it itself, or only that it was told to stop."""
        error = read_error(self.folder / name)
        if _settled(self.folder / name) or (ended is None and error):
            return
        reason = ended.explain(job["id"]) if ended else "The job could not start; see the end of its stderr."
        facts = asdict(ended or Ended("FAILED"))
        record_loss(self.folder, name, job, reason, {"slurm_job": job["id"]} | facts)


def record_loss(sweep: Path, name: str, job: dict[str, Any], reason: str, slurm: dict[str, str] | None = None) -> None:
    """Leave an `error.json` for a job that ended without a result: the reason and the end of its stderr."""
    folder = sweep / name
    if not (sweep / "sweep.json").exists() or (folder / "result.json").exists():
        return
    error, status = read_error(folder), read_json(folder / "status.json") or {}
    started = status.get("since") or job["submitted"]
    found = {"type": "Lost", "stage": status.get("stage", "start"), "started": started, "traceback": ""}
    record = found | (error or {})
    record["message"] = f"{error['message'].rstrip('.')}. {reason}" if error else reason
    record["slurm"] = record.get("slurm", {}) | (slurm or {})
    record["stderr"] = tail(sweep / job["stderr"])
    write_error(folder, record)


def _settled(folder: Path) -> bool:
    """Say whether SLURM's reason is already in a job's `error.json`."""
    return "state" in ((read_error(folder) or {}).get("slurm") or {})


def tail(path: Path, lines: int = TAIL_LINES) -> list[str]:
    """Return the last lines of a file that may be long, or may not be there."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 16_000))
            return file.read().decode(errors="replace").splitlines()[-lines:]
    except OSError:
        return []


def is_logged(job: Path) -> bool:
    """Say whether somebody watches the sweep who logs this job, which is over, so that the job need not.

    Both times come from the file system: the clocks of hosts differ.
    """
    try:
        return job.stat().st_mtime - (job.parent / WATCHED).stat().st_mtime < WATCHED_S
    except OSError:
        return False


class Logger:
    """Logs the jobs of a sweep as they end, in a thread, because a store can be slow."""

    def __init__(self, folder: Path, log: Callable[[Path], bool]) -> None:
        self.sign, self.log, self.able = folder / WATCHED, log, True
        self.over: set[str] | None = None
        self.thread = ThreadPoolExecutor(1)

    def take(self, sweep: Sweep) -> None:
        """Log what has ended since the last call; the first one finds what had ended before."""
        with suppress(OSError):  # without the sign jobs log themselves
            self.sign.touch() if self.able else self.sign.unlink(missing_ok=True)
        over = {row["job"] for row in sweep.rows if row["status"] in ("finished", "failed")}
        for name in sorted(over - (over if self.over is None else self.over)):
            self.thread.submit(self._record, sweep.folder / name)
        self.over = over

    def _record(self, job: Path) -> None:
        self.able = self.log(job)

    def close(self) -> None:
        """Leave what is not logged yet to whoever ends the sweep."""
        with suppress(OSError):
            self.sign.unlink(missing_ok=True)
        self.thread.shutdown(cancel_futures=True)


def watch(
    folder: Path, *, log: Callable[[Path], bool] | None = None, busy: Callable[[], bool] = lambda: False
) -> Sweep:
    """Show a sweep until none of its jobs is pending or running and the caller is not busy; return how it stands.

    Jobs are given to `log` as they end, which says whether it could log them, and do not log themselves while it can.
    """
    from rich.console import Console
    from rich.live import Live

    console, eyes, start = Console(stderr=True), Watch(folder), time.monotonic()
    told = ""
    with ExitStack() as stack:
        live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))
        logger = stack.enter_context(closing(Logger(folder, log))) if log else None
        while True:
            more = busy()
            sweep = eyes.look()
            if logger:
                logger.take(sweep)
            if console.is_terminal:
                live.update(table(sweep, time.monotonic() - start), refresh=True)
            elif sweep.summary != told:
                told = sweep.summary
                print(f"{folder}: {told}", file=sys.stderr, flush=True)
            if not more and not sweep.count("pending", "running"):
                return sweep
            time.sleep(min(LONGEST_PAUSE_S, 1 + (time.monotonic() - start) / 60))


def table(sweep: Sweep, seconds: float) -> Table:
    """Draw what is going on: a line per job that runs, waits or failed, the first `SHOWN` of them."""
    from rich.table import Table

    drawn = Table(title=f"{sweep.folder}: {sweep.summary}; watched for {seconds:.0f} s", title_justify="left")
    for name in ("job", "name", "state", "stage or reason", "node"):
        drawn.add_column(name, overflow="fold")
    order = {"running": 0, "failed": 1, "missing": 2, "pending": 3}
    rows = sorted((row for row in sweep.rows if row["status"] in order), key=lambda row: order[row["status"]])
    for row in rows[:SHOWN]:
        about = row["error"] or row.get("reason") or row["stage"]
        drawn.add_row(row["job"], row["name"], row["status"], about, row.get("node", ""))
    if len(rows) > SHOWN:
        rest = Counter(row["status"] for row in rows[SHOWN:])
        drawn.caption = "and " + ", ".join(f"{count} {status}" for status, count in rest.items())
    return drawn


def remember(folder: Path, jobs: dict[str, dict[str, Any]]) -> None:
    """Add submitted jobs to what is known of the sweep."""
    known = read_json(folder / SUBMITTED) or {"jobs": {}}
    write_json(folder / SUBMITTED, {"host": os.uname().nodename, "jobs": known["jobs"] | jobs})
