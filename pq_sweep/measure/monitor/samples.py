"""The samples of a GPU, and the figures and verdicts that follow from them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from pq_sweep.measure.monitor.figures import gather, spread
from pq_sweep.measure.monitor.nvml import SAMPLED, Absent, Row

# The energy counter of a GPU moves every 20 to 100 ms, which would be a large part of a shorter window.
MIN_ENERGY_S = 1.0
KEPT_ROWS = 300
LOW_CLOCK = 0.75  # of the maximum; nvbench throws away what it measured below that

GPU_IDLE, APPLICATION_CLOCKS, SW_POWER_CAP, HW_SLOWDOWN, SYNC_BOOST = 0x1, 0x2, 0x4, 0x8, 0x10
SW_THERMAL, HW_THERMAL, POWER_BRAKE = 0x20, 0x40, 0x80
SLOWED = HW_SLOWDOWN | SW_THERMAL | HW_THERMAL | POWER_BRAKE
# Reasons why a low clock is the usual one: a T4 or L4 at work is always at its power limit and far below its maximum.
EXPECTED = GPU_IDLE | APPLICATION_CLOCKS | SW_POWER_CAP | SYNC_BOOST
REASONS = {
    GPU_IDLE: "gpu_idle",
    APPLICATION_CLOCKS: "application_clocks",
    SW_POWER_CAP: "sw_power_cap",
    HW_SLOWDOWN: "hw_slowdown",
    SYNC_BOOST: "sync_boost",
    SW_THERMAL: "sw_thermal",
    HW_THERMAL: "hw_thermal",
    POWER_BRAKE: "power_brake",
    0x100: "display_clocks",
    0x200: "board_limit",
    0x400: "reliability",
}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Samples of a GPU: the first was taken just before a window of `seconds`, the last one just after it.

    `missing` are the reasons for what a row lacks. `pid` is the process that was measured. `family` are the processes
    in the rows that are itself, its ancestors or its descendants: a parent may hold a CUDA context while its child
    measures.
    `isolated` says that `pid` has a pid namespace of its own, from which NVML may show the pids of the host or hide
    processes.
    """

    constants: Row
    rows: list[Row]
    missing: Mapping[str, str]
    family: Collection[int]
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
        window |= {"look_ms": spread([row["look_s"] * 1e3 for row in self._inside])}
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
        """Return the energy that the counter added from the first row to the last one, in J."""
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
        """Return the processes outside the family that compute there; raise Absent if NVML has other pids than here."""
        seen = {pid for row in self._values("processes") for pid, _ in row}
        if self.isolated and self.pid not in seen:
            raise Absent("NVML does not list this process, which is in a container, by the pid that it has here")
        return sorted(seen - set(self.family))

    def is_shared(self) -> bool:
        """Say whether another process was seen; if pids mean nothing, one process is taken for the measured one."""
        try:
            return bool(self.other_pids())
        except Absent:
            return any(len(row) > 1 for row in self._column("processes"))

    def is_throttled(self) -> bool:
        """Say whether heat or the power supply slowed the clock, or the clock was low and nothing says why."""
        if any(reasons & SLOWED for reasons in self._column("throttle_reasons")):
            return True
        clocks = [row["sm_mhz"] for row in self._inside if "sm_mhz" in row and _may_be_fast(row)]
        maximum = self.constants.get("sm_max_mhz", 0)
        return bool(clocks) and spread(clocks)["median"] < LOW_CLOCK * maximum

    def verdicts(self) -> list[str]:
        """Return the reasons not to compare the measurement with others."""
        capped = any(reasons & SW_POWER_CAP for reasons in self._column("throttle_reasons"))
        found = {"throttled": self.is_throttled(), "power_capped": capped, "shared": self.is_shared()}
        return [verdict for verdict, holds in found.items() if holds]


def _may_be_fast(row: Row) -> bool:
    """Say whether a GPU was busy and not told to be slow; utilisation lags behind and counts without known reasons."""
    if "throttle_reasons" in row:
        return not row["throttle_reasons"] & EXPECTED
    return row.get("utilization_percent", 100) > 0


def decode(reasons: int) -> list[str]:
    """Name the bits of NVML's clock reasons, unknown ones by their value."""
    bits = (1 << place for place in range(reasons.bit_length()))
    return [REASONS.get(bit, hex(bit)) for bit in bits if reasons & bit]


def thin(rows: list[Row]) -> dict[str, list[Any]]:
    """Return the numbers of every n-th row by column, at most `KEPT_ROWS` rows; time counts from the first row."""
    kept = rows[:: -(-len(rows) // KEPT_ROWS)]
    names = [name for name in SAMPLED if name != "processes" and any(name in row for row in kept)]
    times = [round(row["t_s"] - rows[0]["t_s"], 3) for row in kept]
    return {"t_s": times} | {name: [row.get(name) for row in kept] for name in names}
