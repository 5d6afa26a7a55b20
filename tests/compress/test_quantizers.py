"""Quantizers: the graph has the precision it claims, is calibrated by the right images, and still answers right."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from independent import matrices, onnx_logits, relative_error, snr_db, tensors, torch_logits, torch_threads
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from pq_sweep.compress import qdq, quantizers
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn, torchvision_model
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

FORMS = ("cpu", "tensorrt")
METHODS = ("minmax", "entropy", "percentile")
WEIGHTS = {
    "stem.0.0.weight",
    "stem.1.0.weight",
    "residual.conv1.weight",
    "residual.conv2.weight",
    "body.0.weight",
    "fc1.weight",
    "fc2.weight",
}

each_form = pytest.mark.parametrize("form", FORMS)
each_method = pytest.mark.parametrize("calibration", METHODS)


@dataclass(frozen=True)
class Case:
    """A network, its data, its FP32 graph, and its own logits (N, classes) of the evaluation images."""

    model: Model
    data: Data
    source: Path
    images: Tensor
    logits: np.ndarray


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The embedded network, exported once."""
    model = digits_cnn()
    return exported(model, digits(model), tmp_path_factory.mktemp("digits"))


def exported(model: Model, data: Data, folder: Path) -> Case:
    images = everything(data.evaluation)
    logits = torch_logits(model.module, images)
    export_onnx(model, folder / "export.onnx")
    return Case(model, data, folder / "export.onnx", images, logits)


def everything(split: Split) -> Tensor:
    return split.fetch(list(range(len(split))))


def quantize(name: str, case: Case, target: Path, form: str = "cpu", **options: Any) -> dict[str, Any]:
    """Run a quantizer with the defaults of its YAML, as a job does."""
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "quantizer" / f"{name}.yaml"))
    assert isinstance(defaults, dict)
    chosen = {str(key): value for key, value in defaults.items() if not str(key).startswith("_")} | options
    stage = Stages(target.parent, "")
    return getattr(quantizers, name)(case.source, target, case.data, form=form, stage=stage, **chosen)


def graph_of(name: str, case: Case, folder: Path, form: str = "cpu", **options: Any) -> onnx.ModelProto:
    quantize(name, case, folder / "model.onnx", form, **options)
    return onnx.load(folder / "model.onnx")


def zero_points(graph: onnx.ModelProto) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield operator, quantized tensor and zero point of every Q and DQ node."""
    constants = tensors(graph)
    for node in graph.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            yield node.op_type, node.input[0], constants[node.input[2]]


def weight_dequantizers(graph: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Return the DQ nodes of constants of two dimensions and more, by the constant's name."""
    constants = tensors(graph)
    found = [node for node in graph.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    return {node.input[0]: node for node in found if constants[node.input[0]].ndim > 1}


# What the graph of each form looks like


@each_form
def test_int8_is_written_as_explicit_quantize_and_dequantize(case: Case, tmp_path: Path, form: str) -> None:
    operators = Counter(node.op_type for node in graph_of("int8", case, tmp_path, form).graph.node)

    assert operators["QuantizeLinear"] >= len(WEIGHTS)
    assert operators["DequantizeLinear"] >= 2 * len(WEIGHTS)
    assert operators["Conv"] + operators["Gemm"] == len(WEIGHTS)
    assert not [name for name in operators if name.startswith(("QLinear", "ConvInteger", "MatMulInteger"))]


def test_the_cpu_form_has_unsigned_activations_and_symmetric_weights(case: Case, tmp_path: Path) -> None:
    graph = graph_of("int8", case, tmp_path, "cpu")
    weights = set(weight_dequantizers(graph))

    activations = [zero for operator, _, zero in zero_points(graph) if operator == "QuantizeLinear"]
    assert {zero.dtype for zero in activations} == {np.dtype("uint8")}
    of_weights = [zero for _, name, zero in zero_points(graph) if name in weights]
    assert {zero.dtype for zero in of_weights} == {np.dtype("int8")}
    assert not any(zero.any() for zero in of_weights)


def test_the_tensorrt_form_is_symmetric_int8_throughout(case: Case, tmp_path: Path) -> None:
    graph = graph_of("int8", case, tmp_path, "tensorrt")

    zeros = [zero for _, _, zero in zero_points(graph)]
    assert {zero.dtype for zero in zeros} == {np.dtype("int8")}
    assert not any(zero.any() for zero in zeros)


def test_the_tensorrt_form_keeps_its_biases_in_float(case: Case, tmp_path: Path) -> None:
    graph = graph_of("int8", case, tmp_path, "tensorrt")
    constants = tensors(graph)

    biases = [constants[node.input[2]] for node in graph.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(biases) == len(WEIGHTS)
    assert {bias.dtype for bias in biases} == {np.dtype("float32")}
    assert np.dtype("int32") not in {array.dtype for array in constants.values()}


@each_form
def test_every_weight_is_rounded_by_its_own_channel(case: Case, tmp_path: Path, form: str) -> None:
    original = tensors(onnx.load(case.source))
    graph = graph_of("int8", case, tmp_path, form)
    constants = tensors(graph)
    nodes = weight_dequantizers(graph)

    assert len(nodes) == len(WEIGHTS)
    for name in WEIGHTS:
        stored = next(node for key, node in nodes.items() if key.startswith(name))
        quantized, scales = constants[stored.input[0]], constants[stored.input[1]]
        scale = scales.reshape(-1, *[1] * (quantized.ndim - 1))
        assert scales.shape == (original[name].shape[0],), name
        assert [item.i for item in stored.attribute if item.name == "axis"] == [0], name
        assert np.all(np.abs(quantized * scale - original[name]) <= scale * 0.5001), name


@pytest.mark.parametrize(("vnni", "largest"), [(True, 127), (False, 64)])
def test_weights_have_seven_bits_where_byte_products_saturate(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool, largest: int
) -> None:
    monkeypatch.setattr(qdq, "multiplies_bytes", lambda flags: vnni)
    record = quantize("int8", case, tmp_path / "model.onnx", "cpu")
    graph = onnx.load(tmp_path / "model.onnx")
    constants = tensors(graph)

    assert record["reduce_range"] is not vnni
    assert max(np.abs(constants[name].astype(int)).max() for name in weight_dequantizers(graph)) == largest


@each_form
def test_int8_is_far_smaller_than_fp32(case: Case, tmp_path: Path, form: str) -> None:
    quantize("int8", case, tmp_path / "model.onnx", form)

    assert (tmp_path / "model.onnx").stat().st_size <= 0.45 * case.source.stat().st_size


# Calibration


@each_form
@each_method
def test_int8_answers_like_fp32(case: Case, tmp_path: Path, form: str, calibration: str) -> None:
    quantize("int8", case, tmp_path / "model.onnx", form, calibration=calibration)
    actual, labels = onnx_logits(tmp_path / "model.onnx", case.images), case.data.evaluation.labels.numpy()

    assert snr_db(case.logits, actual) > 15
    assert abs((actual.argmax(1) == labels).mean() - (case.logits.argmax(1) == labels).mean()) <= 0.02


@each_form
def test_calibration_methods_differ(case: Case, tmp_path: Path, form: str) -> None:
    written = []
    for method in METHODS:
        quantize("int8", case, tmp_path / f"{method}.onnx", form, calibration=method)
        written.append((tmp_path / f"{method}.onnx").read_bytes())

    assert all(one != other for one, other in combinations(written, 2))


def test_a_lower_percentile_cuts_more(case: Case, tmp_path: Path) -> None:
    def widest(percentile: float) -> float:
        graph = graph_of("int8", case, tmp_path, "cpu", calibration="percentile", percentile=percentile)
        constants = tensors(graph)
        scales = [constants[node.input[1]] for node in graph.graph.node if node.op_type == "QuantizeLinear"]
        return float(max(scales))

    assert widest(90.0) < 0.8 * widest(99.999)


@pytest.mark.parametrize("images", [1, 5, 64])
def test_minmax_spans_the_logits_of_the_calibration_images(case: Case, tmp_path: Path, images: int) -> None:
    graph = graph_of("int8", case, tmp_path, "cpu", calibration="minmax", images=images)
    logits = torch_logits(case.model.module, everything(case.data.calibration.take(images)))
    last = next(node for node in graph.graph.node if node.output[0] == "logits")

    assert last.op_type == "DequantizeLinear"
    assert tensors(graph)[last.input[1]] == pytest.approx((logits.max() - logits.min()) / 255, rel=1e-5)


@each_method
@pytest.mark.parametrize("images", [1, 7, 11, 16])
def test_calibration_sees_its_own_images_once_each(case: Case, tmp_path: Path, calibration: str, images: int) -> None:
    seen: dict[str, list[int]] = {"evaluation": [], "calibration": [], "train": []}
    watched = replace(case, data=watching(case.data, seen))

    record = quantize("int8", watched, tmp_path / "model.onnx", calibration=calibration, images=images)

    assert seen == {"evaluation": [], "calibration": list(range(images)), "train": []}
    assert record["calibration_images"] == images


def watching(data: Data, seen: dict[str, list[int]]) -> Data:
    """Return the same data, which notes in `seen` the index of every image that is fetched."""

    def watch(name: str, split: Split) -> Split:
        def fetch(indices: list[int]) -> Tensor:
            seen[name] += indices
            return split.fetch(indices)

        return Split(split.labels, fetch)

    return replace(data, **{name: watch(name, getattr(data, name)) for name in seen})


@pytest.mark.parametrize("images", [0, 201])
def test_a_number_of_images_that_is_not_there_is_refused(case: Case, tmp_path: Path, images: int) -> None:
    with pytest.raises(UserError, match=rf"quantizer\.images={images} does not fit the 200 calibration images"):
        quantize("int8", case, tmp_path / "model.onnx", images=images)


def test_an_unknown_calibration_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantizer\.calibration=kl is not known; valid are: minmax, entropy"):
        quantize("int8", case, tmp_path / "model.onnx", calibration="kl")


def test_calibrating_and_quantizing_are_timed_apart(case: Case, tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    options = {"calibration": "minmax", "images": 8, "exclude": [], "percentile": 99.9}
    quantizers.int8(case.source, tmp_path / "model.onnx", case.data, form="cpu", stage=stage, **options)

    assert set(stage.seconds) == {"calibrate", "quantize"}
    assert all(seconds > 0 for seconds in stage.seconds.values())


@each_method
def test_calibration_prints_nothing(
    case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str], calibration: str
) -> None:
    quantize("int8", case, tmp_path / "model.onnx", calibration=calibration, images=8)

    assert capfd.readouterr().out == ""


# Layers left out

EXCLUDED: list[tuple[list[str], set[str]]] = [
    ([], set()),
    (["fc1.weight"], {"fc1.weight"}),
    (["fc*"], {"fc1.weight", "fc2.weight"}),
    (["residual"], {"residual.conv1.weight", "residual.conv2.weight"}),
    (["stem.0"], {"stem.0.0.weight"}),
    (["first"], {"stem.0.0.weight"}),
    (["last"], {"fc2.weight"}),
    (["first", "last", "fc2.weight"], {"stem.0.0.weight", "fc2.weight"}),
]
each_exclusion = pytest.mark.parametrize(("patterns", "expected"), EXCLUDED, ids=lambda item: "+".join(sorted(item)))
each_quantizer_with_exclude = pytest.mark.parametrize("name", ["fp16", "int8", "int8_dynamic"])


@each_quantizer_with_exclude
@each_exclusion
def test_excluded_layers_stay_in_float(
    case: Case, tmp_path: Path, name: str, patterns: list[str], expected: set[str]
) -> None:
    record = quantize(name, case, tmp_path / "model.onnx", exclude=patterns)

    # int8_dynamic turns linear layers into matrix products with a transposed weight.
    found = matrices(onnx.load(tmp_path / "model.onnx"))
    assert {weight.removesuffix("_Transposed") for weight in found} == expected
    assert len(record["excluded_nodes"]) == len(expected)


@each_exclusion
def test_excluded_layers_stay_in_float_for_tensorrt(
    case: Case, tmp_path: Path, patterns: list[str], expected: set[str]
) -> None:
    assert matrices(graph_of("int8", case, tmp_path, "tensorrt", exclude=patterns)) == expected


@each_quantizer_with_exclude
def test_excluding_every_layer_leaves_no_weight_quantized(case: Case, tmp_path: Path, name: str) -> None:
    graph = graph_of(name, case, tmp_path, exclude=["*"])

    assert len(matrices(graph)) == len(WEIGHTS)
    # INT8 still rounds what runs between the layers: pooling and the residual sum.
    assert relative_error(case.logits, onnx_logits(tmp_path / "model.onnx", case.images)) < 0.03


@each_quantizer_with_exclude
def test_a_pattern_without_a_layer_is_refused_and_names_the_layers(case: Case, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"quantizer\.exclude=layer9 matches no layer") as caught:
        quantize(name, case, tmp_path / "model.onnx", exclude=["fc1", "layer9"])

    assert all(weight in str(caught.value) for weight in WEIGHTS)


class Tokens(nn.Module):
    """Linear layers over tokens, as in a transformer: the exporter writes MatMul with a transposed weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 2, stride=2)
        self.mix = nn.Linear(8, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(torch.relu(self.mix(tokens)).mean(1))


@pytest.mark.slow
@each_quantizer_with_exclude
@pytest.mark.parametrize("pattern", ["mix", "mix.weight", "mi*"])
def test_a_layer_over_tokens_is_excluded_by_its_parameter_name(
    tokens: Case, tmp_path: Path, name: str, pattern: str
) -> None:
    graph = graph_of(name, tokens, tmp_path, exclude=[pattern])

    assert {tensors(graph)[weight].size for weight in matrices(graph)} == {8 * 24}


@pytest.fixture(scope="module")
def tokens(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.manual_seed(0)
    model = Model(Tokens().eval(), 10, case.model.preprocess, case.model.classes)
    return exported(model, case.data, tmp_path_factory.mktemp("tokens"))


# The other precisions


def test_fp16_halves_every_weight(case: Case, tmp_path: Path) -> None:
    graph = graph_of("fp16", case, tmp_path)

    def size(arrays: dict[str, np.ndarray]) -> int:
        return sum(array.nbytes for array in arrays.values() if array.dtype.kind == "f")

    assert size(tensors(graph)) == size(tensors(onnx.load(case.source))) / 2
    assert (tmp_path / "model.onnx").stat().st_size <= 0.6 * case.source.stat().st_size


class Summed(nn.Module):
    """One tensor is summed up along two axes, which the conversion to half precision leaves in FP32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 16, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        down, right = (features.cumsum(axis) for axis in (2, 3))
        return self.head(nn.functional.adaptive_avg_pool2d(down + right, 4).flatten(1))


@pytest.mark.slow
def test_fp16_of_a_tensor_that_two_operators_need_in_fp32(tmp_path: Path) -> None:
    model = replace(digits_cnn(), module=Summed().eval())
    case = exported(model, digits(model), tmp_path)
    graph = graph_of("fp16", case, tmp_path)
    casts = [node for node in graph.graph.node if node.op_type == "Cast"]
    assert len({(node.input[0], node.attribute[0].i) for node in casts}) == len(casts)
    assert snr_db(case.logits, onnx_logits(tmp_path / "model.onnx", case.images)) > 50


class Beside(nn.Module):
    """A BatchNorm beside a convolution, as in RepVGG, an InstanceNorm, and a product with a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.beside, self.instance = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.InstanceNorm2d(8)
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.vector, self.head = nn.Parameter(torch.rand(8)), nn.Linear(72, 10)
        for norm in (self.beside, self.norm):
            nn.init.uniform_(norm.weight, 0.03, 1.4)
            nn.init.normal_(norm.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        features = torch.relu(self.norm(features + self.beside(features)))
        means = torch.relu(features.mean(2) @ self.vector)
        return self.head(torch.cat([features.amax((2, 3)), features.mean(2).flatten(1) * means.mean(1, True)], 1))


@pytest.mark.slow
def test_scales_of_norms_that_follow_no_convolution_are_quantized_well_and_quietly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Onnxruntime looks for a second axis in them, warns that there is none, and takes one scale for all."""
    model = replace(digits_cnn(), module=Beside().eval())
    case = exported(model, digits(model), tmp_path)
    graph = graph_of("int8", case, tmp_path)
    quantized = {node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    assert {"beside.weight_quantized", "vector_quantized"} <= quantized
    assert snr_db(case.logits, onnx_logits(tmp_path / "model.onnx", case.images)) > 25
    assert caplog.messages == []
    with qdq._quiet_about_vectors():
        logging.warning("Axis 1 is out-of-range for weight 'w' with rank 2")
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("exclude", [[], ["first"], ["last"], ["residual"]], ids=str)
def test_fp16_takes_and_gives_float32(case: Case, tmp_path: Path, exclude: list[str]) -> None:
    graph = graph_of("fp16", case, tmp_path, exclude=exclude)
    ends = [*graph.graph.input, *graph.graph.output]
    actual = onnx_logits(tmp_path / "model.onnx", case.images)

    assert [item.type.tensor_type.elem_type for item in ends] == [onnx.TensorProto.FLOAT] * 2
    assert actual.dtype == np.float32
    assert snr_db(case.logits, actual) > 50


def test_int8_dynamic_runs_and_is_smaller(case: Case, tmp_path: Path) -> None:
    quantize("int8_dynamic", case, tmp_path / "model.onnx")

    assert (tmp_path / "model.onnx").stat().st_size <= 0.45 * case.source.stat().st_size
    assert snr_db(case.logits, onnx_logits(tmp_path / "model.onnx", case.images)) > 15


def test_none_keeps_the_graph(case: Case, tmp_path: Path) -> None:
    quantize("none", case, tmp_path / "model.onnx")

    assert (tmp_path / "model.onnx").read_bytes() == case.source.read_bytes()


def test_bf16_has_no_graph(case: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="quantizer=bf16 has no graph for ONNX Runtime; use runtime=torch, or"):
        quantize("bf16", case, tmp_path / "model.onnx")


# Every quantizer that writes a graph

EVERY = [
    ("none", "cpu", {}),
    ("fp16", "cpu", {}),
    ("int8_dynamic", "cpu", {}),
    *[("int8", form, {"calibration": method, "images": 8}) for form in FORMS for method in METHODS],
]
each_graph = pytest.mark.parametrize(("name", "form", "options"), EVERY)


@each_graph
def test_quantizing_twice_gives_the_same_bytes(
    case: Case, tmp_path: Path, name: str, form: str, options: dict[str, Any]
) -> None:
    for target in ("one.onnx", "two.onnx"):
        quantize(name, case, tmp_path / target, form, **options)

    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@each_graph
def test_only_the_graph_is_left(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str, options: dict[str, Any]
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    quantize(name, case, tmp_path / "model.onnx", form, **options)

    assert {path.name for path in tmp_path.rglob("*")} <= {"here", "model.onnx", "status.json"}


# Big networks

Exporter = Callable[[str], Case]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exporter]:
    """Torchvision networks with random weights that use every layer, each exported once, and random smooth images."""

    @functools.cache
    def make(name: str) -> Case:
        torch.manual_seed(0)
        model = narrow_vit() if name == "vit" else torchvision_model(name=name, weights=None, num_classes=10)
        model.module.apply(randomise)
        images = nn.functional.interpolate(torch.randn(12, 3, 14, 14), size=model.preprocess.size, mode="bilinear")
        parts = [Split.of_tensors(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(6)]
        return exported(model, Data(*parts, None, tuple("0123456789")), tmp_path_factory.mktemp(name))

    with torch_threads(2):
        yield make


def narrow_vit() -> Model:
    """Return a network like vit_b_16, a quarter as wide."""
    width = {"num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    network = VisionTransformer(image_size=224, patch_size=16, num_layers=12, num_classes=10, **width)
    return Model(network.eval(), 10, Preprocess())


def randomise(part: nn.Module) -> None:
    """Give weights that no layer drops out with: torchvision's ViT starts with a head of zeros."""
    if isinstance(part, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(part.weight)
    elif isinstance(part, nn.BatchNorm2d):
        nn.init.uniform_(part.weight, 0.5, 1.5)
        nn.init.uniform_(part.running_var, 0.5, 1.5)  # type: ignore[arg-type]


@pytest.mark.slow
@each_form
# Random weights leave a transformer little room: 13 dB, and 7 with quantized residual sums.
@pytest.mark.parametrize(("name", "least_db"), [("resnet18", 20), ("vit", 10)])
def test_int8_of_a_big_network(big: Exporter, tmp_path: Path, name: str, least_db: float, form: str) -> None:
    case = big(name)
    graph = graph_of("int8", case, tmp_path, form, images=4)
    types = {zero.dtype for operator, _, zero in zero_points(graph) if operator == "QuantizeLinear"}

    assert types == {np.dtype("uint8" if form == "cpu" else "int8")}
    assert (tmp_path / "model.onnx").stat().st_size <= 0.3 * case.source.stat().st_size
    assert snr_db(case.logits, onnx_logits(tmp_path / "model.onnx", case.images)) > least_db


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_fp16_halves_a_big_network(big: Exporter, tmp_path: Path, name: str) -> None:
    quantize("fp16", big(name), tmp_path / "model.onnx")

    assert (tmp_path / "model.onnx").stat().st_size <= 0.51 * big(name).source.stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pattern", "layers"),
    [
        ("resnet18", "layer1", 4),
        ("resnet18", "*.downsample.*", 3),
        ("vit", "encoder.layers.encoder_layer_1", 4),  # attention in and out, two of the MLP; not layers 10, 11
        ("vit", "*.mlp.*", 24),
    ],
)
def test_a_block_of_a_big_network_is_excluded_as_a_whole(big: Exporter, name: str, pattern: str, layers: int) -> None:
    graph = onnx.load(big(name).source)
    found = quantizers.match_layers(graph, [pattern])
    weights = matrices(graph)
    layers_found = [node for node in graph.graph.node if node.name in found and weights & set(node.input)]

    assert len(layers_found) == len(found) == layers
