"""Calls of a function as jobs of a launcher, for what is no sweep of configurations: one call for each item."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from pq_sweep.core.files import read_json, tail, write_json
from pq_sweep.results import slurm
from pq_sweep.results.slurm import max_array_size
from pq_sweep.results.standing import GRACE_S
from pq_sweep.sweep.launchers import SlurmLauncher, WatchedLauncher, share_path
from pq_sweep.types import UserError

LONGEST_PAUSE_S = 10.0


@dataclass
class Queue:
    """Which calls are over, by the files of their jobs and, under SLURM, by its queue."""

    under_slurm: bool
    queued: dict[str, slurm.Queued] | None = None
    gone_since: dict[str, float] = field(default_factory=dict)

    def ended(self, jobs: Mapping[str, Any]) -> dict[str, str]:
        """Return the calls that are over: why one did not end well, or nothing if it did."""
        if self.under_slurm:
            self.queued = slurm.queue(os.getuid())
        found = {name: self._why(job) for name, job in jobs.items()}
        return {name: why for name, why in found.items() if why is not None}

    def _why(self, job: Any) -> str | None:
        if job.paths.result_pickle.exists():
            return _told(job)
        if not self.under_slurm:
            lost = ["its process ended without a result", *tail(job.paths.stderr, 1)]
            return ": ".join(lost) if job.done() else None
        if self.queued is None or job.job_id in self.queued:  # None: SLURM does not answer
            self.gone_since.pop(job.job_id, None)
            return None
        ended = slurm.ended(job.job_id)
        gone = time.monotonic() - self.gone_since.setdefault(job.job_id, time.monotonic())
        return ended.explain(job.job_id) if ended.final or gone > GRACE_S else None


def _told(job: Any) -> str:
    """Return what a function returned, which is why it failed or None, or the last line of what it raised."""
    error = job.exception()
    return str(error).strip().splitlines()[-1] if error else job.result() or ""


def launched(
    launcher: DictConfig,
    function: Callable[[Any], str | None],
    items: Mapping[str, Any],
    look: Callable[[], object],
    record: Path,
) -> dict[str, str]:
    """Call a function with each item in a job of its own, and return why, for each that did not end well.

    The function returns a sentence if it fails. `look` is called every few seconds until all have ended. If this
    process ends, jobs of SLURM go on, and a later call with the same `record` waits for them; those of this machine
    end with it.

    Raises:
        UserError: If no job can be started, as SLURM takes none.
    """
    own, failed, start = instantiate(launcher), dict[str, str](), time.monotonic()
    assert isinstance(own, WatchedLauncher)
    share_path()
    queue = Queue(isinstance(own, SlurmLauncher))
    running = _still_queued(own, items, record) if queue.under_slurm else {}
    waiting = iter({name: item for name, item in items.items() if name not in running}.items())
    at_once = getattr(own, "at_once", None) or len(items)
    try:
        while True:
            begun = _begun(own, function, dict(islice(waiting, at_once - len(running))))
            running |= begun
            if begun:
                write_json(record, (read_json(record) or {}) | {name: job.job_id for name, job in begun.items()})
            look()
            if not running:
                return failed
            time.sleep(min(LONGEST_PAUSE_S, 0.5 + (time.monotonic() - start) / 60))
            for name, why in queue.ended(running).items():
                del running[name]
                failed |= {name: why} if why else {}
    finally:
        for job in running.values() if not queue.under_slurm else ():
            job.cancel()


def _still_queued(own: WatchedLauncher, names: Iterable[str], record: Path) -> dict[str, Any]:
    """Return the jobs of an earlier process that SLURM still has."""
    from submitit import SlurmJob

    known, queued = read_json(record) or {}, slurm.queue(os.getuid()) or {}
    return {name: SlurmJob(own.params["submitit_folder"], known[name]) for name in names if known.get(name) in queued}


def _begun(own: WatchedLauncher, function: Callable[[Any], str | None], items: dict[str, Any]) -> dict[str, Any]:
    """Start jobs, under SLURM in as few arrays as it allows."""
    names, jobs = list(items), list[Any]()
    size = max_array_size() if isinstance(own, SlurmLauncher) else max(1, len(names))
    try:
        for start in range(0, len(names), size):
            jobs += own.executor().map_array(function, [items[name] for name in names[start : start + size]])
    except Exception as error:
        raise UserError(f"no job could be started: {' '.join(str(error).split())}.") from error
    return dict(zip(names, jobs, strict=True))
