"""Recovery: BatchNorm statistics are recomputed by hand, and accuracy comes back where it should and only there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from torch import Tensor, nn
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

from pq_sweep.compress import pruners, recovery, removal
from pq_sweep.inputs.datasets import digits, image_folder
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

State = dict[str, Tensor]
Prune = Callable[[Model, Data], Any]

PIXEL = Preprocess(size=4, resize=4, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AMOUNTS = [0.1, 0.3, 0.5, 0.7, 0.9]


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None))


def top1(model: Model, data: Data) -> float:
    """Return the share of right answers in percent."""
    with torch.no_grad():
        hits = [(model.module(x).argmax(1) == y).float() for x, y in data.evaluation.batches(100)]
    return float(torch.cat(hits).mean()) * 100


def state_of(model: Model) -> State:
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def normed(*before: nn.Module) -> Model:
    """Return a network whose BatchNorm sees what `before` makes of the image, with statistics far from right."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3, momentum=0.3)
    norm.running_mean.fill_(50)  # type: ignore[union-attr]
    norm.running_var.fill_(9)  # type: ignore[union-attr]
    return Model(nn.Sequential(*before, norm, nn.Flatten(), nn.Linear(48, 2)).eval(), 2, PIXEL)


def norm_of(model: Model) -> nn.BatchNorm2d:
    (norm,) = (part for part in model.module.modules() if isinstance(part, nn.BatchNorm2d))
    return norm


def noise(count: int, seed: int, shift: float = 0.0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 4, 4, generator=generator) * 2 + shift
    return Split.of_tensors(images, torch.arange(count) % 2)


def toy_data(train: Split | None) -> Data:
    return Data(noise(4, seed=1), noise(12, seed=2, shift=7), train, ("a", "b"))


def statistics_by_hand(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Average the means and the unbiased variances of whole batches (N, 3, 4, 4)."""
    flat = [batch.transpose(0, 1).flatten(1) for batch in batches]
    return torch.stack([x.mean(1) for x in flat]).mean(0), torch.stack([x.var(1) for x in flat]).mean(0)


def reestimate(model: Model, data: Data, images: int = 1024, batch_size: int = 64) -> None:
    recovery.bn_reestimate(model, data, images=images, batch_size=batch_size)


def assert_statistics(model: Model, batches: list[Tensor]) -> None:
    mean, variance = statistics_by_hand(batches)
    torch.testing.assert_close(norm_of(model).running_mean, mean)
    torch.testing.assert_close(norm_of(model).running_var, variance)


# --- BatchNorm re-estimation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "batch_size", "used"),
    [(1024, 4, [4, 4, 4]), (8, 4, [4, 4]), (10, 4, [4, 4]), (1024, 64, [14]), (3, 64, [3])],
    ids=["whole batches of all", "first images", "last batch left out", "fewer than a batch", "few images"],
)
def test_statistics_equal_those_computed_by_hand(images: int, batch_size: int, used: list[int]) -> None:
    train = noise(14, seed=5, shift=3)
    model = normed()
    reestimate(model, toy_data(train), images, batch_size)
    assert_statistics(model, list(train.fetch(list(range(sum(used)))).split(used)))


def test_statistics_behind_a_convolution() -> None:
    train, conv = noise(8, seed=5), nn.Conv2d(3, 3, 3, padding=1)
    model = normed(conv)
    reestimate(model, toy_data(train), batch_size=4)
    assert_statistics(model, [conv(images).detach() for images, _ in train.batches(4)])


def test_dropout_is_not_active() -> None:
    train = noise(8, seed=5, shift=3)
    model = normed(nn.Dropout(0.5), nn.Dropout2d(0.5))
    reestimate(model, toy_data(train), batch_size=4)
    assert_statistics(model, [images for images, _ in train.batches(4)])


def test_calibration_images_are_used_without_training_images() -> None:
    data, model = toy_data(None), normed()
    reestimate(model, data, batch_size=6)
    assert_statistics(model, [images for images, _ in data.calibration.batches(6)])


def test_only_statistics_change(data: Data) -> None:
    model = digits_cnn()
    before = state_of(model)
    reestimate(model, data)
    changed = {key for key, value in state_of(model).items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if key.endswith(STATISTICS)}


def test_momentum_and_modes_are_left_as_they_were() -> None:
    model = normed(nn.Dropout(0.5))
    reestimate(model, toy_data(noise(8, seed=5)))
    assert norm_of(model).momentum == 0.3
    assert not any(part.training for part in model.module.modules())


def test_networks_without_batchnorm_are_refused(data: Data) -> None:
    model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), 10)
    with pytest.raises(UserError, match=r"needs BatchNorm layers and this model has none; .*\.$"):
        reestimate(model, data)


def test_first_training_images_of_a_folder_show_every_class(tmp_path: Path) -> None:
    """Half of the training images are all of one class if they are taken in the order of the folders."""
    for part in ("train", "val"):
        for name, value in (("black", 0), ("white", 255)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(8):
                pixels = np.full((4, 4, 3), value, dtype=np.uint8)
                pixels[0, 0] = index + 20 if part == "train" else index + 40
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    model = normed()
    data = image_folder(model, root=str(tmp_path), calibration=2, evaluation=None, seed=0)
    reestimate(model, data, images=8, batch_size=8)
    mean = norm_of(model).running_mean
    assert mean is not None
    assert ((mean > 0.3) & (mean < 0.7)).all()


# --- accuracy on the digits ------------------------------------------------------------------------------------------


def test_none_changes_nothing(data: Data) -> None:
    model = digits_cnn()
    before = state_of(model)
    recovery.none(model, data)
    assert same(before, state_of(model))


def test_half_of_the_smallest_weights_cost_nothing_and_half_at_random_all(data: Data) -> None:
    smallest, at_random = digits_cnn(), digits_cnn()
    baseline = top1(digits_cnn(), data)
    pruners.l1_global(smallest, data, amount=0.5)
    torch.manual_seed(0)
    pruners.random(at_random, data, amount=0.5)
    assert top1(smallest, data) >= baseline - 1
    assert top1(at_random, data) <= baseline - 30


@pytest.mark.parametrize("amount", AMOUNTS)
def test_reestimation_never_costs_accuracy(amount: float, data: Data) -> None:
    model = digits_cnn()
    pruners.l1_global(model, data, amount=amount)
    pruned = top1(model, data)
    reestimate(model, data)
    assert top1(model, data) >= pruned - 1
    if amount == 0.9:
        assert top1(model, data) > pruned + 50


def remove_half(model: Model, data: Data) -> None:
    removal.remove(model, data, amount=0.5, importance="magnitude", p=2, global_ranking=False, round_to=None)


def test_reestimation_helps_after_removal(data: Data) -> None:
    model = digits_cnn()
    remove_half(model, data)
    pruned = top1(model, data)
    reestimate(model, data)
    assert top1(model, data) > pruned + 15


# --- fine-tuning -----------------------------------------------------------------------------------------------------


def finetune(model: Model, data: Data, *, images: int | None = 256, epochs: int = 1, seed: int = 0) -> None:
    """Fine-tune on the first `images` training images only, to be quick; None are all."""
    train = data.training() if images is None else data.training().take(images)
    torch.manual_seed(seed)
    recovery.finetune(model, Data(data.evaluation, data.calibration, train, data.classes), epochs=epochs, lr=0.003)


@pytest.mark.parametrize(
    "prune",
    [
        lambda model, data: pruners.l1_global(model, data, amount=0.7),
        lambda model, data: pruners.ln_structured(model, data, amount=0.5, n=2, dim=0),
        lambda model, data: pruners.l1(model, data, amount=0.5, every_weight=True),
    ],
    ids=["l1_global", "ln_structured", "every_weight"],
)
def test_finetuning_keeps_zeros(prune: Prune, data: Data) -> None:
    model = digits_cnn()
    prune(model, data)
    before = {key: value for key, value in state_of(model).items() if key.endswith("weight")}
    finetune(model, data)
    after = state_of(model)
    grown = {key for key, value in before.items() if after[key][value == 0].any()}
    assert not grown
    assert all(after[key][value != 0].ne(value[value != 0]).any() for key, value in before.items() if value.any())


def test_finetuning_trains_biases_that_are_zero(data: Data) -> None:
    model = digits_cnn()
    bias = model.module.get_submodule("fc2").bias
    assert isinstance(bias, nn.Parameter)
    nn.init.zeros_(bias)
    finetune(model, data)
    assert bias.ne(0).all()


def test_finetuning_ends_in_eval_mode(data: Data) -> None:
    model = digits_cnn()
    finetune(model, data)
    assert not any(part.training for part in model.module.modules())


def test_finetuning_repeats_with_its_seed(data: Data) -> None:
    models = [digits_cnn() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        finetune(model, data, seed=seed)
    first, again, other = map(state_of, models)
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("images", [2, 40, 65])
def test_finetuning_with_few_images(images: int, data: Data) -> None:
    """Fewer images than a batch, or one more than a batch."""
    model = digits_cnn()
    before = state_of(model)
    finetune(model, data, images=images)
    after = state_of(model)
    assert not torch.equal(before["fc2.weight"], after["fc2.weight"])
    assert all(value.isfinite().all() for value in after.values())


def test_finetuning_without_training_images_is_refused(data: Data) -> None:
    flat = Data(data.evaluation, data.calibration, None, data.classes)
    with pytest.raises(UserError, match=r"no training images; .*train/ and val/.*\.$"):
        recovery.finetune(digits_cnn(), flat, epochs=1, lr=0.001)


@pytest.mark.slow
def test_finetuning_restores_a_halved_network(data: Data) -> None:
    model, baseline = digits_cnn(), top1(digits_cnn(), data)
    remove_half(model, data)
    pruned = top1(model, data)
    finetune(model, data, images=None, epochs=2)
    assert top1(model, data) > pruned + 20
    assert top1(model, data) >= baseline - 2


# --- networks and images that cannot be trained ----------------------------------------------------------------------


def headed(*head: nn.Module) -> Model:
    """Return a network for `noise` whose head follows a flat layer of 16."""
    torch.manual_seed(0)
    return Model(nn.Sequential(nn.Flatten(), nn.Linear(48, 16), *head, nn.Linear(16, 2)).eval(), 2, PIXEL)


def tune(model: Model, train: Split, **options: Any) -> list[str]:
    torch.manual_seed(0)
    record = recovery.finetune(model, toy_data(train), **({"epochs": 1, "lr": 0.001, "batch_size": 4} | options))
    notes: list[str] = record["notes"]
    return notes


class Pooled(nn.Module):
    """A BatchNorm2d that sees a single pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:, :, None, None])[:, :, 0, 0]


@pytest.mark.parametrize(("images", "batch_size"), [(8, 1), (1, 64)], ids=["batches of one", "one image"])
@pytest.mark.parametrize(("head", "name"), [(nn.BatchNorm1d(16), "2"), (Pooled(), "2.norm")], ids=["1d", "2d"])
@pytest.mark.parametrize("name_of_recovery", ["finetune", "bn_reestimate"])
def test_a_batchnorm_that_sees_one_value_per_channel_is_named(
    images: int, batch_size: int, head: nn.Module, name: str, name_of_recovery: str
) -> None:
    model, train = headed(head), noise(images, seed=1)
    calls: dict[str, Callable[[], Any]] = {
        "finetune": lambda: tune(model, train, batch_size=batch_size),
        "bn_reestimate": lambda: reestimate(model, toy_data(train), batch_size=batch_size),
    }
    assert refused(calls[name_of_recovery]) == (
        f"recovery={name_of_recovery} gives the BatchNorm {name} one value per channel with batches of 1; give"
        " recovery.batch_size=2 or more and as many training images, or recovery=none."
    )
    assert not any(part._forward_pre_hooks for part in model.module.modules())


def test_a_batchnorm_over_pixels_trains_on_single_images() -> None:
    assert tune(normed(), noise(4, seed=1), batch_size=1) == []


def test_what_else_cannot_train_is_led_by_a_sentence() -> None:
    """InstanceNorm over a single value fails with any batch size."""
    model = headed(nn.Unflatten(1, (16, 1)), nn.InstanceNorm1d(16, track_running_stats=True), nn.Flatten())
    text = refused(lambda: tune(model, noise(8, seed=1)))
    assert text.startswith(
        "recovery=finetune cannot run this network in training mode (ValueError: Expected more than 1"
    )
    assert text.endswith("); use another recovery.batch_size, or recovery=none.")


def test_no_training_images_are_refused() -> None:
    text = refused(lambda: tune(headed(), noise(0, seed=1)))
    assert text == "recovery=finetune needs training images and the data has none; give some, or recovery=none."


def test_a_frozen_network_is_refused() -> None:
    model = headed()
    model.module.requires_grad_(False)
    text = refused(lambda: tune(model, noise(8, seed=1)))
    assert "as all have requires_grad=False; call requires_grad_(True) on the network, or use recovery=none." in text


class Detached(nn.Sequential):
    """A network of which code cuts off the gradients behind `parts` of its layers."""

    def __init__(self, parts: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 2))
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self):
            x = layer(x).detach() if number < self.parts else layer(x)
        return x


def test_a_network_that_hides_its_gradients_is_refused() -> None:
    text = refused(lambda: tune(Model(Detached(4).eval(), 2, PIXEL), noise(8, seed=1)))
    assert "whose logits have no gradient" in text


@pytest.mark.parametrize(
    ("model", "frozen", "unused"), [(headed(), 48 * 16 + 16, 0), (Model(Detached(2).eval(), 2, PIXEL), 0, 48 * 16 + 16)]
)
def test_what_was_not_trained_is_said(model: Model, frozen: int, unused: int) -> None:
    model.module[1].requires_grad_(not frozen)  # type: ignore[index]
    before = state_of(model)
    whole = 48 * 16 + 16 + 16 * 2 + 2
    assert tune(model, noise(8, seed=1)) == [
        f"recovery=finetune trained {16 * 2 + 2} of {whole} parameters: {frozen} are frozen (requires_grad=False) and"
        f" {unused} get no gradient."
    ]
    after = state_of(model)
    assert {key for key in before if torch.equal(before[key], after[key])} == {"1.weight", "1.bias"}


def test_a_network_that_trains_as_a_whole_has_no_notes(data: Data) -> None:
    assert tune(headed(nn.BatchNorm1d(16)), noise(8, seed=1)) == []


# --- training that leaves the numbers --------------------------------------------------------------------------------


class Supervised(nn.Module):
    """Gives its logits alone in eval mode, and what `shape` makes of them and of others in training mode."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.aux = nn.Linear(48, 16), nn.Linear(16, 2), nn.Linear(16, 2)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        features = self.body(x.flatten(1)).relu()
        return self.shape(self.head(features), self.aux(features)) if self.training else self.head(features)


GIVEN: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "tuple": (lambda y, aux: (y, aux), "entry 0"),
    "list": (lambda y, aux: [y, None, aux], "entry 0"),
    "inception": (lambda y, aux: InceptionOutputs(y, aux), "logits"),
    "googlenet": (lambda y, aux: GoogLeNetOutputs(y, aux, aux), "logits"),
    "dictionary": (lambda y, aux: {"aux": aux, "logits": y}, "logits"),
    "one of its shape": (lambda y, aux: {"loss": y.sum(), "out": y}, "out"),
    "map": (lambda y, aux: (y[..., None, None], aux), "entry 0"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_the_logits_of_a_network_with_auxiliary_classifiers_are_trained(case: str) -> None:
    shape, name = GIVEN[case]
    plain, model = (Model(Supervised(each).eval(), 2, PIXEL) for each in (lambda y, aux: y, shape))
    tune(plain, noise(8, seed=1))
    first = tune(model, noise(8, seed=1))[0]
    assert first == f"recovery=finetune trained {name} alone of what the network gives in training mode."
    assert same(state_of(plain), state_of(model))


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (lambda y, aux: {"main": y, "aux": aux}, "the network gives dict (main, aux) in training mode; let it give"),
        (lambda y, aux: (y.sum(), y, aux), "the network gives tuple (0, 1, 2) in training mode"),
        (lambda y, aux: y.sum(), "the network gives a tensor () in training mode"),
        (lambda y, aux: None, "the network gives NoneType () in training mode"),
    ],
)
def test_what_is_not_plain_in_training_mode_is_refused(shape: Callable[[Tensor, Tensor], Any], words: str) -> None:
    text = refused(lambda: tune(Model(Supervised(shape).eval(), 2, PIXEL), noise(8, seed=1)))
    assert text.startswith("recovery=finetune needs logits (4, 2) and ")
    assert words in text


class Trunk(nn.Module):
    """A trunk with an auxiliary classifier beside it that runs in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.more, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 1),
            nn.Linear(128, 2),
        )
        self.aux = nn.Sequential(nn.Flatten(), nn.Linear(128, 2))

    def forward(self, x: Tensor) -> Any:
        features = self.norm(self.body(x)).relu()
        logits = self.head(self.more(features).relu().flatten(1))
        return (logits, self.aux(features)) if self.training else logits


def test_an_auxiliary_classifier_that_removal_has_not_seen_is_left_out() -> None:
    model, split = Model(Trunk().eval(), 2, PIXEL), noise(8, seed=1)
    removal.remove(model, toy_data(None), amount=0.5, importance="magnitude", p=2, global_ranking=False, round_to=None)
    before = state_of(model)
    notes = tune(model, split)
    assert notes[0].startswith("recovery=finetune left out aux, which runs in training mode alone and no longer fits")
    changed = {key for key, value in state_of(model).items() if not torch.equal(value, before[key])}
    assert {key.partition(".")[0] for key in changed} == {"body", "norm", "more", "head"}
    assert int(model.module.norm.num_batches_tracked) == 2
    assert "forward" not in vars(model.module.aux)


def test_looking_for_what_no_longer_fits_leaves_a_network_as_it_was() -> None:
    """Statistics are those of a training without that look."""
    model = Model(Trunk().eval(), 2, PIXEL)
    tune(model, noise(8, seed=1))
    assert int(model.module.norm.num_batches_tracked) == 2


class Untrainable(nn.Sequential):
    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            raise NotImplementedError("Only for inference.")
        return super().train(mode)


class InferenceInside(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            x = self[1](self[0](x))
        return self[2](x)


def test_a_network_that_refuses_training_is_told_so() -> None:
    parts = (nn.Flatten(), nn.Linear(48, 16), nn.Linear(16, 2))
    text = refused(lambda: tune(Model(Untrainable(*parts).eval(), 2, PIXEL), noise(8, seed=1)))
    assert text.startswith("recovery=finetune cannot run this network in training mode (NotImplementedError: Only for")
    text = refused(lambda: tune(Model(InferenceInside(*parts).eval(), 2, PIXEL), noise(8, seed=1)))
    assert text.endswith("; take inference_mode out of its forward, or recovery=none.")


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_training_that_diverges_stops_at_the_end_of_its_epoch(epochs: int) -> None:
    text = refused(lambda: tune(headed(nn.ReLU()), noise(8, seed=1), epochs=epochs, lr=1e30))
    assert text == (
        f"fine-tuning diverged in epoch 1 of {epochs} (loss or weights are not finite); lower recovery.lr=1e+30."
    )


@pytest.mark.parametrize("where", ["weights", "images"])
def test_numbers_that_were_not_finite_before_are_no_divergence(where: str) -> None:
    model, train = headed(), noise(8, seed=1)
    if where == "weights":
        model.module[1].weight.data[0] = torch.nan  # type: ignore[index]
    else:
        train = Split.of_tensors(train.fetch(list(range(8))) * torch.inf, train.labels)
    assert "not finite before recovery=finetune has changed anything" in refused(lambda: tune(model, train))


class Bursts(nn.Module):
    """A step whose answers are infinite from its fifth training call on."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return x * (float("inf") if self.calls > 4 else 1)


def test_the_epoch_of_a_late_divergence_is_named() -> None:
    text = refused(lambda: tune(headed(Bursts()), noise(8, seed=1), epochs=4))
    assert text.startswith("fine-tuning diverged in epoch 3 of 4")


def test_statistics_that_are_not_finite_are_refused() -> None:
    model = normed()
    images = torch.randn(8, 3, 4, 4) * 1e30
    text = refused(lambda: reestimate(model, toy_data(Split.of_tensors(images, torch.arange(8) % 2))))
    assert "found statistics that are not finite in 0;" in text
