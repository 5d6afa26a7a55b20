"""Weights of 2 to 8 bits: the integers are those closest to the weights, and the file holds and computes just them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from independent import onnx_logits, runtime, tensors, torch_logits, workspace
from omegaconf import OmegaConf
from random_networks import small_vit
from shared_networks import shared_network
from torch import Tensor, nn
from torch.nn.functional import linear

from pq_sweep.compress import quantizers
from pq_sweep.compress.weight_only import Grid, fitted
from pq_sweep.core.stored import packed, stored_weights
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.stages import Stages
from pq_sweep.measure.graph import EXACT
from pq_sweep.runtimes import precision_of
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Data, Model, Preprocess, UserError

BITS = range(2, 9)
CONTAINERS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}
each_bits = pytest.mark.parametrize("bits", BITS)


def written(source: Path, target: Path, **options: Any) -> onnx.ModelProto:
    """Run the quantizer with the defaults of its YAML."""
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "quantizer" / "weights.yaml"))
    assert isinstance(defaults, dict)
    chosen: dict[str, Any] = {str(key): value for key, value in defaults.items() if key != "_target_"}
    data: Any = None  # it looks at no images
    quantizers.weights(source, target, data, form="cpu", stage=Stages(target.parent, ""), **(chosen | options))
    return onnx.load(target)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "export.onnx"
    export_onnx(digits_cnn(), path)
    return path


@pytest.fixture(scope="module")
def images() -> Tensor:
    data: Data = digits(digits_cnn())
    return data.evaluation.fetch(list(range(100)))


def exported(network: nn.Module, shape: tuple[int, int, int], folder: Path) -> Path:
    channels, size, _ = shape
    model = Model(network.eval(), 10, Preprocess(size, size, channels))
    export_onnx(model, folder / "export.onnx")
    return folder / "export.onnx"


def with_values(source: Path, values: dict[str, np.ndarray], images: Tensor) -> np.ndarray:
    """Run the FP32 graph with other values of its weights."""
    graph = onnx.load(source)
    for item in graph.graph.initializer:
        if item.name in values:
            item.CopyFrom(onnx.numpy_helper.from_array(values[item.name].astype("float32"), item.name))
    path = source.with_name("decoded.onnx")
    onnx.save(graph, path)
    return onnx_logits(path, images)


# The integers


@each_bits
def test_scales_have_the_least_squared_error(bits: int) -> None:
    generator = np.random.default_rng(bits)
    rows = np.concatenate([generator.standard_normal((6, 300)), generator.standard_t(2, (6, 300))]).astype("float32")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes, scales = fitted(rows, Grid(bits))
    errors = np.square(codes * scales[:, None] - rows).sum(1)

    assert (codes.min(), codes.max()) >= (low, low)
    assert codes.max() <= high
    for row, error in zip(rows.astype("float64"), errors, strict=True):
        tried = np.abs(row).max() / high * np.linspace(0.02, 1.2, 6000)[:, None]
        least = np.square(np.clip(np.rint(row / tried), low, high) * tried - row).sum(1).min()
        assert error <= 1.03 * least


# Pruning vs Quantization (NeurIPS 2023), figure 1: what the best symmetric grid of so many bits reaches.
@pytest.mark.parametrize(
    ("bits", "db", "step"), [(2, 8.26, 1.0484), (3, 13.91, 0.6018), (4, 19.26, 0.3386), (8, 40.57, 0.0308)]
)
def test_normal_weights_have_the_noise_and_step_of_theory(bits: int, db: float, step: float) -> None:
    row = np.random.default_rng(0).standard_normal((1, 200_000)).astype("float32")
    codes, scale = fitted(row, Grid(bits))

    assert 10 * np.log10(np.square(row).sum() / np.square(codes * scale - row).sum()) == pytest.approx(db, abs=0.1)
    assert scale[0] == pytest.approx(step, rel=0.03)


def test_rows_of_zeros_stay_zeros() -> None:
    codes, scale = fitted(np.zeros((2, 5), "float32"), Grid(4))

    assert not codes.any()
    assert np.isfinite(scale).all()
    assert (scale > 0).all()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_packed_integers_are_read_by_onnx(bits: int, count: int) -> None:
    kind = getattr(onnx.TensorProto, f"INT{bits}", None)
    if kind is None:
        pytest.skip(f"onnx {onnx.__version__} has no integers of {bits} bits")
    codes = np.arange(count) % 2**bits - 2 ** (bits - 1)
    item = onnx.TensorProto(data_type=kind, dims=[count], raw_data=packed(codes, bits).tobytes())

    assert onnx.numpy_helper.to_array(item).astype("int32").tolist() == codes.tolist()


# The file


@each_bits
def test_the_file_holds_the_bits_and_computes_with_their_values(
    source: Path, images: Tensor, tmp_path: Path, bits: int
) -> None:
    if not hasattr(onnx.TensorProto, f"INT{CONTAINERS[bits]}"):
        pytest.skip(f"onnx {onnx.__version__} has no integers of {CONTAINERS[bits]} bits")
    graph = written(source, tmp_path / "model.onnx", bits=bits)
    weights = stored_weights(graph.graph)
    metadata = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}

    onnx.checker.check_model(graph, full_check=True)
    assert {onnx.TensorProto.DataType.Name(weight.item.data_type) for weight in weights} == {f"INT{CONTAINERS[bits]}"}
    assert all(len(weight.item.raw_data) == -(-weight.codes().size * CONTAINERS[bits] // 8) for weight in weights)
    assert max(np.abs(weight.codes() + 0.5).max() for weight in weights) <= 2 ** (bits - 1)
    assert metadata.get(EXACT) == (None if bits in (2, 4, 8) else {weight.item.name: bits for weight in weights})
    floats = {name for name, values in tensors(graph).items() if values.ndim > 1 and values.dtype == np.float32}
    assert not floats
    expected = with_values(source, {weight.name: weight.values() for weight in weights}, images)
    assert np.abs(onnx_logits(tmp_path / "model.onnx", images) - expected).max() < 1e-4 * np.abs(expected).max()


def test_blocks_lie_along_the_inputs_of_linear_layers(source: Path, images: Tensor, tmp_path: Path) -> None:
    graph = written(source, tmp_path / "model.onnx", bits=4, block=32)
    weights = {weight.name: weight for weight in stored_weights(graph.graph)}
    dequantizers = {node.input[0]: node for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    scales = tensors(graph)
    plain = {weight.name: weight for weight in stored_weights(written(source, tmp_path / "plain.onnx", bits=4).graph)}
    before = tensors(onnx.load(source))
    for name, weight in weights.items():
        blocked = {a.name: a.i for a in dequantizers[weight.item.name].attribute}.get("block_size")
        if before[name].ndim == 2:
            outputs, inputs = before[name].shape
            assert blocked == 32
            assert scales[f"{name}_scale"].shape == (outputs, -(-inputs // 32))
            errors = [np.square(each[name].values() - before[name]).sum() for each in (weights, plain)]
            assert errors[0] < errors[1]
        else:
            assert blocked is None
    expected = with_values(source, {name: weight.values() for name, weight in weights.items()}, images)

    assert np.abs(onnx_logits(tmp_path / "model.onnx", images) - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.parametrize("block", [7, 16, 1000])
def test_inputs_need_not_fill_their_blocks(tmp_path: Path, block: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 25, 20), nn.ReLU(), nn.Linear(20, 10))
    graph = written(exported(network, (3, 5, 5), tmp_path), tmp_path / "model.onnx", bits=4, block=block)
    first, last = (torch.from_numpy(weight.values()) for weight in stored_weights(graph.graph))
    images = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        expected = linear(linear(images.flatten(1), first, network[1].bias).relu(), last, network[3].bias)  # type: ignore[arg-type]

    assert np.abs(onnx_logits(tmp_path / "model.onnx", images) - expected.numpy()).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, 16])
def test_a_transformer_has_no_matrix_left_in_float(tmp_path: Path, block: int | None) -> None:
    model = small_vit()
    export_onnx(model, tmp_path / "export.onnx")
    graph = written(tmp_path / "export.onnx", tmp_path / "model.onnx", bits=4, block=block)
    stored = stored_weights(graph.graph)
    added = ("class_token", "pos_embedding")
    matrices = {n: p.numel() for n, p in model.module.named_parameters() if p.dim() > 1 and not n.endswith(added)}

    assert sum("in_proj" in name for name in matrices) == 2
    assert sorted(weight.codes().size for weight in stored) == sorted(matrices.values())
    assert all(weight.scale is not None for weight in stored)
    assert np.isfinite(onnx_logits(tmp_path / "model.onnx", model.sample(2))).all()


class Unusual(nn.Module):
    """A grouped and a transposed convolution, whose outputs lie along different axes."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.up = nn.Conv2d(4, 8, 3, groups=2, padding=1), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.up(self.grouped(x).relu()).mean((2, 3)))
        return logits


@pytest.mark.slow
def test_grouped_and_transposed_convolutions_have_a_scale_for_each_output(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Unusual()
    graph = written(exported(network, (4, 8, 8), tmp_path), tmp_path / "model.onnx", bits=3)
    scales = tensors(graph)
    for weight in stored_weights(graph.graph):
        network.get_parameter(weight.name).data = torch.from_numpy(weight.values())
    images = torch.randn(2, 4, 8, 8)

    assert scales["grouped.weight_scale"].shape == (8,)
    assert scales["up.weight_scale"].shape == (6,)
    assert np.abs(onnx_logits(tmp_path / "model.onnx", images) - torch_logits(network, images)).max() < 1e-4


class Mixing(nn.Module):
    """Products of which the outputs come last, of numbers that do and do not fill bytes of two-bit integers."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.even, self.head = nn.Linear(25, 21), nn.Linear(21, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.even(self.odd(x.flatten(2)).relu()).mean(1))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, 8])
def test_products_of_two_bits_are_right_whatever_the_number_of_outputs(tmp_path: Path, block: int | None) -> None:
    if not hasattr(onnx.TensorProto, "INT2"):
        pytest.skip(f"onnx {onnx.__version__} has no integers of 2 bits")
    torch.manual_seed(0)
    images = torch.randn(4, 3, 5, 5)
    source, target = exported(Mixing(), (3, 5, 5), tmp_path), tmp_path / "model.onnx"
    weights = stored_weights(written(source, target, bits=2, block=block).graph)
    kinds = {weight.codes().size: onnx.TensorProto.DataType.Name(weight.item.data_type) for weight in weights}
    session = runtime("onnxruntime").load(target, partial(quantizers.weights, bits=2), workspace(tmp_path / "job"), {})

    assert kinds == {25 * 21: "INT4", 21 * 24: "INT2", 24 * 10: "INT2"}
    expected = with_values(source, {weight.name: weight.values() for weight in weights}, images)
    assert np.abs(session(images).numpy() - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_a_weight_of_several_layers_is_there_once(tmp_path: Path) -> None:
    model = shared_network("one Parameter of two convolutions")
    export_onnx(model, tmp_path / "export.onnx")
    graph = written(tmp_path / "export.onnx", tmp_path / "model.onnx", bits=4)
    names = [weight.name for weight in stored_weights(graph.graph)]

    assert len(names) == len(set(names)) < sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in graph.graph.node)
    assert np.isfinite(onnx_logits(tmp_path / "model.onnx", model.sample(2))).all()


def test_excluded_layers_stay_as_they_are(source: Path, tmp_path: Path) -> None:
    graph = written(source, tmp_path / "model.onnx", bits=3, exclude=["first", "last", "residual.*"])
    before, weights = tensors(onnx.load(source)), stored_weights(graph.graph)
    left = {weight.name: weight for weight in weights if weight.scale is None}

    assert left.keys() == {"stem.0.0.weight", "residual.conv1.weight", "residual.conv2.weight", "fc2.weight"}
    assert all((weight.values() == before[name]).all() for name, weight in left.items())


def test_a_layer_that_is_not_there_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantizer\.exclude=nonsense matches no layer"):
        written(source, tmp_path / "model.onnx", exclude=["nonsense"])


def test_packages_without_integers_of_two_bits_are_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx, "TensorProto", SimpleNamespace(INT4=onnx.TensorProto.INT4, INT8=onnx.TensorProto.INT8))
    with pytest.raises(UserError, match=r"quantizer\.bits=2 needs integers of 2 bits, which onnx"):
        written(source, tmp_path / "model.onnx", bits=2)


@each_bits
def test_bits_are_the_precision(bits: int) -> None:
    assert precision_of(partial(quantizers.weights, bits=bits)) == f"w{bits}"
