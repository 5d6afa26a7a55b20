"""Training as recoveries and pruners share it: gradual pruning reaches its amount, and options do what they say."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import refused
from independent import torch_logits
from omegaconf import OmegaConf
from random_networks import fresh, same, state_of
from test_conf import composed
from torch import Tensor, nn

from pq_sweep.compress import pruners, recovery, training
from pq_sweep.compress.pruners import cubic
from pq_sweep.compress.training import Recipe, augmented
from pq_sweep.core.environment import resolve_device
from pq_sweep.core.weights import prunable_by_name
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.check import problems
from pq_sweep.job.steps import moved
from pq_sweep.types import Data, Model, Preprocess, UserError

DIGITS = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))


@pytest.fixture(scope="module")
def data() -> Data:
    """The digits, of which the first 320 train: five steps an epoch."""
    whole = digits(digits_cnn(weights=None))
    return Data(whole.evaluation, whole.calibration, whole.training().take(320), whole.classes)


def gradual(model: Model, data: Data, **changed: Any) -> dict[str, Any]:
    """Prune with the options of the YAML, some of them changed."""
    options: Any = OmegaConf.to_container(composed("pruner=gradual").pruner)
    torch.manual_seed(0)
    return pruners.gradual(model, data, **{key: options[key] for key in options if key != "_target_"} | changed)


def zeros(model: Model) -> tuple[int, int]:
    weights = list(prunable_by_name(model.module).values())
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


# --- Gradual pruning -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("amount", "optimizer"), [(0.5, "adamw"), (0.8125, "sgd"), (0.999, "adamw")])
def test_amount_is_reached_exactly(amount: float, optimizer: str, data: Data) -> None:
    """SGD's momentum would move zeros, which masks keep."""
    model = digits_cnn()
    keys = [*state_of(model)]
    record = gradual(model, data, amount=amount, epochs=1, optimizer=optimizer)
    gone, count = zeros(model)
    assert gone == round(amount * count)
    assert record["reached"] == {"weights": gone / count}
    assert record["asked"] == {"weights": amount}
    assert [*state_of(model)] == keys
    assert not any(part.training for part in model.module.modules())
    assert not any(torch.signbit(weight[weight == 0]).any() for weight in prunable_by_name(model.module).values())


def test_share_rises_as_in_the_paper(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty steps, of which fifteen prune; the smallest go, and what is gone stays gone."""
    shares, masks = [], list[Tensor]()
    apply = training.apply

    def watched(found: Any) -> None:
        apply(found)
        flat = torch.cat([weight.detach().flatten() for weight, _ in found])
        shares.append(float((flat == 0).float().mean()))
        masks.append(flat == 0)

    monkeypatch.setattr(pruners, "apply", watched)
    gradual(digits_cnn(), data, amount=0.8, epochs=4, lr=1e-4)
    expected = [0.8 * (1 - (1 - min(step / 15, 1)) ** 3) for step in range(1, 21)]
    assert shares == pytest.approx(expected, abs=1e-4)
    assert all((after | ~before).all() for before, after in pairwise(masks))
    assert [cubic(0.8, time) for time in (0, 0.5, 1, 2)] == pytest.approx([0, 0.7, 0.8, 0.8])


def test_many_steps_are_ranked_a_hundred_times(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, ranked = nn.Parameter(torch.randn(1000)), list[int]()
    without = pruners._without_smallest
    monkeypatch.setattr(pruners, "_without_smallest", lambda *given: ranked.append(given[1]) or without(*given))
    step = pruners._Gradually([weight], 0.9)
    for number in range(1, 4001):
        step(number, 4000)
    assert len(ranked) == 100
    assert ranked[-1] == int((weight == 0).sum()) == 900


def test_the_smallest_of_all_go_without_training(data: Data) -> None:
    first, second = fresh(), fresh()
    gradual(first, data, amount=0.5, epochs=1, lr=0.0, weight_decay=0.0)
    pruners.l1_global(second, data, amount=0.5)
    for one, other in zip(*(prunable_by_name(model.module).values() for model in (first, second)), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_pruned_is_the_control(data: Data) -> None:
    """It trains as fine-tuning does, and then measures BatchNorm's statistics anew."""
    first, second = digits_cnn(), digits_cnn()
    gradual(first, data, amount=0.0, epochs=1, augment=["shift"])
    torch.manual_seed(0)
    recovery.finetune(second, data, epochs=1, lr=1e-3, augment=["shift"])
    recovery.bn_reestimate(second, data, images=1024, batch_size=64)
    assert same(state_of(first), state_of(second))


def test_training_meanwhile_helps(data: Data) -> None:
    images, labels = data.evaluation.fetch(list(range(500))), data.evaluation.labels.numpy()

    def top1(model: Model) -> float:
        return float((torch_logits(model.module, images).argmax(1) == labels).mean())

    trained, once = digits_cnn(), digits_cnn()
    gradual(trained, data, amount=0.97, epochs=4, lr=0.01)
    pruners.l1_global(once, data, amount=0.97)
    recovery.bn_reestimate(once, data, images=1024, batch_size=64)
    assert top1(trained) > top1(once) + 0.2


def test_networks_without_batchnorm(data: Data) -> None:
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), 10, DIGITS)
    gradual(model, data, amount=0.5, epochs=1)
    assert zeros(model) == (320, 640)


def test_images_are_needed(data: Data) -> None:
    alone = Data(data.evaluation, data.calibration, None, data.classes)
    assert "no training images" in refused(lambda: gradual(digits_cnn(), alone))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("pruner.amount=1",), "pruner.amount=1 is out of range"),
        (("pruner.epochs=0",), "pruner.epochs=0 is out of range"),
        (("pruner.optimizer=lion",), "pruner.optimizer=lion is not known; valid are: adamw, adam, sgd"),
        (("pruner.augment=[mixup]",), "pruner.augment=mixup is not known; valid are: flip, shift"),
        (("pruner.weight_decay=-1",), "pruner.weight_decay=-1 is out of range"),
        (("order=quantize_first", "quantizer=int8"), "order=quantize_first cannot train, as this pruner does"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(overrides: tuple[str, ...], says: str) -> None:
    found = problems(composed("pruner=gradual", *overrides))
    assert [text for text in found if says in text]
    assert all(text.endswith(".") and "\n" not in text for text in found)


def test_divergence_names_the_learning_rate_of_the_pruner(data: Data) -> None:
    text = refused(lambda: gradual(digits_cnn(), data, amount=0.5, lr=1e30, optimizer="sgd"))
    assert "lower pruner.lr=1e+30" in text


# --- What all trainings share ----------------------------------------------------------------------------------------


def recipe(**changed: Any) -> Recipe:
    options = {"epochs": 1, "lr": 0.1, "batch_size": 4, "optimizer": "adamw", "weight_decay": 0.5, "augment": []}
    return Recipe(of="recovery=finetune", instead="recovery=none", **(options | changed))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_optimizers(name: str, kind: type) -> None:
    made = recipe(optimizer=name).optimizing([nn.Parameter(torch.zeros(1))])
    assert type(made) is kind
    assert made.defaults["lr"] == 0.1
    assert made.defaults["weight_decay"] == 0.5
    assert made.defaults.get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("wrong", [{"optimizer": "lion"}, {"augment": ["flip", "mixup"]}])
def test_unknown_names_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"recovery\.(optimizer|augment)=\w+ is not known; valid are: .*\.$"):
        recipe(**wrong)


def test_fine_tuning_takes_them(data: Data) -> None:
    states = []
    for options in ({}, {"optimizer": "sgd"}, {"weight_decay": 0.5}, {"augment": ["flip"]}):
        model = digits_cnn()
        torch.manual_seed(0)
        recovery.finetune(model, data, epochs=1, lr=0.01, **options)  # type: ignore[arg-type]
        states.append(state_of(model))
    assert not any(same(states[0], other) for other in states[1:])


def test_images_are_left_alone_by_default() -> None:
    images = torch.randn(3, 1, 4, 4)
    assert augmented(images, []) is images


def test_flipping_turns_half_of_the_images() -> None:
    torch.manual_seed(0)
    images = torch.randn(2000, 1, 2, 3)
    found = augmented(images, ["flip"])
    turned, kept = (torch.tensor([torch.equal(*pair) for pair in zip(found, each, strict=True)])
                    for each in (images.flip(-1), images))  # fmt: skip
    assert (turned ^ kept).all()
    assert turned.float().mean() == pytest.approx(0.5, abs=0.04)


def test_shifting_moves_whole_images_in_all_directions() -> None:
    """An image of 16 pixels moves by 2 at most, and what comes in is zero."""
    torch.manual_seed(0)
    images = torch.randn(3000, 2, 16, 8)
    found, seen = augmented(images, ["shift"]), set[tuple[int, int]]()
    wide = nn.functional.pad(images, (1, 1, 2, 2))
    options = [(down, right) for down in range(5) for right in range(3)]
    moved = torch.stack([wide[:, :, down : down + 16, right : right + 8] for down, right in options])
    alike = (moved == found).flatten(2).all(2)  # (options, images)
    assert (alike.sum(0) == 1).all()
    seen = {options[place] for place in alike.float().argmax(0).tolist()}
    assert seen == set(options)
    assert alike.float().mean(1).max() < 0.1


def test_one_image_is_enough_to_refuse_a_batch_that_is_too_small(data: Data) -> None:
    first = Data(data.evaluation, data.calibration, data.training().take(1), data.classes)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
    text = refused(lambda: gradual(Model(network.eval(), 10, DIGITS), first, epochs=1))
    assert "pruner=gradual gives the BatchNorm 2 one value per channel" in text
    assert "pruner.batch_size=2 or more" in text


# --- Where it trains -------------------------------------------------------------------------------------------------


def test_a_network_is_back_where_it_was_whatever_happens() -> None:
    """Parameters on meta have no values, so that moving back shows by an error of torch's."""
    model = Model(nn.Linear(2, 2), 2)
    with pytest.raises(NotImplementedError, match="meta"), moved(model, "meta"):
        assert model.module.weight.device.type == "meta"  # type: ignore[union-attr]
    with pytest.raises(KeyError), moved(model := Model(nn.Linear(2, 2), 2), "cpu"):
        raise KeyError
    assert next(model.module.parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    ("where", "says"), [("gpu", "valid are: null, cpu, cuda"), ("auto", "valid are: null"), ("[cpu,cuda]", "is a list")]
)
def test_a_device_to_train_on_is_checked(where: str, says: str) -> None:
    assert says in " ".join(problems(composed(f"train_device={where}")))


def test_devices_to_train_on_are_taken() -> None:
    assert problems(composed("train_device=cuda:1", "device=cpu", "recovery=finetune")) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to train on")
def test_a_device_that_is_not_there_is_named() -> None:
    assert "train_device=cuda was asked for" in refused(lambda: resolve_device("cuda", "train_device"))
