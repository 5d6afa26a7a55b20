"""What a CPU does while something is measured on it."""

from __future__ import annotations

import os
import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

from pq_sweep.core.hardware import CPUINFO, processors
from pq_sweep.measure.monitor.figures import gather, spread
from pq_sweep.measure.monitor.nvml import Absent

# More than any CPU package draws for long: in a time of range / PACKAGE_W its energy counter wraps at most once.
PACKAGE_W = 600.0
POWERCAP, CPUS = Path("/sys/class/powercap"), Path("/sys/devices/system/cpu")

Energy = dict[str, tuple[int, int]]


class Processor:
    """Looks at the CPU before and after: energy, clocks, and how often this process had to make room for others."""

    def __init__(self, powercap: Path) -> None:
        self.powercap = powercap

    def start(self) -> None:
        """Take the first look; the energy counters come last, close to what is measured."""
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
        # "core" is a part of a package, "dram" is not part of it and not on every machine, "psys" is the whole machine.
        domains = powercap.glob("intel-rapl:*")
        packages = [path for path in domains if (path / "name").read_text().startswith("package")]
        found = {path.name: (_number(path / "energy_uj"), _number(path / "max_energy_range_uj")) for path in packages}
    except (OSError, ValueError) as error:
        # It is kept from users because the energy gives away what other processes compute.
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
    found = [one for one in processors(cpuinfo) if "cpu MHz" in one]
    return [float(one["cpu MHz"]) for one in found if int(one["processor"]) in cores]
