"""The sampling process, as the measured process starts and ends it."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pq_sweep.measure.monitor import nvml
from pq_sweep.measure.monitor.nvml import Absent
from pq_sweep.measure.monitor.samples import Samples

# How long the sampling process may take for its first sample (NVML looks at every GPU of the machine), and to end.
START_S, STOP_S, KILL_S = 10.0, 5.0, 1.0
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # Linux always gives the first namespace this number (PROC_PID_INIT_INO)


class Sampler:
    """Starts and ends the sampling process, both in bounded time, whatever happens to it."""

    def __init__(self, index: int, uuid: str | None) -> None:
        # -P: the modules beside that file must not hide installed ones.
        self.command = [sys.executable, "-P", nvml.__file__, str(index), *([uuid] if uuid else [])]
        self.process: subprocess.Popen[bytes] | None = None
        self.said: dict[str, Any] = {}

    def start(self) -> None:
        """Return when the first sample was taken, or when it is clear that there will be none."""
        try:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(self.command, stdin=pipe, stdout=pipe, stderr=pipe)
            self.said = json.loads(self._first_line(self.process))
        except Absent as reason:
            self.said = {"absent": f"the sampling process {reason}"}
        except (OSError, ValueError) as error:
            self.said = {"absent": f"the sampling process did not start: {error}"}

    def _first_line(self, process: subprocess.Popen[bytes]) -> bytes:
        assert process.stdout
        output, line, end = process.stdout.fileno(), b"", time.monotonic() + START_S
        while not line.endswith(b"\n"):
            if not select.select([output], [], [], max(0.0, end - time.monotonic()))[0]:
                process.kill()
                raise Absent(f"took no sample within {START_S:g} s")
            chunk = os.read(output, 65536)
            if not chunk:
                raise Absent(self._end(process)[1])
            line += chunk
        return line

    def stop(self, seconds: float) -> dict[str, Any]:
        """End the process and return what it saw in the `seconds` since it started."""
        output, ending = self._end(self.process) if self.process else (b"", "")
        if "absent" in self.said:
            return {"verdicts": [], "unavailable": {"nvml": self.said["absent"]}}
        try:
            seen = json.loads(output)
        except ValueError:
            unavailable = {"samples": f"the sampling process {ending}"}
            return self.said["constants"] | {"verdicts": [], "unavailable": unavailable}
        return Samples(**self.said, **seen, seconds=seconds, pid=os.getpid(), isolated=_is_isolated()).summary()

    def _end(self, process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
        """Let the process end, or kill it; return what it wrote and how it ended."""
        try:
            output, errors = process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # a process that waits for a driver cannot always be killed
                process.communicate(timeout=KILL_S)
            return b"", f"did not answer for {STOP_S:g} s and was killed"
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        code = process.returncode
        ending = f"signal {-code}" if code < 0 else f"exit code {code}"
        return output, f"ended early, {ending} {last}".rstrip()


def _is_isolated() -> bool:
    """Say whether this process has a pid namespace of its own, as in most containers."""
    try:
        return str(Path("/proc/self/ns/pid").readlink()) != FIRST_PID_NAMESPACE
    except OSError:
        return True
