"""What tests/gpu compares device time with: on the CPU where real code can run there, else on GPUs that count time."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from cuda_stand_in import Machine
from gpu.clocks import Enqueued, benchmark_ms, busy_ms, in_flight_ms
from gpu_stand_in import as_a100
from independent import runtime, workspace
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from pq_sweep.compress.quantizers import none
from pq_sweep.core.cache import Cache
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn


def test_a_benchmark_takes_as_long_as_its_calls() -> None:
    made: list[float] = []

    def call() -> None:
        made.append(time.perf_counter())
        time.sleep(0.002)

    found = benchmark_ms(call, 5)

    assert 2 <= found <= (time.perf_counter() - made[0]) * 1e3
    assert len(made) >= 5


def test_what_is_summed_of_a_profile_is_in_its_trace(tmp_path: Path) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(3):
            torch.relu(torch.ones(8, 8) @ torch.ones(8, 8))
    found.export_chrome_trace(str(tmp_path / "trace.json"))
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    work = [event["dur"] for event in trace if event.get("cat") == "cpu_op"]

    assert len(work) >= 9
    assert busy_ms(found, DeviceType.CPU) == pytest.approx(sum(work) / 1e3, rel=0.01)
    assert busy_ms(found, DeviceType.CUDA) == 0


@pytest.mark.parametrize(("device_ns", "host_ns", "expected_ms"), [(10_000_000, 10_000, 10), (10_000, 1_000_000, 1)])
def test_events_of_calls_in_flight_have_the_slower_of_device_and_host(
    monkeypatch: pytest.MonkeyPatch, device_ns: int, host_ns: int, expected_ms: float
) -> None:
    machine = Machine().install(monkeypatch)

    def call() -> None:
        machine.torch_op("cuda:0", device_ns=device_ns, host_ns=host_ns)

    assert in_flight_ms(call, 20) == pytest.approx(expected_ms, rel=0.02)


@pytest.mark.slow
def test_an_engine_that_is_enqueued_alone_answers_as_its_session(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    as_a100(monkeypatch)
    work, model = workspace(tmp_path), digits_cnn()
    work.stage.cache = Cache({})
    session = runtime("tensorrt_native").open(model, none, digits(model), work)
    images = model.sample(1)
    alone = Enqueued(session.artifact, 0, images)
    alone()

    assert torch.equal(alone.logits, session(images))
