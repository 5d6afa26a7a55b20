"""pruner=obs: what goes is what a recomputation by hand would drop, and what stays fits the layer's output best."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from independent import snr_db, torch_logits
from numpy.typing import NDArray
from random_networks import attention, fresh, state_of
from torch import nn

from pq_sweep.compress import obs, pruners
from pq_sweep.compress.moments import layer_moments
from pq_sweep.compress.obs import greedy, least_squares, thinned
from pq_sweep.compress.rounding import error
from pq_sweep.core.weights import prunable
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.check import problems
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

Array = NDArray[np.float64]


def layer(seed: int, inputs: int, rows: int, alike: float = 0.3) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    given = random.standard_normal((4 * inputs, inputs)) @ (
        np.eye(inputs) + alike * random.standard_normal((inputs, inputs))
    )
    return random.standard_normal((rows, inputs)), given.T @ given


def cost(row: Array, hessian: Array, kept: NDArray[np.bool_]) -> float:
    """Fit the kept weights in plain arithmetic, and return the error."""
    fitted = np.zeros(len(row))
    fitted[kept] = np.linalg.lstsq(hessian[np.ix_(kept, kept)], hessian[kept] @ row, rcond=None)[0]
    return float((fitted - row) @ hessian @ (fitted - row))


def test_each_step_drops_what_costs_least() -> None:
    rows, hessian = layer(0, 7, 3)
    places, costs = greedy(rows, hessian)
    for row, order, steps in zip(rows, places, costs, strict=True):
        kept, before = np.ones(7, bool), 0.0
        for place, step in zip(order, steps, strict=True):
            tried = {j: cost(row, hessian, kept & (np.arange(7) != j)) for j in np.flatnonzero(kept)}
            assert place == min(tried, key=tried.__getitem__)
            assert step == pytest.approx(tried[place] - before, rel=1e-6, abs=1e-9)
            kept[place], before = False, tried[place]


def test_each_row_may_have_moments_of_its_own() -> None:
    rows, hessian = layer(0, 5, 4)
    each = np.stack([hessian * (number + 1) + np.diag(np.arange(5.0)) for number in range(4)])
    places, costs = greedy(rows, each)
    for number in range(4):
        alone = greedy(rows[number : number + 1], each[number])
        assert (places[number] == alone[0][0]).all()
        assert costs[number] == pytest.approx(alone[1][0])


@pytest.mark.parametrize("limit", [obs.GREEDY, 0.0], ids=["one by one", "in rounds"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.93, 1.0])
def test_as_many_go_as_were_asked_for_and_the_others_fit_best(
    limit: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "GREEDY", limit)
    rows, hessian = layer(1, 40, 12)
    drop = round(share * rows.size)
    (found,) = thinned([rows], [hessian], drop)
    slope = np.where(found != 0, (rows - found) @ hessian, 0)

    assert (found == 0).sum() == drop
    assert np.abs(slope).max() < 2e-3 * np.abs(rows @ hessian).max()


def test_rounds_come_close_to_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, hessian = layer(2, 60, 20, alike=0.1)
    (one_by_one,) = thinned([rows], [hessian], 840)
    monkeypatch.setattr(obs, "GREEDY", 0.0)
    (in_rounds,) = thinned([rows], [hessian], 840)
    size = np.abs(rows) >= np.sort(np.abs(rows).ravel())[840]
    magnitude = least_squares(rows, hessian, size)
    errors = [error(rows - found, hessian).sum() for found in (one_by_one, in_rounds, magnitude)]

    assert errors[1] < 1.15 * errors[0]
    assert max(errors[:2]) < 0.8 * errors[2]


def test_groups_lose_together_what_is_cheapest() -> None:
    rows, hessian = layer(3, 9, 16)
    parts = [rows[number : number + 1] for number in range(16)]
    found = thinned(parts, [hessian * (100 if number < 8 else 1) for number in range(16)], 72)
    zeros = [int((part == 0).sum()) for part in found]

    assert sum(zeros) == 72
    assert sum(zeros[:8]) < sum(zeros[8:])


# The pruner


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None), calibration=32)


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_the_amount_is_reached_in_each_layer(amount: float, data: Data) -> None:
    model = digits_cnn()
    before = state_of(model)
    record = pruners.obs(model, data, amount=amount, images=32)
    after = state_of(model)
    weights = {
        f"{name}.weight" for name, part in model.module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)
    }

    assert {key: int((after[key] == 0).sum()) for key in weights} == {
        key: round(amount * after[key].numel()) for key in weights}  # fmt: skip
    assert {key for key in before if not torch.equal(before[key], after[key])} == weights
    assert record["reached"]["weights"] == pytest.approx(amount, abs=0.002)
    assert not record["notes"]


def test_the_classifier_may_lose_another_share(data: Data) -> None:
    model = digits_cnn()
    pruners.obs(model, data, amount=0.5, amount_last=0.0, images=32)
    last = model.module.get_parameter("fc2.weight")

    assert (last != 0).all()
    assert torch.equal(last, digits_cnn().module.get_parameter("fc2.weight"))


def test_nothing_is_calibrated_if_nothing_goes(data: Data) -> None:
    def refuse(indices: list[int]) -> Any:
        raise AssertionError

    model = digits_cnn()
    before = state_of(model)
    pruners.obs(model, replace(data, calibration=replace(data.calibration, fetch=refuse)), amount=0.0, images=8)

    assert all(torch.equal(value, before[key]) for key, value in state_of(model).items())


def test_weights_in_another_layout_end_up_alike(data: Data) -> None:
    plain, other = digits_cnn(), digits_cnn()
    other.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for model in (plain, other):
        pruners.obs(model, data, amount=0.5, images=16)
    images = data.evaluation.fetch(list(range(50)))

    assert snr_db(torch_logits(plain.module, images), torch_logits(other.module, images)) > 30


def test_only_calibration_images_are_looked_at(data: Data) -> None:
    def refuse(indices: list[int]) -> Any:
        raise AssertionError

    hidden = Split(data.evaluation.labels, refuse)
    pruners.obs(digits_cnn(), replace(data, evaluation=hidden, train=None), amount=0.5, images=8)


def test_answers_stay_closer_than_by_magnitude(data: Data) -> None:
    images = data.evaluation.fetch(list(range(200)))
    expected, found = torch_logits(digits_cnn().module, images), {}
    for name, options in {"l1": {}, "obs": {"images": 32}}.items():
        model = digits_cnn()
        getattr(pruners, name)(model, data, amount=0.7, **options)
        found[name] = snr_db(expected, torch_logits(model.module, images))

    assert found["obs"] > found["l1"] + 4


def test_every_kind_of_layer_is_fitted() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(54, 10),
    ).eval()  # fmt: skip
    model = Model(network, 10, Preprocess(12, 12))
    split = Split.of_tensors(torch.randn(24, 3, 12, 12), torch.zeros(24, dtype=torch.int64))
    moments = layer_moments(model, prunable(network), split)
    before = {part: part.weight.detach().clone() for part, _ in moments}
    pruners.obs(model, Data(split, split, None, tuple("0123456789")), amount=0.6, images=24)
    shares = []
    for (part, _), seen in moments.items():
        old, new = (seen.window.rows(weight.detach().double().numpy()) for weight in (before[part], part.weight))
        smallest = np.abs(old) > np.sort(np.abs(old).ravel())[round(0.6 * old.size) - 1]
        errors = [0.0, 0.0]
        for group, inputs, hessian in seen.problems(""):
            for place, other in enumerate((new, np.where(smallest, old, 0))):
                errors[place] += error((other - old)[group][:, inputs], hessian).sum()
        assert (new == 0).sum() == round(0.6 * new.size)
        assert errors[0] < errors[1]
        shares.append(errors[0] / errors[1])
    assert np.mean(shares) < 0.8


def test_weights_whose_inputs_no_one_sees_go_by_magnitude_and_a_note_says_so() -> None:
    model = attention()
    images = Split.of_tensors(model.sample(8), torch.zeros(8, dtype=torch.int64))
    before = model.module.get_parameter("attention.out_proj.weight").detach().clone()
    record = pruners.obs(model, Data(images, images, None, tuple("0123456789")), amount=0.5, images=8)
    after = model.module.get_parameter("attention.out_proj.weight")

    assert record["notes"] == [
        "pruner=obs cannot see the inputs of attention.out_proj.weight, and took the smallest weights there."
    ]
    assert torch.equal(after, torch.where(after == 0, 0, before))
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()


def test_weights_that_are_not_finite_are_refused(data: Data) -> None:
    model = fresh()
    model.module.get_parameter("stem.0.0.weight").data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        pruners.obs(model, data, amount=0.5, images=8)


def test_it_cannot_prune_integers() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["pruner=obs", "quantizer=int8", "order=quantize_first"])
    found = problems(config)

    assert [each.partition(",")[0] for each in found] == ["order=quantize_first cannot fit weights to images"]
