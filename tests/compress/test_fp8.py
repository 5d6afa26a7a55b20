"""FP8 graphs: each weight a byte of E4M3, each activation rounded to E4M3, and answers as these numbers give them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from independent import Opened, opened_on_cpu, snr_db, tensors, torch_logits
from onnx.reference import ReferenceEvaluator
from random_networks import randomise
from torch import Tensor, nn

from pq_sweep.compress import quantizers
from pq_sweep.compress.fp8 import LARGEST, rounded_to_fp8
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Data, Model, Preprocess

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
fp8 = partial(quantizers.fp8, calibration="minmax", images=32, exclude=[], percentile=99.9)


def unchanged(place: str, x: Tensor) -> Tensor:
    return x


class Small(nn.Module):
    """Convolutions, two of which TensorRT has no FP8 kernels for, an attention, and layers over tokens.

    `see` is given each factor of the products that are to be in FP8, but for weights, and may change it.
    """

    see: Callable[[str, Tensor], Tensor] = staticmethod(unchanged)

    def __init__(self) -> None:
        super().__init__()
        self.few, self.conv, self.deep = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3), nn.Conv2d(16, 32, 3, groups=2)
        self.mix, self.more, self.head = nn.Linear(32, 24), nn.Linear(24, 20), nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.few(x))
        x = torch.relu(self.conv(self.see("conv", x)) + self.deep(x)).flatten(2).transpose(1, 2)
        x = nn.functional.relu6(self.mix(self.see("mix", x)))
        x = self.more(self.see("more", x))
        scores = torch.softmax(self.see("left", x) @ self.see("right", x.transpose(1, 2)) / 5, -1)
        x = torch.relu(self.see("scores", scores) @ self.see("values", x + 1))
        return self.head(self.see("head", x.mean(1)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """A small network in FP8 under ONNX Runtime."""
    module = Small().eval()
    randomise(module)
    model = Model(module, 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))
    return opened_on_cpu(model, tmp_path_factory.mktemp("small"), fp8)


def images_of(data: Data, count: int = 100) -> Tensor:
    return data.evaluation.fetch(list(range(count)))


# Rounding to E4M3


def every_number() -> np.ndarray:
    """Return all finite numbers of E4M3 from 0 on, read bit by bit."""
    found = []
    for code in range(0x7F):  # 0x7F is NaN
        exponent, mantissa = code >> 3, code & 7
        found.append(2.0 ** (exponent - 7) * (1 + mantissa / 8) if exponent else 2.0**-6 * mantissa / 8)
    return np.array(found, np.float32)


def test_weights_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    numbers = every_number()
    assert numbers[-1] == LARGEST
    values = [float(numbers[-1])]  # makes the scale 1
    expected = [float(numbers[-1])]
    for code, (low, high) in enumerate(pairwise(numbers)):
        middle = np.float32((low + high) / 2)
        values += [low, np.nextafter(middle, np.float32(low)), middle, np.nextafter(middle, np.float32(high)), high]
        expected += [low, low, low if code % 2 == 0 else high, high, high]
    values, expected = [*values, *(-value for value in values)], [*expected, *(-value for value in expected)]
    stored, scales = rounded_to_fp8(np.array(values, np.float32), None)
    assert stored.dtype == E4M3
    assert scales == 1
    assert stored.astype(np.float32).tolist() == expected


def test_the_largest_weight_of_each_channel_is_448() -> None:
    weights = np.random.default_rng(0).normal(size=(5, 7, 3, 3)).astype(np.float32)
    weights *= np.array([1e-30, 1e-3, 1, 1e3, 1e30], np.float32)[:, None, None, None]
    stored, scales = rounded_to_fp8(weights, 0)
    assert np.abs(stored.astype(np.float32)).max((1, 2, 3)).tolist() == [LARGEST] * 5
    decoded = stored.astype(np.float32) * scales[:, None, None, None]
    large = np.abs(weights) > scales[:, None, None, None] * 2.0**-6
    assert np.abs(decoded / weights - 1)[large].max() <= 2.0**-4 * 1.001  # half of the last of 3 bits


@pytest.mark.parametrize("axis", [0, 1, None])
def test_a_channel_of_zeros_stays_zero(axis: int | None) -> None:
    weights = np.zeros((3, 4), np.float32)
    weights[1:, 1:] = 2.0 if axis is not None else 0.0
    stored, scales = rounded_to_fp8(weights, axis)
    assert scales.reshape(-1)[0] == 1
    assert np.isfinite(scales).all()
    assert not stored.astype(np.float32)[weights == 0].any()


# What the graph holds


def stored_weights(graph: onnx.ModelProto) -> dict[str, tuple[np.ndarray, np.ndarray, int | None]]:
    """Return codes, scales and axis of each FP8 weight by its name in the network, read from the bytes of the file."""
    items = {item.name: item for item in graph.graph.initializer}
    found = {}
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in items:
            item, scales = items[node.input[0]], onnx.numpy_helper.to_array(items[node.input[1]])
            assert item.data_type == onnx.TensorProto.FLOAT8E4M3FN
            assert len(item.raw_data) == np.prod(item.dims)
            codes = np.frombuffer(item.raw_data, E4M3).reshape(tuple(item.dims))
            axis = next((each.i for each in node.attribute if each.name == "axis"), None)
            found[node.output[0]] = codes, scales, axis
    return found


def decoded(codes: np.ndarray, scales: np.ndarray, axis: int | None) -> np.ndarray:
    shape = [-1 if place == axis else 1 for place in range(codes.ndim)] if axis is not None else ()
    return codes.astype(np.float32) * scales.reshape(shape)


@pytest.mark.slow
def test_weights_have_a_scale_for_each_output_channel(small: Opened) -> None:
    _, graph, model, _ = small
    found = stored_weights(graph)
    weights = {name: value.detach().numpy() for name, value in model.module.state_dict().items()}
    assert set(found) == {"conv.weight", "mix.weight", "more.weight", "head.weight"}
    for name, (codes, scales, axis) in found.items():
        original = weights[name] if codes.shape == weights[name].shape else weights[name].T
        channels = original if codes.shape == weights[name].shape else original.T
        assert scales.dtype == np.float32
        assert np.allclose(scales, np.abs(channels.reshape(len(channels), -1)).max(1) / 448, rtol=1e-6), name
        assert np.abs(decoded(codes, scales, axis) - original).max() <= np.abs(original).max() * 2.0**-4, name


def test_what_tensorrt_has_no_kernels_for_stays_in_fp32(small: Opened) -> None:
    session, graph, _, _ = small
    arrays = tensors(graph)
    assert {name for name in arrays if arrays[name].ndim > 1 and arrays[name].dtype == np.float32} == {
        "few.weight",
        "deep.weight",
    }
    told = session.details["quantizer"]
    assert len(told["without_fp8_kernels"]) == 2
    assert told["excluded_nodes"] == told["without_fp8_kernels"]
    assert all(array.dtype == np.float32 for name, array in arrays.items() if name.endswith("bias"))


def test_both_factors_of_attention_are_rounded(small: Opened) -> None:
    _, graph, _, _ = small
    made_by = {name: node for node in graph.graph.node for name in node.output}
    products = [node for node in graph.graph.node if node.op_type == "MatMul"]
    assert len(products) == 4
    for node in products:
        assert {made_by[name].op_type for name in node.input} == {"DequantizeLinear"}


# Answers


def rounded(values: Tensor, largest: Tensor) -> Tensor:
    """Round to E4M3 by torch, which is neither ONNX Runtime nor ml_dtypes, with 448 standing for the largest."""
    scale = (largest / LARGEST).clamp(min=1e-30)
    return (values / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float() * scale


def simulated(model: Model, data: Data, images: Tensor) -> np.ndarray:
    """Compute the network in FP8 by torch alone, with ranges of its own."""
    net = copy.deepcopy(model.module)
    assert isinstance(net, Small)
    largest: dict[str, Tensor] = {}

    def note(place: str, x: Tensor) -> Tensor:
        largest[place] = x.abs().max()
        return x

    with torch.no_grad():
        net.see = note
        net(data.calibration.take(32).fetch(list(range(32))))
        for layer in (net.conv, net.mix, net.more, net.head):
            weight = layer.weight.flatten(1)
            layer.weight.copy_(rounded(weight, weight.abs().max(1, keepdim=True)[0]).reshape(layer.weight.shape))
        net.see = lambda place, x: rounded(x, largest[place])
        return net(images).numpy()


def test_answers_are_those_of_numbers_in_fp8(small: Opened) -> None:
    session, _, model, data = small
    images = images_of(data)
    expected, answers = simulated(model, data, images), session(images).numpy()
    dense = torch_logits(model.module, images)
    # A sum in another order may move an activation over the edge between two numbers of E4M3.
    assert snr_db(expected, answers) > 45
    assert 15 < snr_db(dense, answers) < 40


@pytest.mark.slow
def test_answers_are_those_of_onnx_itself(tmp_path: Path) -> None:
    session, graph, _, data = opened_on_cpu(digits_cnn(), tmp_path, fp8)
    images = images_of(data, 20)
    (expected,) = ReferenceEvaluator(graph).run(None, {"input": images.numpy()})
    assert snr_db(expected, session(images).numpy()) > 45


def test_activations_beyond_their_range_saturate(small: Opened) -> None:
    session, _, model, data = small
    images = images_of(data, 20) * 50
    answers = session(images).numpy()
    assert np.isfinite(answers).all()
    assert snr_db(simulated(model, data, images), answers) > 45


# Options


@pytest.mark.slow
def test_excluded_layers_stay_in_fp32(small: Opened, tmp_path: Path) -> None:
    _, _, model, _ = small
    session, graph, _, _ = opened_on_cpu(model, tmp_path, partial(fp8, exclude=["first", "mix", "last"]))
    assert set(stored_weights(graph)) == {"conv.weight", "more.weight"}
    assert len(session.details["quantizer"]["excluded_nodes"]) == 4


@pytest.mark.slow
def test_excluding_all_changes_nothing(tmp_path: Path) -> None:
    session, graph, model, data = opened_on_cpu(digits_cnn(), tmp_path, partial(fp8, exclude=["*"]))
    assert not stored_weights(graph)
    assert snr_db(torch_logits(model.module, images_of(data)), session(images_of(data)).numpy()) > 100


@pytest.mark.slow
def test_a_file_of_fp8_is_a_quarter_and_says_that_it_is_simulated(tmp_path: Path) -> None:
    session, _, model, data = opened_on_cpu(digits_cnn(), tmp_path, fp8)
    parameters = sum(value.numel() for value in model.module.parameters())
    assert session.artifact.stat().st_size < 1.4 * parameters
    assert session.details["simulated"].startswith("FP8 is computed in FP32 by ONNX Runtime on a CPU")
    right = (session(images_of(data, 400)).argmax(1) == data.evaluation.labels[:400]).float().mean()
    assert right > 0.97
