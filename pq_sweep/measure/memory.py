"""The peak of memory while something runs."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
from functools import cache
from pathlib import Path

import torch

from pq_sweep.measure.timing import Result


def release_memory() -> None:
    """Give freed memory back to the system and the device, so that the peak is not that of an earlier stage."""
    gc.collect()
    _set_aside()
    torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@cache
def _set_aside() -> None:
    """Have garbage collections leave out what there is at the first job: objects of libraries, which stay."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some libraries complain of what is left over at the end


def allocated(device: str) -> Result:
    """Return the peaks of torch's allocator since the last reset in MB: of tensors, and of what it holds for them."""
    return {
        "allocator_mb": torch.cuda.max_memory_allocated(device) / 1e6,
        "allocator_reserved_mb": torch.cuda.max_memory_reserved(device) / 1e6,
    }


def watched_memory(latencies: Result) -> Result:
    """Return the peaks that NVML saw while latency was measured at any batch size, in MB, or None if it saw none."""
    states = [figures["device_state"] for figures in latencies.values()]

    def peak(name: str) -> float | None:
        return max((state[name] for state in states if name in state), default=None)

    return {"nvml_process_mb": peak("memory_process_mb"), "nvml_device_mb": peak("memory_device_mb")}


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


def peak_memory_mb(device: str) -> float:
    """Return the peak since the last reset in MB (10^6 bytes)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6
