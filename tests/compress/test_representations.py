"""Representations: CKA by hand and its invariances, what a probe looks at, and that it changes nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from random_networks import attention, same, state_of, two_convs
from torch import Tensor, nn

from pq_sweep.compress import pruners, recovery, removal, representations
from pq_sweep.compress.lsq import lsq
from pq_sweep.compress.representations import Probe, cka, images_to_probe
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Data, Model, Preprocess, Record, Split

SMALL = Preprocess(size=8, resize=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def column(*values: float) -> Tensor:
    return torch.tensor(values).unsqueeze(1)


def network(*parts: nn.Module) -> Model:
    return Model(nn.Sequential(*parts).eval(), 5, SMALL)


SCHOOL: dict[str, Any] = {"epochs": 2, "lr": 1e-2, "batch_size": 16}


def row_of(probe: Probe, layer: str) -> Record:
    (row,) = (row for row in probe.rows if row["layer"] == layer)
    return row


# --- CKA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (column(1, 0, -1), column(1, -2, 1), 0.0),
        (column(1, 0, -1), column(1, -1, 0), 0.25),
        (column(1, 0, -1), torch.tensor([[3.0, 1.0], [0.0, -2.0], [-3.0, 1.0]]), 3 / np.sqrt(10)),
        (column(1, 2), numbers(2, 5), 1.0),
    ],
    ids=["orthogonal", "at an angle", "one of two directions", "two images alone"],
)
def test_small_cases_are_exact(first: Tensor, second: Tensor, expected: float) -> None:
    assert cka(first, second) == pytest.approx(expected, abs=1e-12)
    assert cka(second, first) == pytest.approx(expected, abs=1e-12)


def test_it_is_that_of_centred_gram_matrices() -> None:
    first, second = numbers(9, 20), numbers(9, 4, seed=1) + 3
    centring = np.eye(9) - 1 / 9
    grams = [centring @ (x @ x.T) @ centring for x in (first.double().numpy(), second.double().numpy())]
    expected = np.trace(grams[0] @ grams[1]) / np.sqrt(np.trace(grams[0] @ grams[0]) * np.trace(grams[1] @ grams[1]))
    assert cka(first, second) == pytest.approx(expected, rel=1e-10)
    assert 0.1 < expected < 0.9


def test_a_rotated_scaled_and_shifted_copy_is_the_same() -> None:
    outputs = numbers(16, 7).double()
    rotation = torch.linalg.qr(numbers(7, 7, seed=2).double()).Q
    assert cka(outputs, 1e-3 * outputs @ rotation + 5) == pytest.approx(1, abs=1e-12)
    stretched = outputs @ torch.diag(torch.tensor([9.0, 1, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert cka(outputs, stretched) < 0.9  # type: ignore[operator]


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6])
def test_outputs_that_are_the_same_for_all_images_have_none(value: float) -> None:
    constant = torch.full((6, 3), value)
    almost = constant * (1 + 1e-8 * numbers(6, 3, seed=3).double())
    assert cka(constant, numbers(6, 4)) is cka(numbers(6, 4), constant) is cka(constant, constant) is None
    assert cka(almost, numbers(6, 4)) is None
    assert cka(numbers(6, 4) * 1e-3 + 1, numbers(6, 4)) == pytest.approx(1, abs=1e-4)


# --- which layers -----------------------------------------------------------------------------------------------------


def test_layers_from_the_first_to_the_last_before_the_classifier_are_chosen() -> None:
    model = digits_cnn()
    probe = Probe(model, model.sample(4))
    assert list(probe.most) == ["stem.0.0", "stem.1.0", "residual.conv1", "body.0", "fc1"]


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (2, [0]), (3, [0, 1]), (7, [0, 1, 2, 4, 5])])
def test_of_few_layers_all_but_the_classifier_are_chosen(count: int, chosen: list[int]) -> None:
    model = Model(nn.Sequential(*(nn.Linear(8, 8) for _ in range(count))).eval(), 8, SMALL)
    assert list(Probe(model, numbers(3, 8)).most) == [str(place) for place in chosen]


def test_layers_are_taken_in_the_order_in_which_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.third, self.second, self.first = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.third(self.second(self.first(x))))

    assert list(Probe(Model(Backwards(), 8, SMALL), numbers(3, 8)).most) == ["first", "second", "third"]


def test_layers_and_blocks_may_be_named() -> None:
    model = digits_cnn()
    probe = Probe(model, model.sample(4), ["residual", "fc2", "residual"])
    assert list(probe.most) == ["residual", "fc2"]


def test_a_layer_that_is_not_there_is_refused_with_those_that_are() -> None:
    model = digits_cnn()
    sentence = refused(lambda: Probe(model, model.sample(4), ["fc1", "fc3", "layer9"]))
    assert sentence.startswith("recovery.probe_layers names fc3, layer9, of which this network gives no tensor")
    assert "valid are: stem.0.0, stem.1.0, residual.conv1, residual.conv2, body.0, fc1, fc2, and" in sentence


def test_what_gives_no_tensor_for_each_image_is_refused() -> None:
    class TokensFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.turn, self.head = nn.Linear(8, 6), nn.Identity(), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.turn(self.embed(x).transpose(0, 1))  # (tokens, images, 6)
            return self.head(tokens.mean(0))

    model = Model(TokensFirst(), 5, SMALL)
    assert "names turn" in refused(lambda: Probe(model, numbers(4, 6, 8), ["turn"]))
    assert list(Probe(model, numbers(4, 6, 8)).most) == ["embed"]
    found = attention()
    assert "names attention" in refused(lambda: Probe(found, found.sample(4), ["attention"]))  # it gives a pair


def test_a_network_without_such_layers_is_refused() -> None:
    model = Model(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(8)).eval(), 8, SMALL)
    assert "finds no convolution or linear layer" in refused(lambda: Probe(model, numbers(4, 8)))


# --- what it says of them ---------------------------------------------------------------------------------------------


def scale(layer: nn.Module, factor: float) -> None:
    for parameter in layer.parameters():
        parameter.data *= factor


def test_a_layer_that_gives_a_tenth_more_has_twenty_decibel() -> None:
    model = two_convs()
    probe = Probe(model, model.sample(40), ["0", "2", "6"])
    scale(model.module[2], 1.1)  # type: ignore[index]
    probe.look(3)
    assert [row["epoch"] for row in probe.rows] == [3, 3, 3]
    assert (row_of(probe, "0")["snr_db"], row_of(probe, "0")["cka"]) == (200.0, pytest.approx(1))
    assert row_of(probe, "2")["snr_db"] == pytest.approx(20, abs=1e-3)
    assert row_of(probe, "2")["cka"] == pytest.approx(1)
    assert row_of(probe, "6")["snr_db"] > 0
    assert [row["note"] for row in probe.rows] == [""] * 3
    assert [row["images"] for row in probe.rows] == [40] * 3


def test_it_agrees_with_whole_outputs_that_are_computed_apart() -> None:
    model, images = two_convs(), numbers(40, 3, 8, 8)
    conv: nn.Module = model.module[2]  # type: ignore[index]
    with torch.no_grad():
        inputs = torch.relu(model.module[0](images))  # type: ignore[index]
        before = conv(inputs)
        probe = Probe(model, images, ["2"])
        conv.weight[0] = 0  # type: ignore[index,operator]
        now = conv(inputs)
    probe.look(0)
    (row,) = probe.rows
    noise = (now - before).square().sum()
    assert row["snr_db"] == pytest.approx(float(10 * torch.log10(before.square().sum() / noise)), abs=1e-4)
    assert row["cka"] == pytest.approx(cka(before.flatten(1), now.flatten(1)), abs=1e-6)
    assert (row["positions"], row["all_positions"]) == (64, 64)


def test_a_call_that_is_not_the_networks_own_is_looked_at() -> None:
    """Such as one with rounded weights, of which the network has those that are trained."""
    model = two_convs()
    probe = Probe(model, model.sample(8), ["2"])
    weights = {name: value * 1.1 for name, value in model.module.state_dict().items() if name.startswith("2.")}
    probe.look(0, lambda images: torch.func.functional_call(model.module, weights, (images,)))
    probe.look(1)
    assert [row["snr_db"] for row in probe.rows] == [pytest.approx(20, abs=1e-3), 200.0]


def test_outputs_are_taken_before_what_follows_changes_them_in_place() -> None:
    model = network(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 5))
    images = numbers(6, 3, 8, 8)
    original = Probe(model, images, ["0"]).original["0"]
    expected = model.module[0](images).flatten(2).transpose(1, 2).flatten(1)  # type: ignore[index]
    torch.testing.assert_close(original.values, expected.detach())
    assert original.values.min() < 0


def test_a_layer_that_runs_twice_counts_with_both_outputs() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(self.layer(x)))

    probe = Probe(Model(Twice(), 5, SMALL), numbers(4, 8), ["layer"])
    assert probe.original["layer"].values.shape == (4, 16)
    assert probe.original["layer"].shapes == [(8,), (8,)]


def test_windows_beside_images_are_further_positions() -> None:
    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(8, 6), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            windows = self.layer(x.flatten(0, 1))  # (images * windows, tokens, 6)
            return self.head(windows.unflatten(0, (len(x), -1)).mean((1, 2)))

    images = numbers(4, 3, 7, 8)
    probe = Probe(Model(Windows(), 5, SMALL), images, ["layer"])
    found = probe.original["layer"]
    assert (found.shapes, found.positions) == ([(3, 7, 6)], 21)
    layer = probe.model.module.layer
    torch.testing.assert_close(found.values, layer(images).detach().flatten(1))  # type: ignore[operator]


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representations, "VALUES_OF_IMAGE", 60)


@pytest.mark.usefixtures("little_memory")
def test_of_large_outputs_some_positions_are_kept_with_all_channels() -> None:
    model, images = two_convs(), numbers(40, 3, 8, 8)
    probe = Probe(model, images, ["0", "2"])
    scale(model.module[0], 1.1)  # type: ignore[index]
    probe.look(0)
    assert [(row["positions"], row["all_positions"]) for row in probe.rows] == [(10, 64), (15, 64)]
    assert row_of(probe, "0")["snr_db"] == pytest.approx(20, abs=1e-3)
    again = Probe(two_convs(), images, ["0", "2"])
    assert torch.equal(again.original["2"].values, probe.original["2"].values)


def test_memory_is_shared_by_images_and_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(representations, "VALUES", 4000)
    model = two_convs()
    probe = Probe(model, model.sample(20), ["0", "2"])
    assert sum(each.values.numel() for each in probe.original.values()) <= 4000
    assert probe.most == {"0": 100 // 6, "2": 100 // 4}


@pytest.mark.slow
@pytest.mark.usefixtures("little_memory")
def test_without_channels_snr_is_not_defined_and_cka_is() -> None:
    model = digits_cnn()
    data = digits(model)
    probe = Probe(model, images_to_probe(data, 32))
    removal.remove(model, data, amount=0.5, importance="magnitude", p=2, round_to=1, global_ranking=False)
    probe.look(0)
    assert [row["snr_db"] for row in probe.rows] == [None] * 5
    assert all(0.5 < row["cka"] < 1 for row in probe.rows)
    assert row_of(probe, "fc1")["note"] == "no SNR, as outputs are 32 and were 64"
    assert row_of(probe, "body.0")["note"] == "no SNR, as outputs are 32x4x4 and were 64x4x4"


def silence(layer: nn.Module) -> None:
    layer.weight.data.zero_()  # type: ignore[union-attr,operator]


def break_it(layer: nn.Module) -> None:
    layer.weight.data[0] = torch.nan  # type: ignore[union-attr,operator,index]


@pytest.mark.parametrize(
    ("change", "snr", "note"),
    [
        (silence, True, "no CKA, as these outputs are the same for all images"),
        (break_it, False, "outputs are not finite"),
    ],
)
def test_what_is_not_defined_is_empty_and_told(change: Callable[[nn.Module], None], snr: bool, note: str) -> None:
    model = two_convs()
    probe = Probe(model, model.sample(8), ["2"])
    change(model.module[2])  # type: ignore[index]
    probe.look(0)
    (row,) = probe.rows
    assert row["cka"] is None
    assert (row["snr_db"] is not None) == snr
    assert row["note"] == note


def test_a_layer_that_does_not_run_any_more_is_told() -> None:
    model = network(nn.Conv2d(3, 4, 3), nn.Identity(), nn.Flatten(), nn.Linear(144, 5))
    probe = Probe(model, numbers(6, 3, 8, 8), ["0", "1"])
    del model.module._modules["1"]
    probe.look(0)
    assert row_of(probe, "0")["snr_db"] == 200.0
    assert [row_of(probe, "1")[key] for key in ("snr_db", "cka")] == [None, None]
    assert row_of(probe, "1")["note"] == "the layer does not run any more"


# --- which images -----------------------------------------------------------------------------------------------------


def data_of(calibration: int, train: int | None) -> Data:
    def split(count: int, seed: int) -> Split:
        return Split.of_tensors(numbers(count, 3, 8, 8, seed=seed), torch.arange(count) % 5)

    return Data(split(9, 1), split(calibration, 2), None if train is None else split(train, 3), tuple("abcde"))


@pytest.mark.parametrize(
    ("calibration", "train", "count", "seed"), [(40, 20, 33, 2), (40, None, 100, 2), (0, 40, 33, 3)]
)
def test_calibration_images_are_taken_or_else_training_images(
    calibration: int, train: int | None, count: int, seed: int
) -> None:
    found = images_to_probe(data_of(calibration, train), count)
    assert torch.equal(found, numbers(40, 3, 8, 8, seed=seed)[:count])


@pytest.mark.parametrize(("calibration", "train"), [(0, None), (0, 1), (1, 20)])
def test_too_few_images_are_refused(calibration: int, train: int | None) -> None:
    assert "recovery.probe=true needs two" in refused(lambda: images_to_probe(data_of(calibration, train), 64))


# --- that it changes nothing ------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A network that trains with dropout, of which a part stays in eval mode, as frozen parts do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5)
        self.frozen, self.head = nn.BatchNorm2d(6).eval(), nn.Linear(216, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.relu(self.frozen(self.norm(self.conv(x))))).flatten(1))


def noisy_data() -> Data:
    """Return images that are turned at random each time they are fetched, by three generators."""
    images = numbers(48, 3, 8, 8, seed=4)

    def fetch(indices: list[int]) -> Tensor:
        shift = random.random() + np.random.random() + float(torch.rand(()))
        return images[indices] + shift

    split = Split(torch.arange(48) % 5, fetch)
    return Data(split, split.take(16), split, tuple("abcde"))


def generators() -> list[Any]:
    return [random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()]


def test_a_look_leaves_modes_statistics_hooks_and_generators_alone() -> None:
    model = Model(Noisy(), 5, SMALL)
    model.module.train()
    model.module.frozen.eval()  # type: ignore[union-attr,operator]
    before, state, drawn = [part.training for part in model.module.modules()], state_of(model), generators()
    probe = Probe(model, images_to_probe(noisy_data(), 16))
    probe.look(0)
    probe.look(1)
    assert [part.training for part in model.module.modules()] == before == [True, True, True, True, False, True]
    assert same(state, state_of(model))
    assert generators() == drawn
    assert not any(part._forward_hooks for part in model.module.modules())
    assert [row["snr_db"] for row in probe.rows] == [200.0] * len(probe.rows)


@pytest.mark.parametrize(
    "recover",
    [
        partial(recovery.finetune, epochs=3, lr=1e-2, batch_size=16),
        partial(recovery.bn_reestimate, images=48, batch_size=16),
        partial(lsq, bits=3, per_channel=True, activations=4, lr_scale=1e-3, **SCHOOL),
        partial(pruners.gradual, amount=0.5, **SCHOOL),
    ],
    ids=["finetune", "bn_reestimate", "lsq", "gradual"],
)
def test_the_network_is_the_same_bit_for_bit_as_without_a_probe(recover: Callable[..., Any]) -> None:
    trained = []
    for probed in (True, False):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        model, data = Model(Noisy().eval(), 5, SMALL), noisy_data()
        pruners.l1_global(model, data, amount=0.5, every_weight=False)
        looks = {"observe": Probe(model, images_to_probe(data, 16)).look} if probed else {}
        recover(model, data, **looks)
        trained.append((state_of(model), generators()))
    assert same(trained[0][0], trained[1][0])
    assert trained[0][1] == trained[1][1]
    assert not same(trained[0][0], state_of(Model(Noisy(), 5, SMALL)))


# --- when it looks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recover", "epochs"),
    [
        (recovery.none, [0]),
        (partial(recovery.bn_reestimate, images=32, batch_size=16), [0, 1]),
        (partial(recovery.finetune, epochs=3, lr=1e-2), [0, 1, 2, 3]),
        (partial(lsq, bits=3, per_channel=True, activations=None, lr_scale=1e-3, **SCHOOL), [0, 1, 2, 3]),
        (partial(pruners.gradual, amount=0.5, **SCHOOL), [0, 1, 2, 3]),
    ],
    ids=["none", "bn_reestimate", "finetune", "lsq", "gradual"],
)
def test_a_recovery_is_observed_after_compression_and_each_epoch(
    recover: Callable[..., Any], epochs: list[int]
) -> None:
    model, data = Model(Noisy().eval(), 5, SMALL), noisy_data()
    seen: list[int] = []
    states = []

    def observe(epoch: int, call: Any = None) -> None:
        seen.append(epoch)
        states.append(state_of(model))

    before = state_of(model)
    recover(model, data, observe=observe)
    assert seen == epochs
    assert same(states[0], before)
    assert same(states[-1], state_of(model))


@pytest.mark.parametrize("activations", [None, 8])
def test_training_with_rounding_is_looked_at_with_rounding(activations: int | None) -> None:
    """Though the network itself has the weights that are trained until it is done."""
    model, data = Model(Noisy().eval(), 5, SMALL), noisy_data()
    probe = Probe(model, images_to_probe(data, 16), ["conv"])
    lsq(
        model, data, bits=2, per_channel=False, activations=activations, lr_scale=0.0, observe=probe.look,
        epochs=1, lr=1e-9, batch_size=16,
    )  # fmt: skip
    first, second, last = (row["snr_db"] for row in probe.rows)
    assert 3 < first < 12
    assert second == pytest.approx(first, abs=1e-3)
    assert last == pytest.approx(first, abs=1e-3)


def test_a_network_is_trained_towards_its_original() -> None:
    """As appendix H of the paper finds: what was pruned comes back."""
    torch.manual_seed(0)
    model = digits_cnn()
    data = digits(model)
    probe = Probe(model, images_to_probe(data, 64), ["fc1"])
    pruners.l1_global(model, data, amount=0.8, every_weight=False)
    recovery.finetune(model, data, epochs=1, lr=1e-3, observe=probe.look)
    first, last = probe.rows
    assert last["snr_db"] > first["snr_db"] + 1
    assert last["cka"] > first["cka"]
