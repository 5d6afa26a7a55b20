"""Pruners: what they zero or remove is recomputed here by hand, from the weights before and after."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from pq_sweep import measure, pruners
from pq_sweep.check import IMPORTANCES
from pq_sweep.datasets import digits
from pq_sweep.models import digits_cnn, torchvision_model
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

Prune = Callable[..., Any]
State = dict[str, Tensor]

AMOUNTS = [0, 0.0, 0.1, 0.5, 0.9]
ZERO_FILL: dict[str, dict[str, Any]] = {
    "random": {},
    "l1": {},
    "l1_global": {},
    "ln_structured": {"n": 2, "dim": 0},
    "random_structured": {"dim": 0},
}
REMOVE: dict[str, Any] = {"amount": 0.5, "importance": "magnitude", "p": 2, "global_ranking": False, "round_to": None}
YAMLS = sorted((ROOT / "conf" / "pruner").glob("*.yaml"))

every_zero_fill = pytest.mark.parametrize("name", ZERO_FILL)
every_amount = pytest.mark.parametrize("amount", AMOUNTS, ids=repr)


def randomise(module: nn.Module) -> None:
    """Draw all weights and BatchNorm statistics: torchvision's ViT head is zero, which would hide every error."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(0, 0.1)
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def fresh(seed: int = 0, name: str = "digits_cnn") -> Model:
    """Return a network for ten classes with random weights of this seed, whose answers depend on the image."""
    torch.manual_seed(seed)
    torchvision = partial(torchvision_model, name=name, num_classes=10)
    model = (digits_cnn if name == "digits_cnn" else torchvision)(weights=None)
    randomise(model.module)
    return model


class Attention(nn.Module):
    """A patch embedding, one attention and a linear classifier, for (B, 1, 8, 8) images."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 24)
        self.keys = nn.Linear(24, kdim or 24)
        self.attention = nn.MultiheadAttention(24, 3, kdim=kdim, vdim=kdim, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1).unflatten(1, (4, 16)))
        keys = self.keys(x)
        return self.head(self.attention(x, keys, keys, need_weights=False)[0].mean(1))


def attention(kdim: int | None = None) -> Model:
    torch.manual_seed(0)
    return Model(Attention(kdim).eval(), 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))


class TwoConvs(nn.Sequential):
    """Map (B, 3, 8, 8) to five logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        convs = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU())
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def two_convs() -> Model:
    return Model(TwoConvs().eval(), 5, Preprocess(size=8, resize=8))


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None), calibration=8)


def state_of(model: Model) -> State:
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def weights_of(state: State, prefixes: tuple[str, ...] = ("weight",)) -> State:
    """Keep the weights of convolutions and linear layers: those of two dimensions or more."""
    return {key: value for key, value in state.items() if key.endswith(prefixes) and value.dim() > 1}


def pruned_states(name: str, data: Data, model: Model | None = None, **options: Any) -> tuple[State, State]:
    """Prune and return the state before and after."""
    model = model or fresh()
    before = state_of(model)
    torch.manual_seed(0)
    getattr(pruners, name)(model, data, **(ZERO_FILL.get(name, {}) | options))
    return before, state_of(model)


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def zero_slices(weight: Tensor, dim: int) -> set[int]:
    flat = weight.movedim(dim, 0).flatten(1)
    return {index for index, row in enumerate(flat) if not row.any()}


# --- zero-fill -------------------------------------------------------------------------------------------------------


def test_none_changes_nothing(data: Data) -> None:
    assert same(*pruned_states("none", data, amount=0.5))


@every_zero_fill
@pytest.mark.parametrize("amount", [0, 0.0], ids=repr)
def test_amount_zero_changes_nothing(name: str, amount: float, data: Data) -> None:
    assert same(*pruned_states(name, data, amount=amount))


@pytest.mark.parametrize("name", ["l1", "random"])
@every_amount
def test_layerwise_amount_is_reached_exactly_in_each_layer(name: str, amount: float, data: Data) -> None:
    _, after = pruned_states(name, data, amount=amount)
    weights = weights_of(after)
    assert len(weights) == 7
    assert {key: zeros(w) for key, w in weights.items()} == {k: round(amount * w.numel()) for k, w in weights.items()}


@every_amount
def test_l1_keeps_the_largest_weights_of_each_layer(amount: float, data: Data) -> None:
    before, after = pruned_states("l1", data, amount=amount)
    for key, weight in weights_of(after).items():
        original, gone = before[key], weight == 0
        assert torch.equal(weight[~gone], original[~gone])
        if gone.any():
            assert original[gone].abs().max() <= original[~gone].abs().min()


@every_amount
def test_l1_global_zeroes_the_smallest_weights_of_all(amount: float, data: Data) -> None:
    before, after = pruned_states("l1_global", data, amount=amount)
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights_of(before).values()])
    count = round(amount * len(magnitudes))
    threshold = magnitudes.sort().values[count]
    for key, weight in weights_of(before).items():
        assert torch.equal(after[key], torch.where(weight.abs() < threshold, 0, weight))
    assert sum(zeros(weight) for weight in weights_of(after).values()) == count


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
@every_amount
def test_ln_structured_zeroes_the_slices_of_smallest_norm(amount: float, dim: int, n: int, data: Data) -> None:
    before, after = pruned_states("ln_structured", data, amount=amount, n=n, dim=dim)
    for key, weight in weights_of(before).items():
        norms = weight.movedim(dim, 0).flatten(1).abs().pow(n).sum(1)
        count = round(amount * len(norms))
        assert zero_slices(after[key], dim) == set(norms.argsort()[:count].tolist())
        kept = norms.argsort()[count:]
        assert torch.equal(after[key].index_select(dim, kept), weight.index_select(dim, kept))


@pytest.mark.parametrize("dim", [0, 1])
@every_amount
def test_random_structured_zeroes_whole_slices(amount: float, dim: int, data: Data) -> None:
    before, after = pruned_states("random_structured", data, amount=amount, dim=dim)
    for key, weight in weights_of(before).items():
        gone = zero_slices(after[key], dim)
        kept = torch.tensor([index for index in range(weight.shape[dim]) if index not in gone], dtype=torch.int64)
        assert len(gone) == round(amount * weight.shape[dim])
        assert torch.equal(after[key].index_select(dim, kept), weight.index_select(dim, kept))


@pytest.mark.parametrize("name", ["random", "random_structured"])
def test_random_choice_follows_the_seed(name: str, data: Data) -> None:
    def prune(seed: int) -> State:
        model = fresh()
        torch.manual_seed(seed)
        getattr(pruners, name)(model, data, amount=0.5, **ZERO_FILL[name])
        return state_of(model)

    first, again, other = prune(1), prune(1), prune(2)
    assert same(first, again)
    assert not same(first, other)


@every_zero_fill
def test_only_weights_of_layers_change(name: str, data: Data) -> None:
    """Biases, BatchNorm and its statistics stay."""
    before, after = pruned_states(name, data, amount=0.5)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(weights_of(before))


@every_zero_fill
def test_every_weight_takes_batchnorm_too(name: str, data: Data) -> None:
    """A slice of a vector is a single weight, so slice-wise pruners leave vectors out."""
    model = fresh()
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data /= 10  # as small as the others, so that a global choice meets them too
    before, after = pruned_states(name, data, model, amount=0.5, every_weight=True)
    norms = {key for key, value in before.items() if key.endswith("weight") and value.dim() == 1}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(norms) == 5
    assert changed == set(weights_of(before)) | (set() if name.endswith("structured") else norms)


@pytest.mark.parametrize("name", ["l1", "random"])
def test_every_weight_reaches_the_amount_in_batchnorm(name: str, data: Data) -> None:
    _, after = pruned_states(name, data, amount=0.25, every_weight=True)
    norms = [value for key, value in after.items() if key.endswith("weight") and value.dim() == 1]
    assert [zeros(weight) for weight in norms] == [len(weight) // 4 for weight in norms]


@every_zero_fill
@pytest.mark.parametrize("every_weight", [False, True])
def test_zeros_are_permanent(name: str, every_weight: bool, data: Data) -> None:
    """No mask is left that would double the state_dict or come back with it."""
    model = fresh()
    keys, parameters = set(model.module.state_dict()), {key for key, _ in model.module.named_parameters()}
    getattr(pruners, name)(model, data, amount=0.5, every_weight=every_weight, **ZERO_FILL[name])
    assert set(model.module.state_dict()) == keys
    assert {key for key, _ in model.module.named_parameters()} == parameters
    assert not any(part._forward_pre_hooks for part in model.module.modules())


@every_zero_fill
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_reported_sparsity_is_the_share_of_zeros(name: str, amount: float, data: Data) -> None:
    model = fresh()
    getattr(pruners, name)(model, data, amount=amount, **ZERO_FILL[name])
    weights = weights_of(state_of(model)).values()
    total = sum(weight.numel() for weight in weights)
    found = measure.network(model)
    assert found["sparsity"] == sum(map(zeros, weights)) / total
    # One small layer rounds to whole channels.
    assert found["sparsity"] == pytest.approx(amount, abs=0.02)
    assert found["weights"] == total
    assert found["params"] - found["nonzero_params"] == sum(zeros(p) for p in model.module.parameters())


@pytest.mark.parametrize(
    ("kdim", "projections"), [(None, ["in_proj"]), (16, ["q_proj", "k_proj", "v_proj"])], ids=["one", "three"]
)
@every_zero_fill
def test_projections_of_attention_are_pruned(name: str, kdim: int | None, projections: list[str], data: Data) -> None:
    _, after = pruned_states(name, data, attention(kdim), amount=0.5)
    weights = {key: w for key, w in after.items() if key.endswith("weight")}
    inputs = {f"attention.{projection}_weight" for projection in projections}
    assert {key for key in weights if "proj_weight" in key} == inputs
    assert weights.keys() == inputs | {"embed.weight", "keys.weight", "attention.out_proj.weight", "head.weight"}
    for weight in weights.values():
        assert zeros(weight) / weight.numel() == pytest.approx(0.5, abs=0.4 if name == "l1_global" else 0.001)


@pytest.mark.parametrize("amount", [1, 1.5, -0.1])
@every_zero_fill
def test_amount_one_is_all_and_never_one_weight(name: str, amount: float, data: Data) -> None:
    """torch takes an integer as a number of weights; here `amount` always is a share."""
    if amount != 1:
        with pytest.raises(ValueError, match="amount"):
            pruned_states(name, data, amount=amount)
    else:
        assert all(not weight.any() for weight in weights_of(pruned_states(name, data, amount=amount)[1]).values())


# --- the classifier --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v2", "classifier.1"),
        ("squeezenet1_1", "classifier.1"),
        pytest.param("vit_b_16", "heads.head", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("num_classes", [10, 1000])
def test_classifier_of_torchvisions_networks(name: str, path: str, num_classes: int) -> None:
    model = torchvision_model(name=name, weights=None, num_classes=num_classes)
    assert pruners.classifier(model) is model.module.get_submodule(path)


def test_classifier_of_digits_cnn() -> None:
    model = fresh()
    assert pruners.classifier(model) is model.module.get_submodule("fc2")


def test_classifier_is_the_last_of_equal_width() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    model = Model(layers, 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))
    assert pruners.classifier(model) is layers[3]
    assert not any(layer._forward_hooks for layer in layers)


def test_network_without_such_a_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"11 outputs; check model\.num_classes\."):
        pruners.classifier(replace(fresh(), num_classes=11))


# --- removal ---------------------------------------------------------------------------------------------------------


def remove(model: Model, data: Data, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return pruners.remove(model, data, **(REMOVE | options))


def parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


def widths(model: Model) -> list[int]:
    """Return the output width of every layer but the classifier."""
    layers = [layer for layer in model.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [len(layer.weight) for layer in layers if layer is not pruners.classifier(model)]


def assert_alive(model: Model, images: Tensor) -> None:
    """Answers have ten finite logits and depend on the image; single logits may be constant, their row being zero."""
    with torch.no_grad():
        output = model.module(images)
    assert output.shape == (len(images), 10)
    assert output.isfinite().all()
    assert output.std(0).max() > 1e-4 * output.abs().max() > 0


@pytest.mark.parametrize("importance", IMPORTANCES)
@pytest.mark.parametrize("global_ranking", [False, True])
def test_removal_by_every_importance(importance: str, global_ranking: bool, data: Data) -> None:
    model = digits_cnn()
    before = parameters(model)
    remove(model, data, importance=importance, global_ranking=global_ranking)
    assert parameters(model) < before
    assert_alive(model, data.evaluation.fetch(list(range(8))))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_removal_halves_every_layer(importance: str, data: Data) -> None:
    model = digits_cnn()
    before, widths_before = parameters(model), widths(model)
    remove(model, data, importance=importance)
    expected = [width // 2 for width in widths_before]
    if importance == "bn_scale":
        expected[-1] = widths_before[-1]  # no BatchNorm follows fc1
    assert widths(model) == expected
    assert parameters(model) <= 0.6 * before
    assert model.module.get_submodule("fc2").out_features == 10


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.7, 0.9])
def test_larger_amount_leaves_less(amount: float, data: Data) -> None:
    less, more = fresh(), fresh()
    remove(less, data, amount=amount - 0.1)
    remove(more, data, amount=amount)
    assert parameters(more) < parameters(less)
    assert_alive(more, data.evaluation.fetch(list(range(8))))


def test_importances_choose_differently(data: Data) -> None:
    """Within one layer LAMP ranks as magnitude does; they differ between layers."""
    records = [remove(digits_cnn(), data, importance=name, global_ranking=True) for name in IMPORTANCES]
    assert len({json.dumps(record) for record in records}) == len(IMPORTANCES)


def test_global_ranking_lets_layers_differ(data: Data) -> None:
    before, model = widths(digits_cnn()), digits_cnn()
    remove(model, data, global_ranking=True)
    assert len({after / width for after, width in zip(widths(model), before, strict=True)}) > 1


@pytest.mark.parametrize("round_to", [4, 8])
@pytest.mark.parametrize("amount", [0.3, 0.6, 0.8])
def test_round_to_keeps_multiples(round_to: int, amount: float, data: Data) -> None:
    model, before = digits_cnn(), widths(digits_cnn())
    remove(model, data, amount=amount, round_to=round_to)
    assert all(width % round_to == 0 for width in widths(model))
    for after, width in zip(widths(model), before, strict=True):
        assert abs(after - (1 - amount) * width) <= round_to


def test_removing_nothing_is_refused(data: Data) -> None:
    with pytest.raises(UserError, match=r"removed nothing at amount=0.1 and round_to=128; .*\.$"):
        remove(fresh(), data, amount=0.1, round_to=128)


@pytest.mark.parametrize("amount", [0, 0.0], ids=repr)
def test_removal_of_amount_zero_changes_nothing(amount: float, data: Data) -> None:
    model = fresh()
    before = state_of(model)
    assert remove(model, data, amount=amount)["history"] == []
    assert same(state_of(model), before)


def test_unknown_importance_is_refused(data: Data) -> None:
    with pytest.raises(UserError, match=r"hessian is not known; valid are: .*magnitude.*\.$"):
        remove(fresh(), data, importance="hessian")


def test_bn_scale_without_batchnorm_is_refused(data: Data) -> None:
    with pytest.raises(UserError, match=r"needs BatchNorm and this model has none; .*\.$"):
        remove(two_convs(), data, importance="bn_scale")


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "sensitivity"])
def test_frozen_network_is_pruned(importance: str, data: Data) -> None:
    model, before = fresh(), parameters(fresh())
    model.module.requires_grad_(False)
    remove(model, data, importance=importance)
    assert parameters(model) <= 0.6 * before


def test_frozen_network_stays_frozen(data: Data) -> None:
    model = fresh()
    model.module.requires_grad_(False)
    remove(model, data)
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize("importance", ["taylor", "sensitivity"])
def test_no_gradients_are_left(importance: str, data: Data) -> None:
    model = fresh()
    remove(model, data, importance=importance)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert all(parameter.requires_grad for parameter in model.module.parameters())


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_removes_the_channels_of_smallest_norm(p: int, data: Data) -> None:
    """A channel's norm is over what writes it and what reads it: rows of one layer, columns of the next."""
    model = two_convs()
    first, second, head = (model.module[index].weight.detach().clone() for index in (0, 2, 6))  # type: ignore[index]
    remove(model, data, p=p)

    def norms(rows: Tensor, columns: Tensor) -> Tensor:
        return sum_of_powers(rows) + sum_of_powers(columns.transpose(0, 1))

    def sum_of_powers(weight: Tensor) -> Tensor:
        return weight.flatten(1).abs().pow(p).sum(1)

    kept_first = norms(first, second).argsort(descending=True)[:3].sort().values
    second = second[:, kept_first]
    kept_second = norms(second, head).argsort(descending=True)[:2].sort().values
    found = [model.module[index].weight for index in (0, 2, 6)]  # type: ignore[index]
    assert torch.equal(found[0], first[kept_first])
    assert torch.equal(found[1], second[kept_second])
    assert torch.equal(found[2], head[:, kept_second])


@pytest.mark.parametrize(("p", "kept"), [(1, "even"), (2, "spiky")])
def test_norm_decides_between_even_and_spiky_channels(p: int, kept: str, data: Data) -> None:
    """27 weights of .3: L1 8.1, L2 1.6. A single weight of 5: L1 5, L2 5."""
    model = two_convs()
    with torch.no_grad():
        weight = model.module[0].weight  # type: ignore[index]
        weight[:3] = 0.3
        weight[3:] = 0
        weight[3:, 0, 0, 0] = 5
        model.module[2].weight.fill_(0.1)  # type: ignore[index]
    remove(model, data, p=p)
    left = model.module[0].weight  # type: ignore[index]
    assert len(left) == 3
    assert (left == {"even": 0.3, "spiky": 5}[kept]).flatten(1).any(1).all()


def taylor_by_hand(model: Model, images: Tensor, labels: Tensor, *, absolute: bool) -> Tensor:
    """Score the six channels of the first convolution by w dL/dw, of the mean loss or image by image."""
    layers = [model.module[0].weight, model.module[2].weight]  # type: ignore[index]
    products = []
    for image, label in zip(images.split(1), labels.split(1), strict=True):
        loss = nn.functional.cross_entropy(model.module(image), label)
        products.append([w * g for w, g in zip(layers, torch.autograd.grad(loss, layers), strict=True)])
    scores = torch.zeros(6)
    for position, axis in ((0, 0), (1, 1)):
        stacked = torch.stack([product[position].movedim(axis, 0).flatten(1) for product in products])
        scores += stacked.abs().mean(0).sum(1) if absolute else stacked.mean(0).sum(1).abs()
    return scores.detach()


@pytest.mark.parametrize(("importance", "absolute"), [("taylor", False), ("sensitivity", True)])
@pytest.mark.parametrize("seed", range(4))
def test_gradient_importances_follow_their_definition(importance: str, absolute: bool, seed: int) -> None:
    model = two_convs()
    torch.manual_seed(seed)
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    split = Split.of_tensors(images, labels)
    original = model.module[0].weight.detach().clone()  # type: ignore[index]
    scores = taylor_by_hand(model, images, labels, absolute=absolute)
    remove(model, Data(split, split, None, tuple("abcde")), importance=importance)
    kept = scores.argsort(descending=True)[:3].sort().values
    assert torch.equal(model.module[0].weight, original[kept])  # type: ignore[index]


def test_removals_in_one_process_are_independent(data: Data) -> None:
    """torch-pruning's defaults are shared by all pruners of a process: another network between must not matter."""
    first, between, again = fresh(), attention(), fresh()
    record = remove(first, data, importance="taylor")
    remove(between, data)
    assert remove(again, data, importance="taylor") == record
    assert same(state_of(first), state_of(again))


def test_attention_keeps_whole_heads(data: Data) -> None:
    model, before = attention(), parameters(attention())
    record = remove(model, data)
    layer = model.module.get_submodule("attention")
    assert record["round_to"] == 3
    assert layer.embed_dim % layer.num_heads == 0
    assert parameters(model) < before
    assert_alive(model, data.evaluation.fetch(list(range(8))))


# --- replay and every pruner on every network ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(data: Data) -> Data:
    """A few digits as torchvision's networks take them."""
    full = digits(torchvision_model(name="squeezenet1_1", weights=None, num_classes=10), calibration=8)
    images, labels = next(full.evaluation.batches(4))
    calibration = Split.of_tensors(*next(full.calibration.batches(8)))
    return Data(Split.of_tensors(images.clone(), labels), calibration, None, data.classes)


networks = pytest.mark.parametrize(
    "name", ["digits_cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "mobilenet_v2", "vit_b_16"))]
)


def data_for(name: str, request: pytest.FixtureRequest) -> Data:
    found: Data = request.getfixturevalue("data" if name == "digits_cnn" else "big")
    return found


@networks
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_pruner_leaves_every_network_alive(name: str, path: Path, request: pytest.FixtureRequest) -> None:
    data, model = data_for(name, request), fresh(name=name)
    before = parameters(model)
    prune: Prune = instantiate(OmegaConf.load(path), _partial_=True, _convert_="all")
    prune(model, data)
    assert_alive(model, data.evaluation.fetch([0, 1, 2, 3]))
    after = measure.network(model)
    assert path.stem == "none" or after["sparsity"] > 0.4 or after["params"] <= 0.6 * before


@networks
def test_replay_repeats_a_removal(name: str, request: pytest.FixtureRequest) -> None:
    """A fresh network, the record after a round trip through JSON, and a state_dict give the same bits."""
    data, removed, again = data_for(name, request), fresh(0, name), fresh(1, name)
    record = json.loads(json.dumps(remove(removed, data)))
    pruners.replay(again, record)
    again.module.load_state_dict(removed.module.state_dict())
    images = data.evaluation.fetch([0, 1])
    with torch.no_grad():
        assert torch.equal(again.module(images), removed.module(images))


@pytest.mark.parametrize("options", [{"global_ranking": True}, {"round_to": 8}, {"importance": "taylor"}], ids=str)
def test_replay_without_json(options: dict[str, Any], data: Data) -> None:
    removed, again = digits_cnn(), fresh(seed=1)
    pruners.replay(again, remove(removed, data, **options))
    again.module.load_state_dict(removed.module.state_dict())
    images = data.evaluation.fetch([0, 1])
    assert torch.equal(again.module(images), removed.module(images))
    assert all(parameter.requires_grad for parameter in again.module.parameters())


@pytest.mark.slow
def test_removal_shrinks_vit_by_whole_heads(big: Data) -> None:
    model = fresh(name="vit_b_16")
    before = parameters(model)
    record = remove(model, big, round_to=8)
    assert record["round_to"] == math.lcm(8, 12)
    assert model.module.hidden_dim == model.module.get_submodule("conv_proj").out_channels == 384
    assert parameters(model) < 0.3 * before
