"""Looking at a network does not change it: weights, statistics, modes and flags stay, whatever stage looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from peculiar_networks import NETWORKS, make
from test_peculiar_networks import config

from pq_sweep.compress import quantizers
from pq_sweep.inputs.own_model import accepted_model
from pq_sweep.job.baseline import load_baseline
from pq_sweep.job.describe import describe_network
from pq_sweep.job.run import load, prepare
from pq_sweep.job.stages import Stages
from pq_sweep.measure.layers import dense_layers
from pq_sweep.measure.network import count
from pq_sweep.measure.sizes import storage_sizes
from pq_sweep.runtimes import OnnxRuntime, Torch
from pq_sweep.types import Data, Model


def state(model: Model) -> dict[str, Any]:
    """Return copies of all that a stage could change."""
    module = model.module
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {
        **{name: (tensor.detach().clone(), tensor.dtype, tensor.requires_grad) for name, tensor in tensors.items()},
        **{f"{name}.training": part.training for name, part in module.named_modules()},
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules()],
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled()),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        return a[1:] == b[1:] and torch.equal(a[0], b[0]) if isinstance(a, tuple) and len(a) == 3 else a == b

    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


STAGES: dict[str, Callable[[Any, Model, Data], Any]] = {
    "baseline": lambda plan, model, data: load_baseline(plan.cfg, model, data, plan.work, plan.protocol),
    "count": lambda plan, model, data: count(model),
    "describe": lambda plan, model, data: describe_network(model, data, count(model)),
    "layers": lambda plan, model, data: dense_layers(model),
    "sizes": lambda plan, model, data: storage_sizes(model, plan.work.folder),
    "accept again": lambda plan, model, data: accepted_model(model, "again"),
    "torch": lambda plan, model, data: opened(Torch, "torch", plan, model, data, quantizers.none),
    "onnx": lambda plan, model, data: opened(OnnxRuntime, "onnxruntime", plan, model, data, quantizers.none),
    "int8": lambda plan, model, data: opened(OnnxRuntime, "onnxruntime", plan, model, data, instantiate(
        config("frozen", "quantizer=int8").quantizer, _partial_=True, _convert_="all")),
}  # fmt: skip


def opened(kind: type[Any], name: str, plan: Any, model: Model, data: Data, quantizer: Any) -> None:
    runtime = instantiate(config("frozen", f"runtime={name}").runtime, _convert_="all")
    assert isinstance(runtime, kind)
    session = runtime.open(model, quantizer, data, plan.work)
    session(model.sample(3))
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(NETWORKS) - {"buffer_named_mean"}))
def test_no_stage_changes_the_network(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "sweep" / "0"
    folder.mkdir(parents=True)
    plan = prepare(config(kind, "cache=off"), Stages(folder, ""))
    model, data = load(plan.cfg, "cpu")
    before = state(model)
    for name, look in STAGES.items():
        look(plan, model, data)
        assert same(before, state(model)), name


def test_a_change_would_be_seen() -> None:
    model = accepted_model(make(kind="in_training"), "make")
    before = state(model)
    model.module.train()
    assert not same(before, state(model))
    model.module.eval()
    assert same(before, state(model))
    model.module.norm.running_mean += 1
    assert not same(before, state(model))
