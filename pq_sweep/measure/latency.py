"""Latency at each batch size, of a session alone or in turn with the uncompressed model, and what the device did."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pq_sweep.core.environment import gpu_uuid
from pq_sweep.core.result import NOISY_LOAD, Latency, Paired, Speed
from pq_sweep.measure.memory import device_memory, release_memory, reset_peak_memory, resident_peak_mb
from pq_sweep.measure.monitor import Monitor
from pq_sweep.measure.timing import Call, Clock, CudaClock, HostClock, Protocol, paired, timed
from pq_sweep.types import Data, Session, Stage

# If handing over a call takes more than this share of the device's time, the host limits the speed (trtexec).
HOST_BOUND = 0.8
# Verdicts of a monitor that speak against a median; a device at its power limit works as usual.
UNSETTLING = ("throttled", "shared")

# Every sample of a measurement (N,) in ns and in order, by batch size and clock: "b8_host".
Samples = dict[str, Any]
Found = TypeVar("Found", Latency, Paired)
Measure = Callable[[Session, Tensor, Protocol], tuple[Found, Samples]]


def speed(
    session: Session,
    data: Data,
    protocol: Protocol,
    stage: Stage,
    dense_session: Callable[[], AbstractContextManager[Session]],
) -> tuple[Speed, Samples]:
    """Measure latency at every batch size of the protocol, and the peak memory meanwhile; return all samples too."""
    release_memory()
    resettable = reset_peak_memory(session.device)
    samples: Samples = {}
    measured = _each_size("latency", latency, session, data, protocol, stage, samples)
    if session.device == "cpu":
        memory, peak = None, resident_peak_mb() if resettable else None
    else:
        memory = device_memory(session.device, measured)
        peak = memory.process_mb
    pairs = None
    if protocol.paired:
        with dense_session() as dense:
            pairs = _each_size("paired", partial(_paired, dense), session, data, protocol, stage, samples)
    return Speed(latency=measured, peak_memory_mb=peak, memory=memory, paired=pairs), samples


def _each_size(
    name: str, measure: Measure[Found], session: Session, data: Data, protocol: Protocol, stage: Stage, samples: Samples
) -> dict[str, Found]:
    """Measure each batch size as a stage of its own, and add what was sampled to `samples`."""
    measured: dict[str, Found] = {}
    for batch_size in protocol.batch_sizes:
        with stage(f"{name} b{batch_size}", alone=True):
            images = latency_images(data, batch_size, session.device)
            measured[str(batch_size)], taken = measure(session, images, protocol)
            samples |= {f"b{batch_size}_{clock}": values for clock, values in taken.items()}
    return measured


def _paired(dense: Session, session: Session, images: Tensor, protocol: Protocol) -> tuple[Paired, Samples]:
    """Time a session in turn with one of the uncompressed model, on the device's clock."""
    clock = HostClock() if session.device == "cpu" else CudaClock(session.device)
    return paired(lambda: session(images), lambda: dense(images), clock, protocol)


def latency(session: Session, images: Tensor, protocol: Protocol) -> tuple[Latency, Samples]:
    """Time `session` on `images`, which lie on its device; return the figures and the samples in ns of each clock.

    On the CPU there is one latency. While other processes are busy it is measured again, up to `protocol.retries`
    times; the quietest try counts, and `loads` has the load of each. On CUDA, latency is the device's time, and
    `host_to_host` the time for a caller whose images and answers are in host memory, copies included;
    `pipelined_throughput` is that of calls which do not wait for each other.
    """
    if session.device != "cpu":
        return _loaded(_on_cuda, session, images, protocol)
    tries = [_loaded(_on_cpu, session, images, protocol)]
    while tries[-1][0].load_of_others > NOISY_LOAD and len(tries) <= protocol.retries:
        tries.append(_loaded(_on_cpu, session, images, protocol))
    loads = [figures.load_of_others for figures, _ in tries]
    figures, samples = tries[loads.index(min(loads))]
    return replace(figures, loads=loads), samples


def _loaded(measure: Measure[Latency], session: Session, images: Tensor, protocol: Protocol) -> tuple[Latency, Samples]:
    """Measure, and add how much of the CPU this process and the others used meanwhile."""
    others, cpu, start = _other_load(), time.process_time(), time.perf_counter()
    figures, samples = measure(session, images, protocol)
    seconds, calls = time.perf_counter() - start, sum(map(len, samples.values())) + figures.warmup["iterations"]
    cpu_ms, load = (time.process_time() - cpu) / calls * 1e3, max(0.0, _other_load() - others) / seconds
    return replace(figures, cpu_time_per_iteration_ms=cpu_ms, load_of_others=load), samples


def _on_cpu(session: Session, images: Tensor, protocol: Protocol) -> tuple[Latency, Samples]:
    figures, samples = _watched(session, lambda: session(images), HostClock(), protocol, len(images))
    return figures, {"host": samples}


def _watched(
    session: Session, call: Call, clock: Clock, protocol: Protocol, batch_size: int
) -> tuple[Latency, np.ndarray]:
    """Time a call and add what its device did meanwhile: on a throttled or shared device no median is settled."""
    monitor = Monitor(session.device, gpu_uuid(session.device))
    figures, samples = timed(call, clock, protocol, batch_size, monitor)
    doubts = [word for word in monitor.result["verdicts"] if word in UNSETTLING]
    return Latency(
        **vars(figures) | {"unstable": figures.unstable + doubts},
        energy_per_image_j=_energy(monitor, figures.duration_s, len(samples) * batch_size),
        device_state=monitor.result,
    ), samples


def _energy(monitor: Monitor, seconds: float, images: int) -> float | None:
    """Return the energy in J of each of the images that took so many seconds of what a monitor watched."""
    energy = monitor.result.get("energy_j")
    share = seconds / monitor.result.get("sampled_s", monitor.result["seconds"])
    return energy and energy * share / images


def _on_cuda(session: Session, images: Tensor, protocol: Protocol) -> tuple[Latency, Samples]:
    """Time the device, then the way from host to host, then calls that are handed over without waiting."""
    clock = CudaClock(session.device)
    with torch.cuda.device(session.device):
        pinned = images.cpu().pin_memory()
    figures, device = _watched(session, lambda: session(images), clock, protocol, len(images))

    def there_and_back() -> Tensor:
        return session(pinned.to(session.device, non_blocking=True)).cpu()

    host, way = timed(there_and_back, HostClock(), protocol, len(images), nullcontext())
    throughput, energy = _pipelined(session, images, len(device), figures.duration_s)
    enqueue = float(np.median(clock.enqueue_ns[-len(device) :])) / 1e6
    return replace(
        figures,
        energy_per_image_j=energy,
        host_to_host=host,
        enqueue_ms=enqueue,
        host_bound=enqueue > HOST_BOUND * figures.p50_ms,  # trtexec's rule: the device waits for its host
        pipelined_throughput=throughput,
    ), {"device": device, "host": way}


def _pipelined(session: Session, images: Tensor, calls: int, seconds: float) -> tuple[float, float | None]:
    """Return images per second and the energy of an image in J, of calls of which only the last is waited for.

    There are so many calls at least, and they take so many seconds at least. This is where energy is counted, as a
    device whose calls are timed one by one rests between them.
    """
    done, monitor = 0, Monitor(session.device, gpu_uuid(session.device))
    torch.cuda.synchronize(session.device)
    with monitor:
        start = time.perf_counter()
        while done < calls or time.perf_counter() - start < seconds:
            session(images)
            done += 1
        torch.cuda.synchronize(session.device)
        taken = time.perf_counter() - start
    return done * len(images) / taken, _energy(monitor, taken, done * len(images))


def latency_images(data: Data, batch_size: int, device: str) -> Tensor:
    """Return the first evaluation images as a batch on `device`, repeated if there are fewer."""
    indices = [index % len(data.evaluation) for index in range(batch_size)]
    return data.evaluation.fetch(indices).to(device)


def _other_load() -> float:
    """Return the CPU seconds used so far on this machine by everything but this process."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _, _, irq, softirq, steal = (ticks + [0] * 8)[:8]
    own = resource.getrusage(resource.RUSAGE_SELF)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.ru_utime - own.ru_stime
