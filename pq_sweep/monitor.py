"""What a device does while something is measured on it: clocks, temperature, power, throttling, processes, energy.

A GPU is sampled by a process of its own, which runs this file and imports nothing heavy: Python's lock does not reach
from there into the timed loop. A CPU is only looked at before and after, because sampling would be load on it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from itertools import takewhile
from operator import or_
from pathlib import Path
from typing import Any

PERIOD_S = 0.1
# How long the sampling process may take to its first sample (NVML looks at every GPU of the machine), and to its end.
START_S, STOP_S, KILL_S = 10.0, 5.0, 1.0
# The energy counter of a GPU moves every 20 to 100 ms: in a shorter window that would be a large part.
MIN_ENERGY_S = 1.0
KEPT_ROWS = 300
LOW_CLOCK = 0.75  # of the maximum; nvbench throws away what it measured below
# More than any CPU package draws for long: until range / PACKAGE_W its energy counter wraps once at most.
PACKAGE_W = 600.0
POWERCAP, CPUS, CPUINFO = Path("/sys/class/powercap"), Path("/sys/devices/system/cpu"), Path("/proc/cpuinfo")
FIRST_PID_NAMESPACE = "pid:[4026531836]"  # Linux gives the first one always this number (PROC_PID_INIT_INO)

GPU_IDLE, SW_POWER_CAP, HW_SLOWDOWN, SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x1, 0x4, 0x8, 0x20, 0x40, 0x80
SLOWED = HW_SLOWDOWN | SW_THERMAL | HW_THERMAL | POWER_BRAKE
REASONS = {
    GPU_IDLE: "gpu_idle",
    0x2: "application_clocks",
    SW_POWER_CAP: "sw_power_cap",
    HW_SLOWDOWN: "hw_slowdown",
    0x10: "sync_boost",
    SW_THERMAL: "sw_thermal",
    HW_THERMAL: "hw_thermal",
    POWER_BRAKE: "power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}

Row = dict[str, Any]


class Absent(Exception):
    """A figure cannot be had; the message is the reason."""


class Monitor:
    """Watches "cpu" or "cuda:N" while a `with` block runs; afterwards `result` holds what was seen, as plain values.

    N is torch's number. `uuid` is that of the GPU or MIG instance; without it CUDA_VISIBLE_DEVICES says which it is.
    `result["unavailable"]` gives the reason for every figure that is absent. No measurement fails because of a monitor.

    GPU: clocks in MHz; temperature and memory (MB, 10^6 bytes) are peaks; power and utilisation are means, and some
    GPUs give the power of the last second. `energy_j` was used in `sampled_s`, which is a little longer than `seconds`.
    `rows` are the samples, thinned out. `verdicts` are "throttled" (by heat or the power supply, or the median clock
    was under 75 % of the maximum while busy), "power_capped", and "shared" (another process computes there). NVML knows
    power, energy and utilisation of whole GPUs, not of a MIG instance; clocks and temperature are the GPU's around it.

    CPU: `energy_j` of the packages, without memory, whoever used it; `cpu_mhz` of the usable cores, just before and
    just after.
    """

    def __init__(self, device: str, uuid: str | None = None, *, powercap: Path = POWERCAP) -> None:
        self.device = device
        self.watcher = Processor(powercap) if device == "cpu" else Sampler(int(device.partition(":")[2] or 0), uuid)
        self.result: dict[str, Any] = {}

    def __enter__(self) -> Monitor:
        self.watcher.start()
        self.started = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = time.monotonic() - self.started
        self.result = {"device": self.device, "seconds": seconds} | self.watcher.stop(seconds)


def identify(uuid: str | None) -> dict[str, Any]:
    """Return what NVML says of a GPU or MIG instance, by default the one that CUDA numbers 0; MB, MHz and W.

    What the device does not have is absent, and `unavailable` gives the reason. An idle PCIe link may be slower now.
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


def gather(figures: Mapping[str, Callable[[], Any]], unavailable: dict[str, str]) -> dict[str, Any]:
    """Return the figures that can be had, and write down why not for the others."""
    found = {}
    for name, figure in figures.items():
        try:
            found[name] = figure()
        except Absent as reason:
            unavailable[name] = str(reason)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the least, the median and the greatest."""
    from statistics import median  # the sampling process does without

    return {"min": min(values), "median": median(values), "max": max(values)}


# --- NVML: which device, and what it is asked -------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """NVML's handles of a GPU and of what this process was given: the GPU itself or a MIG instance of it.

    `instance` is None where MIG is on and nothing says which instance it is.
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


def _cuda_version(nvml: Any, _: Device) -> str:
    number = nvml.nvmlSystemGetCudaDriverVersion()
    return f"{number // 1000}.{number % 1000 // 10}"


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
IDENTITY: Table = {
    "name": lambda nvml, at: nvml.nvmlDeviceGetName(at.part),
    "pci": lambda nvml, at: nvml.nvmlDeviceGetPciInfo(at.gpu).busId,
    "vbios": lambda nvml, at: nvml.nvmlDeviceGetVbiosVersion(at.gpu),
    "driver": lambda nvml, at: nvml.nvmlSystemGetDriverVersion(),
    "cuda_driver": _cuda_version,
    "memory_mb": lambda nvml, at: nvml.nvmlDeviceGetMemoryInfo(at.part).total / 1e6,
    "ecc": lambda nvml, at: bool(nvml.nvmlDeviceGetEccMode(at.gpu)[0]),
    "mig": lambda nvml, at: bool(nvml.nvmlDeviceGetMigMode(at.gpu)[0]),
    "persistence": lambda nvml, at: bool(nvml.nvmlDeviceGetPersistenceMode(at.gpu)),
    "sm_application_mhz": lambda nvml, at: nvml.nvmlDeviceGetApplicationsClock(at.gpu, nvml.NVML_CLOCK_SM),
    "memory_application_mhz": lambda nvml, at: nvml.nvmlDeviceGetApplicationsClock(at.gpu, nvml.NVML_CLOCK_MEM),
    "pcie_generation": lambda nvml, at: nvml.nvmlDeviceGetCurrPcieLinkGeneration(at.gpu),
    "pcie_max_generation": lambda nvml, at: nvml.nvmlDeviceGetMaxPcieLinkGeneration(at.gpu),
    "pcie_width": lambda nvml, at: nvml.nvmlDeviceGetCurrPcieLinkWidth(at.gpu),
    "pcie_max_width": lambda nvml, at: nvml.nvmlDeviceGetMaxPcieLinkWidth(at.gpu),
}


def read(nvml: Any, table: Table, device: Device, missing: dict[str, str]) -> Row:
    """Ask everything of `table` and return the answers; write down in `missing` why there was none."""
    row: Row = {}
    for name, query in table.items():
        try:
            row[name] = query(nvml, device)
        except (nvml.NVMLError, AttributeError, Absent) as reason:
            missing[name] = str(reason)
    return row


def open_device(index: int, uuid: str | None) -> tuple[Any, Device]:
    """Return NVML, ready, and the device in it, or say in an Absent what is in the way."""
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
    """Find what torch calls cuda:`index`: NVML numbers all GPUs that it sees, CUDA those that it is told to see."""
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
    """Return the handles that there are; a GPU that this process may not use is none, as for CUDA."""
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
    A MIG instance that it names comes before `uuid`, which may be that of the GPU around it.
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
    NVML's; by default CUDA puts faster GPUs first, which changes nothing among equals.
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


def sample(index: int, uuid: str | None) -> None:
    """Write a line when the first sample was taken, and one with all samples when standard input has ended."""
    # SLURM and terminals signal every process of a job; this one ends with the one that it samples for.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    try:
        nvml, device = open_device(index, uuid)
    except Absent as reason:
        return _tell({"absent": str(reason)})
    missing: dict[str, str] = {}

    def look() -> Row:
        return {"t_s": time.monotonic()} | read(nvml, SAMPLED, device, missing)

    rows = [look()]
    _tell({"constants": read(nvml, CONSTANT, device, missing) | {"mig": device.mig}})
    due = rows[0]["t_s"] + PERIOD_S
    while not select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
        if os.getppid() != parent:  # a process that it forked may hold standard input open
            return None
        rows.append(look())
        due = max(due + PERIOD_S, time.monotonic())
    return _tell({"rows": [*rows, look()], "missing": missing})


def _tell(message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


class Sampler:
    """Starts and ends the sampling process, both in bounded time whatever becomes of it."""

    def __init__(self, index: int, uuid: str | None) -> None:
        # -P: the folder of this file would hide modules of Python's own, such as types.
        self.command = [sys.executable, "-P", __file__, str(index), *([uuid] if uuid else [])]
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
            return self.said["constants"] | {
                "verdicts": [],
                "unavailable": {"samples": f"the sampling process {ending}"},
            }
        return Samples(**self.said, **seen, seconds=seconds, pid=os.getpid(), isolated=_is_isolated()).summary()

    def _end(self, process: subprocess.Popen[bytes]) -> tuple[bytes, str]:
        """Let the process end, or kill it; return what it wrote and how it ended."""
        try:
            output, errors = process.communicate(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            with suppress(subprocess.TimeoutExpired):  # what waits for a driver cannot always be killed
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


# --- what the samples say ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of a GPU: the first was taken just before a window of `seconds`, the last one just after it.

    `missing` are the reasons for what a row lacks. `pid` is the process that was measured; `isolated` says that it has
    a pid namespace of its own, from which NVML may show the pids of the host or hide processes.
    """

    constants: Row
    rows: list[Row]
    missing: Mapping[str, str]
    seconds: float
    pid: int
    isolated: bool

    def summary(self) -> dict[str, Any]:
        """Return all figures, the reasons for those that are absent, and the verdicts."""
        unavailable = {name: self._lack(name) for name in self.missing if name not in SAMPLED or self._column(name)}
        if self.isolated:
            unavailable["processes_outside"] = "processes outside of this container may compute there unseen"
        found = gather(
            {
                "sm_mhz": lambda: spread(self._values("sm_mhz")),
                "memory_mhz": lambda: spread(self._values("memory_mhz")),
                "temperature_c": lambda: max(self._values("temperature_c")),
                "power_w": lambda: self._mean("power_w"),
                "energy_j": self.energy_j,
                "utilization_percent": lambda: self._mean("utilization_percent"),
                "throttle_reasons": lambda: decode(reduce(or_, self._values("throttle_reasons"))),
                "memory_device_mb": lambda: max(self._values("memory_device_mb")),
                "memory_process_mb": self.memory_process_mb,
                "other_pids": self.other_pids,
            },
            unavailable,
        )
        window = {"samples": len(self._inside), "sampled_s": self.rows[-1]["t_s"] - self.rows[0]["t_s"]}
        end = {"verdicts": self.verdicts(), "unavailable": unavailable, "rows": thin(self.rows)}
        return self.constants | window | found | end

    @property
    def _inside(self) -> list[Row]:
        return self.rows[1:-1] or self.rows

    def _column(self, name: str) -> list[Any]:
        return [row[name] for row in self._inside if name in row]

    def _lack(self, name: str) -> str:
        total = len(self._inside)
        lacking = total - len(self._column(name))
        return self.missing[name] if lacking == total else f"{self.missing[name]} (in {lacking} of {total} samples)"

    def _values(self, name: str) -> list[Any]:
        values = self._column(name)
        if not values:
            raise Absent(self.missing[name])
        return values

    def _mean(self, name: str) -> float:
        values = self._values(name)
        return sum(values) / len(values)

    def energy_j(self) -> float:
        """Return what the counter counted from the first row to the last one, in J."""
        counted = [row["energy_j"] for row in (self.rows[0], self.rows[-1]) if "energy_j" in row]
        if len(counted) < 2:
            raise Absent(self.missing["energy_j"])
        if self.seconds < MIN_ENERGY_S:
            raise Absent(f"the counter is too coarse for {self.seconds:.2g} s; it needs {MIN_ENERGY_S:g} s")
        if counted[1] < counted[0]:
            raise Absent("the counter began anew, as it does when the driver is loaded")
        return counted[1] - counted[0]

    def memory_process_mb(self) -> float:
        """Return the peak of the memory of the measured process, in MB."""
        found = [size for row in self._values("processes") for pid, size in row if pid == self.pid and size]
        if not found:
            raise Absent(f"NVML gives no memory for pid {self.pid}")
        return max(found)

    def other_pids(self) -> list[int]:
        """Return the other processes that compute there, or raise Absent if NVML's pids are not those of here."""
        seen = {pid for row in self._values("processes") for pid, _ in row}
        if self.isolated and self.pid not in seen:
            raise Absent("NVML does not list this process, which is in a container, by the pid that it has here")
        return sorted(seen - {self.pid})

    def is_shared(self) -> bool:
        """Say whether another process was seen; where pids mean nothing, one process is taken for the measured one."""
        try:
            return bool(self.other_pids())
        except Absent:
            return any(len(row) > 1 for row in self._column("processes"))

    def is_throttled(self) -> bool:
        """Say whether heat or the power supply slowed the clock, or it was low while the GPU was busy."""
        if any(reasons & SLOWED for reasons in self._column("throttle_reasons")):
            return True
        clocks = [row["sm_mhz"] for row in self._inside if "sm_mhz" in row and _is_busy(row)]
        maximum = self.constants.get("sm_max_mhz", 0)
        return bool(clocks) and spread(clocks)["median"] < LOW_CLOCK * maximum

    def verdicts(self) -> list[str]:
        """Return what should keep a reader from comparing the measurement with others."""
        capped = any(reasons & SW_POWER_CAP for reasons in self._column("throttle_reasons"))
        found = {"throttled": self.is_throttled(), "power_capped": capped, "shared": self.is_shared()}
        return [verdict for verdict, holds in found.items() if holds]


def _is_busy(row: Row) -> bool:
    """Go by the utilisation, which lags behind, only where the GPU does not say that it is idle."""
    if "throttle_reasons" in row:
        return not row["throttle_reasons"] & GPU_IDLE
    return row.get("utilization_percent", 100) > 0


def decode(reasons: int) -> list[str]:
    """Name the bits of NVML's clock reasons, unknown ones by their value."""
    bits = (1 << place for place in range(reasons.bit_length()))
    return [REASONS.get(bit, hex(bit)) for bit in bits if reasons & bit]


def thin(rows: list[Row]) -> dict[str, list[Any]]:
    """Return the numbers of every n-th row by column, at most `KEPT_ROWS`; the time is that since the first row."""
    kept = rows[:: -(-len(rows) // KEPT_ROWS)]
    names = [name for name in SAMPLED if name != "processes" and any(name in row for row in kept)]
    times = [round(row["t_s"] - rows[0]["t_s"], 3) for row in kept]
    return {"t_s": times} | {name: [row.get(name) for row in kept] for name in names}


# --- CPU --------------------------------------------------------------------------------------------------------------

Energy = dict[str, tuple[int, int]]


class Processor:
    """Looks at the CPU before and after: energy, clocks, and how often this process had to make room for others."""

    def __init__(self, powercap: Path) -> None:
        self.powercap = powercap

    def start(self) -> None:
        """Take the first look; the counters last, close to what is measured."""
        self.mhz = core_mhz(os.sched_getaffinity(0))
        self.switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        self.energy: Energy = {}
        with suppress(Absent):  # the second look says why
            self.energy = read_rapl(self.powercap)

    def stop(self, seconds: float) -> dict[str, Any]:
        """Take the second look and return the differences over `seconds`."""
        unavailable: dict[str, str] = {}
        energy = gather({"energy_j": lambda: joules(self.energy, read_rapl(self.powercap), seconds)}, unavailable)
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - self.switches
        clocks = self.mhz + core_mhz(os.sched_getaffinity(0))
        if clocks:
            energy["cpu_mhz"] = spread(clocks)
        else:
            unavailable["cpu_mhz"] = "neither cpufreq nor /proc/cpuinfo gives it here"
        return energy | {"involuntary_switches": switches, "verdicts": [], "unavailable": unavailable}


def read_rapl(powercap: Path) -> Energy:
    """Return energy and range in microjoules of each CPU package, or raise Absent."""
    try:
        # "core" is a part of a package, "dram" comes on top and not everywhere, "psys" is the whole machine.
        domains = powercap.glob("intel-rapl:*")
        packages = [path for path in domains if (path / "name").read_text().startswith("package")]
        found = {path.name: (_number(path / "energy_uj"), _number(path / "max_energy_range_uj")) for path in packages}
    except (OSError, ValueError) as error:
        # The energy tells what other processes compute.
        raise Absent(f"{error}; since CVE-2020-8694 it is usually for root alone") from None
    if not found:
        raise Absent(f"{powercap} has no CPU package (no RAPL: a virtual machine, or the driver is not loaded)")
    return found


def _number(path: Path) -> int:
    return int(path.read_text())


def joules(before: Energy, after: Energy, seconds: float) -> float:
    """Return the J of all packages between two readings, whose counters may have wrapped once, or raise Absent."""
    if before.keys() != after.keys():
        raise Absent("the packages that can be read changed meanwhile")
    if any(seconds * PACKAGE_W * 1e6 > span for _, span in after.values()):
        raise Absent(f"in {seconds:.0f} s the counter may have wrapped more than once")
    return sum((energy - before[name][0]) % span for name, (energy, span) in after.items()) / 1e6


def core_mhz(cores: set[int], cpus: Path = CPUS, cpuinfo: Path = CPUINFO) -> list[float]:
    """Return the clocks of `cores` by cpufreq, else by /proc/cpuinfo; none if neither has them."""
    with suppress(OSError, ValueError):
        return [_number(cpus / f"cpu{core}" / "cpufreq" / "scaling_cur_freq") / 1e3 for core in sorted(cores)]
    try:
        blocks = cpuinfo.read_text().split("\n\n")
    except OSError:
        return []
    pairs = (re.search(r"^processor\s*: (\d+)$.*^cpu MHz\s*: ([\d.]+)$", block, re.M | re.S) for block in blocks)
    return [float(pair[2]) for pair in pairs if pair and int(pair[1]) in cores]


if __name__ == "__main__":
    sample(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
