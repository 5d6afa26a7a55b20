"""Channels that leave and bits that are learned in one run: the rules of the paper, and a network that is as told."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from independent import torch_logits
from learned_files import assert_equal_answers, job_in, logits_node_by_node, rounding, written
from omegaconf import OmegaConf
from random_networks import attention, fresh
from test_conf import composed
from torch import Tensor, nn

from pq_sweep.compress import geta as package
from pq_sweep.compress.geta import geta
from pq_sweep.compress.geta.groups import Group, groups_of, take_out, zero
from pq_sweep.compress.geta.qasso import EPSILON, START_BITS, Course, Period, forget_rate, step_size
from pq_sweep.compress.geta.quantizer import Inputs, Learnable
from pq_sweep.compress.removal import replay
from pq_sweep.core.weights import prunable_by_name
from pq_sweep.inputs.datasets import digits, image_folder
from pq_sweep.inputs.models import cifar_resnet, digits_cnn
from pq_sweep.job import run as job
from pq_sweep.job.probing import without_probe
from pq_sweep.types import Data, Model, Preprocess, Record


@pytest.fixture(scope="module")
def data() -> Data:
    whole = digits(digits_cnn(weights=None))
    return Data(whole.evaluation, whole.calibration, whole.training().take(640), whole.classes)


def options(**changed: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(without_probe(composed("recovery=geta").recovery))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key != "_target_"} | {"epochs": 4} | changed


def trained(model: Model, data: Data, seed: int = 0, **changed: Any) -> Record:
    torch.manual_seed(seed)
    record: Record = json.loads(json.dumps(geta(model, data, **options(**changed))))
    return record


# --- The quantizer ---------------------------------------------------------------------------------------------------


def quantizer(
    bits: float = 4, power: float = 1.0, most: float | None = None, values: Tensor | None = None
) -> Learnable:
    found = Learnable(torch.randn(1000) if values is None else values, bits)
    with torch.no_grad():
        found.power.fill_(power)
        if most is not None:
            found.log_most.fill_(math.log(most))
        found.log_step.copy_(found.log_step_at(bits))
    return found


@pytest.mark.parametrize("power", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_the_closed_forms(power: float, bits: int) -> None:
    """Equations 1 and 2 with the rounding passed by the estimator; logarithms by the chain rule."""
    torch.manual_seed(0)
    x, weight = torch.randn(500).requires_grad_(), torch.randn(500)
    rounds = quantizer(bits, power, most=1.5)
    (rounds.rounded(x) * weight).sum().backward()

    inside, most = x.detach().abs() <= 1.5, torch.tensor(1.5)
    raised = torch.where(inside, x.detach().abs() ** power, most**power)
    step, sign = rounds.value.detach(), x.detach().sign()
    of_step = (weight * sign * ((raised / step).round() - raised / step)).sum()
    of_most = (weight * sign * ~inside * power * most ** (power - 1)).sum()
    of_power = (weight * sign * raised * torch.where(inside, x.detach().abs(), most).log()).sum()
    found = (rounds.log_step.grad / step, rounds.log_most.grad / most, rounds.power.grad)  # type: ignore[operator]
    for mine, expected in zip(found, (of_step, of_most, of_power), strict=True):
        assert float(mine) == pytest.approx(float(expected), rel=1e-4, abs=1e-3)  # type: ignore[arg-type]
    assert torch.equal(x.grad, torch.where(inside, weight, 0))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [2, 3.5, 8, 16])
def test_bits_are_those_of_equation_3(bits: float) -> None:
    rounds = quantizer(bits, power=1.2, most=0.8)

    assert rounds.bits() == pytest.approx(bits, abs=1e-4)
    assert math.log2(0.8**1.2 / float(rounds.value.detach()) + 1) + 1 == pytest.approx(bits, abs=1e-4)
    rounds.keep_within(3, 6)
    assert rounds.bits() == pytest.approx(min(6, max(3, bits)), abs=1e-4)


def test_what_is_rounded_is_whole_steps() -> None:
    values = torch.cat([torch.randn(300), torch.zeros(5), torch.tensor([100.0, -100.0])])
    rounds = quantizer(3, power=1.4, most=1.1, values=values)
    found = rounds.rounded(values).detach()

    assert torch.allclose(found, rounds.codes(values) * rounds.value.detach())
    assert sorted({*rounds.codes(values).int().tolist()}) == [-3, -2, -1, 0, 1, 2, 3]
    assert (found[values == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 16])
def test_learning_never_leaves_what_a_quantizer_may_be(bits: int) -> None:
    """Step and largest value stay above zero, and nothing becomes NaN, however fast they learn."""
    torch.manual_seed(0)
    values = torch.randn(200)
    rounds = Learnable(values, bits)
    optimizer = torch.optim.SGD(rounds.parameters(), lr=10.0)
    for _ in range(50):
        optimizer.zero_grad()
        (rounds.rounded(values) - 3).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            rounds.log_most.clamp_(-20, 20)
        rounds.keep_within(2, 16)
        assert all(torch.isfinite(each).all() for each in rounds.parameters())
        assert rounds.value > 0
        assert 2 - 1e-3 <= rounds.bits() <= 16 + 1e-3


@pytest.mark.parametrize("signed", [True, False])
def test_inputs_are_rounded_to_the_integers_of_a_file(signed: bool) -> None:
    values = torch.randn(500) if signed else torch.rand(500)
    rounds = Inputs(values, 4)
    given = torch.linspace(-3, 3, 400) * values.abs().max()
    low, high = rounds.grid.limits
    expected = torch.fake_quantize_per_tensor_affine(given, float(rounds.value), 0, low, high)

    assert rounds.bits() == pytest.approx(4, abs=1e-4)
    assert (low, high) == ((-8, 7) if signed else (0, 15))
    assert torch.allclose(rounds.rounded(given).detach(), expected, atol=1e-5)


# --- The rules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(300))
def test_the_direction_leads_down(seed: int) -> None:
    """Proposition 5.1, on random problems of one layer of which some rows are redundant."""
    torch.manual_seed(seed)
    x, gradient, rate = torch.randn(4, 9) * 10 ** (seed % 4 - 2), torch.randn(4, 9), 10.0 ** -(seed % 5)
    rounds = quantizer(2 + seed % 7, power=0.8 + seed % 5 / 10, values=x)
    way = rate * gradient
    clipped, rest = x.sign() * rounds.clipped(x).detach(), x.sign() * rounds.residual(x).detach()
    forget = forget_rate(way.flatten(), clipped.flatten(), left=5)
    step = step_size(way.flatten(), rest.flatten(), forget)
    if step is None:
        step = float(rounds.log_step_at(2).exp())
    direction = -way - forget * (clipped + step * rest)  # equation 9

    assert 0 < forget <= 1
    assert float((gradient * direction).sum()) < 0


def test_next_to_nothing_goes_at_once() -> None:
    assert forget_rate(torch.ones(4), torch.full((4,), EPSILON / 2), left=3) == 0
    assert forget_rate(torch.ones(4), torch.ones(4), left=3) == pytest.approx(1 / 3)


@pytest.mark.parametrize(("length", "periods"), [(10, 4), (7, 1), (9, 9), (100, 7)])
def test_periods_fill_a_stage(length: int, periods: int) -> None:
    found = [Period.of(place, length, periods) for place in range(length)]

    assert [each.number for each in found] == sorted(each.number for each in found)
    assert {each.number for each in found} == set(range(periods))
    assert sum(each.is_last_step for each in found) == periods
    assert found[-1].is_last_step


def test_stages_follow_each_other() -> None:
    course = Course(200, 4, 4)
    stages = [course.place(step)[0] for step in range(200)]

    assert [stages.count(name) for name in ("warm-up", "projection", "joint", "cool-down")] == [20, 40, 60, 80]
    assert stages == sorted(stages, key=["warm-up", "projection", "joint", "cool-down"].index)


# --- Groups ----------------------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """A network with what cannot leave: channels that a sigmoid or a normalization over all of them follows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.between: nn.Module = {
            "sigmoid": nn.Sigmoid(), "group norm": nn.GroupNorm(2, 8), "relu": nn.ReLU(), "gelu": nn.GELU(),
        }[kind]  # fmt: skip
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.between(self.first(x))).relu().mean((2, 3)))


def plain(kind: str) -> Model:
    torch.manual_seed(0)
    return Model(Plain(kind).eval(), 10, Preprocess(size=8, resize=8, channels=1))


@pytest.mark.parametrize("kind", ["relu", "gelu"])
def test_channels_whose_zeros_stay_zero_leave(kind: str) -> None:
    groups, notes = groups_of(plain(kind))

    assert [(group.root, group.channels) for group in groups] in (
        [("second", 12), ("first", 8)], [("first", 8), ("second", 12)])  # fmt: skip
    assert notes == []


@pytest.mark.parametrize(
    ("kind", "why"),
    [("sigmoid", "first (what follows does not give zeros for zeros)"), ("group norm", "first (a GroupNorm depends")],
)
def test_channels_that_cannot_leave_stay_and_are_named(kind: str, why: str) -> None:
    groups, notes = groups_of(plain(kind))

    assert [group.root for group in groups] == ["second"]
    (note,) = notes
    assert note.startswith(f"recovery=geta kept the channels of {why}")


def test_the_classifier_keeps_its_classes_and_attention_its_channels() -> None:
    roots = {group.root for group in groups_of(fresh())[0]}
    assert roots == {"fc1", "body.0", "residual.conv2", "residual.conv1", "stem.0.0"}
    groups, notes = groups_of(attention()) if _has_groups(attention()) else ([], ["no group"])
    assert all("attend" not in group.root for group in groups)
    assert notes


def _has_groups(model: Model) -> bool:
    try:
        return bool(groups_of(model))
    except Exception:
        return False


@pytest.mark.parametrize(
    "name",
    [
        "digits_cnn",
        "resnet18",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("mobilenet_v2", "densenet121")),
    ],
)
def test_what_is_zero_can_be_taken_out(name: str) -> None:
    model = fresh(name=name)
    groups, _ = groups_of(model)
    gone = {group.root: list(range(1, group.channels, 3)) for group in groups}
    zero(model.module, groups, gone)
    smaller = copy.deepcopy(model)
    history = take_out(smaller, gone)
    images = model.sample(2)
    with torch.no_grad():
        expected, found = model.module(images), smaller.module(images)

    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert sum(p.numel() for p in smaller.module.parameters()) < 0.8 * sum(p.numel() for p in model.module.parameters())
    again = fresh(seed=1, name=name)
    replay(again, {"history": history})
    again.module.load_state_dict(smaller.module.state_dict())
    with torch.no_grad():
        assert torch.equal(again.module(images), found)


def test_sums_are_those_of_each_channel() -> None:
    group = next(group for group in groups_of(fresh())[0] if group.root == "residual.conv2")
    module = fresh().module
    values = {part.parameter: module.get_parameter(part.parameter).detach() for part in group.parts}
    expected = sum(value.reshape(32, -1).sum(1) for value in values.values())

    assert torch.allclose(group.sums(values), expected, atol=1e-4)  # type: ignore[arg-type]
    assert isinstance(group, Group)


# --- The whole -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("amount", "least", "most"), [(0.3, 4, 8), (0.5, 2, 4), (0.7, 3, 3)])
def test_sparsity_is_exact_and_bits_are_in_range(
    amount: float, least: int, most: int, data: Data, tmp_path: Path
) -> None:
    model = digits_cnn()
    record = trained(model, data, amount=amount, least_bits=least, bits=most)
    before, after = (sum(counts) for counts in zip(*record["channels"].values(), strict=True))

    assert before - after == round(amount * before)
    assert min(kept for _, kept in record["channels"].values()) >= 1
    assert all(least <= entry["bits"] <= most for entry in record["learned"].values())
    assert least <= record["mean_bits"] <= most
    for name, entry in record["learned"].items():
        codes = model.module.get_parameter(name).detach() / entry["scale"][0]
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert codes.abs().max() < 2 ** (entry["bits"] - 1)
    images = data.evaluation.fetch(list(range(200)))
    assert_equal_answers(model, record, written(model, record, tmp_path, bits=most), images, bits=most)
    labels = data.evaluation.labels[:200]
    assert (torch_logits(model.module, images).argmax(1) == labels.numpy()).mean() > (0.9 if least == 4 else 0.5)


@pytest.mark.slow
def test_the_smaller_network_answers_as_the_masked_one(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    masked = list[nn.Module]()
    monkeypatch.setattr(
        package, "take_out", lambda model, gone: (masked.append(copy.deepcopy(model.module)), take_out(model, gone))[1]
    )
    model = digits_cnn()
    trained(model, data)
    images = data.evaluation.fetch(list(range(len(data.evaluation))))
    expected, found = torch_logits(masked[0], images), torch_logits(model.module, images)

    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    assert sum(p.numel() for p in model.module.parameters()) < 0.5 * sum(p.numel() for p in masked[0].parameters())


@pytest.mark.slow
def test_inputs_are_rounded_in_the_file_too(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    record = trained(model, data, activations=7, epochs=6)
    path = written(model, record, tmp_path, bits=8, activations=7)
    images = data.evaluation.fetch(list(range(100)))
    with rounding(model.module, record):
        expected = torch_logits(model.module, images)

    assert all(4 <= entry["activation"]["bits"] <= 7 for entry in record["learned"].values())
    assert np.quantile(np.abs(logits_node_by_node(path, images) - expected).max(1) / np.abs(expected).max(), 0.9) < 2e-2


@pytest.mark.slow
def test_seeds_repeat_and_differ(data: Data) -> None:
    found = [trained(digits_cnn(), data, seed=seed, epochs=2, prunings=2, projections=2) for seed in (0, 0, 1)]

    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.slow
@pytest.mark.parametrize("option", ["projection", "joint"])
def test_each_rule_can_be_left_out(option: str, data: Data) -> None:
    record = trained(digits_cnn(), data, **{option: False})
    other = trained(digits_cnn(), data)

    assert sum(before - after for before, after in record["channels"].values()) == 104
    assert record["learned"] != other["learned"]


class Stopped(Exception):
    """What a test stops a training with."""


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [1, 2, 5, 9], ids=["warm-up", "projection", "joint", "cool-down"])
def test_a_training_that_was_stopped_goes_on_and_ends_the_same(
    epoch: int, data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = Data(data.evaluation, data.calibration, data.training().take(320), data.classes)
    how = options(epochs=10, prunings=2, projections=2)

    def run(folder: Path, after: Callable[[], None] = lambda: None) -> tuple[Record, Model]:
        model, stage = digits_cnn(), SimpleNamespace(folder=folder)
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            patch.setattr(package.Checkpoint, "save", saving(after))
            return geta(model, few, **how, stage=stage), model  # type: ignore[arg-type]

    save = package.Checkpoint.save

    def saving(after: Callable[[], None]) -> Callable[..., None]:
        def saved(self: Any, number: int, *others: Any) -> None:
            save(self, number, *others)
            if number == epoch:
                after()

        return saved

    def stop() -> None:
        raise Stopped

    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole, model = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop)
    again, other = run(tmp_path / "cut")

    assert again == whole
    assert all(torch.equal(a, b) for a, b in zip(model.module.state_dict().values(), other.module.state_dict().values(),
                                                 strict=True))  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"amount": 1.0}, "recovery.amount=1.0 is out of range"),
        ({"amount": 0.99}, "and each of the 5 groups keeps one; give at most 0.975"),
        (
            {"epochs": 1, "projections": 1, "prunings": 20},
            "steps for its joint, which needs 40; give more recovery.epochs",
        ),
        ({"least_bits": 6, "bits": 4}, "recovery.least_bits=6 is more than the most bits"),
    ],
)
def test_what_cannot_be_is_refused(changed: dict[str, Any], says: str, data: Data) -> None:
    assert says in refused(lambda: geta(digits_cnn(), data, **options(**changed)))


def test_quantizers_begin_with_bits_to_spare() -> None:
    module = digits_cnn().module
    for weight in prunable_by_name(module).values():
        rounds = Learnable(weight, START_BITS)
        assert torch.allclose(rounds.rounded(weight), weight, atol=1e-4 * float(weight.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize(("amount", "least", "most"), [(0.3, 4, 8), (0.5, 2, 4), (0.7, 4, 8)])
def test_resnet20_of_cifar_is_what_it_says(
    amount: float, least: int, most: int, shared_data: Path, tmp_path: Path
) -> None:
    model = cifar_resnet(n=3, weights=str(shared_data / "weights" / "resnet20_cifar10.pth"))
    whole = image_folder(model, root=str(shared_data / "cifar10_jpeg"), calibration=64, evaluation=None, seed=0)
    data = Data(whole.evaluation, whole.calibration, whole.training().take(2560), whole.classes)
    record = trained(model, data, amount=amount, least_bits=least, bits=most, prunings=2, projections=2, epochs=2)
    before, after = (sum(counts) for counts in zip(*record["channels"].values(), strict=True))
    path = written(model, record, tmp_path, bits=most)

    assert before - after == round(amount * before)
    assert all(least <= entry["bits"] <= most for entry in record["learned"].values())
    # Statistics of channels that hardly vary make more of what FP32 rounds off.
    assert_equal_answers(model, record, path, data.evaluation.fetch(list(range(2000))), bits=most, rest=1e-3)


@pytest.mark.slow
def test_pruned_weights_stay_zero(data: Data) -> None:
    model = digits_cnn()
    with torch.no_grad():
        model.module.get_parameter("body.0.weight")[:, :16] = 0
    record = trained(model, data, amount=0.0, epochs=2, prunings=1, projections=1)

    assert record["history"] == []
    assert (model.module.get_parameter("body.0.weight")[:, :16] == 0).all()


SHORT_JOB = ("recovery=geta", "quantizer=learned", "runtime=onnxruntime", "recovery.epochs=2", "recovery.prunings=2",
             "cache=off")  # fmt: skip


@pytest.mark.slow
def test_a_job_has_the_smaller_network_and_goes_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job_in(tmp_path / "whole", *SHORT_JOB)
    assert whole["session"]["precision"] == "w8"
    assert whole["network"]["params"] < 0.4 * whole["baseline"]["params"]
    assert whole["bits"]["rel_bops"] < 0.08
    assert whole["bits"]["packed_bytes"] < whole["size_bytes"]["compressed"] < 0.1 * whole["size_bytes"]["original"]

    with monkeypatch.context() as patch:
        patch.setattr(job, "open_session", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job_in(tmp_path / "cut", *SHORT_JOB)
    with monkeypatch.context() as patch:
        patch.setattr(package, "train", None)  # it cannot be trained again
        again = job_in(tmp_path / "cut", *SHORT_JOB)
    assert again["accuracy"] == whole["accuracy"]
    assert (tmp_path / "cut" / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()
    assert not list((tmp_path / "cut").glob("*.kept.pt"))
