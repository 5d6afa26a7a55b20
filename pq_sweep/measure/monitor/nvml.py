"""NVML: which GPU or MIG instance a device is, the queries, and the process that repeats them.

That process runs this file alone, so nothing of the package is imported here, nor anything that takes long.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

PERIOD_S = 0.1
# A look holds locks of the driver, for which a call that is timed may have to wait. After a look that took long the
# next one comes so many times later, so that looks take less than a hundredth of the time and leave p99 alone.
REST = 100

Row = dict[str, Any]


class Absent(Exception):
    """A figure is not available; the message is the reason."""


# --- a device and what it is asked ------------------------------------------------------------------------------------


class Device(NamedTuple):
    """NVML's handles of a GPU and of what this process was given: the GPU itself or a MIG instance of it.

    `instance` is None if MIG is on and nothing says which instance was given.
    """

    gpu: Any
    instance: Any
    mig: bool = False

    @property
    def part(self) -> Any:
        """Return the handle of what this process was given."""
        if self.instance is None:
            raise Absent("MIG is on and CUDA_VISIBLE_DEVICES does not name the instance by its UUID")
        return self.instance

    @property
    def whole(self) -> Any:
        """Return the handle of a GPU that is not divided."""
        if self.mig:
            raise Absent("NVML knows it of whole GPUs only, and this is a MIG instance")
        return self.gpu


Table = dict[str, Callable[[Any, Device], Any]]


def _reasons(nvml: Any, at: Device) -> int:
    try:
        return nvml.nvmlDeviceGetCurrentClocksEventReasons(at.gpu)
    except (AttributeError, nvml.NVMLError_FunctionNotFound):  # their name before driver 535
        return nvml.nvmlDeviceGetCurrentClocksThrottleReasons(at.gpu)


def _processes(nvml: Any, at: Device) -> list[tuple[int, float | None]]:
    found = nvml.nvmlDeviceGetComputeRunningProcesses(at.part)
    return [(process.pid, process.usedGpuMemory and process.usedGpuMemory / 1e6) for process in found]


SAMPLED: Table = {
    "energy_j": lambda nvml, at: nvml.nvmlDeviceGetTotalEnergyConsumption(at.whole) / 1e3,
    "sm_mhz": lambda nvml, at: nvml.nvmlDeviceGetClockInfo(at.gpu, nvml.NVML_CLOCK_SM),
    "memory_mhz": lambda nvml, at: nvml.nvmlDeviceGetClockInfo(at.gpu, nvml.NVML_CLOCK_MEM),
    "temperature_c": lambda nvml, at: nvml.nvmlDeviceGetTemperature(at.gpu, nvml.NVML_TEMPERATURE_GPU),
    "power_w": lambda nvml, at: nvml.nvmlDeviceGetPowerUsage(at.whole) / 1e3,
    "throttle_reasons": _reasons,
    "utilization_percent": lambda nvml, at: nvml.nvmlDeviceGetUtilizationRates(at.whole).gpu,
    "memory_device_mb": lambda nvml, at: nvml.nvmlDeviceGetMemoryInfo(at.part).used / 1e6,
    "processes": _processes,
}
CONSTANT: Table = {
    "uuid": lambda nvml, at: nvml.nvmlDeviceGetUUID(at.part),
    "sm_max_mhz": lambda nvml, at: nvml.nvmlDeviceGetMaxClockInfo(at.gpu, nvml.NVML_CLOCK_SM),
    "memory_max_mhz": lambda nvml, at: nvml.nvmlDeviceGetMaxClockInfo(at.gpu, nvml.NVML_CLOCK_MEM),
    "power_limit_w": lambda nvml, at: nvml.nvmlDeviceGetEnforcedPowerLimit(at.gpu) / 1e3,
}


def read(nvml: Any, table: Table, device: Device, missing: dict[str, str]) -> Row:
    """Run all queries of `table` and return the answers; write into `missing` why a query had none."""
    row: Row = {}
    for name, query in table.items():
        try:
            row[name] = query(nvml, device)
        except (nvml.NVMLError, AttributeError, Absent) as reason:
            missing[name] = str(reason)
    return row


# --- which device -----------------------------------------------------------------------------------------------------


def open_device(index: int, uuid: str | None) -> tuple[Any, Device]:
    """Return NVML, ready for use, and the device in it, or raise an Absent that says what is in the way."""
    try:
        import pynvml as nvml
    except ImportError:
        raise Absent("the package nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
        return nvml, locate(nvml, index, uuid, os.environ)
    except nvml.NVMLError as error:
        raise Absent(f"NVML says: {error}") from None


def locate(nvml: Any, index: int, uuid: str | None, environ: Mapping[str, str]) -> Device:
    """Find what torch calls cuda:`index`: NVML numbers all GPUs that it sees, CUDA only those that it may see."""
    wanted = wanted_device(index, uuid, environ.get("CUDA_VISIBLE_DEVICES"))
    handles = _each(nvml, nvml.nvmlDeviceGetCount(), nvml.nvmlDeviceGetHandleByIndex)
    known = [(nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)) for handle in handles]
    place = choose_gpu(wanted, known, environ.get("CUDA_DEVICE_ORDER"))
    if isinstance(place, str):
        instance = nvml.nvmlDeviceGetHandleByUUID(place)
        return Device(nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(instance), instance, mig=True)
    gpu = handles[place]
    if not _is_divided(nvml, gpu):
        return Device(gpu, gpu)
    count = nvml.nvmlDeviceGetMaxMigDeviceCount(gpu)
    instances = _each(nvml, count, lambda number: nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu, number))
    return Device(gpu, instances[0] if len(instances) == 1 else None, mig=True)


def _each(nvml: Any, count: int, get: Callable[[int], Any]) -> list[Any]:
    """Return the handles that exist; as for CUDA, a GPU that this process may not use does not count."""
    handles = []
    for number in range(count):
        with suppress(nvml.NVMLError):
            handles.append(get(number))
    return handles


def _is_divided(nvml: Any, gpu: Any) -> bool:
    try:
        return bool(nvml.nvmlDeviceGetMigMode(gpu)[0])
    except nvml.NVMLError:  # GPUs that cannot be divided
        return False


def wanted_device(index: int, uuid: str | None, visible: str | None) -> int | str:
    """Return the UUID of CUDA's device `index`, or its number among all GPUs in CUDA's order, or raise Absent.

    `visible` is CUDA_VISIBLE_DEVICES: numbers, UUIDs or their beginnings; CUDA reads it up to the first other word.
    A MIG instance named there takes precedence over `uuid`, which may be that of the GPU around the instance.
    """
    words = [] if visible is None else [word.strip() for word in visible.split(",")]
    entries = list(takewhile(lambda word: re.match(r"\d+$|GPU-|MIG-", word), words))
    named = entries[index] if index < len(entries) else None
    if uuid and not (named and named.startswith("MIG-")):
        return uuid
    if visible is None:
        return index
    if named is None:
        raise Absent(f"CUDA_VISIBLE_DEVICES={visible} has no device {index}")
    return int(named) if named.isdigit() else named


def choose_gpu(wanted: int | str, known: Sequence[tuple[str, str]], order: str | None) -> int | str:
    """Return the place of a GPU among all, known by UUID and name in NVML's order, or the UUID of a MIG instance.

    Raises Absent. torch gives UUIDs without GPU- or MIG- before them. `order` is CUDA_DEVICE_ORDER: PCI_BUS_ID is
    NVML's order; by default CUDA puts faster GPUs first, which makes no difference if all GPUs are equal.
    """
    if isinstance(wanted, int):
        if order != "PCI_BUS_ID" and len({name for _, name in known}) > 1:
            raise Absent("CUDA numbers unequal GPUs by speed and NVML does not; set CUDA_DEVICE_ORDER=PCI_BUS_ID")
        if wanted >= len(known):
            raise Absent(f"NVML sees {len(known)} GPUs, and CUDA's number {wanted} is none of them")
        return wanted
    if wanted.startswith("MIG-"):
        return wanted
    places = [i for i, (uuid, _) in enumerate(known) if uuid.startswith((wanted, f"GPU-{wanted}"))]
    if not places and not wanted.startswith("GPU-"):
        return f"MIG-{wanted}"
    if len(places) != 1:
        raise Absent(f"{len(places)} of the {len(known)} GPUs that NVML sees have the UUID {wanted}")
    return places[0]


# --- the sampling process ---------------------------------------------------------------------------------------------


def lineage(pid: int) -> Iterator[int]:
    """Yield a process and its ancestors, as far as /proc shows them."""
    while pid:
        yield pid
        pid = _parent(pid)


def _parent(pid: int) -> int:
    with suppress(OSError):
        # The name comes before the state and the parent, and may contain anything, brackets too.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[1])
    return 0


@cache
def is_related(pid: int, other: int) -> bool:
    """Say whether a process is another one, its ancestor or its descendant; once one ended, the first answer stands."""
    return other in lineage(pid) or pid in lineage(other)


def sample(index: int, uuid: str | None) -> None:
    """Write a line when the first sample was taken, and one with all samples when standard input has ended."""
    # SLURM and terminals signal every process of a job; this one ends with the process that it samples for.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    try:
        nvml, device = open_device(index, uuid)
    except Absent as reason:
        return _tell({"absent": str(reason)})
    missing: dict[str, str] = {}
    family: set[int] = set()

    def look() -> Row:
        start = time.monotonic()
        row: Row = {"t_s": start, **read(nvml, SAMPLED, device, missing)}
        row["look_s"] = time.monotonic() - start
        family.update(pid for pid, _ in row.get("processes", ()) if is_related(pid, parent))
        return row

    rows = [look()]
    _tell({"constants": read(nvml, CONSTANT, device, missing) | {"mig": device.mig}})
    due = rows[0]["t_s"] + pause(rows[0])
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        if os.getppid() != parent:  # a process that it forked may hold standard input open
            return None
        rows.append(look())
        due = max(due + pause(rows[-1]), time.monotonic())
    return _tell({"rows": [*rows, look()], "missing": missing, "family": sorted(family)})


def pause(row: Row) -> float:
    """Return the seconds from the start of a look to that of the next one."""
    return max(PERIOD_S, REST * row["look_s"])


def _tell(message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    sample(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
