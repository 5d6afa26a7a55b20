"""The moments of a layer's inputs: right for every kind of layer, and the same of a network and of its graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from random_networks import attention, fresh, small_vit
from shared_networks import shared_network
from torch import Tensor, nn

from pq_sweep.compress import moments as module
from pq_sweep.compress.moments import Moments, damped, graph_moments, layer_moments, window_of
from pq_sweep.core.stored import stored_weights
from pq_sweep.core.weights import prunable
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Model, Preprocess, Split, UserError

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Linear(5, 4), (3, 5)),
    (nn.Linear(5, 4), (3, 2, 5)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    (nn.Conv2d(3, 4, 3), (2, 3, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 7)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 7, 7)),
    (nn.Conv3d(2, 4, (1, 3, 2), padding=(0, 1, 1)), (2, 2, 3, 5, 4)),
    (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    (nn.ConvTranspose2d(4, 6, (3, 2), stride=(3, 1), padding=(2, 0), dilation=(2, 1), groups=2), (2, 4, 5, 4)),
]
each_layer = pytest.mark.parametrize(
    ("layer", "shape"), LAYERS, ids=lambda x: str(x) if isinstance(x, nn.Module) else ""
)


def weight_of(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight


@each_layer
def test_rows_times_columns_are_the_outputs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    images, window, weight = torch.randn(shape), window_of(layer), weight_of(layer)
    with torch.no_grad():
        bias: Any = layer.bias
        expected = layer(images) - bias.reshape(-1, *[1] * len(window.kernel))
    outputs = window.rows(weight) @ window.columns(images)  # (groups, outputs, images times places)
    outputs = (
        outputs.flatten(0, 1).T
        if not window.kernel
        else outputs.flatten(0, 1).unflatten(1, (shape[0], -1)).swapaxes(0, 1)
    )

    assert torch.allclose(outputs.reshape(expected.shape), expected, atol=1e-5)


@each_layer
def test_rows_are_turned_back_into_the_weight(layer: nn.Module, shape: tuple[int, ...]) -> None:
    window, weight = window_of(layer), weight_of(layer)

    assert torch.equal(window.weight(window.rows(weight), weight.shape), weight)
    assert (window.weight(window.rows(weight.numpy()), weight.shape) == weight.numpy()).all()


def hessians(moments: Moments) -> list[np.ndarray]:
    return [part.numpy() for part in moments.sums]


class Every(nn.Module):
    """Convolutions of each kind, and products whose weights lie either way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, groups=4, padding=1)
        self.up, self.tokens = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1), nn.Linear(6, 7)
        self.head = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.stem(x).relu()).relu()).relu()
        logits: Tensor = self.head(self.tokens(x.flatten(2).transpose(1, 2)).relu().mean(1))
        return logits


def images_for(model: Model, count: int = 10) -> Split:
    return Split.of_tensors(model.sample(count).cpu(), torch.zeros(count, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["every kind", "digits", "shared"])
def test_a_network_and_its_graph_have_the_same(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {"every kind": lambda: Model(Every().eval(), 10, Preprocess(16, 16)), "digits": fresh,
             "shared": lambda: shared_network("one Parameter of two convolutions")}[case]()  # fmt: skip
    export_onnx(model, tmp_path / "export.onnx")
    graph, split = onnx.load(tmp_path / "export.onnx"), images_for(model)
    found = graph_moments(graph, split, {each.name for each in stored_weights(graph.graph)})
    targets = prunable(model.module)
    expected = layer_moments(model, targets, split)
    names = {part: name for name, part in model.module.named_modules()}

    assert len(expected) == len(targets) == len(found)
    for (part, name), moments in expected.items():
        stored, other = found[f"{names[part]}.{name}"]
        weight = getattr(part, name).detach().numpy()
        values = stored.values().T if weight.ndim == 2 and stored.outputs == 1 else stored.values()
        assert other.window.rows(values).shape == moments.window.rows(weight).shape
        for mine, theirs in zip(hessians(moments), hessians(other), strict=True):
            assert np.abs(mine - theirs).max() < 1e-4 * np.abs(mine).max()


def test_the_projections_of_attention_are_seen_but_for_the_last() -> None:
    model = attention()
    found = layer_moments(model, prunable(model.module), images_for(model))
    names = {part: name for name, part in model.module.named_modules()}
    (inputs,) = [moments for (_, name), moments in found.items() if name == "in_proj_weight"]

    assert {f"{names[part]}.{name}" for part, name in found} == {
        "embed.weight", "keys.weight", "attention.in_proj_weight", "head.weight"}  # fmt: skip
    assert inputs.sums[0].shape == (3, 24, 24)
    assert not torch.equal(inputs.sums[0][0], inputs.sums[0][1])  # queries and keys differ
    assert torch.equal(inputs.sums[0][1], inputs.sums[0][2])  # keys are values


@pytest.mark.slow
def test_a_transformer_as_a_graph_is_seen_whole(tmp_path: Path) -> None:
    model = small_vit()
    export_onnx(model, tmp_path / "export.onnx")
    graph = onnx.load(tmp_path / "export.onnx")
    weights = {each.name for each in stored_weights(graph.graph)}

    assert graph_moments(graph, images_for(model, 2), weights).keys() == weights


def test_wide_layers_are_looked_at_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WIDEST", 4)
    seen = Moments(window_of(nn.Linear(10, 2)))
    images = torch.randn(6, 10)
    seen.add(images)
    problems = list(seen.problems("layer"))

    assert [(group, part.start, part.stop) for group, part, _ in problems] == [(0, 0, 4), (0, 4, 7), (0, 7, 10)]
    for _, part, hessian in problems:
        own = images[:, part].T @ images[:, part]
        assert hessian - np.diag(np.diag(hessian)) == pytest.approx((own - torch.diag(own.diag())).numpy(), abs=1e-5)


def test_damping_makes_moments_definite() -> None:
    for hessian in (np.zeros((3, 3)), np.diag([1.0, 0, 0]), np.ones((3, 3))):
        assert np.linalg.eigvalsh(damped(hessian, "layer"))[0] > 0


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(wrong: float) -> None:
    with pytest.raises(UserError, match=r"the inputs of stem on the calibration images are not finite"):
        damped(np.diag([1.0, wrong]), "stem")
