"""Watching the jobs of a sweep from outside: by their folders, and by SLURM's queue if they were submitted to it.

The jobs go on without it. Any process on any host that sees the folder can watch, and several can at once.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pq_sweep.core.folder import SweepFolder
from pq_sweep.results.rows import DONE
from pq_sweep.results.standing import Watch
from pq_sweep.results.sweeps import Sweep

if TYPE_CHECKING:
    from rich.table import Table

LONGEST_PAUSE_S = 20.0
SHOWN = 30  # rows of the live table; further jobs are only counted


class Logger:
    """Logs the jobs of a sweep as they end, in a thread, because a store can be slow."""

    def __init__(self, folder: Path, log: Callable[[Path], bool]) -> None:
        self.sign, self.log, self.able = SweepFolder(folder).watched, log, True
        self.over: set[str] | None = None
        self.thread = ThreadPoolExecutor(1)

    def take(self, sweep: Sweep) -> None:
        """Log the jobs that ended since the last call; the first call only notes those that ended before."""
        with suppress(OSError):  # without the sign jobs log themselves
            self.sign.touch() if self.able else self.sign.unlink(missing_ok=True)
        over = {row["job"] for row in sweep.rows if row["status"] in (*DONE, "failed")}
        for name in sorted(over - (over if self.over is None else self.over)):
            self.thread.submit(self._record, sweep.folder / name)
        self.over = over

    def _record(self, job: Path) -> None:
        self.able = self.log(job)

    def close(self) -> None:
        """Stop logging: jobs that are not logged yet are left to the end of the sweep."""
        with suppress(OSError):
            self.sign.unlink(missing_ok=True)
        self.thread.shutdown(cancel_futures=True)


def watch(
    folder: Path, *, log: Callable[[Path], bool] | None = None, busy: Callable[[], bool] = lambda: False
) -> Sweep:
    """Show a sweep until none of its jobs is pending or running and the caller is not busy; return how it stands.

    Jobs are given to `log` as they end. It says whether it could log them; while it can, jobs do not log themselves.
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
