"""What a device does while something is measured on it: clocks, temperature, power, throttling, processes, energy.

A GPU is sampled by a process of its own, which runs `nvml.py` and imports nothing heavy, so that sampling does not hold
Python's lock in the timed loop. A CPU is only looked at before and after, because sampling would put load on it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pq_sweep.measure.monitor.cpu import POWERCAP, Processor
from pq_sweep.measure.monitor.identity import identify
from pq_sweep.measure.monitor.sampler import Sampler

__all__ = ["Monitor", "identify"]


class Monitor:
    """Watches "cpu" or "cuda:N" while a `with` block runs; afterwards `result` holds what was seen, as plain values.

    N is torch's number. `uuid` is that of the GPU or MIG instance; without it CUDA_VISIBLE_DEVICES says which one it
    is. `result["unavailable"]` gives the reason for every figure that is absent. No measurement fails because of a
    monitor.

    GPU: clocks are in MHz; temperature is a peak; power and utilisation are means, and some GPUs give the mean power of
    the last second. `memory_process_mb` (this process) and `memory_device_mb` (the whole device with what its driver
    reserves) are the peaks of the samples, in MB of 10^6 bytes. `rows` are the samples, thinned out. `verdicts` are
    "throttled" (by heat or the power supply, or the median clock was under 75 % of the maximum while the GPU was busy
    and neither at its power limit nor at a clock that was set), "power_capped", and "shared" (processes other than this
    one, its ancestors and descendants compute there: `other_pids`). NVML knows power, energy and utilisation of whole
    GPUs, not of a MIG instance; clocks and temperature are those of the GPU around the instance.

    `energy_j` was used in `sampled_s`, which is a little longer than `seconds`. Idle power is part of it and cannot be
    told apart: after the warm-up a GPU keeps its clocks up for seconds, so it is not at rest just before the window.

    CPU: `energy_j` is that of the packages, without memory, whichever process used it; `cpu_mhz` is that of the usable
    cores, just before and just after.
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
