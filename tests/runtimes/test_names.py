"""Names of a network's tensors can be anything: graphs of every precision answer as the network does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from conftest import refused
from independent import onnx_logits, relative_error, torch_logits
from torch import Tensor, nn

from pq_sweep.compress import quantizers
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes.export import check_export, export_onnx, fill, trace
from pq_sweep.types import Data, Model, Preprocess, Split

SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))

# Each puts something of a name into a network and returns how the input passes it.
Add = Callable[["Net", str], Callable[[Tensor], Tensor]]


class Net(nn.Module):
    """A small network, behind the mean of first steps that a case chooses, one for each name."""

    def __init__(self, add: Add, *names: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
        )
        self.first = [add(self, name) for name in names]

    def forward(self, x: Tensor) -> Tensor:
        return self.body(sum(step(x) for step in self.first) / len(self.first))


def buffer(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    net.register_buffer(name, torch.rand(1, 1, 8, 8))
    return lambda x: x - getattr(net, name)


def passing_buffer(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    net.register_buffer(name, torch.rand(1, 1, 8, 8), persistent=False)
    return lambda x: x - getattr(net, name)


def parameter(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    net.register_parameter(name, nn.Parameter(torch.rand(1, 1, 8, 8)))
    return lambda x: x * getattr(net, name)


def layer(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    """Put in a layer as setattr does, which takes names with dots that add_module refuses."""
    setattr(net, name, nn.Conv2d(1, 1, 3, padding=1))
    return lambda x: net._modules[name](x)  # type: ignore[misc]


def in_the_convolution(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    net.body[0].register_parameter(name, nn.Parameter(torch.tensor(0.9)))
    return lambda x: x * getattr(net.body[0], name)


def two_buffers(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    """Put in a buffer called as the exporter calls the next one while it traces, and a constant."""
    net.register_buffer(name, torch.rand(1, 1, 8, 8))
    net.register_buffer("mean", torch.rand(1, 1, 8, 8))
    return lambda x: (x - getattr(net, name)) * torch.tensor([0.3]) - net.mean


def two_parameters(net: Net, name: str) -> Callable[[Tensor], Tensor]:
    net.register_parameter(name, nn.Parameter(torch.rand(1, 1, 8, 8)))
    net.register_parameter("mean", nn.Parameter(torch.rand(1, 1, 8, 8)))
    return lambda x: x * getattr(net, name) - net.mean


# Steps of the graph, its ends, numbers of the exporter, and what ONNX Runtime makes of these names.
GIVEN = ["mean", "input", "logits", "output", "relu", "sub", "val_0", "conv2d", "relu_quantized", "input_scale",
         "conv2d_zero_point", "linear_QuantizeLinear", "graph_input_cast_0", "b_mean"]  # fmt: skip
ODD = ["with blank", "a/b", "größe", "1", "class", "None", "self", "batch"]
EVERY: list[tuple[Any, ...]] = [
    (buffer, *GIVEN),
    (parameter, "mean", "logits", "relu_scale"),
    (passing_buffer, "mean", "val_0", "relu_scale"),
    (layer, "input", "relu", "conv2d_quantized", "a.b", *ODD),
    (buffer, "with blank", "class", 'with "quotes"', "back\\slash"),
    *((two_buffers, name) for name in ("b_mean", "c_lifted_tensor_0")),
    *((two_parameters, name) for name in ("p_mean", "p_body_0_weight")),
    (in_the_convolution, *(f"{name}{end}" for name in ("weight", "bias") for end in ("_scale", "_quantized"))),
]
SOME = [
    (buffer, "mean"),
    *(pytest.param(case, marks=pytest.mark.slow) for case in ((parameter, "input"), (layer, "a.b"))),
]
pytestmark = pytest.mark.filterwarnings("ignore")


def made(add: Add, *names: str) -> Model:
    return Model(Net(add, *names).eval(), 10, SMALL)


def named(case: tuple[Any, ...]) -> str:
    return f"{case[0].__name__} {case[1]}"


@pytest.mark.parametrize("case", SOME, ids=named)
def test_the_graph_answers_as_the_network(case: tuple[Any, ...], tmp_path: Path) -> None:
    model = made(*case)
    export_onnx(model, tmp_path / "export.onnx")
    graph = onnx.load(tmp_path / "export.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert check_export(model, tmp_path / "export.onnx") < 1e-5
    assert ([end.name for end in graph.graph.input], [end.name for end in graph.graph.output]) == (
        ["input"],
        ["logits"],
    )
    assert not graph.metadata_props


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY, ids=named)
def test_graphs_of_every_precision_answer_as_the_network(case: tuple[Any, ...], tmp_path: Path) -> None:
    model, images = made(*case), torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    split = Split.of_tensors(images, torch.arange(16) % 10)
    data, source, expected = Data(split, split, None, ()), tmp_path / "export.onnx", torch_logits(model.module, images)
    export_onnx(model, source)
    assert relative_error(expected, onnx_logits(source, images)) < 1e-5
    ranges: dict[str, Any] = {"calibration": "minmax", "images": 16, "percentile": 99.9}
    for form, precision, options in (
        ("cpu", quantizers.fp16, {}),
        ("cpu", quantizers.int8, ranges),
        ("tensorrt", quantizers.int8, ranges),
        ("cpu", quantizers.int8_dynamic, {}),
    ):
        target = tmp_path / "model.onnx"
        precision(source, target, data, form=form, stage=Stages(tmp_path, ""), exclude=[], **options)  # type: ignore[operator]
        assert relative_error(expected, onnx_logits(target, images)) < 0.15


@pytest.mark.slow
def test_a_traced_graph_with_renamed_weights_takes_those_of_another_network(tmp_path: Path) -> None:
    one, other = made(parameter, "input"), made(parameter, "input")
    with torch.no_grad():
        other.module.input.mul_(3)  # type: ignore[operator, union-attr]
    trace(one, tmp_path / "traced.onnx")
    fill(other, tmp_path / "traced.onnx", tmp_path / "export.onnx")
    assert check_export(other, tmp_path / "export.onnx") < 1e-5


@pytest.mark.slow
def test_names_without_namesakes_stay(tmp_path: Path) -> None:
    export_onnx(made(parameter, "own_table"), tmp_path / "export.onnx")
    names = {item.name for item in onnx.load(tmp_path / "export.onnx").graph.initializer}
    assert {"own_table", "body.0.weight", "body.0.bias", "body.4.weight", "body.4.bias"} <= names


class Tokens(nn.Module):
    """Linear layers over tokens, whose transposed weights get their names from their layers."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer(name, torch.rand(1, 1, 8, 8))
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
        self.head, self.name = nn.Linear(8, 10), name

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner((x - getattr(self, self.name))[:, 0])).mean(1)


@pytest.mark.slow
def test_weights_are_named_by_their_layers_whatever_the_exporter_was_given(tmp_path: Path) -> None:
    found = []
    for name in ("plain", "b_plain"):
        export_onnx(Model(Tokens(name).eval(), 10, SMALL), tmp_path / "export.onnx")
        names = {item.name for item in onnx.load(tmp_path / "export.onnx").graph.initializer}
        found.append(names - {name})
    assert found[0] == found[1] >= {"inner.0.weight", "head.weight"}


@pytest.mark.slow
def test_a_network_that_cannot_be_exported_is_refused_in_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its step depends on a value, which no graph can."""

    def branching(net: Net, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: x * 2 if x.sum() > 0 else x

    text = refused(lambda: export_onnx(made(branching, ""), tmp_path / "export.onnx"))
    assert text.startswith("the network cannot be exported to ONNX (")
    assert text.endswith("); use runtime=torch, or write that step of its forward in another way.")
    assert "Traceback" not in "".join(capfd.readouterr())
