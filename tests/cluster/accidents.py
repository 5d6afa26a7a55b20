"""A pruner that has an accident: what can happen to a job on a cluster, on demand."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path

from pq_sweep.types import Data, Model

# A folder where tests and jobs leave word for each other.
SIGNS = "ACCIDENT_SIGNS"


def accident(model: Model, data: Data, *, kind: str, amount: float) -> None:
    """Have the accident `kind`; each happens only as long as the file `over` is not there."""
    signs = Path(os.environ[SIGNS])
    with (signs / f"{kind}.tries").open("a") as file:
        file.write(f"{os.environ.get('SLURMD_NODENAME')}\n")
    if not (signs / "over").exists():
        globals()[f"_{kind}"](signs)


def _nothing(signs: Path) -> None:
    """Go on."""


def _raise(signs: Path) -> None:
    raise ArithmeticError("this pruner divides by nothing.")


def _exit(signs: Path) -> None:
    sys.exit(3)


def _vanish(signs: Path) -> None:
    print("last words of a vanishing job", file=sys.stderr, flush=True)
    os._exit(4)


def _killed(signs: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wait(signs: Path) -> None:
    """Wait for somebody to cancel the job or to end its node; the second try goes on."""
    name = sys._getframe(1).f_locals["kind"]
    if len((signs / f"{name}.tries").read_text().splitlines()) == 1:
        time.sleep(600)


_cancelled = _node_dies = _times_out = _wait


def _never_ends(signs: Path) -> None:
    time.sleep(600)


def _full(signs: Path) -> None:
    """Leave no room for any file; the kernel then refuses what a full disk or a quota would refuse."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
