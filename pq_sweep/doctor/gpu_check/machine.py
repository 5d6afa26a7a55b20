"""The machine that is checked, and what keeps anything from being tried on its GPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pq_sweep.core.environment import device_name, git_state, versions
from pq_sweep.core.hardware import cpu_name
from pq_sweep.doctor import Facts
from pq_sweep.doctor.children import ChildError, first_line, in_child
from pq_sweep.doctor.gpu_check import Check, Step
from pq_sweep.doctor.gpu_check.packages import JOBS, USEFUL, is_there, lacks, to_bring, wanted

PRIVATE = ("host", "command", "slurm")  # left out, as reports are published


@dataclass(frozen=True)
class Machine:
    """What is known of a machine, torch's version of CUDA, and why its GPU cannot be tried: not there, or broken."""

    about: Facts
    cuda: str = ""
    absent: str = ""
    broken: str = ""

    @property
    def checks(self) -> list[Check]:
        """Return the check that fails if the GPU is broken."""
        return [Check("machine", "torch", "failed", self.broken)] if self.broken else []

    def prevents(self, step: Step) -> str:
        """Say why a step cannot be tried here, or return "" if it can."""
        return "; ".join(filter(None, [self.absent or self.broken, lacks(step.needs, self.cuda)]))

    def lacking(self, steps: Sequence[Step]) -> list[str]:
        """Return what pip would have to bring for all steps, without a gap."""
        return to_bring(dict.fromkeys([*(package for step in steps for package in step.needs), *USEFUL]), self.cuda)


def look_at(device: str) -> Machine:
    """Look at the machine and the device, which only children use."""
    about: Facts = {"device": None} | without_torch()
    if not is_there("torch"):
        return Machine(about, absent="this Python has no torch")
    try:
        found = in_child(__name__, "by_torch", device)
        if not found["absent"] and all(map(is_there, JOBS)):
            about = in_child(__name__, "in_full", device)
    except ChildError as error:
        return Machine(about, broken=f"{device} cannot be used: {error}")
    return Machine(about | {"device": found["device"]}, found["cuda"], found["absent"])


def without_torch() -> Facts:
    """Return what Python alone can say of a machine."""
    return {
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(),
        "cpu": {"name": cpu_name(), "cores_usable": len(os.sched_getaffinity(0))},
    }


def by_torch(device: str) -> dict[str, Any]:
    """Return torch's version of CUDA and the device's name, or why torch finds none. To be called in a child."""
    import torch

    cuda = torch.version.cuda or ""
    if device != "cpu" and not torch.cuda.is_available():
        instead = "" if cuda else f"; needs {wanted('torch', cuda)}"
        absent = f"torch {torch.__version__} finds no CUDA device here{_why()}{instead}"
        return {"cuda": cuda, "device": None, "absent": absent}
    return {"cuda": cuda, "device": device_name(device), "absent": ""}


def _why() -> str:
    """Return, in brackets, why torch finds no device."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # an AssertionError or a RuntimeError, depending on how torch was built
        return f" ({first_line(error).split('. ')[0].rstrip('.')})"
    return ""


def in_full(device: str) -> dict[str, Any]:
    """Return the device and the versions that figures depend on. To be called in a child."""
    import torch

    from pq_sweep.job.describe import describe

    found = describe(device, torch.get_num_threads())
    return {key: value for key, value in found.items() if key not in PRIVATE}
