"""Export: one file that computes what the network computes, at every batch size, and nothing else is accepted."""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from independent import matrices, onnx_logits, relative_error, tensors, torch_logits
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from pq_sweep.inputs.models import digits_cnn
from pq_sweep.runtimes.export import TOLERANCE, ExportError, check_export, export_onnx, fill, trace
from pq_sweep.types import Model, Preprocess


class Attention(nn.Module):
    """Self-attention over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.attend(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def attention() -> Model:
    torch.manual_seed(0)
    return Model(Attention().eval(), 10, Preprocess(size=6, resize=6, channels=16))


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded network as ONNX, alone in its folder."""
    path = tmp_path_factory.mktemp("export") / "export.onnx"
    export_onnx(digits_cnn(), path)
    return path


def test_the_export_is_a_single_valid_file(graph: Path) -> None:
    onnx.checker.check_model(onnx.load(graph, load_external_data=False), full_check=True)

    assert [path.name for path in graph.parent.iterdir()] == ["export.onnx"]


def test_the_export_holds_all_weights_in_float32(graph: Path) -> None:
    state = digits_cnn().module.state_dict()
    constants = tensors(onnx.load(graph))

    assert matrices(onnx.load(graph)) == {key for key, value in state.items() if value.dim() > 1}
    assert all(constants[name].shape == tuple(state[name].shape) for name in matrices(onnx.load(graph)))


def test_the_ends_of_the_graph_are_named_and_take_any_batch(graph: Path) -> None:
    ends = [*onnx.load(graph).graph.input, *onnx.load(graph).graph.output]
    shapes = [[dim.dim_param or dim.dim_value for dim in end.type.tensor_type.shape.dim] for end in ends]

    assert [end.name for end in ends] == ["input", "logits"]
    assert [end.type.tensor_type.elem_type for end in ends] == [TensorProto.FLOAT] * 2
    assert shapes == [["batch", 1, 8, 8], ["batch", 10]]


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_the_graph_answers_like_the_network_at_every_batch_size(graph: Path, batch: int) -> None:
    model = digits_cnn()
    images = model.sample(batch)

    assert relative_error(torch_logits(model.module, images), onnx_logits(graph, images, batch)) < 1e-5


@pytest.mark.slow
def test_the_batch_of_a_network_with_attention_is_dynamic_too(tmp_path: Path) -> None:
    model = attention()
    export_onnx(model, tmp_path / "export.onnx")

    assert check_export(model, tmp_path / "export.onnx") < 1e-5
    for batch in (1, 5):
        images = model.sample(batch)
        actual = onnx_logits(tmp_path / "export.onnx", images, batch)
        assert relative_error(torch_logits(model.module, images), actual) < 1e-5


@pytest.mark.slow
def test_exporting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = digits_cnn()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    export_onnx(model, tmp_path / "export.onnx")

    assert all(torch.equal(before[key], value) for key, value in model.module.state_dict().items())
    assert not model.module.training


@pytest.mark.slow
def test_exporting_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_onnx(digits_cnn(), tmp_path / "export.onnx")

    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes(graph: Path, tmp_path: Path) -> None:
    export_onnx(digits_cnn(), tmp_path / "again.onnx")

    assert (tmp_path / "again.onnx").read_bytes() == graph.read_bytes()


@pytest.mark.slow
def test_a_traced_graph_takes_the_weights_of_any_network_of_its_structure(tmp_path: Path) -> None:
    """Of an attention layer they are folded into constants that have no name of their own."""
    one, other = attention(), attention()
    with torch.no_grad():
        for parameter in other.module.parameters():
            parameter.add_(torch.randn_like(parameter))
    trace(one, tmp_path / "traced.onnx")
    fill(other, tmp_path / "traced.onnx", tmp_path / "filled.onnx")
    export_onnx(other, tmp_path / "export.onnx")

    assert (tmp_path / "filled.onnx").read_bytes() == (tmp_path / "export.onnx").read_bytes()
    assert check_export(other, tmp_path / "filled.onnx") < 1e-5
    with pytest.raises(ExportError):
        check_export(one, tmp_path / "filled.onnx")


@pytest.mark.slow
def test_a_traced_graph_holds_no_weights(tmp_path: Path) -> None:
    trace(attention(), tmp_path / "traced.onnx")

    kept = {item.name for item in onnx.load(tmp_path / "traced.onnx").graph.initializer if item.raw_data}
    assert not kept & attention().module.state_dict().keys()


def test_the_export_names_no_folder_of_this_machine(graph: Path) -> None:
    """A path in the artifact would make its size depend on where the package is installed."""
    content = graph.read_bytes()
    folders = [sysconfig.get_path("purelib"), str(ROOT)]

    assert not [folder for folder in folders if folder.encode() in content]


# The proof of an export


def test_the_error_of_an_export_is_measured(graph: Path) -> None:
    model = digits_cnn()
    images = model.sample(3)
    expected = relative_error(torch_logits(model.module, images), onnx_logits(graph, images, 3))

    assert check_export(model, graph) == pytest.approx(expected, abs=1e-6)
    assert expected < TOLERANCE


def test_the_graph_of_other_weights_is_refused(graph: Path) -> None:
    torch.manual_seed(1)
    with pytest.raises(ExportError, match="the exported graph differs from the network by"):
        check_export(digits_cnn(weights=None), graph)


def biased(graph: Path, target: Path, offset: float) -> Path:
    """Write the graph with `offset` added to the bias of its last layer."""
    model = onnx.load(graph)
    bias = next(item for item in model.graph.initializer if item.name == "fc2.bias")
    shifted = numpy_helper.to_array(bias) + np.float32(offset)
    bias.CopyFrom(numpy_helper.from_array(shifted, bias.name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize(("share", "accepted"), [(0.5, True), (2.0, False), (math.nan, False), (math.inf, False)])
def test_the_tolerance_is_relative_to_the_largest_logit(
    graph: Path, tmp_path: Path, share: float, accepted: bool
) -> None:
    model = digits_cnn()
    largest = float(np.abs(torch_logits(model.module, model.sample(3))).max())
    off = biased(graph, tmp_path / "off.onnx", share * TOLERANCE * largest)

    if accepted:
        assert check_export(model, off) == pytest.approx(share * TOLERANCE, rel=0.1)
    else:
        with pytest.raises(ExportError):
            check_export(model, off)


@pytest.mark.slow
def test_the_exporters_operators_are_read_once(graph: Path, tmp_path: Path) -> None:
    from torch.onnx._internal import _lazy_import

    read = vars(_lazy_import)["onnxscript_apis"].get_torchlib_ops
    before = read.cache_info()
    for number, model in enumerate((digits_cnn(), attention())):
        path = tmp_path / f"{number}.onnx"
        export_onnx(model, path)
        assert check_export(model, path) < TOLERANCE
    after = read.cache_info()
    assert (after.misses, after.hits >= before.hits + 2) == (1, True)
