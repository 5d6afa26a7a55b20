"""Removal: what leaves is recomputed here by hand, and what is left computes what the whole did without the rest."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, refused
from hydra.utils import instantiate
from omegaconf import OmegaConf
from random_networks import (
    assert_alive,
    attention,
    big_digits,
    fresh,
    parameters,
    randomise,
    same,
    state_of,
    two_convs,
)
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer, shufflenetv2
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    SwinTransformerBlockV2,
)

from pq_sweep.compress import removal
from pq_sweep.compress.choices import IMPORTANCES
from pq_sweep.core.weights import load_state
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn, torchvision_model
from pq_sweep.runtimes.export import check_export, export_onnx
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

REMOVE: dict[str, Any] = {"amount": 0.5, "importance": "magnitude", "p": 2, "global_ranking": False, "round_to": None}
SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
NONE = Split.of_tensors(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
NO_DATA = Data(NONE, NONE, None, ())


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None), calibration=8)


@pytest.fixture(scope="module")
def big() -> Data:
    return big_digits()


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
    assert removal.classifier(model) is model.module.get_submodule(path)


def test_classifier_of_digits_cnn() -> None:
    model = fresh()
    assert removal.classifier(model) is model.module.get_submodule("fc2")


def test_classifier_is_the_last_of_equal_width() -> None:
    layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10))
    model = Model(layers, 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))
    assert removal.classifier(model) is layers[3]
    assert not any(layer._forward_hooks for layer in layers)


def test_network_without_such_a_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"11 outputs; check model\.num_classes\."):
        removal.classifier(replace(fresh(), num_classes=11))


# --- removal ---------------------------------------------------------------------------------------------------------


def remove(model: Model, data: Data, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return removal.remove(model, data, **(REMOVE | options))


def widths(model: Model) -> list[int]:
    """Return the output width of every layer but the classifier."""
    layers = [layer for layer in model.module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [len(layer.weight) for layer in layers if layer is not removal.classifier(model)]


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


def test_a_layer_keeps_at_least_one_channel(data: Data) -> None:
    """torch-pruning leaves a layer whole that would lose all."""
    model = two_convs()
    remove(model, data, amount=0.9)
    assert [len(model.module[index].weight) for index in (0, 2)] == [1, 1]  # type: ignore[index]


@pytest.mark.parametrize("global_ranking", [False, True])
@pytest.mark.parametrize("amount", [1e-9, 0.001])
def test_less_than_half_a_channel_removes_nothing_and_says_so(amount: float, global_ranking: bool, data: Data) -> None:
    model = fresh()
    before = state_of(model)
    record = remove(model, data, amount=amount, global_ranking=global_ranking)
    assert same(state_of(model), before)
    assert record["history"] == []
    assert record["asked"] == {"channels": amount}
    assert record["reached"] == {"channels": 0, "parameters": 0}
    assert record["notes"] == [f"pruner=remove took nothing: pruner.amount={amount} is less than half a channel."]


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.2, 0.3, 0.45, 0.55, 0.7, 0.9])
def test_each_layer_loses_the_nearest_number_of_channels(amount: float, data: Data) -> None:
    model, before = fresh(), widths(fresh())
    record = remove(model, data, amount=amount)
    kept = [width - int(amount * width + 0.5) for width in before]
    assert widths(model) == kept
    assert record["reached"]["channels"] == pytest.approx(1 - sum(kept) / sum(before), abs=0.02)
    assert record["reached"]["parameters"] == pytest.approx(1 - parameters(model) / parameters(fresh()), abs=1e-12)


@pytest.mark.parametrize("amount", [0.01, 0.1, 0.35, 0.8])
def test_a_global_ranking_takes_the_nearest_number_of_all_channels(amount: float, data: Data) -> None:
    """The residual blocks share their widths, so that their channels leave together and count once."""
    model = two_convs()
    record = remove(model, NO_DATA, amount=amount, global_ranking=True)
    left = sum(len(model.module[index].weight) for index in (0, 2))  # type: ignore[index]
    assert left == max(2, 10 - int(amount * 10 + 0.5))
    assert record["reached"]["channels"] == pytest.approx(1 - left / 10)


@pytest.mark.parametrize(
    ("amount", "round_to", "kept"),
    [(0.5, None, 16), (0.5, 8, 16), (0.4, 8, 16), (0.3, None, 24), (0.95, None, 4), (0.95, 8, 8), (1e-9, 8, 32)],
)
@pytest.mark.parametrize("normed", [False, True], ids=["grouped", "group norm"])
def test_the_parts_of_a_grouped_layer_lose_equally_many(
    amount: float, round_to: int | None, kept: int, normed: bool, data: Data
) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.GroupNorm(4, 32) if normed else nn.Conv2d(32, 32, 1, groups=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    model = Model(layers.eval(), 10, SMALL)
    remove(model, data, amount=amount, round_to=round_to)
    assert layers[0].out_channels == layers[5].in_features == kept
    assert_alive(model, data.evaluation.fetch([0, 1, 2]))


def test_an_amount_that_rounds_far_is_said(data: Data) -> None:
    """16, 32, 64 and 256 channels in multiples of 16."""
    record = remove(fresh(), data, amount=0.05, round_to=16)
    share = record["reached"]["channels"]
    assert share > 0.06
    assert record["notes"] == [
        f"pruner.amount=0.05 asked for 5.000% of the channels, and {share:.3%} went (channels are whole and kept in"
        " multiples of 16)."
    ]


def test_an_amount_that_is_reached_has_no_notes(data: Data) -> None:
    record = remove(fresh(), data, amount=0.5)
    assert (record["asked"]["channels"], record["reached"]["channels"], record["notes"]) == (0.5, 0.5, [])


def test_a_classifier_alone_has_no_channels_to_remove(data: Data) -> None:
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), 10, SMALL)
    assert "finds no channels that may leave (no convolution or linear layer comes before the classifier)" in refused(
        lambda: remove(model, data)
    )


def test_a_removal_from_layers_with_dots_in_their_names_can_be_repeated(data: Data) -> None:
    def dotted(seed: int) -> Model:
        torch.manual_seed(seed)
        module = nn.Sequential()
        for name, part in {"a.b": nn.Conv2d(1, 8, 3), "with blank": nn.Flatten(), "c.d": nn.Linear(288, 10)}.items():
            setattr(module, name, part)
        return Model(module.eval(), 10, SMALL)

    model, again = dotted(0), dotted(1)
    removal.replay(again, remove(model, data))
    load_state(again.module, model.module.state_dict())
    assert torch.equal(again.module(model.sample()), model.module(model.sample()))


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


# --- replay ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"global_ranking": True}, {"round_to": 8}, {"importance": "taylor"}], ids=str)
def test_replay_without_json(options: dict[str, Any], data: Data) -> None:
    removed, again = digits_cnn(), fresh(seed=1)
    removal.replay(again, remove(removed, data, **options))
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


# --- every network ---------------------------------------------------------------------------------------------------

# Big, or long to trace; the everyday tests have a smaller one of most of these families.
SLOW = ("alexnet", "densenet", "googlenet", "inception", "resnet34", "resnet50", "simplenetv1_9m", "vgg16", "vit")
# The same blocks as in densenet121 and resnet50, only more of them.
DEEPER = ("densenet161", "densenet169", "densenet201", "resnet101", "resnet152")
EVERY = [
    pytest.param(path.stem, 0.5, marks=[pytest.mark.slow] if path.stem.startswith(SLOW) else [], id=f"{path.stem}-0.5")
    for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))
    if path.stem not in DEEPER and "name: ???" not in path.read_text()
]
SOME = [
    pytest.param(name, amount, marks=[pytest.mark.slow] if name == "vit_b_16" else [], id=f"{name}-{amount}")
    for name in ("digits_cnn", "resnet20", "squeezenet1_1", "shufflenet_v2_x1_0", "swin_t", "vit_b_16")
    for amount in (0.25, 0.75)
]


def configured(name: str, seed: int = 0) -> Model:
    """Return a network of conf/model with random weights of this seed, for small images if it takes any size."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if name == "digits_cnn" else {"num_classes": 10}
    model: Model = instantiate(OmegaConf.load(ROOT / "conf" / "model" / f"{name}.yaml"), weights=None, **options)
    randomise(model.module)
    size = model.preprocess.size if name == "vit_b_16" else min(96, model.preprocess.size)
    return replace(model, preprocess=replace(model.preprocess, size=size))


def without_the_removed(whole: nn.Module, part: nn.Module) -> nn.Module:
    """Switch off in `whole` the channels that `part` has lost: those whose bias is not among the biases left."""
    for layer, left in zip(whole.modules(), part.modules(), strict=True):
        if isinstance(layer, nn.MultiheadAttention):
            switch_off(layer.in_proj_weight, layer.in_proj_bias, left.in_proj_bias, 3)  # type: ignore[arg-type]
        elif isinstance(getattr(layer, "bias", None), nn.Parameter):
            thirds = isinstance(layer, nn.Linear) and len(layer.bias) == 3 * layer.in_features
            switch_off(layer.weight, layer.bias, left.bias, 3 if thirds else 1)  # type: ignore[arg-type]
    return whole


def switch_off(weight: Tensor, bias: Tensor, left: Tensor, parts: int) -> None:
    """Zero the rows whose bias is gone; of queries, keys and values the values tell, since queries are rescaled."""
    kept = torch.isin(bias.chunk(parts)[-1], left.chunk(parts)[-1])
    assert kept.sum() == len(left) / parts
    weight.data[~kept.repeat(parts)], bias.data[~kept.repeat(parts)] = 0, 0


def close(first: Tensor, second: Tensor) -> bool:
    return bool((first - second).abs().max() <= 1e-4 * second.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "amount"), EVERY + SOME)
@torch.no_grad()
def test_every_network_loses_channels(name: str, amount: float) -> None:
    """Smaller, alive, repeatable, and equal to the whole with the removed channels switched off.

    That last holds where nothing normalises over channels: LayerNorm would see the zeros.
    """
    model = configured(name)
    whole, before = copy.deepcopy(model.module), parameters(model)
    record = json.loads(json.dumps(removal.remove(model, NO_DATA, **(REMOVE | {"amount": amount}))))
    images = model.sample(3)
    output = model.module(images)

    assert parameters(model) <= (1 - 0.9 * amount) * before
    assert output.shape == (3, 10)
    assert output.isfinite().all()
    assert not any("forward" in vars(part) for part in model.module.modules())
    if not any(isinstance(part, nn.LayerNorm) for part in whole.modules()):
        assert close(output, without_the_removed(whole, model.module)(images))
    del whole

    again = configured(name, seed=1)
    removal.replay(again, record)
    again.module.load_state_dict(model.module.state_dict())
    assert torch.equal(again.module(images), output)


# --- blocks that torch-pruning cannot follow -------------------------------------------------------------------------


def shuffle_blocks(module: nn.Module) -> list[shufflenetv2.InvertedResidual]:
    return [part for part in module.modules() if isinstance(part, shufflenetv2.InvertedResidual)]


def test_shuffle_blocks_lose_their_least_important_inner_channels() -> None:
    model = configured("shufflenet_v2_x1_0")
    before = copy.deepcopy(model.module)
    removal.remove(model, NO_DATA, **REMOVE)
    for block, left in zip(shuffle_blocks(before), shuffle_blocks(model.module), strict=True):
        first, norm, _, _, middle_norm, last, *_ = block.branch2
        scores = first.weight.square().flatten(1).sum(1) + last.weight.square().flatten(2).sum((0, 2))
        scores += norm.weight.square() + middle_norm.weight.square()
        kept = scores.argsort(descending=True)[: len(scores) // 2].sort().values
        assert torch.equal(left.branch2[1].bias, norm.bias[kept])
        assert torch.equal(left.branch2[4].bias, middle_norm.bias[kept])
        assert torch.equal(left.branch2[5].weight, last.weight[:, kept])
        assert left.branch2[3].groups == len(kept)
        assert left.branch2[5].out_channels == last.out_channels


def test_shuffle_blocks_in_a_network_of_ones_own(data: Data) -> None:
    """The convolution before a halving block keeps its width; the one before a block of stride 2 does not."""
    torch.manual_seed(0)
    blocks = [shufflenetv2.InvertedResidual(*shape) for shape in ((16, 16, 1), (16, 32, 2), (24, 48, 2))]
    tail = [nn.Conv2d(32, 24, 1), nn.ReLU(), blocks[2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)]
    model = Model(nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), *blocks[:2], *tail).eval(), 10, SMALL)
    randomise(model.module)
    whole = copy.deepcopy(model.module)
    removal.remove(model, data, **REMOVE)
    images = data.evaluation.fetch([0, 1, 2])
    assert [len(model.module[index].weight) for index in (0, 3)] == [16, 12]  # type: ignore[index]
    assert [block.branch2[0].out_channels for block in shuffle_blocks(model.module)] == [4, 8, 12]
    assert close(model.module(images), without_the_removed(whole, model.module)(images))


@pytest.mark.slow
def test_swin_keeps_whole_heads() -> None:
    model = configured("swin_t")
    removal.remove(model, NO_DATA, **REMOVE)
    parts = list(model.module.modules())
    layers = [part for part in parts if isinstance(part, ShiftedWindowAttention)]
    widths = [layer.proj.out_features for layer in layers]
    assert widths == [48] * 2 + [96] * 2 + [192] * 6 + [384] * 2
    assert [layer.num_heads for layer in layers] == [3] * 2 + [6] * 2 + [12] * 6 + [24] * 2
    for layer, width in zip(layers, widths, strict=True):
        assert width % layer.num_heads == 0
        assert layer.qkv.weight.shape == (3 * width, width)
        assert layer.proj.weight.shape == (width, width)
    merging = [part for part in parts if isinstance(part, PatchMerging)]
    assert [(part.dim, part.norm.normalized_shape[0]) for part in merging] == [(48, 192), (96, 384), (192, 768)]


@pytest.mark.slow
def test_the_second_swin() -> None:
    model = torchvision_model(name="swin_v2_t", weights=None, num_classes=10)
    model = replace(model, preprocess=replace(model.preprocess, size=64))
    before = parameters(model)
    removal.remove(model, NO_DATA, **REMOVE)
    assert parameters(model) < 0.3 * before
    assert model.module(model.sample(3)).isfinite().all()


class Affine(nn.LayerNorm):
    """A LayerNorm that does not normalise, so that channels that are off stay off."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def transformer(name: str) -> Model:
    """Return a small Vision or Swin Transformer of torchvision without normalisation."""
    torch.manual_seed(0)
    swin = partial(SwinTransformer, [4, 4], 24, [2, 2], [3, 6], [2, 2], num_classes=10, norm_layer=Affine)
    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": partial(VisionTransformer, 32, 8, 2, 3, 48, 96, num_classes=10, norm_layer=Affine),
        "swin": swin,
        "swin_v2": partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2),
    }
    module = makers[name]()
    randomise(module)
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            part.in_proj_bias.data = torch.linspace(-0.2, 0.2, len(part.in_proj_bias))
    return Model(module.eval(), 10, replace(SMALL, size=32, channels=3))


every_transformer = pytest.mark.parametrize("name", ["vit", "swin", "swin_v2"])


@every_transformer
@pytest.mark.parametrize("amount", [0.25, 0.5, 0.75])
@torch.no_grad()
def test_transformers_compute_the_same_without_the_removed(name: str, amount: float) -> None:
    """Channels of the embedding, of the hidden layers and, others, of each head; no head takes over its neighbour's."""
    model = transformer(name)
    whole, before = copy.deepcopy(model.module), parameters(model)
    remove(model, NO_DATA, amount=amount)
    images = model.sample(3)
    expected = without_the_removed(whole, model.module)(images)
    assert parameters(model) <= (1 - 0.9 * amount) * before
    assert close(model.module(images), expected)
    assert expected.std(0).min() > 0.01 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("importance", [name for name in IMPORTANCES if name != "bn_scale"])
@pytest.mark.parametrize("global_ranking", [False, True])
@every_transformer
def test_transformers_by_every_importance(name: str, importance: str, global_ranking: bool) -> None:
    model = transformer(name)
    before = parameters(model)
    split = Split.of_tensors(model.sample(6), torch.arange(6))
    remove(model, Data(split, split, None, ()), importance=importance, global_ranking=global_ranking)
    assert parameters(model) < 0.7 * before
    assert_alive(model, model.sample(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["shufflenet_v2_x1_0", "swin_t"])
def test_removed_blocks_export(name: str, tmp_path: Path) -> None:
    model = configured(name)
    removal.remove(model, NO_DATA, **REMOVE)
    export_onnx(model, tmp_path / "model.onnx")
    assert check_export(model, tmp_path / "model.onnx") < 1e-4


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["alexnet", "squeezenet1_1", "swin_t", "vit_b_16"])
def test_networks_without_batchnorm_refuse_its_importance(name: str) -> None:
    model = torchvision_model(name=name, weights=None, num_classes=10)
    assert "needs BatchNorm" in refused(lambda: removal.remove(model, NO_DATA, **(REMOVE | {"importance": "bn_scale"})))


@pytest.mark.parametrize("importance", ["taylor", "sensitivity"])
def test_gradients_that_are_zero_are_refused(importance: str) -> None:
    """As with torchvision's untrained ViT, whose head is zero."""
    model = two_convs()
    nn.init.zeros_(model.module[6].weight)  # type: ignore[index]
    split = Split.of_tensors(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3]))
    data = Data(split, split, None, tuple("abcde"))
    text = refused(lambda: removal.remove(model, data, **(REMOVE | {"importance": importance})))
    assert "cannot rank the channels of 2, whose weights or gradients are all zero" in text


# --- code that forbids gradients -------------------------------------------------------------------------------------


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(128, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).relu().flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class NoGrad(Plain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Inference(Plain):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class InferenceInside(Plain):
    def features(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            return super().features(x)


class NoGradInside(Plain):
    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.first.weight.clamp_(-10, 10)
            return super().features(x)


class Detached(Plain):
    def features(self, x: Tensor) -> Tensor:
        return super().features(x.data).detach()


class Switched(Plain):
    def forward(self, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        try:
            return super().forward(x)
        finally:
            torch.set_grad_enabled(True)


@cache
def compiled() -> Callable[[Tensor], Tensor]:
    return torch.compile(torch.relu, backend="eager")


class Compiled(Plain):
    def features(self, x: Tensor) -> Tensor:
        relu = compiled()
        return relu(self.second(relu(self.first(x)))).flatten(1)


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
@pytest.mark.parametrize(
    "kind",
    [
        NoGrad,
        Inference,
        InferenceInside,
        NoGradInside,
        Switched,
        Detached,
        pytest.param(Compiled, marks=pytest.mark.slow),
    ],
)
def test_code_that_forbids_gradients_does_not_matter(kind: type[Plain], importance: str, data: Data) -> None:
    model, plain = (Model(each().eval(), 10, SMALL) for each in (kind, Plain))
    record, expected = remove(model, data, importance=importance), remove(plain, data, importance=importance)
    assert record == expected
    assert same(state_of(model), state_of(plain))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    with torch.inference_mode():
        assert torch.is_inference_mode_enabled()


class SharedInside(Plain):
    """Runs a layer twice where gradients are forbidden."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(8, 8, 1)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        return self.second(self.twice(self.twice(self.first(x).relu()).relu())).relu().flatten(1)


def test_layers_shared_where_gradients_are_forbidden_are_kept(data: Data) -> None:
    model = Model(SharedInside().eval(), 10, SMALL)
    record = remove(model, data)
    assert record["notes"][0].startswith("pruner=remove kept the channels of twice")
    assert (len(model.module.first.weight), len(model.module.second.weight)) == (8, 4)  # type: ignore[arg-type]


def test_a_network_through_which_nothing_can_be_followed_is_told_so(data: Data) -> None:
    class Numpy(Plain):
        def features(self, x: Tensor) -> Tensor:
            return torch.tensor(super().features(x).tolist())

    text = refused(lambda: remove(Model(Numpy().eval(), 10, SMALL), data))
    assert "before the classifier, or none that can be followed to it, as through numpy)" in text


def test_a_forward_of_the_networks_own_is_put_back(data: Data) -> None:
    model = Model(Plain().eval(), 10, SMALL)
    own = model.module.forward = partial(Plain.forward, model.module)  # type: ignore[method-assign]
    remove(model, data)
    assert model.module.forward is own


class OwnShuffle(nn.Module):
    """A shuffle whose sizes torch-pruning does not know, around a convolution of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = torch.cat((x.chunk(2, 1)[0], self.conv(x)[:, :8]), 1)
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def test_what_cannot_be_followed_is_named(data: Data) -> None:
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    module = nn.Sequential(nn.Conv2d(1, 16, 3), OwnShuffle(), OwnShuffle(), *tail)
    text = refused(lambda: removal.remove(Model(module.eval(), 10, SMALL), data, **REMOVE))
    assert "through 2 (OwnShuffle)" in text


def test_layers_that_do_not_fit_any_more_are_named(data: Data) -> None:
    class Fixed(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(2).view(len(x), 16, 6, 6))

    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    module = nn.Sequential(nn.Conv2d(1, 16, 3), Fixed(16, 8, 1), *tail)
    text = refused(lambda: removal.remove(Model(module.eval(), 10, SMALL), data, **REMOVE))
    assert "through 1 (Fixed)" in text


def test_attention_over_keys_of_another_width_is_refused(data: Data) -> None:
    text = refused(lambda: removal.remove(attention(kdim=16), data, **REMOVE))
    assert "kdim or vdim of its own" in text


def test_a_weight_that_a_hook_computes_is_named() -> None:
    """As torch's own hooks of before parametrizations did: the weight is an attribute, set before each call."""
    layer = nn.Linear(64, 10)
    kept = nn.Parameter(layer.weight.detach().clone())
    del layer.weight
    layer.register_parameter("kept", kept)
    layer.register_forward_pre_hook(lambda part, _: setattr(part, "weight", part.kept * 2))
    model = Model(nn.Sequential(nn.Flatten(), layer).eval(), 10, SMALL)
    model.module(model.sample())
    text = refused(lambda: remove(model, NO_DATA, amount=0.5))
    assert text.startswith("the weight of 1 is no Parameter but computed by a hook or by code, so no pruner can")
