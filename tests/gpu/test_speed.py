"""Device time beside CUDA events that are written here once more, and what has to be faster than what."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpu.cuda import opened, resnet50
from pq_sweep.measure.timing import CudaClock

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]
Timed = Callable[[], float]

WARM_UP, PAIRS = 30, 200


def event_ms(call: Callable[[], object]) -> float:
    """Return how long the device works on a call, in ms, by two events on the current stream."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def medians(one: Timed, other: Timed, pairs: int = PAIRS) -> tuple[float, float]:
    """Time two calls in turn, ABBA, so that clocks and heat meet both; return the median of each."""
    taken: tuple[list[float], list[float]] = ([], [])
    turns = [(one, taken[0]), (other, taken[1])]
    for number in range(WARM_UP + pairs):
        for timed, samples in turns if number % 2 else turns[::-1]:
            samples.append(timed())
    return statistics.median(taken[0][WARM_UP:]), statistics.median(taken[1][WARM_UP:])


@pytest.mark.parametrize("batch", [1, 32])
def test_device_time_is_that_of_other_cuda_events(tmp_path: Path, record_property: Record, batch: int) -> None:
    model, clock = resnet50(), CudaClock()
    network = copy.deepcopy(model.module).to("cuda").eval()
    with opened(tmp_path, model, "torch", sizes=(batch,)) as session, torch.inference_mode():
        images = model.sample(batch)
        ours, theirs = medians(lambda: clock(lambda: session(images)) / 1e6, lambda: event_ms(lambda: network(images)))
    record_property("p50_ms", f"{ours:.4f}")
    record_property("ratio", f"{ours / theirs:.4f}")

    assert ours == pytest.approx(theirs, rel=0.02)


def test_fp16_is_faster_than_fp32_in_large_batches(tmp_path: Path, record_property: Record) -> None:
    full, half, batch = resnet50(), resnet50(), 128
    with (
        opened(tmp_path / "fp32", full, "torch", sizes=(batch,)) as fp32,
        opened(tmp_path / "fp16", half, "torch", "fp16", sizes=(batch,)) as fp16,
    ):
        images = full.sample(batch)
        slow, fast = medians(lambda: event_ms(lambda: fp32(images)), lambda: event_ms(lambda: fp16(images)), pairs=50)
    record_property("fp32_ms", f"{slow:.3f}")
    record_property("fp16_ms", f"{fast:.3f}")

    assert fast < slow
