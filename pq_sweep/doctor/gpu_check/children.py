"""Processes with a time limit that leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path

from pq_sweep.doctor.gpu_check import ROOT

STOP_S = 10.0  # for a process to write down what it found before it is killed


def run_python(
    arguments: list[str], folder: Path, seconds: float, log: Path | None = None, more: Mapping[str, str] | None = None
) -> int | None:
    """Run this Python in `folder` with `more` in its environment; return its exit code, or None if time was up.

    What it prints goes to `log`, by default to the terminal. The processes that it started end with it.
    """
    command, env = [sys.executable, *arguments], os.environ | {"PYTHONPATH": python_path(os.environ)} | dict(more or {})
    with log.open("wb") if log else nullcontext() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_hear_interrupts,
        )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _hear_interrupts() -> None:
    """Let a process be interrupted even if this one runs in the background of a shell, which ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python_path(environ: Mapping[str, str]) -> str:
    """Return a PYTHONPATH that means the same in every folder, with this checkout first."""
    given = [path for path in environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([str(ROOT), *(str(Path(path).absolute()) for path in given)])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process that still runs, as Ctrl-C would; then kill what is left of its group."""
    with suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
