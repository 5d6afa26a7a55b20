"""Bits of weights and products, against counts by hand from the shapes of layers and the tensors of files."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import SHORT
from conftest import ROOT
from hydra import compose, initialize_config_dir
from independent import tensors
from onnx import TensorProto, helper, numpy_helper
from random_networks import attention, two_convs
from torch import Tensor, nn

from pq_sweep.compress import quantizers
from pq_sweep.core.result import Bits, Counts, Result
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import cifar_resnet, digits_cnn
from pq_sweep.job.run import look_at_artifact, run
from pq_sweep.job.stages import Stages
from pq_sweep.measure.arithmetic import arithmetic
from pq_sweep.measure.bits import REST, Holdings, by_layer, of_graph, of_network, with_rest
from pq_sweep.measure.graph import EXACT, Graph
from pq_sweep.measure.network import count
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Model, Preprocess

FULL = 32 * 32
# Outputs times the weights of one output, by hand.
DIGITS = {
    "stem.0.0.weight": 16 * 64 * 9,
    "stem.1.0.weight": 32 * 64 * 16 * 9,
    "residual.conv1.weight": 32 * 64 * 32 * 9,
    "residual.conv2.weight": 32 * 64 * 32 * 9,
    "body.0.weight": 64 * 16 * 32 * 9,
    "fc1.weight": 64 * 256,
    "fc2.weight": 10 * 64,
}
PIXELS = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
STEM = DIGITS["stem.0.0.weight"]


def held(path: Path) -> Holdings:
    found = of_graph(Graph(path))
    assert found is not None
    return found


def macs_of(found: Holdings) -> dict[str, int]:
    return {name: layer["macs"] for name, layer in by_layer(found.products).items()}


def summed(found: Holdings, model: Model) -> Bits:
    figures = count(model)
    return found.summed(figures, figures)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded network as an FP32 graph."""
    path = tmp_path_factory.mktemp("bits") / "source.onnx"
    export_onnx(digits_cnn(), path)
    return path


def quantized(source: Path, target: Path, name: str, form: str = "cpu", **options: Any) -> Holdings:
    if name == "int8":
        options = {"calibration": "minmax", "images": 8, "percentile": 99.9} | options
    made = {"form": form, "stage": Stages(target.parent, ""), "exclude": []} | options
    getattr(quantizers, name)(source, target, digits(digits_cnn()), **made)
    return held(target)


# --- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_resnet20_is_that_of_a_count_by_hand(tmp_path: Path) -> None:
    """He et al. 2016, section 4.2: three stages of six 3x3 convolutions; the shortcuts between stages are 1x1."""
    model, path = cifar_resnet(n=3, weights=None), tmp_path / "model.onnx"
    export_onnx(model, path)
    found = held(path)
    stages = {1: (1024, 16), 2: (256, 32), 3: (64, 64)}  # output pixels and channels
    full = {stage: pixels * channels * channels * 9 for stage, (pixels, channels) in stages.items()}
    stem, first, head = 1024 * 16 * 3 * 9, {1: full[1], 2: full[2] // 2, 3: full[3] // 2}, 640
    shortcuts = 256 * 32 * 16 + 64 * 64 * 32
    total = stem + sum(first[stage] + 5 * full[stage] for stage in stages) + shortcuts + head

    assert total == 40_813_184
    assert sum(product.macs for product in found.products) == count(model).macs == total
    assert sorted(product.macs for product in found.products)[-1] == 1024 * 16 * 16 * 9
    weights = 27 * 16 + 9 * (6 * 16**2 + 16 * 32 + 5 * 32**2 + 32 * 64 + 5 * 64**2) + 16 * 32 + 32 * 64 + 640
    assert sum(product.weights for product in found.products) == weights == 270_896
    bits = summed(found, model)
    assert (bits.rel_bops, bits.bops, bits.weight_bits, bits.activation_bits) == (1.0, total * FULL, 32, 32)
    assert bits.packed_bytes == sum(array.nbytes for array in tensors(onnx.load(path)).values())
    assert 4 * weights < bits.packed_bytes < 4 * weights + 10_000


@pytest.mark.slow
def test_each_layer_of_a_network_has_its_own(source: Path) -> None:
    assert macs_of(held(source)) == DIGITS


class Groups(nn.Sequential):
    """Map (B, 4, 6, 6) to ten logits by a depthwise, a grouped and a transposed convolution."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(4, 8, 3, groups=4, padding=1),
            nn.Conv2d(8, 6, 1, groups=2, stride=2),
            nn.ConvTranspose2d(6, 4, 2, stride=2),
            nn.Flatten(),
            nn.Linear(144, 10),
        )


def test_grouped_and_transposed_convolutions_count_what_they_connect(tmp_path: Path) -> None:
    colours = Preprocess(size=6, resize=6, channels=4, mean=(0.0,) * 4, std=(1.0,) * 4)
    model, path = Model(Groups().eval(), 10, colours), tmp_path / "model.onnx"
    export_onnx(model, path)
    by_hand = {"0.weight": 8 * 36 * 9, "1.weight": 6 * 9 * 4, "2.weight": 6 * 9 * 4 * 4, "4.weight": 1440}

    assert macs_of(held(path)) == by_hand
    assert sum(by_hand.values()) == arithmetic(model)[0]
    assert macs_of(of_network(model, model.module.state_dict())) == by_hand


@pytest.mark.slow
def test_products_of_two_activations_have_no_weight(tmp_path: Path) -> None:
    model, path = attention(), tmp_path / "model.onnx"
    export_onnx(model, path)
    if onnx.__version__ == "1.17.0" and of_graph(Graph(path)) is None:
        pytest.skip("onnx 1.17.0 does not follow the shapes of this graph")
    found = held(path)
    scores = [product for product in found.products if not product.weights]

    # Four tokens of width 24 in three heads of 8: the scores, and what they weight.
    assert [product.macs for product in scores] == [3 * 4 * 4 * 8, 3 * 4 * 8 * 4]
    assert [product.bops for product in scores] == [384 * FULL, 384 * FULL]
    assert sum(product.macs for product in found.products) == count(model).macs
    assert all("sparsity" not in layer for name, layer in by_layer(scores).items())
    by_torch = macs_of(of_network(model, model.module.state_dict()))
    assert by_torch["attention.in_proj_weight"] == 4 * 24 * 24 * 3
    assert by_torch[REST] == 2 * 384
    assert sum(by_torch.values()) == count(model).macs


class Recurrent(nn.Module):
    """An LSTM over the rows of (B, 1, 8, 8) images."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x[:, 0])[0][:, -1])


@pytest.mark.slow
def test_recurrent_layers_count_every_step(tmp_path: Path) -> None:
    model, path = Model(Recurrent().eval(), 10, PIXELS), tmp_path / "model.onnx"
    export_onnx(model, path)
    by_hand = 8 * 4 * (8 * 6 + 6 * 6) + 60

    assert sum(macs_of(held(path)).values()) == by_hand == count(model).macs
    assert sum(macs_of(of_network(model, model.module.state_dict())).values()) == by_hand
    found = quantized(path, tmp_path / "dynamic.onnx", "int8_dynamic")
    assert (sum(macs_of(found).values()), summed(found, model).rel_bops) == (by_hand, 0.0625)


class Indices(nn.Module):
    """Products by indices over the rows of (B, 1, 8, 8) images."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.head = nn.Parameter(torch.ones(4, 8)), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.einsum("...j,kj->...k", x[:, 0], self.few)
        return self.head(torch.einsum("bij,bik->bjk", keys, x[:, 0]).sum(1))


@pytest.mark.slow
def test_products_by_indices_are_counted(tmp_path: Path) -> None:
    model, path = Model(Indices().eval(), 10, PIXELS), tmp_path / "model.onnx"
    export_onnx(model, path)
    assert "Einsum" in {node.op_type for node in Graph(path).nodes}
    assert sorted(product.macs for product in held(path).products) == [80, 8 * 8 * 4, 8 * 8 * 4]
    assert count(model).macs == 80 + 2 * 256


def test_what_no_operator_is_known_to_do_counts_in_fp32() -> None:
    model = two_convs()
    figures = count(model)
    (whole,) = with_rest([], figures)
    assert (whole.name, whole.macs, whole.bops) == (REST, figures.macs, figures.macs * FULL)
    known = of_network(model, model.module.state_dict()).products
    assert with_rest(known, figures) == known
    assert Holdings([], 7).summed(figures, figures).rel_bops == 1


# --- quantizers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form", "weight_bits", "activation_bits"),
    [
        ("fp16", "cpu", 16, 16),
        ("int8", "cpu", 8, 8),
        ("int8", "tensorrt", 8, 8),
        ("int8_dynamic", "cpu", 8, 8),
    ],
)
def test_graphs_of_our_quantizers(
    source: Path, tmp_path: Path, name: str, form: str, weight_bits: int, activation_bits: int
) -> None:
    path = tmp_path / "model.onnx"
    found = quantized(source, path, name, form)
    bits = summed(found, digits_cnn())

    assert macs_of(found) == DIGITS
    assert bits.rel_bops == weight_bits * activation_bits / FULL
    assert (bits.weight_bits, bits.activation_bits) == (weight_bits, activation_bits)
    assert bits.packed_bytes == sum(array.nbytes for array in tensors(onnx.load(path)).values())
    assert bits.packed_bytes < path.stat().st_size


def test_an_excluded_layer_counts_as_it_is(source: Path, tmp_path: Path) -> None:
    found = quantized(source, tmp_path / "model.onnx", "int8", exclude=["first"])
    bits = summed(found, digits_cnn())
    rest = sum(DIGITS.values()) - STEM

    assert bits.bops == STEM * 32 * 32 + rest * 64
    assert bits.rel_bops == (STEM * FULL + rest * 64) / (sum(DIGITS.values()) * FULL)
    assert bits.weight_bits == (144 * 32 + (58640 - 144) * 8) / 58640
    assert bits.activation_bits == (STEM * 32 + rest * 8) / (STEM + rest)
    # What a neighbour has rounded is multiplied with FP32 weights as floats.
    last = summed(quantized(source, tmp_path / "model.onnx", "int8", exclude=["last"]), digits_cnn())
    assert last.bops == 640 * FULL + (sum(DIGITS.values()) - 640) * 64
    halved = quantized(source, tmp_path / "model.onnx", "fp16", exclude=["first"])
    assert summed(halved, digits_cnn()).bops == STEM * FULL + rest * 256


@pytest.mark.slow
def test_zeros_are_codes_of_zero_and_do_not_make_it_less(tmp_path: Path) -> None:
    model, source = digits_cnn(), tmp_path / "source.onnx"
    with torch.no_grad():
        model.module.body[0].weight[:32] = 0  # half of them
    export_onnx(model, source)
    for name in ("int8", "int8_dynamic"):
        found = quantized(source, tmp_path / "model.onnx", name)
        layers, bits = by_layer(found.products), summed(found, model)
        assert 0.5 <= layers["body.0.weight"]["sparsity"] < 0.53
        assert layers["fc2.weight"]["sparsity"] < 0.06
        stored = Graph(tmp_path / "model.onnx").values("body.0.weight_quantized")
        assert layers["body.0.weight"]["sparsity"] == float((stored == 0).double().mean())
        assert bits.sparsity == sum(product.zeros for product in found.products) / 58640
        assert bits.rel_bops == 64 / FULL


# --- graphs by hand --------------------------------------------------------------------------------------------------


def graph_of(path: Path, nodes: list[Any], constants: list[TensorProto], opset: int = 21, exact: Any = None) -> Graph:
    """Write a graph from `input`, ("batch", 8), to `logits`."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None]) for name in ("input", "logits")]
    ends[0] = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 8])
    graph = helper.make_graph(
        [helper.make_node(*node[:3], **node[3]) for node in nodes], "g", ends[:1], ends[1:], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    if exact:
        helper.set_model_props(model, {EXACT: json.dumps(exact)})
    onnx.save(model, path)
    return Graph(path)


def constant(name: str, values: Any, kind: int = TensorProto.FLOAT) -> TensorProto:
    array = np.asarray(values)
    return helper.make_tensor(name, kind, array.shape, array.ravel().tolist())


ADD = ("Add", ["product", "bias"], ["logits"], {})
CODES = np.array([[(row * 5 + column) % 7 - 3 for column in range(5)] for row in range(8)])
BIAS = constant("bias", np.zeros(5))


@pytest.mark.parametrize(
    ("exact", "weight_bits", "packed"),
    # 40 weights; a scale for each of five channels, and five biases, both FP32.
    [(None, 4, 20 + 20 + 20), ({"w_quantized": 3}, 3, 15 + 20 + 20), ({"w_quantized": 3, "other": 5}, 3, 55)],
)
def test_four_bit_weights_with_fp32_activations(tmp_path: Path, exact: Any, weight_bits: int, packed: int) -> None:
    graph = graph_of(
        tmp_path / "model.onnx",
        [
            ("DequantizeLinear", ["w_quantized", "w_scale"], ["w"], {"axis": 1}),
            ("MatMul", ["input", "w"], ["product"], {"name": "layer"}),
            ADD,
        ],
        [constant("w_quantized", CODES, TensorProto.INT4), constant("w_scale", np.full(5, 0.5)), BIAS],
        exact=exact,
    )
    found = of_graph(graph)
    assert found
    (product,) = found.products
    assert (product.name, product.macs, product.weights) == ("w", 40, 40)
    assert product.zeros == (CODES == 0).sum() == 6
    assert (product.weight_bits, product.activation_bits) == (weight_bits, 32)
    assert product.bops / (40 * FULL) == weight_bits / 32
    assert found.packed_bytes == packed
    assert graph.values("w_quantized").tolist() == (CODES * 0.5).tolist()


def test_bits_of_odd_weights_are_rounded_up_to_a_byte(tmp_path: Path) -> None:
    nodes = [
        ("DequantizeLinear", ["w", "scale"], ["floats"], {}),
        ("Gemm", ["input", "floats", "bias"], ["logits"], {}),
    ]
    constants = [constant("w", CODES[:, :3], TensorProto.INT4), constant("scale", 0.5), constant("bias", np.zeros(3))]
    found = of_graph(graph_of(tmp_path / "model.onnx", nodes, constants, exact={"w": 3}))
    assert found
    assert found.packed_bytes == (8 * 3 * 3) // 8 + 4 + 12
    found = of_graph(graph_of(tmp_path / "model.onnx", nodes, constants, exact={"w": 1, "scale": 7}))
    assert found
    assert found.packed_bytes == 3 + 1 + 12


def test_blocks_have_zeros_of_their_own(tmp_path: Path) -> None:
    zeros = np.array([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [10, 11, 12, 13, 14]])
    codes = np.repeat(zeros, 3, 0)[:8].copy()
    codes[0, :] += 1  # all others stand for zero
    graph = graph_of(
        tmp_path / "model.onnx",
        [
            ("DequantizeLinear", ["w", "scale", "zero"], ["floats"], {"axis": 0, "block_size": 3}),
            ("MatMul", ["input", "floats"], ["product"], {}),
            ADD,
        ],
        [
            constant("w", codes, TensorProto.UINT4),
            constant("zero", zeros, TensorProto.UINT4),
            constant("scale", np.arange(1.0, 16.0).reshape(3, 5)),
            BIAS,
        ],
    )
    found = of_graph(graph)
    assert found
    assert found.products[0].zeros == 35
    assert graph.values("w")[0].tolist() == [1, 2, 3, 4, 5]
    assert graph.values("w")[1:].count_nonzero() == 0


@pytest.mark.parametrize(
    ("between", "bits"),
    [
        ([], 8),
        ([("Reshape", ["a"], ["b"], {}), ("Transpose", ["b"], ["a"], {"perm": [0, 1]})], 8),
        ([("Relu", ["a"], ["b"], {}), ("Identity", ["b"], ["a"], {})], 32),
        ([("Cast", ["a"], ["b"], {"to": TensorProto.FLOAT16}), ("Cast", ["b"], ["a"], {"to": TensorProto.FLOAT})], 32),
    ],
    ids=["directly", "moved", "computed", "converted"],
)
def test_activations_are_in_eight_bit_up_to_the_next_computation(tmp_path: Path, between: list[Any], bits: int) -> None:
    """The graph quantizes the weight, which is stored as floats: it has eight bits if the other factor has."""
    names = {"a": "floats", "b": "moved"}
    nodes: list[Any] = [
        ("QuantizeLinear", ["input", "scale", "zero"], ["codes"], {}),
        ("DequantizeLinear", ["codes", "scale", "zero"], ["floats"], {}),
        ("QuantizeLinear", ["w", "scale", "zero"], ["w_codes"], {}),
        ("DequantizeLinear", ["w_codes", "scale", "zero"], ["w_floats"], {}),
    ]
    last = "floats"
    for number, (kind, (_,), _, options) in enumerate(between):
        inputs = [last, "shape"] if kind == "Reshape" else [last]
        last = f"{names['b']}{number}"
        nodes.append((kind, inputs, [last], options))
    nodes += [("MatMul", [last, "w_floats"], ["product"], {}), ADD]
    constants = [constant("scale", 0.5), constant("zero", 0, TensorProto.INT8), constant("w", CODES * 0.5), BIAS]
    found = of_graph(
        graph_of(tmp_path / "model.onnx", nodes, [*constants, constant("shape", [-1, 8], TensorProto.INT64)])
    )
    assert found
    (product,) = found.products
    assert (product.macs, product.weight_bits, product.activation_bits) == (40, bits, bits)
    assert found.packed_bytes == 4 + 1 + 160 + 20 + 16


def test_half_the_bits_in_store_count_though_products_are_in_fp32(tmp_path: Path) -> None:
    nodes = [
        ("Cast", ["w"], ["floats"], {"to": TensorProto.FLOAT}),
        ("Transpose", ["floats"], ["turned"], {"perm": [1, 0]}),
        ("MatMul", ["input", "turned"], ["product"], {}),
        ADD,
    ]
    weight = numpy_helper.from_array(CODES.T.astype(np.float16), "w")
    found = of_graph(graph_of(tmp_path / "model.onnx", nodes, [weight, BIAS]))
    assert found
    assert [(product.name, product.weight_bits, product.activation_bits) for product in found.products] == [
        ("w", 16, 32)
    ]


def test_a_weight_that_two_layers_share_is_stored_once(tmp_path: Path) -> None:
    nodes = [
        ("MatMul", ["input", "square"], ["once"], {}),
        ("MatMul", ["once", "square"], ["logits"], {}),
    ]
    square = constant("square", np.eye(8))
    found = of_graph(graph_of(tmp_path / "model.onnx", nodes, [square]))
    assert found
    assert (found.packed_bytes, [product.macs for product in found.products]) == (256, [64, 64])
    figures = Counts(params=64, nonzero_params=8, weights=64, sparsity=0.0, structure="", macs=128)
    assert found.summed(figures, figures).sparsity == 56 / 64
    assert by_layer(found.products) == {
        "square": {"macs": 128, "weight_bits": 32, "activation_bits": 32, "sparsity": 56 / 64}
    }


def test_shapes_that_depend_on_what_an_image_shows_have_no_bits(tmp_path: Path) -> None:
    nodes = [
        ("NonZero", ["input"], ["places"], {}),
        ("Cast", ["places"], ["floats"], {"to": TensorProto.FLOAT}),
        ("MatMul", ["floats", "w"], ["logits"], {}),
    ]
    assert of_graph(graph_of(tmp_path / "model.onnx", nodes, [constant("w", CODES)])) is None


# --- jobs ------------------------------------------------------------------------------------------------------------


def test_an_engine_is_told_by_the_graph_that_it_was_built_from(source: Path, tmp_path: Path) -> None:
    engine, graph = tmp_path / "engine" / "b1" / "model.engine", tmp_path / "model.onnx"
    assert look_at_artifact(engine, graph, "fp32", digits_cnn()) == ({}, None)
    graph.write_bytes(source.read_bytes())
    stored, found = look_at_artifact(engine, graph, "fp32", digits_cnn())
    assert isinstance(stored, Graph)
    assert found == held(source)
    # Whether TensorRT took BF16 for a layer, no graph tells.
    stored, found = look_at_artifact(engine, graph, "bf16", digits_cnn())
    assert isinstance(stored, Graph)
    assert found is None


def job(folder: Path, *overrides: str) -> tuple[Bits, Result, dict[str, Any]]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*overrides, *SHORT])
    path = folder / "sweep" / "0"
    path.mkdir(parents=True)
    run(config, path)
    result, layers = Result.read(path / "result.json"), json.loads((path / "layers.json").read_text())
    assert result
    assert result.bits
    return result.bits, result, layers


def test_a_network_of_torch_counts_in_its_own_precision(tmp_path: Path) -> None:
    bits, result, layers = job(tmp_path, "quantizer=bf16", "runtime=torch", "pruner=l1_global", "pruner.amount=0.5")
    state = torch.load(tmp_path / "sweep" / "0" / "model.pt", weights_only=True)

    assert bits.rel_bops == 0.25
    assert (bits.weight_bits, bits.activation_bits) == (16, 16)
    assert bits.packed_bytes == sum(tensor.numel() * tensor.itemsize for tensor in state.values())
    assert bits.sparsity == pytest.approx(0.5, abs=1e-3)
    assert {name: layer["macs"] for name, layer in layers["after"].items()} == DIGITS
    assert sum(DIGITS.values()) == result.network.macs
    assert layers["products"] == {}


@pytest.mark.slow
def test_removed_channels_lower_what_is_multiplied(tmp_path: Path) -> None:
    bits, result, layers = job(tmp_path, "quantizer=int8", "runtime=onnxruntime", "pruner=remove", "pruner.amount=0.5")

    assert result.network.macs < 0.4 * result.baseline.macs
    assert bits.rel_bops == result.network.macs * 64 / (result.baseline.macs * FULL)
    assert {layer["weight_bits"] for layer in layers["after"].values()} == {8}
    assert sum(layer["macs"] for layer in layers["after"].values()) == result.network.macs
    assert all(prod((layer["weights"], 8)) / 8 < bits.packed_bytes for layer in layers["after"].values())
