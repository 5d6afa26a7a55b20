"""Zero-fill pruners: what they zero is recomputed here by hand, from the weights before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from random_networks import State, assert_alive, attention, big_digits, fresh, parameters, same, state_of
from torch import Tensor, nn

from pq_sweep import measure, pruners
from pq_sweep.datasets import digits
from pq_sweep.models import digits_cnn
from pq_sweep.types import Data, Model

Prune = Callable[..., Any]

AMOUNTS = [0, 0.0, 0.1, 0.5, 0.9]
ZERO_FILL: dict[str, dict[str, Any]] = {
    "random": {},
    "l1": {},
    "l1_global": {},
    "ln_structured": {"n": 2, "dim": 0},
    "random_structured": {"dim": 0},
}
YAMLS = sorted((ROOT / "conf" / "pruner").glob("*.yaml"))

every_zero_fill = pytest.mark.parametrize("name", ZERO_FILL)
every_amount = pytest.mark.parametrize("amount", AMOUNTS, ids=repr)


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None), calibration=8)


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


# --- every pruner on some networks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big() -> Data:
    return big_digits()


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
