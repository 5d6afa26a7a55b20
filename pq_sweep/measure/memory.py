"""The peak of memory while something runs."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from pq_sweep.core.result import Latency, Memory
from pq_sweep.types import Record


def release_memory() -> None:
    """Give freed memory back to the system and the device, so that the peak is not that of an earlier stage."""
    gc.collect()
    _set_aside()
    torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@cache
def _set_aside() -> None:
    """Have garbage collections leave out the objects that exist at the first job: those of libraries, which stay."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries complain about what is left over at the end


@cache
def free_at_first(device: str) -> int:
    """Return the bytes of a GPU's memory that were free when this process first asked, which it does before all else.

    CUDA's own part, some hundred MB, is taken already, as asking takes it.
    """
    return int(torch.cuda.mem_get_info(device)[0])


def device_memory(device: str, latencies: Mapping[str, Latency]) -> Memory:
    """Return the peaks of a GPU's memory while latency was measured at any batch size, in MB.

    The peaks of torch's allocator are those since the last reset: of tensors, and of what it reserves for them. What
    libraries have once taken they keep, so one look at what is free is enough.
    """
    process, whole = watched_memory([figures.device_state for figures in latencies.values()])
    taken = free_at_first(device) - torch.cuda.mem_get_info(device)[0]
    return Memory(
        allocator_mb=torch.cuda.max_memory_allocated(device) / 1e6,
        allocator_reserved_mb=torch.cuda.max_memory_reserved(device) / 1e6,
        nvml_process_mb=process,
        nvml_device_mb=whole,
        taken_mb=taken / 1e6 if taken > 0 else None,  # others may have given back more
    )


def watched_memory(states: list[Record]) -> tuple[float | None, ...]:
    """Return the most memory that NVML saw in use by this process and on the whole device, in MB, or None."""
    names = ("memory_process_mb", "memory_device_mb")
    return tuple(max((state[name] for state in states if name in state), default=None) for name in names)


def reset_peak_memory(device: str) -> bool:
    """Start a new peak of the process's resident memory, or of torch's memory on the CUDA device, if allowed to."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_peak_mb() -> float:
    """Return the peak of the process's resident memory since the last reset in MB (10^6 bytes)."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
