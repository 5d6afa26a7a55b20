"""The device's clock on GPUs that keep time by themselves: the host's pace is not in it, and pauses stay short."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from cuda_stand_in import Machine
from protocols import protocol
from torch import Tensor

from pq_sweep.measure import latency, timing
from pq_sweep.measure.timing import MOST_HOLD_NS, CudaClock, hold_ns, paired


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Two GPUs whose host hands over work at a pace of its own; its clock is that of the test."""
    found = Machine().install(monkeypatch)
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: found.host_ns)
    return found


@dataclass(frozen=True)
class Network:
    """A call of so many kernels, each handed over in `host_ns`, after what the host does before the first one."""

    machine: Machine
    kernels: int
    device_ns: int
    host_ns: int
    first_ns: int = 0

    def __call__(self) -> None:
        self.machine.host_ns += self.first_ns
        for _ in range(self.kernels):
            self.machine.torch_op("cuda:1", device_ns=self.device_ns, host_ns=self.host_ns)

    @property
    def work_ns(self) -> int:
        return self.kernels * self.device_ns


NETWORKS = {
    "small": (50, 2_000, 10_000),
    "as fast as its host": (50, 10_000, 10_000),
    "large": (50, 300_000, 100_000),
    "one kernel": (1, 5_000, 8_000, 40_000),
    "a runtime that prepares": (10, 30_000, 9_000, 60_000),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_device_time_has_no_time_of_the_host(machine: Machine, name: str) -> None:
    """Without a pause, the device would wait for each kernel of a small network."""
    network = Network(machine, *NETWORKS[name])
    clock = CudaClock("cuda:1")
    samples = [clock(network) for _ in range(20)]

    assert samples[0] > network.work_ns
    assert samples[3:] == [network.work_ns] * 17  # the first ones, which are a warm-up, teach it how long to wait
    assert set(clock.enqueue_ns) == {network.first_ns + network.kernels * network.host_ns}


def test_two_networks_in_turn_have_their_own_pauses(machine: Machine) -> None:
    small, large = (Network(machine, *NETWORKS[name]) for name in ("small", "large"))
    chosen = protocol(warmup_iterations=4, iterations=20)
    result, taken = paired(small, large, CudaClock("cuda:1"), chosen)

    assert np.median(taken["paired"]) == small.work_ns
    assert np.median(taken["paired_dense"]) == large.work_ns
    assert result.speedup == large.work_ns / small.work_ns


def test_a_pause_is_as_short_as_can_be(machine: Machine) -> None:
    """A device that rests becomes cooler, and what keeps it busy is what should be timed."""
    network = Network(machine, *NETWORKS["large"])
    clock = CudaClock("cuda:1")
    clock(network)
    before = machine.host_ns
    for _ in range(100):
        clock(network)
    rest = (machine.host_ns - before) / 100 - network.work_ns

    assert rest < 0.26 * network.work_ns


def test_a_call_that_waits_for_its_device_is_timed_all_the_same(machine: Machine) -> None:
    """Its pauses must not grow from call to call, though it takes longer for each of them."""
    network = Network(machine, *NETWORKS["small"])

    def waiting() -> None:
        network()
        machine.synchronize("cuda:1")

    clock = CudaClock("cuda:1")
    samples = [clock(waiting) for _ in range(50)]

    assert max(samples[1:]) <= samples[0]
    assert machine.host_ns < 50 * 2 * samples[0]


def test_a_first_call_that_compiles_costs_no_long_pause() -> None:
    assert hold_ns(10_000_000_000, 10_000_000_000) == MOST_HOLD_NS


def test_the_installed_torch_lets_a_device_wait() -> None:
    assert callable(torch.cuda._sleep)


@dataclass
class OnSecondGpu:
    """A session whose network is of 50 kernels of 2 us, each handed over in 10 us."""

    machine: Machine
    device: str = "cuda:1"
    runtime: str = "torch"
    calls: int = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        Network(self.machine, *NETWORKS["small"])()
        return images


@dataclass
class Watching:
    """A monitor of a device that uses 300 W, and looks for twice as long as it watches."""

    device: str
    uuid: str | None
    result: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = 2 * (time.perf_counter() - self.start)
        self.result |= {"energy_j": 300 * seconds, "seconds": seconds, "sampled_s": seconds, "verdicts": []}


def test_energy_is_counted_while_the_device_does_not_rest(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(latency, "Monitor", Watching)
    session: Any = OnSecondGpu(machine)
    chosen = protocol(warmup_iterations=4, iterations=20)
    found, samples = latency.latency(session, torch.zeros(8, 1, 2, 2), chosen)

    assert found.p50_ms == 0.1
    assert found.enqueue_ms == 0.5
    assert found.host_bound
    assert found.energy_per_image_j == pytest.approx(300 / found.pipelined_throughput, rel=0.1)
    assert session.calls >= 3 * 20
    assert machine.pinned_on == [1]
    assert {name: len(values) for name, values in samples.items()} == {"device": 20, "host": 20}
