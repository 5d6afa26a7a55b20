"""Separate processes for code that loads drivers or native libraries, because it may crash or hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from threading import Lock
from typing import Any

from pq_sweep.core.limits import bounded
from pq_sweep.core.sentences import without_password

CHILD_S = 90.0  # for a process that imports torch or TensorRT from a slow file system
UNKILLABLE_S = 5.0  # on top of that, for a process that the kernel does not let go

SERVE = f"import sys; from {__name__} import serve; serve(*sys.argv[1:])"
ALONE = Lock()


class ChildError(RuntimeError):
    """A child process failed, crashed or did not answer; the message says which."""


def in_child(module: str, function: str, *arguments: str) -> Any:
    """Return what a function returns in a child process, as JSON; raise a ChildError that says why it does not."""
    command = [sys.executable, "-c", SERVE, module, function, *arguments]
    run = partial(subprocess.run, command, capture_output=True, errors="replace", timeout=CHILD_S, check=False)
    try:
        done = bounded(run, CHILD_S + UNKILLABLE_S)
    except (subprocess.TimeoutExpired, TimeoutError):
        raise ChildError(f"no answer within {CHILD_S:.0f} s") from None
    if code := done.returncode:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise ChildError(": ".join(filter(None, [f"crashed, {how}", last_line(done.stderr)])))
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise ChildError("ended without an answer") from None
    if "error" in answer:
        raise ChildError(answer["error"])
    return answer["value"]


def alone(module: str, function: str, *arguments: str) -> Any:
    """Do as `in_child`, but one call at a time: a GPU may be set to allow a single process."""
    with ALONE:
        return in_child(module, function, *arguments)


def serve(module: str, function: str, *arguments: str) -> None:
    """Be the child: print what a function returns, or the first line of its error."""
    try:
        answer = {"value": getattr(import_module(module), function)(*arguments)}
    except Exception as error:
        answer = {"error": first_line(error)}
    print(json.dumps(answer, default=str))


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without a password."""
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def last_line(text: str) -> str:
    """Return the last line of what a process printed, without a password."""
    return without_password(text.strip().splitlines()[-1])[:300] if text.strip() else ""
