"""The steps of the small sweep: jobs started as a user starts them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pq_sweep.doctor.gpu_check import ROOT, Check, Limit, Step
from pq_sweep.types import UserError

RUNTIMES = ROOT / "conf" / "runtime"
SHORT = ("measure=quick", "measure.batch_sizes=[1,32]", "tracking=none")
PRECISIONS = {"none": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"}


@dataclass(frozen=True, kw_only=True)
class Launch(Step):
    """Jobs that are started together: one for each quantizer whose precision the runtime has on the device."""

    runtime: str
    overrides: tuple[str, ...]
    quantizers: tuple[str, ...] = ("none",)

    part: ClassVar[str] = "sweep"

    def run(self, device: str, folder: Path, limit: Limit) -> list[Check]:
        """Start the jobs and return how each ended."""
        from pq_sweep.doctor.gpu_check.outcomes import run_jobs

        if not (chosen := self.chosen(device)):
            return [self.not_tried(f"runtime={self.runtime} has none of these precisions on {device}")]
        return run_jobs(self.name, chosen, device, folder, limit)

    def chosen(self, device: str) -> tuple[str, ...]:
        """Return all overrides of the jobs but for folder and device, or nothing if there is no job on the device."""
        able = [name for name in quantizers(self.runtime, device) if name in self.quantizers]
        return (*SHORT, *self.overrides, f"runtime={self.runtime}", f"quantizer={','.join(able)}") if able else ()


def quantizers(runtime: str, device: str) -> list[str]:
    """Name the quantizers whose precision a runtime has on a device."""
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    able: Any = get_class(OmegaConf.load(RUNTIMES / f"{runtime}.yaml")._target_)
    precisions = able.precisions.get(device.partition(":")[0], ())
    return [name for name, precision in PRECISIONS.items() if precision in precisions]


def why_not(runtime: Any, device: str) -> str:
    """Say what a runtime lacks on this machine, or return "" if nothing."""
    try:
        runtime.require(device)
    except (UserError, ImportError) as error:
        return str(error)
    return ""
