"""What is said of each layer, against the files that jobs leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import SHORT
from conftest import ROOT
from hydra import compose, initialize_config_dir
from onnx import TensorProto, helper, numpy_helper

from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.run import run
from pq_sweep.measure.graph import Graph
from pq_sweep.measure.layers import BINS, compressed_layers, dense_layers


def described(folder: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*overrides, *SHORT])
    (folder / "sweep" / "0").mkdir(parents=True)
    run(config, folder / "sweep" / "0")
    found: dict[str, Any] = json.loads((folder / "sweep" / "0" / "layers.json").read_text())
    return found


def test_zeros_are_those_of_the_file_to_deploy(tmp_path: Path) -> None:
    found = described(tmp_path, "pruner=l1_global", "pruner.amount=0.5", "runtime=torch")
    state = torch.load(tmp_path / "sweep" / "0" / "model.pt", weights_only=True)

    assert found["after"].keys() == found["before"].keys()
    for name, layer in found["after"].items():
        assert layer["nonzero"] == int(state[name].count_nonzero())
        assert sum(layer["counts"]) == layer["weights"] == state[name].numel()
        assert layer["counts"][BINS // 2] >= layer["weights"] - layer["nonzero"]


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["none", "fp16", "int8", "int8_dynamic"])
def test_graphs_of_every_precision_are_read(tmp_path: Path, quantizer: str) -> None:
    found = described(tmp_path, f"quantizer={quantizer}", "runtime=onnxruntime")

    assert found["after"].keys() == found["before"].keys()
    assert all(layer["nonzero"] > 0.9 * layer["weights"] for layer in found["after"].values())


@pytest.mark.slow
def test_removed_channels_are_fewer_weights(tmp_path: Path) -> None:
    found = described(tmp_path, "pruner=remove", "pruner.amount=0.5", "runtime=onnxruntime")
    inner = found["after"]["body.0.weight"]

    assert inner["weights"] * 4 == found["before"]["body.0.weight"]["weights"]


@pytest.mark.parametrize("axis", [0, 1])
def test_bytes_count_as_the_numbers_that_they_stand_for(tmp_path: Path, axis: int) -> None:
    stored = np.array([[-2, 0, 4], [1, 3, 127]], np.int8)
    scale = np.array([0.5, 0.25] if axis == 0 else [0.5, 0.25, 2.0], np.float32)
    zero = np.zeros(len(scale), np.int8)
    items = {"w_quantized": stored, "w_scale": scale, "w_zero_point": zero}
    node = helper.make_node("DequantizeLinear", [*items], ["w"], axis=axis)
    product = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node, product], "g", [], [helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(value, name) for name, value in items.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    values = stored * (scale[:, None] if axis == 0 else scale)
    dense = {"w": {"limit": 3.0}}
    (layer,) = compressed_layers(Graph(tmp_path / "model.onnx"), dense).values()

    assert layer["nonzero"] == 5
    assert layer["counts"] == np.histogram(values.clip(-3, 3), BINS, (-3, 3))[0].tolist()


def test_every_prunable_weight_of_a_network_is_there() -> None:
    model = digits_cnn(weights="DEFAULT")
    layers = dense_layers(model)

    assert sum(layer["weights"] for layer in layers.values()) == 58640
    assert all(sum(layer["counts"]) == layer["weights"] for layer in layers.values())
