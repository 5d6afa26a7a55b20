"""What a GPU is: the facts that a reader needs to compare results of different GPUs."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from pq_sweep.core.hardware import COMPUTE_MODES
from pq_sweep.measure.monitor.nvml import CONSTANT, Absent, Device, Table, open_device, read


def _cuda_version(nvml: Any, _: Device) -> str:
    number = nvml.nvmlSystemGetCudaDriverVersion()
    return f"{number // 1000}.{number % 1000 // 10}"


def _mig_instance(nvml: Any, at: Device) -> dict[str, Any]:
    if not at.mig:
        raise Absent("the GPU is not divided into MIG instances")
    return {
        "gpu_uuid": nvml.nvmlDeviceGetUUID(at.gpu),
        "gpu_instance": nvml.nvmlDeviceGetGpuInstanceId(at.part),
        "compute_instance": nvml.nvmlDeviceGetComputeInstanceId(at.part),
    }


def _compute_mode(nvml: Any, at: Device) -> str:
    return COMPUTE_MODES[nvml.nvmlDeviceGetComputeMode(at.gpu)]


IDENTITY: Table = {
    "name": lambda nvml, at: nvml.nvmlDeviceGetName(at.part),
    "pci": lambda nvml, at: nvml.nvmlDeviceGetPciInfo(at.gpu).busId,
    "vbios": lambda nvml, at: nvml.nvmlDeviceGetVbiosVersion(at.gpu),
    "driver": lambda nvml, at: nvml.nvmlSystemGetDriverVersion(),
    "cuda_driver": _cuda_version,
    "memory_mb": lambda nvml, at: nvml.nvmlDeviceGetMemoryInfo(at.part).total / 1e6,
    "ecc": lambda nvml, at: bool(nvml.nvmlDeviceGetEccMode(at.gpu)[0]),
    "mig": lambda nvml, at: bool(nvml.nvmlDeviceGetMigMode(at.gpu)[0]),
    "mig_instance": _mig_instance,
    "compute_mode": _compute_mode,
    "persistence": lambda nvml, at: bool(nvml.nvmlDeviceGetPersistenceMode(at.gpu)),
    "sm_application_mhz": lambda nvml, at: nvml.nvmlDeviceGetApplicationsClock(at.gpu, nvml.NVML_CLOCK_SM),
    "memory_application_mhz": lambda nvml, at: nvml.nvmlDeviceGetApplicationsClock(at.gpu, nvml.NVML_CLOCK_MEM),
    "pcie_generation": lambda nvml, at: nvml.nvmlDeviceGetCurrPcieLinkGeneration(at.gpu),
    "pcie_max_generation": lambda nvml, at: nvml.nvmlDeviceGetMaxPcieLinkGeneration(at.gpu),
    "pcie_width": lambda nvml, at: nvml.nvmlDeviceGetCurrPcieLinkWidth(at.gpu),
    "pcie_max_width": lambda nvml, at: nvml.nvmlDeviceGetMaxPcieLinkWidth(at.gpu),
}


def identify(uuid: str | None) -> dict[str, Any]:
    """Return what NVML says about a GPU or MIG instance, by default the one that CUDA numbers 0; in MB, MHz and W.

    `memory_mb` is all memory, used or not. Limits and application clocks are the present ones, and an idle PCIe link
    may be slower at present. `mig_instance` says where in its GPU an instance lies, by NVML's numbers. What the device
    does not have is absent, and `unavailable` gives the reason.
    """
    missing: dict[str, str] = {}
    try:
        nvml, device = open_device(0, uuid)
    except Absent as reason:
        return {"unavailable": {"nvml": str(reason)}}
    try:
        return read(nvml, CONSTANT | IDENTITY, device, missing) | {"unavailable": missing}
    finally:
        with suppress(nvml.NVMLError):
            nvml.nvmlShutdown()
