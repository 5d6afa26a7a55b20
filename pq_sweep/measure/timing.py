"""Timing one call again and again: warm-up, sampling until the median is known, and the statistics of the samples.

docs/measuring.md gives the reason and the source of every number here.
"""

from __future__ import annotations

import math
import statistics
import time
import typing
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pq_sweep.core.result import Latency, Paired, Spread, Timed
from pq_sweep.types import Record

Call = Callable[[], Any]
Repeated = typing.TypeVar("Repeated", Latency, Paired)

# Samples needed to state a percentile with 99 % confidence (MLPerf LoadGen's early-stopping rule, one overshoot).
SAMPLES_FOR = {90: 64, 99: 662}
# Besides an interval that is too wide, a result is unstable if the medians of the two halves, or of repeats, differ by
# more than DRIFT, or the quartiles by more than SPREAD, all relative to the median.
DRIFT = 0.02
SPREAD = 0.1
# Under load a server's GPU runs at 1.2 to 2 GHz; with a slower clock than this it waits longer than it is asked to.
CYCLES_PER_NS = 2
LEAST_HOLD_NS, MOST_HOLD_NS = 20_000, 50_000_000
HOST_SPREAD = 1.5  # of the time that handing over takes, over its least
OUTLIER = 14.826  # modified z-score, as in hyperfine: 10 standard deviations of a normal distribution


class Clock(typing.Protocol):
    """Times calls, and tells the time between them."""

    name: str

    def __call__(self, call: Call) -> int:
        """Return how long a call took, in ns."""
        ...

    def now(self) -> float:
        """Return the time in s."""
        ...


class HostClock:
    """Wall time of one call by the monotonic clock, in ns; the call has to wait for its own answer."""

    name = "perf_counter_ns"

    def __call__(self, call: Call) -> int:
        start = time.perf_counter_ns()
        call()
        return time.perf_counter_ns() - start

    def now(self) -> float:
        return time.perf_counter()


@dataclass
class CudaClock:
    """Device time of one call by CUDA events on the session's stream of a device, in ns, one call in flight.

    Events would also time the device while it waits for the rest of the call to be handed over. So it first waits
    itself, in a kernel that only counts cycles, while the host gets ahead (nvbench's blocking kernel does the same).
    `enqueue_ns` is how long the host took to hand over each call.
    """

    device: str
    name: str = "cuda_event"
    enqueue_ns: list[int] = field(default_factory=list)
    least: dict[Call, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        self.stream = torch.cuda.current_stream(self.device)
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, call: Call) -> int:
        self._hold(call)
        self.start.record(self.stream)
        before = time.perf_counter_ns()
        call()
        enqueue = time.perf_counter_ns() - before
        self.end.record(self.stream)
        self.end.synchronize()
        taken = round(self.start.elapsed_time(self.end) * 1e6)
        known = self.least.get(call, (enqueue, taken))
        self.least[call] = min(known[0], enqueue), min(known[1], taken)
        self.enqueue_ns.append(enqueue)
        return taken

    def now(self) -> float:
        return time.perf_counter()

    def _hold(self, call: Call) -> None:
        """Let the device wait while the host gets ahead with a call, if the call was made before."""
        import torch

        if call in self.least:
            with torch.cuda.stream(self.stream):
                torch.cuda._sleep(CYCLES_PER_NS * hold_ns(*self.least[call]))


def hold_ns(enqueue: int, taken: int) -> int:
    """Return how long a device has to wait for its host to get ahead, from the least of earlier calls, in ns.

    If handing over takes longer than the device, the host needs the difference. In any case it needs what comes before
    the first kernel, which is part of `enqueue` but not known. A device that is always at work rests for a quarter of
    that time at most, as it would become cooler, and faster, than it usually is.
    """
    ahead = HOST_SPREAD * enqueue
    return round(min(max(ahead - taken, min(ahead, taken / 4)) + LEAST_HOLD_NS, MOST_HOLD_NS))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How long to measure; a YAML of conf/measure holds the values and their source.

    Warm-up ends after `warmup_iterations` and `warmup_s`, and, with `window`, once the medians of two successive
    windows of iterations differ by less than `agreement` (at most `warmup_max_s`). Sampling ends after `iterations` and
    `min_s` once the 95 % interval of the median reaches no further than `interval` of it to either side. It ends at
    `max_s` in any case, but not before `min_iterations`. With `paired`, the uncompressed model is timed as well, in
    turn with the compressed one in the same runtime. With `repeats` above 1, everything is measured that many times,
    each time in a fresh process. If other processes kept the CPU busy, latency is measured again up to `retries` times.
    """

    name: str
    batch_sizes: list[int]
    eval_batch_size: int | None
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
    interval: float
    paired: bool
    repeats: int
    retries: int

    def evaluation_batch(self, device: str) -> int:
        """Return how many images are evaluated at once: few on a CPU, so that they fit into caches and memory pages."""
        return self.eval_batch_size or (8 if device == "cpu" else 64)

    def done(self, count: int, seconds: float, half_width: float = 0.0) -> bool:
        """Say whether `count` samples in `seconds` are enough, with the median known to the share `half_width`."""
        if self.max_s is not None and seconds >= self.max_s:
            return count >= self.min_iterations
        enough = count >= max(self.iterations, self.min_iterations) and seconds >= self.min_s
        return enough and half_width <= self.interval


def timed(
    call: Call, clock: Clock, protocol: Protocol, batch_size: int, watched: AbstractContextManager[Any]
) -> tuple[Timed, np.ndarray]:
    """Time a call on `batch_size` images; return the figures and every sample (N,) in ns: nothing is dropped.

    `watched` is entered for the samples, but not for the warm-up.
    """
    warmup = warm_up(call, clock, protocol)
    with watched:
        samples, seconds = sample(call, clock, protocol)
    found = summarise(samples, batch_size, protocol.interval)
    return Timed(**vars(found), clock=clock.name, warmup=warmup, duration_s=seconds), samples


def warm_up(call: Call, clock: Clock, protocol: Protocol) -> Record:
    """Run until the protocol's warm-up is over; its samples are not kept."""
    times: list[int] = []
    start = clock.now()
    converged = protocol.window is None
    while True:
        seconds = clock.now() - start
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


def sample(call: Call, clock: Clock, protocol: Protocol) -> tuple[np.ndarray, float]:
    """Time calls until the protocol is content; return the samples (N,) in ns and the seconds that it took."""
    samples: list[int] = []
    seconds = _until_known(lambda: samples.append(clock(call)), lambda: np.asarray(samples), clock, protocol)
    return np.asarray(samples), seconds


def _until_known(step: Callable[[], None], values: Callable[[], np.ndarray], clock: Clock, protocol: Protocol) -> float:
    """Take steps until the median of the values is known as well as the protocol asks; return the seconds it took."""
    start, count, look_at = clock.now(), 0, 0
    while True:
        seconds = clock.now() - start
        if count >= look_at and protocol.done(count, seconds):
            if protocol.done(count, seconds, half_width(values())):
                return seconds
            look_at = count + count // 20  # not after each step, as each look sorts everything
        step()
        count += 1


def paired(call: Call, other: Call, clock: Clock, protocol: Protocol) -> tuple[Paired, dict[str, np.ndarray]]:
    """Time two calls in turn, as many pairs as the protocol's samples; return how much faster `call` is than `other`.

    What changes slowly, such as a clock or another user's load, affects both calls and drops out of the ratio of each
    pair. The two calls take turns at going first.
    """
    warm_up(other, clock, protocol)
    own: list[int] = []
    others: list[int] = []

    def pair() -> None:
        turns = [(own, call), (others, other)]
        for samples, timed_call in turns if len(own) % 2 == 0 else turns[::-1]:
            samples.append(clock(timed_call))

    _until_known(pair, lambda: np.asarray(others) / np.asarray(own), clock, protocol)
    taken = {"paired": np.asarray(own), "paired_dense": np.asarray(others)}
    return _ratio(taken["paired"], taken["paired_dense"], protocol.interval), taken


def _ratio(own: np.ndarray, others: np.ndarray, interval: float) -> Paired:
    ratios = others / own
    return Paired(
        pairs=len(ratios),
        speedup=float(np.median(ratios)),
        speedup_ci95=median_interval(ratios),
        dense_p50_ms=float(np.median(others)) / 1e6,
        p50_ms=float(np.median(own)) / 1e6,
        unstable=unstable(ratios, interval),
    )


def middle(measured: list[Repeated], figure: str) -> Repeated:
    """Return the measurement with the middle value of a figure, together with the values of all measurements.

    Of an even number of values, the lower of the two in the middle counts. A spread above DRIFT makes it unstable.
    """
    values = [getattr(one, figure) for one in measured]
    place = values.index(statistics.median_low(values))
    spread = (max(values) - min(values)) / values[place]
    return replace(
        measured[place],
        repeats={figure: values, "middle": place + 1, "spread": spread},
        unstable=measured[place].unstable + (["repeats"] if spread > DRIFT else []),
    )


def summarise(samples: np.ndarray, batch_size: int, interval: float) -> Spread:
    """Derive the figures from raw samples (ns); a percentile for which there are too few samples is None."""
    ms = samples / 1e6
    p90, p99 = (float(np.percentile(ms, q)) if len(ms) >= need else None for q, need in SAMPLES_FOR.items())
    return Spread(
        iterations=len(ms),
        p50_ms=float(np.median(ms)),
        p50_ci95_ms=median_interval(ms),
        p90_ms=p90,
        p99_ms=p99,
        mean_ms=float(ms.mean()),
        std_ms=float(ms.std(ddof=1)) if len(ms) > 1 else None,
        throughput=batch_size / float(np.median(ms)) * 1e3,
        outliers=outliers(ms),
        unstable=unstable(ms, interval),
    )


def median_interval(samples: np.ndarray) -> tuple[float, float] | None:
    """Return the 95 % interval of the median by order statistics, or None for fewer than 6 samples.

    It holds for any distribution if the samples are independent (David and Nagaraja 2003, Order Statistics, 7.1).
    """
    rank = math.floor((len(samples) + 1) / 2 - 0.98 * math.sqrt(len(samples)))
    if rank < 1:
        return None
    ordered = np.sort(samples)
    return float(ordered[rank - 1]), float(ordered[-rank])


def half_width(samples: np.ndarray) -> float:
    """Return how far the median's interval reaches from the median, relative to it, or infinity without an interval."""
    found, median = median_interval(samples), float(np.median(samples))
    return max(found[1] - median, median - found[0]) / median if found and median else math.inf


def unstable(samples: np.ndarray, interval: float) -> list[str]:
    """Name what speaks against the median of the samples: its interval, a drift between the halves, the spread."""
    median, middle = float(np.median(samples)), len(samples) // 2
    low, high = np.percentile(samples, (25, 75))
    found = {
        "interval": half_width(samples) > interval,
        "drift": _differ(samples[:middle], samples[middle:], DRIFT * median),
        "spread": high - low > SPREAD * median,
    }
    return [name for name, is_so in found.items() if is_so]


def _differ(first: np.ndarray, second: np.ndarray, least: float) -> bool:
    """Say whether two medians differ by more than `least`, and by more than chance."""
    one, other = median_interval(first), median_interval(second)
    if one is None or other is None:
        return False
    apart = one[1] < other[0] or other[1] < one[0]
    return apart and abs(float(np.median(first)) - float(np.median(second))) > least


def outliers(samples: np.ndarray) -> int:
    """Count samples with a modified z-score above OUTLIER (Iglewicz and Hoaglin 1993); they are kept."""
    away = np.abs(samples - np.median(samples))
    usual = float(np.median(away))
    return int((0.6745 * away > OUTLIER * usual).sum()) if usual else 0
