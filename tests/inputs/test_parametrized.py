"""Computed weights are folded into plain ones that give the same answers, or are refused by the layer's name."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from conftest import refused
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from pq_sweep.compress import pruners
from pq_sweep.core.weights import prunable
from pq_sweep.inputs.parametrized import fold
from pq_sweep.types import Data, Model, Preprocess, Split

SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
NO_DATA = Data(
    Split.of_tensors(torch.zeros(0), torch.zeros(0)), Split.of_tensors(torch.zeros(0), torch.zeros(0)), None, ()
)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(-1, -2)


class LowRank(nn.Module):
    """A weight and a product of two small matrices, as LoRA learns it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.left, self.right = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.left @ self.right


class Expanded(nn.Module):
    """One row for all: a view without memory of its own."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight[:1].expand(weight.shape)


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


class Broken(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        raise RuntimeError("no\nweight")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(conv, nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))


def old_hooks(module: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises its newer ones
        weight_norm(module[0][0])  # type: ignore[index]
        weight_norm(module[3], "bias", dim=None)
        spectral_norm(module[1])


def masks(module: nn.Sequential) -> None:
    """A mask, a mask over a mask, and a mask of a bias, all left on."""
    prune.l1_unstructured(module[0][0], "weight", 0.5)  # type: ignore[index]
    prune.random_unstructured(module[1], "weight", 0.3)
    prune.ln_structured(module[1], "weight", 0.3, n=2, dim=0)
    prune.l1_unstructured(module[3], "bias", 0.5)


def mask_in_weight_norm(module: nn.Sequential) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(module[1])
    prune.l1_unstructured(module[1], "weight_v", 0.5)


def several(module: nn.Sequential) -> None:
    parametrizations.spectral_norm(module[1])
    register_parametrization(module[1], "weight", Symmetric())
    register_parametrization(module[1], "bias", nn.Softplus())


def shared_original(module: nn.Sequential) -> None:
    """Two layers compute their weights from one tensor, and a third takes it as it is."""
    module.append(nn.Linear(10, 10)).append(nn.Linear(10, 10))
    module[3] = nn.Linear(32, 10)
    module[5].weight = module[4].weight
    module.append(nn.Linear(10, 10))
    register_parametrization(module[4], "weight", Symmetric())
    register_parametrization(module[6], "weight", Symmetric())
    module[6].parametrizations.weight.original = module[5].weight  # type: ignore[union-attr]
    module[4].parametrizations.weight.original = module[5].weight  # type: ignore[union-attr]


CASES: dict[str, Callable[[nn.Sequential], object]] = {
    "weight_norm": lambda module: parametrizations.weight_norm(module[0][0]),
    "weight_norm of all": lambda module: parametrizations.weight_norm(module[3], dim=None),
    "spectral_norm": lambda module: parametrizations.spectral_norm(module[1]),
    "orthogonal": lambda module: parametrizations.orthogonal(module[1]),
    "orthogonal, not square": lambda module: parametrizations.orthogonal(module[3], orthogonal_map="householder"),
    "own": lambda module: register_parametrization(module[1], "weight", Symmetric()),
    "own with weights": lambda module: register_parametrization(module[1], "weight", LowRank(32, 32)),
    "own view": lambda module: register_parametrization(module[1], "weight", Expanded()),
    "several": several,
    "old hooks": old_hooks,
    "masks": masks,
    "mask in weight_norm": mask_in_weight_norm,
    "shared original": shared_original,
}
every_case = pytest.mark.parametrize("case", CASES)


def computed(case: str, *, training: bool = False) -> nn.Sequential:
    """Return a network with computed weights whose sources have changed since, as by a loaded checkpoint."""
    module = net()
    CASES[case](module)
    with torch.no_grad():
        for number, parameter in enumerate(module.parameters()):
            parameter.mul_(1 + number / 10)
    return module.train(training)


def answers(module: nn.Module) -> Tensor:
    training = module.training
    with torch.no_grad():
        found: Tensor = module.eval()(torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    module.train(training)
    return found


@every_case
def test_folded_weights_give_the_same_answers(case: str) -> None:
    module = computed(case)
    answers(module)  # a weight norm reads the mask of the call before
    before = answers(module)
    sentences = fold(module)
    assert torch.equal(answers(module), before)
    assert all(sentence.endswith(", with the same answers.") for sentence in sentences)
    assert sentences


@every_case
def test_nothing_computed_is_left(case: str) -> None:
    module, plain = computed(case), net()
    if case == "shared original":
        plain.extend([nn.Linear(10, 10) for _ in range(3)])
    fold(module)
    assert {name: value.shape for name, value in module.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert {name for name, _ in module.named_parameters()} | {"6.weight"} >= {
        name for name, _ in plain.named_parameters()
    } - {"5.weight"}
    assert [type(part) for part in module.modules()] == [type(part) for part in plain.modules()]
    assert not any(part._forward_pre_hooks for part in module.modules())
    assert all(0 not in parameter.stride() and parameter.is_leaf for parameter in module.parameters())
    assert fold(module) == []


@every_case
def test_pruners_set_folded_weights_to_zero(case: str) -> None:
    module = computed(case)
    fold(module)
    pruners.l1(Model(module.eval(), 10, SMALL), NO_DATA, amount=0.5)
    assert all(
        2 * int((getattr(part, name) == 0).sum()) >= getattr(part, name).numel() for part, name in prunable(module)
    )


@every_case
def test_a_frozen_network_stays_frozen_and_keeps_its_parameters(case: str) -> None:
    module = computed(case).requires_grad_(False)
    fold(module)
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert all(isinstance(getattr(part, name), nn.Parameter) for part, name in prunable(module))


def test_a_spectral_norm_in_training_mode_does_not_go_on_estimating() -> None:
    module = computed("spectral_norm", training=True)
    before = answers(module)
    fold(module)
    assert torch.equal(answers(module), before)


def test_layers_that_computed_alike_from_one_tensor_go_on_sharing() -> None:
    module = computed("shared original")
    fold(module)
    assert module[4].weight is module[6].weight
    assert module[5].weight is not module[4].weight


def test_the_sentences_name_the_layers() -> None:
    module = net()
    for part in (module[0][0], module[1], module[3]):  # type: ignore[index]
        parametrizations.weight_norm(part)
    parametrizations.weight_norm(module[3], "bias")
    prune.l1_unstructured(module[1], "bias", 0.5)
    assert fold(module) == [
        "the parametrization WeightNorm was folded into 0.0.weight, 1.weight, 3.weight and 1 more,"
        " with the same answers.",
        "a pruning mask was folded into 1.bias, with the same answers.",
    ]


def test_a_buffer_stays_a_buffer() -> None:
    module = nn.BatchNorm2d(3)
    register_parametrization(module, "running_var", nn.Softplus())
    before = module.running_var.clone()  # type: ignore[union-attr]
    fold(module)
    assert torch.equal(dict(module.named_buffers())["running_var"], before)


@pytest.mark.parametrize(("step", "words"), [(Noisy(), "is another at each call"), (Broken(), "cannot be computed")])
def test_what_cannot_be_folded_is_refused_by_name(step: nn.Module, words: str) -> None:
    module = net()
    register_parametrization(module[1], "weight", step, unsafe=True) if words.startswith("is") else _force(
        module[1], step
    )
    text = refused(lambda: fold(module))
    assert f"the weight of 1 (the parametrization {type(step).__name__})" in text
    assert words in text


def _force(layer: nn.Module, step: nn.Module) -> None:
    """Put on a step that fails, which torch would try at once."""
    register_parametrization(layer, "weight", Symmetric())
    layer.parametrizations.weight[0] = step  # type: ignore[union-attr, index]


def test_a_weight_that_an_unknown_hook_computes_is_refused_by_pruners() -> None:
    module = net()
    weight = module[1].weight.detach()
    del module[1]._parameters["weight"]
    module[1].register_forward_pre_hook(lambda part, _: setattr(part, "weight", weight * 2))
    module[1].weight = weight
    text = refused(lambda: pruners.l1_global(Model(module, 10, SMALL), NO_DATA, amount=0.5))
    assert "the weight of 1 is no Parameter" in text


def test_parametrized_networks_of_one_class_do_not_meet() -> None:
    first, second = computed("own"), computed("own")
    fold(first)
    assert parametrize.is_parametrized(second[1])
    assert torch.equal(answers(first), answers(second))
