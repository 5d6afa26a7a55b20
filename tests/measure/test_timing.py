"""Timing on clocks whose time is written down beforehand: what is dropped, kept, stated and called unstable."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import chain, cycle, repeat
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from omegaconf import OmegaConf
from protocols import protocol
from scipy.stats import binom, quantile_test

from pq_sweep.core.result import Latency, Paired, Timed
from pq_sweep.measure.timing import (
    SAMPLES_FOR,
    Protocol,
    half_width,
    median_interval,
    middle,
    outliers,
    paired,
    sample,
    summarise,
    timed,
    warm_up,
)

Call = Callable[[], Any]

# Summary of samples


def interpolated(samples: list[float], share: float) -> float:
    """Return the percentile between the two nearest samples."""
    ordered, place = sorted(samples), share * (len(samples) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def synthetic(count: int) -> np.ndarray:
    """Return samples in ns with a long tail."""
    return np.round(np.random.default_rng(count).lognormal(14, 0.4, count)).astype(np.int64)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 661, 662, 1000])
def test_a_summary_is_that_of_its_samples(count: int) -> None:
    samples = synthetic(count)
    ms = [value / 1e6 for value in samples.tolist()]
    result = summarise(samples, 8, math.inf)

    assert result.iterations == count
    assert result.p50_ms == pytest.approx(statistics.median(ms))
    assert result.mean_ms == pytest.approx(statistics.fmean(ms))
    assert result.throughput == pytest.approx(8 / (statistics.median(ms) / 1000))
    assert result.std_ms == (pytest.approx(statistics.stdev(ms)) if count > 1 else None)
    assert result.p90_ms == (pytest.approx(interpolated(ms, 0.90)) if count >= 64 else None)
    assert result.p99_ms == (pytest.approx(interpolated(ms, 0.99)) if count >= 662 else None)


@pytest.mark.parametrize(("q", "samples"), SAMPLES_FOR.items())
def test_a_percentile_needs_the_samples_of_loadgen(q: int, samples: int) -> None:
    """With one sample fewer, 99 % confidence is missed: q^n + n (1 - q) q^(n-1) is the chance of at most one above."""
    share = q / 100

    def chance(count: int) -> float:
        return share**count + count * (1 - share) * share ** (count - 1)

    assert chance(samples) <= 0.01 < chance(samples - 1)


# How long is measured


@pytest.mark.parametrize(
    ("options", "count", "seconds", "done"),
    [
        ({"iterations": 10, "min_s": 2.0}, 10, 1.9, False),
        ({"iterations": 10, "min_s": 2.0}, 9, 2.0, False),
        ({"iterations": 10, "min_s": 2.0}, 10, 2.0, True),
        ({"iterations": 10, "min_s": 2.0}, 9, 1e9, False),
        ({"iterations": 10, "min_s": 2.0, "max_s": 5.0}, 9, 4.9, False),
        ({"iterations": 10, "min_s": 2.0, "max_s": 5.0}, 9, 5.0, True),
        ({"iterations": 10, "min_s": 2.0, "max_s": 5.0, "min_iterations": 4}, 3, 60.0, False),
        ({"iterations": 10, "min_s": 2.0, "max_s": 5.0, "min_iterations": 4}, 4, 60.0, True),
        ({"iterations": 10, "min_iterations": 20}, 19, 1.0, False),
        ({"iterations": 10, "min_iterations": 20}, 20, 1.0, True),
        ({"iterations": 10, "min_s": 9.0, "max_s": 5.0}, 10, 5.0, True),
        ({"max_s": 0.0}, 0, 0.0, False),
    ],
)
def test_sampling_stops_by_the_rules(options: dict[str, Any], count: int, seconds: float, done: bool) -> None:
    assert protocol(**options).done(count, seconds) is done


@pytest.mark.parametrize(("given", "device", "size"), [(None, "cpu", 8), (None, "cuda:1", 64), (3, "cpu", 3)])
def test_a_device_has_its_batch_for_accuracy(given: int | None, device: str, size: int) -> None:
    assert protocol(eval_batch_size=given).evaluation_batch(device) == size


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf" / "measure").glob("*.yaml")])
def test_every_protocol_ends(name: str) -> None:
    """Its own stop rule holds after an hour of 100 ms calls, and not before its own minimum."""
    parts = [OmegaConf.load(ROOT / "conf" / "measure" / f"{stem}.yaml") for stem in ("quick", name)]
    options = OmegaConf.to_container(OmegaConf.merge(*parts))
    assert isinstance(options, dict)
    chosen = Protocol(**{str(key): value for key, value in options.items() if key not in ("_target_", "defaults")})

    assert not chosen.done(0, 3600.0)
    assert chosen.done(36_000, 3600.0)


# Warm-up


class Machine:
    """A clock that only moves when something is timed by it: by the next of `seconds`."""

    name = "machine"

    def __init__(self, seconds: Iterable[float]) -> None:
        self.seconds = iter(seconds)
        self.time = 100.0
        self.calls = 0

    def __call__(self, call: Call) -> int:
        call()
        self.calls += 1
        step = next(self.seconds)
        self.time += step
        return round(step * 1e9)

    def now(self) -> float:
        return self.time


def warm(seconds: Iterable[float], **options: Any) -> tuple[dict[str, Any], int]:
    """Warm up on a machine of given seconds per call; return the record and the number of calls."""
    machine, calls = Machine(seconds), list[int]()
    return warm_up(lambda: calls.append(1), machine, protocol(**options)), len(calls)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup_iterations": 0}, 0),
        ({"warmup_iterations": 5}, 5),
        ({"warmup_iterations": 5, "warmup_s": 2.0}, 5),
        ({"warmup_iterations": 5, "warmup_s": 7.0}, 7),
        ({"warmup_iterations": 5, "warmup_s": 7.5}, 8),
    ],
)
def test_warm_up_takes_its_iterations_and_its_time(options: dict[str, Any], expected: int) -> None:
    record, calls = warm(cycle([1.0]), **options)

    assert record == {"iterations": expected, "seconds": pytest.approx(expected), "converged": True}
    assert calls == expected


def until_steady(seconds: list[float], window: int, agreement: float, least: int) -> int:
    """Return after how many calls the medians of the last two windows first agree."""
    for count in range(least, len(seconds) + 1):
        if count >= 2 * window:
            before = statistics.median(seconds[count - 2 * window : count - window])
            after = statistics.median(seconds[count - window : count])
            if abs(after - before) < agreement * before:
                return count
    raise AssertionError("never steady")


SLOW_START = [8.0, 4.0, 2.0, *[1.0] * 40]
RAMP = [*[3.0 * 0.9**i for i in range(20)], *[0.36] * 40]
STEP = [*[2.0] * 3, *[1.0] * 40]
SLIDE = [*[0.975**i for i in range(60)], *[0.22] * 40]


@pytest.mark.parametrize("seconds", [SLOW_START, RAMP, STEP, SLIDE], ids=["slow start", "ramp", "step", "drift"])
@pytest.mark.parametrize("window", [2, 5])
@pytest.mark.parametrize("least", [0, 4, 30])
def test_warm_up_ends_when_two_windows_agree(seconds: list[float], window: int, least: int) -> None:
    options = {"window": window, "agreement": 0.02, "warmup_iterations": least, "warmup_max_s": 1e9}
    record, calls = warm(chain(seconds, cycle([1.0])), **options)

    assert calls == record["iterations"] == until_steady(seconds, window, 0.02, least)
    assert record["converged"] is True
    assert record["seconds"] == pytest.approx(sum(seconds[:calls]))


def test_warm_up_without_end_is_cut_and_says_so() -> None:
    growing = (1.2**i for i in range(1000))
    record, calls = warm(growing, window=3, agreement=0.02, warmup_iterations=4, warmup_s=1.0, warmup_max_s=50.0)

    assert record["converged"] is False
    assert record["seconds"] >= 50
    assert record["seconds"] - 1.2 ** (calls - 1) < 50  # and not a call longer


def test_a_warm_up_that_agrees_at_its_last_moment_has_converged() -> None:
    record, calls = warm(cycle([1.0]), window=2, agreement=0.02, warmup_s=4.0, warmup_max_s=4.0)

    assert (record["converged"], calls) == (True, 4)


# The median and how well it is known


@pytest.mark.parametrize("count", [*range(1, 200), 1000, 20_001])
def test_the_interval_of_the_median_covers_it_with_95_percent(count: int) -> None:
    """And is none too wide: the next narrower one, by one rank on each side, does not cover as much."""
    found = median_interval(np.arange(1, count + 1, dtype=float))
    if found is None:
        assert count < 6
        assert 1 - 2 * binom.cdf(0, count, 0.5) < 0.95
        return
    low, high = found
    assert low + high == count + 1
    assert 1 - 2 * binom.cdf(low - 1, count, 0.5) >= 0.95 - 1e-4
    assert 1 - 2 * binom.cdf(low, count, 0.5) < 0.96


@pytest.mark.parametrize("count", [6, 50, 333])
def test_the_interval_of_the_median_is_scipys(count: int) -> None:
    samples = synthetic(count)
    expected = quantile_test(samples, q=np.median(samples), p=0.5).confidence_interval(0.95)
    found = median_interval(samples)
    assert found is not None
    ordered = np.sort(samples).tolist()
    for one, other in zip(found, expected, strict=True):  # scipy takes one rank more on a side at times
        assert abs(ordered.index(one) - ordered.index(other)) <= 1


def test_half_a_width_is_relative_and_infinite_where_nothing_is_known() -> None:
    assert half_width(np.asarray([1.0, 2.0])) == math.inf
    assert half_width(np.zeros(100)) == math.inf
    assert half_width(np.full(100, 3.0)) == 0
    low, high = median_interval(samples := synthetic(500).astype(float)) or (0.0, 0.0)
    median = statistics.median(samples.tolist())
    assert half_width(samples) == pytest.approx(max(high - median, median - low) / median)


def test_sampling_goes_on_until_the_median_is_known() -> None:
    noise = np.random.default_rng(0).normal(1.0, 0.3, 10**5)
    wanted = protocol(iterations=50, interval=0.01, max_s=1e9)
    taken, seconds = sample(lambda: None, Machine(noise), wanted)
    assert len(taken) > 50
    assert seconds == pytest.approx(taken.sum() / 1e9)
    assert half_width(taken) <= 0.01
    assert half_width(taken[: round(len(taken) * 0.9)]) > 0.01 or len(taken) < 60
    assert "interval" not in summarise(taken, 1, 0.01).unstable


def test_sampling_ends_at_its_limit_and_says_that_the_median_is_not_known() -> None:
    noise = np.random.default_rng(0).normal(1.0, 0.3, 10**5)
    result, taken = timed(
        lambda: None, Machine(noise), protocol(iterations=50, interval=1e-4, max_s=200.0), 1, nullcontext()
    )
    assert 190 < len(taken) < 230
    assert "interval" in result.unstable


# Clocks that do what machines do


def jitter(share: float = 0.002, seed: int = 1) -> Iterator[float]:
    """Return factors close to 1."""
    generator = np.random.default_rng(seed)
    while True:
        yield from generator.normal(1.0, share, 1000).tolist()


def times(seconds: Iterable[float], share: float = 0.002) -> Iterator[float]:
    return (value * factor for value, factor in zip(seconds, jitter(share), strict=False))


def measured(seconds: Iterator[float], **options: Any) -> tuple[Timed, np.ndarray]:
    chosen = {"iterations": 1000, "interval": 0.01, "max_s": 100.0, "window": 20, "agreement": 0.02} | options
    return timed(lambda: None, Machine(seconds), protocol(**{"warmup_max_s": 15.0} | chosen), 1, nullcontext())


def test_a_steady_machine_is_stable() -> None:
    result, _ = measured(times(repeat(0.010)))
    assert result.unstable == []
    assert result.p50_ms == pytest.approx(10.0, rel=1e-3)
    assert result.outliers == 0


def test_a_slow_start_is_dropped() -> None:
    slow = [0.5, 0.2, 0.1, *(0.05 * 0.9**i for i in range(15))]
    result, taken = measured(times(chain(slow, repeat(0.010))))
    assert result.warmup["converged"]
    assert result.warmup["iterations"] >= len(slow)
    assert taken.max() < 0.0105e9
    assert result.p50_ms == pytest.approx(10.0, rel=1e-3)
    assert result.unstable == []


def test_a_drifting_machine_is_unstable() -> None:
    """As one that gets hot: a thousandth slower every ten calls, too little for two windows to differ."""
    result, _ = measured(times(0.010 * 1.0001**i for i in range(10**6)))
    assert result.warmup["converged"]
    assert "drift" in result.unstable


@pytest.mark.parametrize("share", [0.5, 0.7])
def test_a_machine_of_two_speeds_is_unstable(share: float) -> None:
    fast = np.random.default_rng(3).random(10**5) < share
    result, _ = measured(times(np.where(fast, 0.010, 0.013)))
    assert "spread" in result.unstable
    assert ("interval" in result.unstable) == (share == 0.5)


def test_spikes_are_kept_and_counted_and_do_not_move_the_median() -> None:
    spiky = (0.1 if i % 97 == 50 else 0.010 for i in range(10**6))
    result, taken = measured(times(spiky))
    assert result.unstable == []
    assert result.p50_ms == pytest.approx(10.0, rel=1e-3)
    assert result.outliers == (taken > 0.05e9).sum() > 0
    assert result.p99_ms > 50


def test_outliers_are_not_looked_for_where_most_samples_are_equal() -> None:
    assert outliers(np.asarray([1.0] * 9 + [5.0])) == 0
    assert outliers(np.asarray([*np.linspace(0.9, 1.1, 99), 9.0])) == 1


# Two calls in turn


class TwoMachines(Machine):
    """A clock on which the second call takes `factor` times as long as the first at that moment."""

    def __init__(self, seconds: Iterable[float], factor: float) -> None:
        super().__init__(seconds)
        self.factor = factor
        self.order: list[str] = []

    def __call__(self, call: Call) -> int:
        self.order.append(call())
        self.calls += 1
        step = next(self.seconds) * (self.factor if self.order[-1] == "dense" else 1.0)
        self.time += step
        return round(step * 1e9)


def in_turn(machine: Machine, **options: Any) -> tuple[Paired, dict[str, np.ndarray]]:
    return paired(lambda: "own", lambda: "dense", machine, protocol(**{"iterations": 200, "interval": 0.01} | options))


def test_a_ratio_is_known_on_a_machine_that_drifts() -> None:
    """Twice as slow at the end as at the beginning: the medians say nothing, the ratio does."""
    slowing = times((0.010 * (1 + i / 2000) for i in range(10**6)), share=0.001)
    result, taken = in_turn(TwoMachines(slowing, 1.25), iterations=1000)
    assert result.speedup == pytest.approx(1.25, rel=1e-3)
    low, high = result.speedup_ci95
    assert low <= 1.25 <= high
    assert result.unstable == []
    assert "drift" in summarise(taken["paired"], 1, 0.01).unstable


def test_who_goes_first_alternates() -> None:
    machine = TwoMachines(repeat(0.01), 2.0)
    result, taken = in_turn(machine, iterations=6, warmup_iterations=3)
    assert machine.order == ["dense"] * 3 + ["own", "dense", "dense", "own"] * 3
    assert result.pairs == len(taken["paired"]) == 6
    assert (taken["paired_dense"] == 2 * taken["paired"]).all()
    assert result.speedup == 2.0
    assert result.dense_p50_ms == pytest.approx(2 * result.p50_ms) == pytest.approx(20.0)


def test_pairs_are_taken_until_the_ratio_is_known() -> None:
    noisy = times(repeat(0.01), share=0.1)
    result, taken = in_turn(TwoMachines(noisy, 1.5), iterations=10, interval=0.005)
    assert len(taken["paired"]) > 100
    low, high = result.speedup_ci95
    assert (high - low) / 2 <= 0.0055 * result.speedup
    assert low <= 1.5 <= high


# Repeats


@pytest.mark.parametrize(
    ("medians", "place", "spread", "unstable"),
    [
        ([5.0], 1, 0.0, []),
        ([5.0, 5.0, 5.0], 1, 0.0, []),
        ([5.05, 5.0, 4.96], 2, 0.018, []),
        ([5.0, 6.0, 4.0], 1, 0.4, ["repeats"]),
        ([4.0, 5.0], 1, 0.25, ["repeats"]),
        ([8.0, 5.0, 4.0, 4.0], 3, 1.0, ["repeats"]),
    ],
)
def test_the_middle_of_repeats_is_one_of_them(
    medians: list[float], place: int, spread: float, unstable: list[str]
) -> None:
    """Of four it is the lower one of the two in the middle, and of equals the first."""
    measured = [Latency.of({"p50_ms": value, "mean_ms": -value, "unstable": ["drift"]}) for value in medians]
    result = middle(measured, "p50_ms")

    assert result.p50_ms == -result.mean_ms == medians[place - 1]
    assert result.repeats == {"p50_ms": medians, "middle": place, "spread": pytest.approx(spread)}
    assert result.unstable == ["drift", *unstable]
    assert measured[place - 1].unstable == ["drift"]
