"""INT4 graphs: two weights in a byte, products that ONNX Runtime computes with 4-bit weights, and exact answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from independent import Opened, opened_on_cpu, snr_db, tensors, torch_logits
from random_networks import randomise
from torch import Tensor, nn

from pq_sweep.compress import quantizers
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Model, Preprocess, UserError

int4 = partial(quantizers.int4, block=64, exclude=[])


class Small(nn.Module):
    """Linear layers over tokens and over images, an odd number of outputs, one without a bias, and inputs of 33."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 64, 4, stride=4)
        self.mix, self.wide = nn.Linear(64, 128), nn.Linear(128, 192, bias=False)
        self.odd, self.head = nn.Linear(192, 33), nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        x = torch.tanh(self.mix(x)).mean(1)
        return self.head(torch.relu(self.odd(torch.relu(self.wide(x)))))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Opened:
    module = Small().eval()
    randomise(module)
    model = Model(module, 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))
    return opened_on_cpu(model, tmp_path_factory.mktemp("small"), int4)


def decoded(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the weights (inputs, outputs) that the file stands for, from its bytes."""
    items, arrays = {item.name: item for item in graph.graph.initializer}, tensors(graph)
    found = {}
    for node in graph.graph.node:
        if node.op_type == "DequantizeLinear":
            item, scales = items[node.input[0]], arrays[node.input[1]].astype(np.float32)
            options = {each.name: each.i for each in node.attribute}
            assert item.data_type == onnx.TensorProto.INT4
            assert options == {"axis": 0, "block_size": 64}
            assert len(node.input) == 2
            raw = np.frombuffer(item.raw_data, np.uint8)
            assert len(raw) == -(-int(np.prod(item.dims)) // 2)
            codes = np.stack([raw & 15, raw >> 4], 1).ravel().astype(np.int8)[: int(np.prod(item.dims))]
            codes = np.where(codes > 7, codes - 16, codes).reshape(tuple(item.dims))
            found[node.output[0]] = codes * scales.repeat(64, 0)
    return found


@pytest.mark.slow
def test_every_linear_layer_of_whole_blocks_has_four_bits(small: Opened) -> None:
    session, graph, model, _ = small
    weights = decoded(graph)
    assert set(weights) == {"mix.weight", "wide.weight", "odd.weight"}
    assert len(session.details["quantizer"]["int4_nodes"]) == 3
    for name, weight in weights.items():
        original = model.module.state_dict()[name].numpy().T
        assert snr_db(original, weight) > 18, name


def test_onnx_runtime_multiplies_with_four_bits(small: Opened, tmp_path: Path) -> None:
    session, _, _, _ = small
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    for name, value in session.details["session_options"].items():
        options.add_session_config_entry(name, value)
    disabled = session.details["disabled_optimizers"]
    onnxruntime.InferenceSession(
        session.artifact, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    )
    nodes = onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    found = [node for node in nodes if node.op_type == "MatMulNBits"]
    told = [{each.name: each.i for each in node.attribute} for node in found]
    assert [(each["bits"], each["block_size"], each["accuracy_level"]) for each in told] == [(4, 64, 0)] * 2
    # One without a bias before another product stays apart (onnxruntime 1.31.1), which changes no answer.
    assert [node.output[0] for node in nodes if node.op_type == "DequantizeLinear"] == ["wide.weight"]
    assert "simulated" not in session.details


def test_answers_are_those_of_the_weights_in_the_file(small: Opened) -> None:
    session, graph, model, data = small
    images = data.evaluation.fetch(list(range(100)))
    weights, net = decoded(graph), Small().eval()
    state = model.module.state_dict()
    net.load_state_dict(state | {name: torch.from_numpy(value.T.copy()) for name, value in weights.items()})
    answers = session(images).numpy()
    assert snr_db(torch_logits(net, images), answers) > 100  # activations are not rounded
    assert 10 < snr_db(torch_logits(model.module, images), answers) < 40


@pytest.mark.slow
def test_all_else_is_half_precision_for_tensorrt(small: Opened, tmp_path: Path) -> None:
    _, _, model, data = small
    export_onnx(model, tmp_path / "export.onnx")
    int4(tmp_path / "export.onnx", tmp_path / "model.onnx", data, form="tensorrt", stage=Stages(tmp_path, ""))
    graph = onnx.load(tmp_path / "model.onnx")
    assert set(decoded(graph)) == {"mix.weight", "wide.weight", "odd.weight"}
    kinds = {name: array.dtype for name, array in tensors(graph).items() if array.dtype.kind == "f"}
    assert set(kinds.values()) == {np.dtype("float16")}
    products = [node for node in graph.graph.node if node.op_type == "MatMul"]
    assert len(products) == 3


@pytest.mark.slow
def test_excluded_layers_have_no_four_bits(small: Opened, tmp_path: Path) -> None:
    _, _, model, _ = small
    session, graph, _, _ = opened_on_cpu(model, tmp_path, partial(int4, exclude=["wide", "first"]))
    assert set(decoded(graph)) == {"mix.weight", "odd.weight"}
    assert len(session.details["quantizer"]["excluded_nodes"]) == 2


@pytest.mark.slow
def test_a_trained_network_stays_accurate(tmp_path: Path) -> None:
    session, _, _, data = opened_on_cpu(digits_cnn(), tmp_path, partial(int4, block=128))
    images = data.evaluation.fetch(list(range(400)))
    assert (session(images).argmax(1) == data.evaluation.labels[:400]).float().mean() > 0.97


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block": 32}, r"quantizer\.block=32 is not known; valid are: 64, 128\."),
        ({"exclude": ["fc1", "fc2"]}, r"finds no linear layer to quantize whose inputs are whole blocks of 64"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        opened_on_cpu(digits_cnn(), tmp_path, partial(int4, **options))
