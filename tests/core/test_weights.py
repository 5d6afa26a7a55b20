"""Which weights are pruned and counted, and what is said of networks that have few or none of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from torch import Tensor, nn

from pq_sweep.compress import pruners
from pq_sweep.core.weights import load_state, network_structure, prunable, prunable_by_name, untouched
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.measure import network
from pq_sweep.measure.layers import dense_layers
from pq_sweep.measure.sizes import storage_sizes
from pq_sweep.types import Data, Model, Preprocess, Split

SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
EMPTY = Split.of_tensors(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))
NO_DATA = Data(EMPTY, EMPTY, None, ())


class Recurrent(nn.Module):
    """Rows of an image through a recurrent layer."""

    def __init__(self, rows: nn.Module, width: int) -> None:
        super().__init__()
        self.rows, self.head = rows, nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rows(x[:, 0])[0].mean(1))


class Tables(nn.Module):
    """A table of embeddings for the brightness of pixels, and templates that are Parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.templates = nn.Embedding(100, 10), nn.Parameter(torch.randn(640, 10))
        self.head = nn.Linear(10, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table((x.flatten(1).sigmoid() * 99).long())
        return self.head(found.mean(1)) + found.flatten(1) @ self.templates


class Scaled(nn.Module):
    """A network without a layer: one number for each pixel and class."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.scores


def made(module: nn.Module) -> Model:
    return Model(module.eval(), 10, SMALL)


@pytest.mark.parametrize(
    ("module", "share", "kinds"),
    [
        (Recurrent(nn.LSTM(8, 32, batch_first=True), 32), "94%", "LSTM 94%"),
        (Recurrent(nn.GRU(8, 32, batch_first=True), 32), "93%", "GRU 92%"),
        (Tables(), "99%", "own parameters of Tables 85%, Embedding 13%"),
        (Scaled(), "100%", "own parameters of Scaled 100%"),
    ],
    ids=["LSTM", "GRU", "tables", "no layer"],
)
def test_networks_that_pruners_hardly_touch_say_so(module: nn.Module, share: str, kinds: str) -> None:
    (text,) = untouched(module)
    told = f"{share} of the parameters are of kinds that no pruner sets to zero ({kinds}):"
    assert text == f"{told} amount and sparsity speak of the others."


@pytest.mark.parametrize(
    "module", [digits_cnn(weights=None).module, nn.MultiheadAttention(8, 2), nn.Linear(64, 10), nn.Flatten()]
)
def test_networks_that_pruners_touch_say_nothing(module: nn.Module) -> None:
    assert untouched(module) == []


def test_a_table_that_is_a_layers_weight_is_touched() -> None:
    module = nn.ModuleDict({"table": nn.Embedding(16, 24), "scores": nn.Linear(24, 16)})
    module["scores"].weight = module["table"].weight
    assert untouched(module) == []


def test_pruners_note_it() -> None:
    model = made(Recurrent(nn.LSTM(8, 32, batch_first=True), 32))
    expected = untouched(model.module)
    assert expected
    for name, options in {"l1": {"amount": 0.5}, "l1_global": {"amount": 0.5}, "nm_sparsity": {"n": 2, "m": 4}}.items():
        assert getattr(pruners, name)(model, NO_DATA, **options)["notes"] == expected


# --- networks without prunable weights -------------------------------------------------------------------------------

PRUNERS: dict[str, dict[str, Any]] = {
    "random": {"amount": 0.5},
    "l1": {"amount": 0.5},
    "l1_global": {"amount": 0.5},
    "ln_structured": {"amount": 0.5, "n": 1, "dim": 0},
    "random_structured": {"amount": 0.5, "dim": 0},
    "nm_sparsity": {"n": 2, "m": 4},
}


def test_a_network_without_prunable_weights_is_measured(tmp_path: Path) -> None:
    model = made(Scaled())
    found = network.count(model)
    assert (found.params, found.nonzero_params, found.weights, found.sparsity) == (640, 640, 0, 0.0)
    assert found.macs == 640
    assert dense_layers(model) == {}
    assert storage_sizes(model, tmp_path)["bitmask"] == 640 * 4


@pytest.mark.parametrize("name", PRUNERS)
def test_a_network_without_prunable_weights_is_refused_by_pruners(name: str) -> None:
    text = refused(lambda: getattr(pruners, name)(made(Scaled()), NO_DATA, **PRUNERS[name]))
    assert text.startswith("the network has no weights that can be set to zero (convolutions,")


def test_weights_are_named_by_their_first_name() -> None:
    module = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    module["second"].weight = module["first"].weight
    assert list(prunable_by_name(module)) == ["first.weight"]
    assert prunable(module) == [(module["first"], "weight")]


# --- what was asked and what was reached -----------------------------------------------------------------------------


def test_slices_that_round_far_are_noted() -> None:
    """Of five neurons, a tenth is half of one, which Python rounds to none."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Linear(5, 5))
    record = pruners.ln_structured(made(module), NO_DATA, amount=0.3, n=1, dim=0)
    assert record == {
        "asked": {"slices": 0.3},
        "reached": {"slices": 0.4, "weights": pytest.approx(0.4)},
        "notes": ["pruner.amount=0.3 asked for 30.000% of the slices, and 40.000% went (taken in whole numbers)."],
    }


@pytest.mark.parametrize(
    ("name", "options"), [("l1_global", {}), ("ln_structured", {"n": 1, "dim": 0}), ("random_structured", {"dim": 1})]
)
def test_layers_that_lose_all_weights_are_named(name: str, options: dict[str, Any]) -> None:
    """Nine tenths of four neurons round to four, and a global ranking may find all that is small in one layer."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 4), nn.Linear(4, 64))
    with torch.no_grad():
        module[2].weight.mul_(1e-6)
    record = getattr(pruners, name)(made(module), NO_DATA, amount=0.9 if options else 0.1, **options)
    (note,) = [note for note in record["notes"] if note.endswith(" are zero, so that nothing passes there.")]
    assert " 2" in note


@pytest.mark.parametrize("name", ["random", "l1", "l1_global"])
def test_weights_reach_the_amount_without_a_note(name: str) -> None:
    record = getattr(pruners, name)(digits_cnn(), NO_DATA, amount=0.25)
    assert record["asked"] == {"weights": 0.25}
    assert record["reached"]["weights"] == pytest.approx(0.25, abs=1e-4)
    assert record["notes"] == []


# --- states ----------------------------------------------------------------------------------------------------------


def dotted() -> nn.Module:
    module = nn.Sequential()
    setattr(module, "a.b", nn.Linear(4, 4))
    return module


def test_a_state_of_layers_with_dots_in_their_names_is_loaded() -> None:
    first, second = dotted(), dotted()
    load_state(second, first.state_dict())
    assert torch.equal(second.state_dict()["a.b.weight"], first.state_dict()["a.b.weight"])


@pytest.mark.parametrize(
    "state", [{}, {"a.b.weight": torch.zeros(4, 4)}, {**dotted().state_dict(), "c": torch.zeros(1)}]
)
def test_a_state_of_another_network_is_not_loaded(state: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="the state is of another network"):
        load_state(dotted(), state)


class Signed(nn.Module):
    """A layer whose answers depend on attributes of several kinds, none of which its repr shows."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        vars(self).update({"signs": [-1.0], "options": {"a": [1]}, "act": torch.relu, "array": np.ones(3)} | attributes)


@pytest.mark.parametrize(
    "attributes",
    [
        {"signs": [1.0]},
        {"signs": ([-1.0], 2)},
        {"options": {"a": [2]}},
        {"act": torch.tanh},
        {"act": partial(nn.functional.leaky_relu, negative_slope=0.1)},
        {"array": np.zeros(3)},
    ],
)
def test_attributes_of_any_kind_tell_networks_apart(attributes: dict[str, Any]) -> None:
    one, same, other = (Model(Signed(**given), 2, SMALL) for given in ({}, {}, attributes))
    assert network_structure(one) == network_structure(same) != network_structure(other)
