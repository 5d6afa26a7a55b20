"""Measurements: accuracy over samples, latency per batch size, memory, and the size of the network itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pq_sweep.fingerprint import digest
from pq_sweep.pruners import prunable
from pq_sweep.types import Data, Model, Session, Stage

Result = dict[str, Any]

# Samples needed to state a percentile with 99 % confidence (MLPerf LoadGen's early-stopping rule, one overshoot).
SAMPLES_FOR = {90: 64, 99: 662}


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long to measure; a YAML of conf/measure holds the values and their source.

    Warm-up ends after `warmup_iterations` and `warmup_s`, and, with `window`, once the medians of two successive
    windows of iterations differ by less than `agreement` (at most `warmup_max_s`). Sampling ends after `iterations`
    and `min_s`, or at `max_s` but then not before `min_iterations`.
    """

    name: str
    batch_sizes: list[int]
    eval_batch_size: int
    threads: int | None
    warmup_iterations: int
    warmup_s: float
    window: int | None
    agreement: float
    warmup_max_s: float
    min_iterations: int
    iterations: int
    min_s: float
    max_s: float | None

    def done(self, count: int, seconds: float) -> bool:
        """Say whether `count` samples in `seconds` are enough."""
        if self.max_s is not None and seconds >= self.max_s:
            return count >= self.min_iterations
        return count >= max(self.iterations, self.min_iterations) and seconds >= self.min_s


class CpuClock:
    """Wall time of one call by the monotonic clock, in ns."""

    name = "perf_counter_ns"

    def __call__(self, call: Callable[[], Any]) -> int:
        start = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - start


class CudaClock:
    """Device time of one call by CUDA events on the current stream, in ns, one call in flight."""

    name = "cuda_event"

    def __call__(self, call: Callable[[], Any]) -> int:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return round(start.elapsed_time(end) * 1e6)


def accuracy(session: Session, data: Data, batch_size: int) -> tuple[Result, np.ndarray]:
    """Run the evaluation images once: top-1 and top-5 over samples, and the predicted class of each image (N,)."""
    hits1 = hits5 = 0
    predictions = []
    total = math.ceil(len(data.evaluation) / batch_size)
    batches = data.evaluation.batches(batch_size, session.device)
    for images, labels in tqdm(batches, total=total, desc="accuracy", unit="batch", disable=None, leave=False):
        logits = data.logits(session(images))
        places = rank(logits, labels)
        hits1 += int((places < 1).sum())
        hits5 += int((places < 5).sum())
        predictions.append(logits.argmax(dim=1).cpu().numpy())
    samples = len(data.evaluation)
    result = {
        "samples": samples,
        "top1": hits1 / samples,
        "top1_ci95": wilson(hits1, samples),
        # With five classes or fewer every answer is among the first five.
        "top5": hits5 / samples if len(data.classes) > 5 else None,
    }
    return result, np.concatenate(predictions)


def rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the true one (B,), in (B, classes) logits.

    Quantized logits are often equal; as for argmax, the first class then counts first. NaN never counts as a hit.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier) | logits.isnan()
    return before.sum(dim=1) + own.isnan()[:, 0] * logits.shape[1]


def wilson(hits: int, samples: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    share = hits / samples
    centre = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    # At 0 and 1 the bounds are exact; rounding would leave a speck.
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (low if hits else 0.0), (high if hits < samples else 1.0)


def speed(session: Session, data: Data, protocol: Protocol, stage: Stage) -> Result:
    """Measure latency at every batch size of the protocol, and the peak memory meanwhile."""
    _release_memory()
    resettable = _reset_peak_memory(session.device)
    timed = {}
    for batch_size in protocol.batch_sizes:
        with stage(f"latency b{batch_size}"):
            timed[str(batch_size)] = latency(session, latency_images(data, batch_size, session.device), protocol)
    return {"latency": timed, "peak_memory_mb": _peak_memory_mb(session.device) if resettable else None}


def latency(session: Session, images: Tensor, protocol: Protocol) -> Result:
    """Time `session` on `images` (on its device) and keep every sample; nothing else runs, nothing is dropped."""
    clock = CpuClock() if session.device == "cpu" else CudaClock()

    def call() -> Any:
        return session(images)

    warmup = _warm_up(call, clock, protocol)
    samples: list[int] = []
    others, cpu, start = _other_load(), time.process_time(), time.perf_counter()
    while not protocol.done(len(samples), time.perf_counter() - start):
        samples.append(clock(call))
    seconds = time.perf_counter() - start
    cpu = time.process_time() - cpu
    return summarise(np.asarray(samples), len(images)) | {
        "clock": clock.name,
        "warmup": warmup,
        "duration_s": seconds,
        "cpu_time_per_iteration_ms": cpu / len(samples) * 1e3,
        "load_of_others": max(0.0, _other_load() - others) / seconds,
        "samples_ns": samples,
    }


def summarise(samples: np.ndarray, batch_size: int) -> Result:
    """Derive the figures from raw samples (ns); a percentile that the samples cannot state is None."""
    ms = samples / 1e6
    percentiles = {
        f"p{q}_ms": float(np.percentile(ms, q)) if len(ms) >= need else None for q, need in SAMPLES_FOR.items()
    }
    return {
        "iterations": len(ms),
        "p50_ms": float(np.median(ms)),
        **percentiles,
        "mean_ms": float(ms.mean()),
        "std_ms": float(ms.std(ddof=1)) if len(ms) > 1 else None,
        "throughput": batch_size / float(np.median(ms)) * 1e3,
    }


def _warm_up(call: Callable[[], Any], clock: Callable[[Callable[[], Any]], int], protocol: Protocol) -> Result:
    """Run until the protocol's warm-up is over."""
    times: list[int] = []
    start = time.perf_counter()
    converged = protocol.window is None
    while True:
        seconds = time.perf_counter() - start
        if len(times) >= protocol.warmup_iterations and seconds >= protocol.warmup_s:
            converged = converged or _steady(times, protocol)
            if converged or seconds >= protocol.warmup_max_s:
                return {"iterations": len(times), "seconds": seconds, "converged": converged}
        times.append(clock(call))


def _steady(times: list[int], protocol: Protocol) -> bool:
    window = protocol.window or 0
    if len(times) < 2 * window:
        return False
    before, after = np.median(times[-2 * window : -window]), np.median(times[-window:])
    return bool(abs(after - before) < protocol.agreement * before)


def latency_images(data: Data, batch_size: int, device: str) -> Tensor:
    """Return the first evaluation images as a batch on `device`, repeated if there are fewer."""
    indices = [index % len(data.evaluation) for index in range(batch_size)]
    return data.evaluation.fetch(indices).to(device)


def network(model: Model, known: Result | None = None) -> Result:
    """Count parameters, multiply-accumulates of one image, and zeros among the prunable weights.

    `known` are the figures of the network before it was changed: while all shapes are the same, so is the arithmetic.
    """
    shapes = structure(model)
    weights = [getattr(part, name) for part, name in prunable(model.module)]
    zeros, total = (
        sum(int(n) for n in counts) for counts in zip(*((w.eq(0).sum(), w.numel()) for w in weights), strict=True)
    )
    return {
        "params": sum(parameter.numel() for parameter in model.module.parameters()),
        "nonzero_params": sum(int(parameter.count_nonzero()) for parameter in model.module.parameters()),
        "weights": total,
        "sparsity": zeros / total,
        "structure": shapes,
        "macs": known["macs"] if known and known["structure"] == shapes else macs(model),
    }


def structure(model: Model) -> str:
    """Return a hash of the names and shapes of all parameters."""
    return digest({name: list(parameter.shape) for name, parameter in model.module.named_parameters()})


def macs(model: Model) -> int:
    """Count the multiply-accumulates of one image in convolutions and matrix products."""
    from torch.utils.flop_counter import FlopCounterMode

    # Attention's fast path is one operator that the counter does not know.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.module(model.sample(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops() // 2)


def _release_memory() -> None:
    """Give freed memory back to the system, so that the peak is not that of an earlier stage."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _reset_peak_memory(device: str) -> bool:
    """Start a new peak of the process's resident memory, or of torch's memory on the CUDA device, if allowed to."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_memory_mb(device: str) -> float:
    """Return the peak since the last reset in MB (10^6 bytes)."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def use_threads(threads: int | None) -> int:
    """Set torch's CPU threads, by default to the cores that this process may use, and return the number."""
    count = threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


def _other_load() -> float:
    """Return the CPU seconds used so far on this machine by everything but this process."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = (ticks + [0] * 8)[:8]
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime
