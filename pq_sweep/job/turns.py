"""Turns on a device: jobs may use it at the same time, but a job that measures latency has it alone."""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from pq_sweep.core.environment import gpu_uuid
from pq_sweep.core.fingerprint import digest

log = logging.getLogger(__name__)


class Turns:
    """Locks of this machine for one of its devices; a process releases them when it ends, however it ends.

    All jobs that see a GPU share it. Jobs share a CPU if they may use the same cores and SLURM has not given each its
    own.
    """

    def __init__(self, device: str) -> None:
        cores = [sorted(os.sched_getaffinity(0)), os.environ.get("SLURM_JOB_ID")]
        name = digest([os.uname().nodename, gpu_uuid(device) or cores])
        self.folder = Path(tempfile.gettempdir()) / f"pq_sweep-{os.getuid()}" / name
        self.depth = 0

    @contextmanager
    def take(self, alone: bool) -> Iterator[None]:
        """Hold the device alone or together with others; a turn inside a turn is part of the outer one."""
        with ExitStack() as held:
            if self.depth == 0:
                try:
                    self._lock(held, alone)
                except OSError as error:
                    log.warning("other jobs cannot be kept off the device (%s: %s)", self.folder, error.strerror)
            self.depth += 1
            held.callback(self._leave)
            yield

    def _leave(self) -> None:
        self.depth -= 1

    def _lock(self, held: ExitStack, alone: bool) -> None:
        """Pass the gate, then lock the device.

        A job that wants to be alone keeps the gate shut meanwhile: otherwise new jobs could go first for ever.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mode = fcntl.LOCK_EX if alone else fcntl.LOCK_SH
        gate, device = (held.enter_context((self.folder / name).open("a")) for name in ("gate", "device"))
        for lock in (gate, device):
            _wait(lock, mode)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)


def _wait(lock: IO[str], mode: int) -> None:
    """Take a lock, and log that the job is waiting if it is not free."""
    try:
        fcntl.flock(lock, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info("waiting for other jobs on the device")
        fcntl.flock(lock, mode)
