"""Measurements: every figure is worked out a second time by other means."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TESTS, new_user, python
from cuda_stand_in import Machine
from independent import torch_threads
from protocols import protocol
from torch import Tensor, nn
from torchvision.ops import deform_conv2d, roi_align

from pq_sweep.core.result import Latency
from pq_sweep.core.threads import use_threads
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.describe import describe_network, describe_notes
from pq_sweep.job.stages import Stages
from pq_sweep.measure import accuracy as scores
from pq_sweep.measure import latency as clocked
from pq_sweep.measure import memory, network, timing
from pq_sweep.measure.arithmetic import FORMULAS, arithmetic
from pq_sweep.measure.timing import HostClock, summarise
from pq_sweep.types import Data, Model, Preprocess, Split

Call = Callable[[], Any]


@dataclass
class Fake:
    """A session on the CPU that does what it is given and counts its calls."""

    answer: Callable[[Tensor], Tensor]
    device: str = "cpu"
    runtime: str = "torch"
    calls: list[int] = field(default_factory=list)
    closed: bool = False

    def close(self) -> None:
        self.closed = True

    def __call__(self, images: Tensor) -> Tensor:
        self.calls.append(len(images))
        return self.answer(images)


def not_opened() -> Any:
    raise AssertionError("the uncompressed model is only needed for pairs")


def lookup(logits: Tensor) -> Fake:
    """Return a session that answers image i, whose only pixel is i, with row i of `logits`."""
    return Fake(lambda images: logits[images.flatten().long()])


def data_of(labels: Tensor, classes: int, columns: Tensor | None = None) -> Data:
    """Return evaluation images whose only pixel is their index."""
    images = torch.arange(len(labels), dtype=torch.float32).view(-1, 1, 1, 1)
    split = Split.of_tensors(images, labels)
    return Data(split, split.take(0), None, tuple(map(str, range(classes))), columns)


# Accuracy


def plain_accuracy(logits: np.ndarray, labels: np.ndarray, top: int) -> float:
    """Count image by image how often the label is among the `top` largest logits."""
    hits = 0
    for row, label in zip(logits, labels, strict=True):
        hits += label in sorted(range(len(row)), key=lambda column: -row[column])[:top]
    return hits / len(labels)


def random_answers(samples: int, classes: int) -> tuple[Tensor, Tensor]:
    """Return logits and labels with which about half of the answers are right."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(classes, (samples,), generator=generator)
    hint = 2 * nn.functional.one_hot(labels, classes)
    return torch.randn(samples, classes, generator=generator) + hint, labels


@pytest.mark.parametrize("batch_size", [1, 7, 64, 101, 500])
def test_accuracy_is_that_of_a_plain_loop(batch_size: int) -> None:
    logits, labels = random_answers(101, 12)
    session = lookup(logits)
    result, predictions = scores.accuracy(session, data_of(labels, 12), batch_size)

    assert result.samples == 101
    assert result.top1 == plain_accuracy(logits.numpy(), labels.numpy(), 1)
    assert result.top5 == plain_accuracy(logits.numpy(), labels.numpy(), 5)
    assert predictions.tolist() == logits.numpy().argmax(1).tolist()
    assert session.calls == [min(batch_size, 101 - start) for start in range(0, 101, batch_size)]


def test_accuracy_lets_only_the_classes_of_the_data_compete() -> None:
    logits, _ = random_answers(90, 40)
    columns = torch.tensor([31, 4, 18, 0, 25, 9, 11])
    labels = torch.randint(7, (90,), generator=torch.Generator().manual_seed(4))
    result, predictions = scores.accuracy(lookup(logits), data_of(labels, 7, columns), 32)
    chosen = logits.numpy()[:, columns.numpy()]

    assert result.top1 == plain_accuracy(chosen, labels.numpy(), 1)
    assert result.top5 == plain_accuracy(chosen, labels.numpy(), 5)
    assert predictions.tolist() == chosen.argmax(1).tolist()


@pytest.mark.parametrize(("classes", "stated"), [(2, False), (5, False), (6, True)])
def test_top5_needs_more_than_five_classes(classes: int, stated: bool) -> None:
    logits, labels = random_answers(30, classes)
    result, _ = scores.accuracy(lookup(logits), data_of(labels, classes), 8)

    assert (result.top5 is not None) is stated


@pytest.mark.parametrize("classes", [10, 1000])
def test_equal_logits_count_for_the_first_class(classes: int) -> None:
    """Quantized logits are often equal; numpy's and torch's argmax both take the first, whatever the batch."""
    logits = torch.zeros(50, classes)
    logits[:, [3, 6, 9]] = 1.0
    result, predictions = scores.accuracy(lookup(logits), data_of(torch.full((50,), 3), classes), 16)

    assert set(predictions.tolist()) == {3}
    assert result.top1 == 1.0


# Wilson's interval


def score_interval(hits: int, samples: int) -> tuple[float, float]:
    """Find by bisection the proportions from which the observed one is 1.96 standard errors away."""

    def distance(p: float) -> float:
        return abs(hits / samples - p) - 1.959963984540054 * math.sqrt(p * (1 - p) / samples)

    def root(outside: float, inside: float) -> float:
        for _ in range(200):
            middle = (outside + inside) / 2
            outside, inside = (middle, inside) if distance(middle) > 0 else (outside, middle)
        return (outside + inside) / 2

    share = hits / samples
    return (0.0 if hits == 0 else root(0.0, share)), (1.0 if hits == samples else root(1.0, share))


@pytest.mark.parametrize(
    ("hits", "samples", "lower", "upper"),
    # Newcombe, Statistics in Medicine 17 (1998), Table I, method 3: the score interval without correction.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0000, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(hits: int, samples: int, lower: float, upper: float) -> None:
    assert scores.wilson(hits, samples) == pytest.approx((lower, upper), abs=5e-5)


@pytest.mark.parametrize(("hits", "samples"), [(0, 1), (1, 1), (0, 500), (500, 500), (493, 500), (3, 7), (250, 500)])
def test_wilson_solves_the_score_equation(hits: int, samples: int) -> None:
    lower, upper = scores.wilson(hits, samples)

    assert (lower, upper) == pytest.approx(score_interval(hits, samples), abs=1e-9)
    assert 0 <= lower <= hits / samples + 1e-12
    assert hits / samples - 1e-12 <= upper <= 1


# Latency


@pytest.mark.parametrize(("warmup", "iterations", "batch"), [(0, 1, 1), (3, 20, 1), (5, 70, 4)])
def test_latency_keeps_every_sample(warmup: int, iterations: int, batch: int) -> None:
    session = Fake(lambda images: images)
    chosen = protocol(warmup_iterations=warmup, iterations=iterations)
    result, samples = clocked.latency(session, torch.zeros(batch, 1, 8, 8), chosen)

    assert session.calls == [batch] * (warmup + iterations)
    assert result.warmup["iterations"] == warmup
    assert len(samples["host"]) == result.iterations == iterations
    assert (samples["host"] > 0).all()


def test_latency_is_derived_from_its_samples() -> None:
    result, samples = clocked.latency(Fake(torch.clone), torch.zeros(4, 1, 8, 8), protocol(iterations=70))
    again = summarise(samples["host"], 4, math.inf)

    assert result.plain().items() >= again.plain().items()
    assert result.clock == "perf_counter_ns"
    assert samples["host"].sum() / 1e9 <= result.duration_s
    assert result.cpu_time_per_iteration_ms >= 0
    assert result.load_of_others >= 0


@pytest.mark.parametrize(("loads", "kept"), [([0.0], 0), ([0.9, 0.1], 1), ([0.9, 0.3, 0.5], 1), ([0.9, 0.9, 0.8], 2)])
def test_latency_is_taken_again_while_others_are_busy_and_the_quietest_counts(
    monkeypatch: pytest.MonkeyPatch, loads: list[float], kept: int
) -> None:
    session, left = Fake(lambda images: images), list(loads)

    def loaded(*_: Any) -> Any:
        return Latency.of({"load_of_others": left.pop(0), "iterations": len(loads) - len(left) - 1}), {}

    monkeypatch.setattr(clocked, "_loaded", loaded)
    result, _ = clocked.latency(session, torch.zeros(1, 1, 8, 8), protocol(retries=2))

    assert not left
    assert (result.iterations, result.loads, result.load_of_others) == (kept, loads, min(loads))


def test_the_state_of_the_device_comes_with_the_latency() -> None:
    state = clocked.latency(Fake(torch.clone), torch.zeros(1, 1, 8, 8), protocol(iterations=10))[0].device_state
    assert state["device"] == "cpu"
    assert state["involuntary_switches"] >= 0
    assert ("energy_j" in state and state["energy_j"] is not None) != ("energy_j" in state["unavailable"])


@dataclass
class Hot:
    """A monitor of a device that got hot and used 3 J, in a window three times as long as the sampling took."""

    device: str
    uuid: str | None
    result: dict[str, Any] = field(default_factory=dict)

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = time.perf_counter() - self.start
        verdicts = ["throttled", "power_capped"]
        self.result |= {"energy_j": 3.0, "seconds": seconds, "sampled_s": 3 * seconds, "verdicts": verdicts}


def test_a_throttled_device_settles_nothing_and_energy_is_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocked, "Monitor", Hot)
    chosen = protocol(min_s=0.2, interval=math.inf)
    result, samples = clocked.latency(Fake(resting), torch.zeros(4, 1, 8, 8), chosen)
    assert "throttled" in result.unstable
    assert "power_capped" not in result.unstable
    assert result.energy_per_image_j == pytest.approx(1.0 / (4 * len(samples["host"])), rel=0.25)


def resting(images: Tensor) -> Tensor:
    """Take so long that the time between calls hardly counts, on a busy machine too."""
    time.sleep(0.005)
    return images.clone()


def test_latency_includes_all_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read right before and right after the call: half a second inside of it is in the sample."""
    ticks = iter(range(0, 10**12, 5 * 10**8))
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: next(ticks))

    assert HostClock()(lambda: None) == 5 * 10**8


@pytest.mark.parametrize(
    ("images", "batch", "expected"), [(3, 8, [0, 1, 2, 0, 1, 2, 0, 1]), (3, 3, [0, 1, 2]), (9, 2, [0, 1])]
)
def test_the_first_images_are_timed_again_if_they_are_too_few(images: int, batch: int, expected: list[int]) -> None:
    data = data_of(torch.zeros(images, dtype=torch.int64), 2)

    assert clocked.latency_images(data, batch, "cpu").flatten().tolist() == expected


def test_speed_measures_every_batch_size(tmp_path: Path) -> None:
    session, stage = Fake(torch.clone), Stages(tmp_path, "")
    data = data_of(torch.zeros(5, dtype=torch.int64), 2)
    chosen = protocol(batch_sizes=[1, 8], warmup_iterations=2, iterations=3)
    result, samples = clocked.speed(session, data, chosen, stage, not_opened)

    assert list(result.latency) == ["1", "8"]
    assert session.calls == [1] * 5 + [8] * 5
    assert {name: len(values) for name, values in samples.items()} == {"b1_host": 3, "b8_host": 3}
    assert np.median(samples["b8_host"]) / 1e6 == result.latency["8"].p50_ms
    assert set(stage.seconds) == {"latency b1", "latency b8"}


def test_pairs_are_timed_with_the_uncompressed_model(tmp_path: Path) -> None:
    session, dense = Fake(torch.clone), Fake(lambda images: images.flatten(1).repeat(1, 400_000).sum(1))
    data = data_of(torch.zeros(5, dtype=torch.int64), 2)
    chosen = protocol(batch_sizes=[1, 2], iterations=7, paired=True)
    result, samples = clocked.speed(session, data, chosen, Stages(tmp_path, ""), lambda: closing(dense))

    assert dense.calls == [1] * 7 + [2] * 7
    assert session.calls == [1] * 7 + [2] * 7 + [1] * 7 + [2] * 7
    assert dense.closed
    assert set(samples) == {f"b{size}_{name}" for size in (1, 2) for name in ("host", "paired", "paired_dense")}
    ratio = np.median(samples["b1_paired_dense"] / samples["b1_paired"])
    assert result.paired["1"].speedup == ratio > 1


# Threads


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_torch_leaves_the_cores_to_who_runs_the_model(monkeypatch: pytest.MonkeyPatch, runtime: str) -> None:
    monkeypatch.setattr(memory.torch, "get_num_threads", lambda: 5)
    told: list[int] = []
    monkeypatch.setattr(memory.torch, "set_num_threads", told.append)
    session = Fake(lambda images: torch.zeros(len(images), 2), runtime=runtime)
    scores.accuracy(session, data_of(torch.zeros(3, dtype=torch.long), 2), 2)

    assert told == ([] if runtime == "torch" else [1, 5])


# Memory


def peak_of(megabytes: int, folder: Path) -> float:
    """Return the peak while a session takes that much memory for each call and gives it back."""

    def answer(images: Tensor) -> Tensor:
        torch.ones(megabytes * 250_000)
        return images

    data = data_of(torch.zeros(1), 2)
    result, _ = clocked.speed(Fake(answer), data, protocol(iterations=3), Stages(folder, ""), not_opened)
    if result.peak_memory_mb is None:
        pytest.skip("this kernel does not let a process reset its peak of memory")
    return float(result.peak_memory_mb)


PEAKS = """
import json
from pathlib import Path
from test_measure import peak_of
peak_of(1, Path())  # loads what a first call loads
print(json.dumps([[peak_of(size, Path()) for size in (1, 401, 1)] for _ in range(5)]))
"""


@pytest.mark.slow
def test_the_peak_of_memory_rises_by_what_a_session_takes(tmp_path: Path) -> None:
    """In a process of its own, as a job has one: other tests' libraries change how memory is taken and given back.

    The median of some rounds counts, as the kernel takes pages of libraries away and brings them back meanwhile.
    """
    path = os.pathsep.join(map(str, (TESTS, Path(__file__).parent)))
    done = python(["-c", PEAKS], tmp_path, new_user() | {"PYTHONPATH": path})
    if "does not let a process reset" in done.stderr:
        pytest.skip("this kernel does not let a process reset its peak of memory")
    assert done.returncode == 0, done.stderr
    small, large, again = np.array(json.loads(done.stdout.splitlines()[-1])).T

    assert np.median(large - small) == pytest.approx(400, rel=0.1)
    assert np.median(again - small) == pytest.approx(0, abs=40)


def test_memory_that_nvml_saw_is_the_peak_of_all_batch_sizes() -> None:
    states: list[dict[str, Any]] = [{"memory_process_mb": 900.0}, {"memory_process_mb": 1200.0}, {"verdicts": []}]

    assert memory.watched_memory(states) == (1200.0, None)


@pytest.mark.parametrize(
    ("seen", "peak"),
    [({"memory_process_mb": 5400.0, "memory_device_mb": 9000.0}, 5400.0), ({"memory_device_mb": 9000.0}, 5000.0)],
)
def test_memory_of_a_gpu_is_that_of_all_libraries(
    monkeypatch: pytest.MonkeyPatch, seen: dict[str, Any], peak: float
) -> None:
    """TensorRT and ONNX Runtime take theirs past torch's allocator; NVML may not know this process in a container."""
    machine = Machine().install(monkeypatch)
    memory.free_at_first.cache_clear()
    machine.taken[1] = 3_000_000_000  # by someone else
    memory.free_at_first("cuda:1")
    machine.taken[1] += 5_000_000_000
    found = memory.device_memory("cuda:1", {"8": Latency.of({"device_state": seen})})

    assert found.process_mb == peak
    assert (found.allocator_mb, found.taken_mb) == (0.0, 5000.0)
    machine.taken[1] = 0  # the other one has ended
    assert memory.device_memory("cuda:1", {}).process_mb is None
    memory.free_at_first.cache_clear()


@pytest.mark.gpu
def test_memory_of_a_gpu_is_counted_by_its_allocator_and_by_nvml(tmp_path: Path) -> None:
    data = data_of(torch.zeros(1), 2)
    memory.free_at_first("cuda:0")
    kept = torch.ones(250_000 * 400, device="cuda")
    session = Fake(lambda images: images + kept[0], "cuda:0")
    before = memory.free_at_first("cuda:0") / 1e6 - torch.cuda.mem_get_info("cuda:0")[0] / 1e6
    result, _ = clocked.speed(session, data, protocol(iterations=30, min_s=1.0), Stages(tmp_path, ""), not_opened)
    told = result.memory
    assert told is not None

    assert told.allocator_mb == pytest.approx(400, rel=0.1)
    assert told.allocator_mb <= told.allocator_reserved_mb
    assert told.taken_mb == pytest.approx(before, abs=100)
    assert result.peak_memory_mb == (told.nvml_process_mb or told.taken_mb)
    if told.nvml_device_mb is None:
        pytest.skip("NVML does not tell here")
    assert told.allocator_reserved_mb <= told.nvml_device_mb


# Threads


@pytest.mark.parametrize(("asked", "expected"), [(1, 1), (2, 2), (None, len(os.sched_getaffinity(0)))])
def test_threads_are_set_and_told(asked: int | None, expected: int) -> None:
    with torch_threads(3):
        assert use_threads(asked) == expected
        assert torch.get_num_threads() == expected


# The network itself


class Attention(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.attend(tokens, tokens, tokens, need_weights=self.need_weights)[0].mean(1)


class Encoder(nn.Module):
    """A transformer's encoder layer over the pixels, which torch computes in one operator if it may."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(2).transpose(1, 2)).mean(1)


def model_of(module: nn.Module, channels: int, size: int) -> Model:
    return Model(module.eval(), 16, Preprocess(size=size, resize=size, channels=channels))


TOKENS, WIDTH = 25, 16
# Query, key and value; scores and their use for every pair of tokens; output projection.
ATTENTION_MACS = 3 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH + TOKENS * WIDTH**2


@pytest.mark.parametrize(
    ("module", "channels", "size", "expected"),
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 16)), 3, 4, 48 * 16),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, 16, bias=False), nn.ReLU()), 3, 4, 48 * 16),
        (nn.Conv2d(3, 16, 3), 3, 8, 6 * 6 * 16 * 3 * 9),
        (nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), 3, 8, 4 * 4 * 16 * 3 * 9),
        (nn.Conv2d(8, 16, 3, groups=8, padding=1), 8, 5, 5 * 5 * 16 * 9),
        (nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), nn.ReLU()), 3, 5, 25 * 16 * 3),
        (Attention(need_weights=False), 16, 5, ATTENTION_MACS),
        (Attention(need_weights=True), 16, 5, ATTENTION_MACS),
        (Encoder(), 16, 5, ATTENTION_MACS + 2 * TOKENS * WIDTH * 32),
    ],
    ids=["linear", "without bias", "conv", "strided", "depthwise", "batch norm", "attention", "weights", "encoder"],
)
def test_macs_are_those_counted_by_hand(module: nn.Module, channels: int, size: int, expected: int) -> None:
    assert arithmetic(model_of(module, channels, size)) == (expected, [])


class Rows(nn.Module):
    """A layer over the rows of an image with one channel."""

    def __init__(self, layer: nn.Module, call: Any = lambda layer, x: layer(x)[0]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x[:, 0])


ROWS = [
    (nn.LSTM(8, 6, batch_first=True), 8 * 4 * (8 * 6 + 6 * 6)),
    (nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), 8 * 2 * 4 * (8 * 6 + 6 * 6 + 12 * 6 + 6 * 6)),
    (nn.LSTM(8, 6, proj_size=3, batch_first=True), 8 * (4 * (8 * 6 + 3 * 6) + 6 * 3)),
    (nn.GRU(8, 6, batch_first=True), 8 * 3 * (8 * 6 + 6 * 6)),
    (nn.RNN(8, 6, batch_first=True), 8 * (8 * 6 + 6 * 6)),
]


@pytest.mark.filterwarnings("ignore:TF32", "ignore:LSTM with projections")
@pytest.mark.parametrize("whole", [True, False], ids=["one operator", "steps"])
@pytest.mark.parametrize(("layer", "expected"), ROWS, ids=["LSTM", "both ways", "projected", "GRU", "RNN"])
def test_macs_of_recurrent_layers_are_counted(layer: nn.Module, expected: int, whole: bool) -> None:
    with torch.backends.mkldnn.flags(enabled=whole):
        assert arithmetic(model_of(Rows(layer), 1, 8)) == (expected, [])


@pytest.mark.parametrize(("layer", "expected"), ROWS, ids=["LSTM", "both ways", "projected", "GRU", "RNN"])
def test_macs_of_cudnns_recurrent_layers_are_the_same(layer: nn.Module, expected: int) -> None:
    """cuDNN computes all layers in one operator, which takes all weights."""
    shapes = [weight.shape for weight in layer.parameters()]
    assert FORMULAS[torch.ops.aten._cudnn_rnn](torch.Size([1, 8, 8]), shapes, 4) == 2 * expected


@pytest.mark.parametrize(
    ("layer", "call", "expected"),
    [
        (nn.Bilinear(8, 8, 5), lambda layer, x: layer(x, x), 8 * 5 * 8 * 8),
        (nn.Linear(8, 5), lambda layer, x: layer.weight @ x[0, 0], 5 * 8),
        (nn.Linear(8, 5), lambda layer, x: torch.addmv(layer.bias, layer.weight, x[0, 0]), 5 * 8),
        (nn.Linear(8, 5), lambda layer, x: layer.weight[0] @ x[0, 0], 8),
        (nn.Linear(8, 5), lambda layer, x: torch.cdist(x, layer.weight), 8 * 5 * 8),
        (nn.Linear(8, 40), lambda layer, x: torch.cdist(x.repeat(1, 5, 1), layer.weight), 40 * 40 * 8),
        (nn.Linear(8, 5), lambda layer, x: torch.addbmm(x[0], x, x), 8 * 8 * 8),
        (nn.Conv2d(1, 4, 3), lambda layer, x: deform_conv2d(x[:, None], x.new_zeros(1, 18, 6, 6), layer.weight), 1296),
    ],
    ids=["bilinear", "vector", "biased vector", "dot", "distances", "many distances", "sum of products", "deformable"],
)
def test_macs_of_other_products_are_counted(layer: nn.Module, call: Any, expected: int) -> None:
    assert arithmetic(model_of(Rows(layer, call), 1, 8)) == (expected, [])


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda layer, x: torch.fft.rfft(x).real, "aten._fft_r2c"),
        (lambda layer, x: roi_align(x[:, None], [x.new_zeros(1, 4)], 2), "torchvision.roi_align"),
    ],
)
def test_operations_that_are_not_counted_are_named(call: Any, name: str) -> None:
    model = model_of(Rows(nn.Linear(8, 8), lambda layer, x: call(layer, layer(x))), 1, 8)
    found = network.count(model)
    assert (found.macs, found.uncounted) == (8 * 8 * 8, [name])
    assert network.count(model, found).uncounted == [name]
    described = describe_network(model, data_of(torch.zeros(1), 1), found)
    (note,) = describe_notes(model, data_of(torch.zeros(1), 1), described, None)
    assert note == f"Multiply-accumulates leave out what the network computes by {name}."


@pytest.mark.parametrize("fast", [True, False])
def test_counting_macs_leaves_attention_as_it_was(fast: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        arithmetic(model_of(Encoder(), 16, 5))
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_the_network_is_counted_weight_by_weight() -> None:
    model = digits_cnn()
    with torch.no_grad():
        model.module.fc1.weight[:10] = 0
        model.module.fc2.bias[0] = 0
    parameters = dict(model.module.named_parameters())
    result = network.count(model)

    layers = [value for key, value in parameters.items() if value.dim() > 1]
    assert result.params == sum(math.prod(value.shape) for value in parameters.values())
    assert result.weights == sum(math.prod(value.shape) for value in layers)
    assert result.sparsity == sum(value.flatten().tolist().count(0.0) for value in layers) / result.weights
    assert result.nonzero_params == sum(int((value != 0).sum()) for value in parameters.values())
    assert result.sparsity * result.weights == pytest.approx(10 * 256)


def test_the_projections_of_attention_count_as_weights() -> None:
    result = network.count(model_of(Attention(need_weights=False), 16, 5))

    assert result.weights == 4 * 16 * 16
    assert result.params == 4 * 16 * 16 + 4 * 16
