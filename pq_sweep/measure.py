"""Measurements: accuracy over samples, latency per batch size, memory, and the size of the network itself."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import math
import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pq_sweep.environment import gpu_uuid
from pq_sweep.monitor import Monitor
from pq_sweep.result import NOISY_LOAD
from pq_sweep.significance import Z95
from pq_sweep.threads import one_thread
from pq_sweep.timing import Call, Clock, CudaClock, HostClock, Protocol, Result, paired, timed
from pq_sweep.types import Data, Model, Session, Stage
from pq_sweep.weights import prunable, structure

# Share of the device's time from which on handing over a call is what limits (trtexec).
HOST_BOUND = 0.8
# What a monitor may say of a device that speaks against a median; at its power limit it is at work as usual.
UNSETTLING = ("throttled", "shared")

# Every sample of a measurement (N,) in ns and in order, by batch size and clock: "b8_host".
Samples = dict[str, Any]
Measure = Callable[[Session, Tensor, Protocol], tuple[Result, Samples]]


def accuracy(session: Session, data: Data, batch_size: int) -> tuple[Result, np.ndarray]:
    """Run the evaluation images once: top-1 and top-5 over samples, and the predicted class of each image (N,)."""
    hits1 = hits5 = 0
    predictions = []
    total = math.ceil(len(data.evaluation) / batch_size)
    batches = data.evaluation.batches(batch_size, session.device)
    bar = tqdm(batches, total=total, desc="accuracy", unit="batch", disable=None, leave=False)
    with nullcontext() if session.runtime == "torch" else one_thread():
        for images, labels in bar:
            logits = data.logits(session(images))
            places = rank(logits, labels)
            hits1 += int((places < 1).sum())
            hits5 += int((places < 5).sum())
            predictions.append(logits.argmax(dim=1).cpu().numpy())
    samples = len(data.evaluation)
    result = {
        "samples": samples,
        "batch_size": batch_size,
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


def wilson(hits: int, samples: int, z: float = Z95) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    share = hits / samples
    centre = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    # At 0 and 1 the bounds are exact; rounding would leave a speck.
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (low if hits else 0.0), (high if hits < samples else 1.0)


def speed(
    session: Session,
    data: Data,
    protocol: Protocol,
    stage: Stage,
    dense_session: Callable[[], AbstractContextManager[Session]],
) -> tuple[Result, Samples]:
    """Measure latency at every batch size of the protocol, and the peak memory meanwhile; return all samples too."""
    release_memory()
    resettable = _reset_peak_memory(session.device)
    samples: Samples = {}
    measured = _each_size("latency", latency, session, data, protocol, stage, samples)
    result = {"latency": measured, "peak_memory_mb": _peak_memory_mb(session.device) if resettable else None}
    if session.device != "cpu":
        result["memory"] = allocated(session.device) | watched_memory(measured)
    if protocol.paired:
        with dense_session() as dense:
            pair = partial(_paired, dense)
            result["paired"] = _each_size("paired", pair, session, data, protocol, stage, samples)
    return result, samples


def _each_size(
    name: str, measure: Measure, session: Session, data: Data, protocol: Protocol, stage: Stage, samples: Samples
) -> Result:
    """Measure at every batch size as a stage of its own; add what was sampled to `samples`."""
    measured = {}
    for batch_size in protocol.batch_sizes:
        with stage(f"{name} b{batch_size}", alone=True):
            images = latency_images(data, batch_size, session.device)
            measured[str(batch_size)], taken = measure(session, images, protocol)
            samples |= {f"b{batch_size}_{clock}": values for clock, values in taken.items()}
    return measured


def _paired(dense: Session, session: Session, images: Tensor, protocol: Protocol) -> tuple[Result, Samples]:
    """Time a session in turn with that of the uncompressed model, on the device's clock."""
    clock = HostClock() if session.device == "cpu" else CudaClock()
    return paired(lambda: session(images), lambda: dense(images), clock, protocol)


def latency(session: Session, images: Tensor, protocol: Protocol) -> tuple[Result, Samples]:
    """Time `session` on `images`, which lie on its device; return the figures and the samples in ns of each clock.

    On the CPU there is one latency, taken again, up to `protocol.retries` times, while other processes are busy; the
    quietest counts and `loads` are those of all. On CUDA it is the device's time, and `host_to_host` that of a caller
    whose images and answers are in host memory, copies included; `pipelined_throughput` is that of calls which do not
    wait for each other.
    """
    if session.device != "cpu":
        return _loaded(_on_cuda, session, images, protocol)
    tries = [_loaded(_on_cpu, session, images, protocol)]
    while tries[-1][0]["load_of_others"] > NOISY_LOAD and len(tries) <= protocol.retries:
        tries.append(_loaded(_on_cpu, session, images, protocol))
    loads = [figures["load_of_others"] for figures, _ in tries]
    figures, samples = tries[loads.index(min(loads))]
    return figures | {"loads": loads}, samples


def _loaded(measure: Measure, session: Session, images: Tensor, protocol: Protocol) -> tuple[Result, Samples]:
    """Measure, and say what this process and the others used of the CPU meanwhile."""
    others, cpu, start = _other_load(), time.process_time(), time.perf_counter()
    figures, samples = measure(session, images, protocol)
    seconds, calls = time.perf_counter() - start, sum(map(len, samples.values())) + figures["warmup"]["iterations"]
    return figures | {
        "cpu_time_per_iteration_ms": (time.process_time() - cpu) / calls * 1e3,
        "load_of_others": max(0.0, _other_load() - others) / seconds,
    }, samples


def _on_cpu(session: Session, images: Tensor, protocol: Protocol) -> tuple[Result, Samples]:
    figures, samples = _watched(session, lambda: session(images), HostClock(), protocol, len(images))
    return figures, {"host": samples}


def _watched(
    session: Session, call: Call, clock: Clock, protocol: Protocol, batch_size: int
) -> tuple[Result, np.ndarray]:
    """Time a call and say what its device did meanwhile: a median taken on a throttled or shared one is not settled."""
    monitor = Monitor(session.device, gpu_uuid(session.device))
    figures, samples = timed(call, clock, protocol, batch_size, monitor)
    energy = monitor.result.get("energy_j")
    share = figures["duration_s"] / monitor.result.get("sampled_s", monitor.result["seconds"])
    return figures | {
        "energy_per_image_j": energy and energy * share / (len(samples) * batch_size),
        "device_state": monitor.result,
        "unstable": figures["unstable"] + [word for word in monitor.result["verdicts"] if word in UNSETTLING],
    }, samples


def _on_cuda(session: Session, images: Tensor, protocol: Protocol) -> tuple[Result, Samples]:
    """Time the device, then the way from host to host, then calls that are all handed over at once."""
    clock, pinned = CudaClock(), images.cpu().pin_memory()
    figures, device = _watched(session, lambda: session(images), clock, protocol, len(images))

    def there_and_back() -> Tensor:
        return session(pinned.to(session.device, non_blocking=True)).cpu()

    host, way = timed(there_and_back, HostClock(), protocol, len(images), nullcontext())
    enqueue = float(np.median(clock.enqueue_ns[-len(device) :])) / 1e6
    return figures | {
        "host_to_host": host,
        "enqueue_ms": enqueue,
        # trtexec's rule: the device waits for its host.
        "host_bound": enqueue > HOST_BOUND * figures["p50_ms"],
        "pipelined_throughput": _pipelined(session, images, len(device)),
    }, {"device": device, "host": way}


def _pipelined(session: Session, images: Tensor, calls: int) -> float:
    """Return images per second of calls on the current stream that wait for none but the last."""
    torch.cuda.synchronize(session.device)
    start = time.perf_counter()
    for _ in range(calls):
        session(images)
    torch.cuda.synchronize(session.device)
    return calls * len(images) / (time.perf_counter() - start)


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


def macs(model: Model) -> int:
    """Count the multiply-accumulates of one image in convolutions and matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Attention's fast path is one operator that the counter does not know, nor does torch 2.10's its fused kernel.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.module(model.sample(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops() // 2)


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


def _other_load() -> float:
    """Return the CPU seconds used so far on this machine by everything but this process."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = (ticks + [0] * 8)[:8]
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime
