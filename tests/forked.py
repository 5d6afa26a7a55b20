"""The command line without the seconds that its imports take: a process that has imported all forks for each run.

Each run still is a process of its own, with its arguments, folder, environment and output. What tests the start
itself, such as which modules are imported, starts Python anew.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

# What a sweep imports before its first job, in it, in the quantizers, and at its end.
IMPORTED = (
    "torch",
    "torchvision",
    "onnx",
    "onnxruntime",
    "mlflow",
    "pandas",
    "alembic.command",
    "cryptography.fernet",
    "mlflow.store.tracking.sqlalchemy_store",
    "pq_sweep.sweep.callback",
    "pq_sweep.sweep.cli",
    "sklearn.datasets",
    "safetensors.torch",
    "rich.progress",
    "pq_sweep.job.run",
    "pq_sweep.compress.recovery",
    "pq_sweep.inputs.datasets",
    "pq_sweep.inputs.models",
    "onnxruntime.quantization",
    "onnxscript",
    "torch.onnx._internal.exporter._compat",
    "pq_sweep.runtimes.export",
    "altair",
    "tabulate",
    "vl_convert",
    "pq_sweep.results.report.page",
    "pq_sweep.tracking.summary",
)
# Libraries read variables that begin so as they are imported.
AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "KMP_", "LD_", "CUDA", "XDG_", "HOME", "MPL", "TORCH")


class Forks:
    """A process that forks; it is started when it is first needed and ends with this one."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment: dict[str, str] = {}
        self.end: socket.socket | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()

    def can_run(self, arguments: Sequence[str], env: dict[str, str]) -> bool:
        """Say whether a run is one of this checkout's own commands in an environment like this process's."""
        own = arguments[0] == str(self.root / "launch.py") or (
            arguments[0] == "-m" and arguments[1].startswith("pq_sweep.")
        )
        return own and _of_imports(env) == _of_imports(self.environment or dict(os.environ))

    def run(
        self, arguments: Sequence[str], folder: Path, env: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Run Python with arguments in a folder; raise subprocess.TimeoutExpired if it takes too long."""
        answer, theirs = socket.socketpair()
        out, err = os.pipe(), os.pipe()
        with self.lock:
            request = {"arguments": [*arguments], "folder": str(folder), "env": env}
            content = json.dumps(request).encode()
            socket.send_fds(self._started(), [len(content).to_bytes(4, "big")], [out[1], err[1], theirs.fileno()])
            self._started().sendall(content)
        for file in (out[1], err[1]):
            os.close(file)
        theirs.close()
        return _wait(answer, out[0], err[0], [sys.executable, *arguments], timeout)

    def close(self) -> None:
        """End the process that forks."""
        if self.end and self.process:
            self.end.close()
            self.process.wait()

    def _started(self) -> socket.socket:
        if self.end is None:
            self.environment = dict(os.environ)
            self.end, theirs = socket.socketpair()
            code = f"import sys; sys.path.insert(1, {str(Path(__file__).parent)!r}); import forked; del sys.path[1]"
            command = [sys.executable, "-c", f"{code}; forked.serve({theirs.fileno()})"]
            self.process = subprocess.Popen(
                command, cwd=self.root, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
            theirs.close()
        return self.end


def _of_imports(env: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(AT_IMPORT)}


def _wait(
    answer: socket.socket, out: int, err: int, command: list[str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Read what a run prints, and its process's number and status, until it ends."""
    texts: dict[int, bytes] = {}

    def read(file: int) -> None:
        with os.fdopen(file, "rb") as stream:
            texts[file] = stream.read()

    readers = [threading.Thread(target=read, args=(file,), daemon=True) for file in (out, err)]
    for reader in readers:
        reader.start()
    process = int.from_bytes(answer.recv(4, socket.MSG_WAITALL), "big")
    assert process, "the process that forks has ended"
    answer.settimeout(timeout)
    try:
        status = os.waitstatus_to_exitcode(int.from_bytes(answer.recv(4, socket.MSG_WAITALL), "big"))
    except TimeoutError:
        os.killpg(process, signal.SIGKILL)
        raise subprocess.TimeoutExpired(command, timeout) from None
    finally:
        for reader in readers:
            reader.join(timeout)
        answer.close()
    return subprocess.CompletedProcess(command, status, _text(texts[out]), _text(texts[err]))


def _text(printed: bytes) -> str:
    return printed.decode().replace("\r\n", "\n").replace("\r", "\n")


def serve(end: int) -> None:
    """Import everything, then fork for each request until the tests are over."""
    for name in IMPORTED:
        with suppress(ModuleNotFoundError):  # not everything is installed wherever tests for a GPU run
            importlib.import_module(name)
    _read_operators()
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=end)
    while True:
        length, files, _, _ = socket.recv_fds(requests, 4, 3)
        if not length:
            os._exit(0)  # libraries have nothing to put in order, and would complain
        request = json.loads(requests.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
        if not os.fork():
            requests.close()
            _fork_and_tell(request, *files)
        for file in files:
            os.close(file)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _read_operators() -> None:
    """Let torch's exporter read its operators, which it does once in a process."""
    with suppress(ImportError, AttributeError):
        from torch.onnx._internal._lazy_import import onnxscript_apis  # type: ignore[attr-defined]

        from pq_sweep.runtimes.export import read_operators_once

        read_operators_once()
        onnxscript_apis.get_torchlib_ops()


def _fork_and_tell(request: dict[str, Any], out: int, err: int, answer: int) -> None:
    """Run the request in a child, tell its number and then how it ended, and end."""
    if not (process := os.fork()):
        os.close(answer)
        os.setsid()
        for file, standard in ((out, 1), (err, 2)):
            os.dup2(file, standard)
            os.close(file)
        _run(request["arguments"], request["folder"], request["env"])
    os.close(out)
    os.close(err)
    told = socket.socket(fileno=answer)
    told.sendall(process.to_bytes(4, "big"))
    told.sendall(os.waitpid(process, 0)[1].to_bytes(4, "big"))
    os._exit(0)


def _run(arguments: list[str], folder: str, env: dict[str, str]) -> None:
    """Be what Python is with these arguments, and end."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    random.seed()
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace", buffering=1)  # noqa: SIM115
    sys.orig_argv, sys.argv = [sys.executable, *arguments], arguments
    status = 1
    try:
        status = _main(arguments, folder)
        threading._shutdown()  # type: ignore[attr-defined]
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main(arguments: list[str], folder: str) -> int:
    """Run a module or a script, and return the status with which Python would end."""
    try:
        if arguments[0] == "-m":
            sys.path[0], sys.argv = folder, arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
