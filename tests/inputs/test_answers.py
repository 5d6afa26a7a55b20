"""Answers that are not the same each time, by chance or by what a network keeps, are refused; the rest is taken."""

from __future__ import annotations

import random
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from pq_sweep.inputs import state
from pq_sweep.inputs.own_model import accepted_change, accepted_model
from pq_sweep.types import Model, Preprocess

SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
Step = Callable[[Any, Tensor], Tensor]
HALVES = random.Random(0)
SEEN = {"images": 0}
CALLS = 0


class Net(nn.Module):
    """A linear network whose features `step` may change."""

    calls = 0

    def __init__(self, step: Step = lambda net, x: x, **kept: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.step = nn.Linear(64, 10), step
        vars(self).update(kept)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.step(self, images.flatten(1)))


def accepted(net: nn.Module) -> Model:
    return accepted_model(Model(net.eval(), 10, SMALL), "mine.make")


# --- chance ----------------------------------------------------------------------------------------------------------


def attention(net: Any, x: Tensor) -> Tensor:
    tokens = x.unflatten(1, (8, 8))
    return F.scaled_dot_product_attention(tokens, tokens, tokens, dropout_p=0.01).flatten(1)


def rarely(net: Any, x: Tensor) -> Tensor:
    return x * 2 if random.random() < 1e-9 else x


def forked(net: Any, x: Tensor) -> Tensor:
    with torch.random.fork_rng(()):
        return F.dropout(x, 1e-3, training=True)


OF_CHANCE: dict[str, tuple[Step, str]] = {
    "dropout": (lambda net, x: F.dropout(x, 1e-4, training=True), "(bernoulli)"),
    "channels": (lambda net, x: F.dropout1d(x[..., None], 1e-4, training=True)[..., 0], "(bernoulli)"),
    "alpha dropout": (lambda net, x: F.alpha_dropout(x, 1e-4, training=True), "(bernoulli)"),
    "stochastic depth": (lambda net, x: x + stochastic_depth(x, 0.05, "batch", training=True), "(bernoulli)"),
    "attention": (attention, "(bernoulli)"),
    "little noise": (lambda net, x: x + 1e-7 * torch.randn_like(x), "(randn_like)"),
    "rrelu": (lambda net, x: F.rrelu(x, training=True), "(rrelu_with_noise)"),
    "shuffle": (lambda net, x: x[:, torch.randperm(64)], "(randperm)"),
    "rare number": (lambda net, x: x * (torch.randint(0, 10**6, ()) != 7), "(randint)"),
    "gumbel": (lambda net, x: F.gumbel_softmax(x), "(exponential)"),
    "forked": (forked, "(bernoulli)"),
    "python": (rarely, "(random or numpy.random)"),
    "numpy": (lambda net, x: x * float(np.random.rand() > 1e-9), "(random or numpy.random)"),
    "own generator": (lambda net, x: x + torch.rand((), generator=net.generator) * 1e-6, "(rand)"),
    "own generator of numpy": (lambda net, x: x * float(net.rng.random() > 1e-9), "from rng when it answers"),
    "a module's generator": (lambda net, x: x, "from HALVES when it answers"),
}


class OfItsModule(Net):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) * (HALVES.random() > 1e-9)


@pytest.mark.parametrize("case", OF_CHANCE)
def test_chance_is_refused_however_rarely_it_strikes(case: str) -> None:
    step, words = OF_CHANCE[case]
    kept = {"generator": torch.Generator(), "rng": np.random.default_rng(0)}
    net = OfItsModule() if case == "a module's generator" else Net(step, **kept)
    text = refused(lambda: accepted(net))
    assert text.startswith("the network of mine.make draws random numbers ")
    assert words in text


def seeded(net: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    return x @ torch.randn(64, 64) * random.random() * np.random.rand()


def seeded_generator(net: Any, x: Tensor) -> Tensor:
    return x @ torch.randn(64, 64, generator=torch.Generator().manual_seed(3))


def attention_alone(net: Any, x: Tensor) -> Tensor:
    tokens = x.unflatten(1, (8, 8))
    return F.dropout(F.scaled_dot_product_attention(tokens, tokens, tokens).flatten(1), 0.5, training=net.training)


@pytest.mark.parametrize("step", [seeded, seeded_generator, attention_alone])
def test_numbers_that_are_the_same_each_time_are_no_chance(step: Step) -> None:
    assert accepted(Net(step)).notes == ()


@pytest.mark.parametrize(
    "step",
    [
        lambda net, x: x + 0 * torch.randn_like(x),
        lambda net, x: torch.where(torch.rand_like(x) < -1e9, 0, x),
        lambda net, x: (F.dropout(x, 0.5, training=True), x)[1],
    ],
    ids=["times 0", "impossible", "unused"],
)
def test_chance_that_changes_no_answer_is_noted(step: Step) -> None:
    (note,) = accepted(Net(step)).notes
    assert note.startswith("The network draws random numbers when it answers (")
    assert note.endswith("), on which its answers do not depend.")


def test_looking_for_chance_leaves_all_generators_as_they_were() -> None:
    fixed, dropping = Net(seeded), Net(lambda net, x: F.dropout(x))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    accepted(fixed)
    refused(lambda: accepted(dropping))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


# --- what is kept between answers ------------------------------------------------------------------------------------


def counting(net: Any, x: Tensor) -> Tensor:
    net.calls += 1
    return x


def after_some(net: Any, x: Tensor) -> Tensor:
    return counting(net, x) if net.calls < 4 else 2 * counting(net, x)


def after_many(net: Any, x: Tensor) -> Tensor:
    return counting(net, x) if net.calls < 100_000 else 2 * counting(net, x)


def every_hundredth(net: Any, x: Tensor) -> Tensor:
    return 2 * counting(net, x) if (net.calls + 1) % 100 == 0 else counting(net, x)


def average(net: Any, x: Tensor) -> Tensor:
    net.mean = 0.999 * net.mean + 0.001 * x.mean()
    return x - net.mean


def history(net: Any, x: Tensor) -> Tensor:
    net.seen.append(float(x.mean()))
    return x - sum(net.seen) / len(net.seen)


def of_the_class(net: Any, x: Tensor) -> Tensor:
    Net.calls += 1
    return x * (1 + (Net.calls > 10_000))


def helper(net: Any, x: Tensor) -> Tensor:
    net.helper.calls = getattr(net.helper, "calls", 0) + 1
    return x * (1 + (net.helper.calls > 5))


class Global(Net):
    def forward(self, images: Tensor) -> Any:
        global CALLS
        CALLS += 1
        return super().forward(images) * (1 + (CALLS > 50_000))


def enclosing() -> Net:
    calls = 0

    class Enclosed(Net):
        def forward(self, images: Tensor) -> Any:
            nonlocal calls
            calls += 1
            return super().forward(images) * (1 + (calls > 50_000))

    return Enclosed()


STATEFUL: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "after some calls": (lambda: Net(after_some, calls=0), "changes calls"),
    "after many calls": (lambda: Net(after_many, calls=0), "changes calls"),
    "every hundredth": (lambda: Net(every_hundredth, calls=0), "changes calls"),
    "average": (lambda: Net(average, mean=torch.zeros(())), "changes mean"),
    "history": (lambda: Net(history, seen=[]), "changes seen"),
    "class": (lambda: Net(of_the_class), "changes Net.calls"),
    "helper": (lambda: Net(helper, helper=namedtuple("Helper", "").__class__("Helper", (), {})()), "changes helper"),
    "global": (Global, "changes CALLS"),
    "enclosing": (enclosing, "changes calls"),
    "inner": (lambda: nn.Sequential(Net(after_some, calls=0)), "changes 0.calls"),
}


@pytest.mark.parametrize("case", STATEFUL)
def test_answers_that_depend_on_earlier_ones_are_refused(case: str) -> None:
    make, words = STATEFUL[case]
    text = refused(lambda: accepted(make()))
    assert text.startswith(f"the network of mine.make {words} when it answers, and with it what it answers next")


def remembering(net: Any, x: Tensor) -> Tensor:
    net.last = x
    return x


def cached(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "scale"):
        net.scale = torch.linspace(0, 1, 64)
    return x * net.scale


def counted_elsewhere(net: Any, x: Tensor) -> Tensor:
    SEEN["images"] += len(x)
    return x


class Counted(Net):
    def forward(self, images: Tensor) -> Any:
        assert SEEN["images"] >= 0
        return super().forward(images)


@pytest.mark.parametrize(
    ("step", "name"),
    [(counting, "calls"), (history, "seen"), (counted_elsewhere, "SEEN"), (remembering, None), (cached, None)],
)
def test_what_goes_on_changing_and_changes_no_answer_is_noted(step: Step, name: str | None) -> None:
    net = Counted(lambda net, x: x + 0 * step(net, x), calls=0, seen=[])
    changed = f"The network changes {name} when it answers; its answers stayed the same in 8 passes."
    assert accepted(net).notes == ((changed,) if name else ())


class Fused(Net):
    """Computes a matrix from its weights at the first call and keeps it, as networks with several branches do."""

    def __init__(self, *, forgets: bool) -> None:
        super().__init__()
        self.forgets, self.kept = forgets, {}

    def train(self, mode: bool = True) -> nn.Module:
        if mode and self.forgets:
            self.kept.clear()
        return super().train(mode)

    def forward(self, images: Tensor) -> Any:
        if "fused" not in self.kept:
            self.kept["fused"] = (self.head.weight * 2 + 1).detach()
        return F.linear(images.flatten(1), self.kept["fused"], self.head.bias)


def test_what_is_kept_of_old_weights_is_refused_or_forgotten() -> None:
    net = Fused(forgets=False)
    before = net.head.weight.clone()
    assert "keeps kept from its first answer on, and does not compute it anew" in refused(lambda: accepted(net))
    assert torch.equal(net.head.weight, before)

    model = accepted(Fused(forgets=True))
    assert model.notes == ()
    model.module(model.sample())
    with torch.no_grad():
        model.module.head.weight.zero_()
    assert accepted_change(model, "the network", "mend it") == []
    assert torch.equal(model.module.kept["fused"], torch.ones(10, 64))


class Merging(Net):
    """Has a scale multiplied into its weight in eval mode, which loses digits, as networks with adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.merged = nn.Parameter(torch.rand(10, 64) + 0.5), False

    def train(self, mode: bool = True) -> nn.Module:
        if mode == self.merged:
            self.merged = not mode
            self.head.weight.data *= 1 / self.scale if mode else self.scale
        return super().train(mode)


def test_what_a_network_merges_into_its_weights_stays() -> None:
    model = accepted(Merging())
    before = model.module.head.weight.clone()
    model.module.train().eval()
    assert not torch.equal(model.module.head.weight, before)
    model.module.head.weight.data.copy_(before)
    accepted_change(model, "the network", "mend it")
    assert torch.equal(model.module.head.weight, before)


def test_attributes_that_cannot_be_read_are_no_hindrance() -> None:
    class Odd(dict[str, Any]):
        def items(self) -> Any:
            raise KeyError("no value yet")

    options = OmegaConf.create({"depth": "???", "width": 3})
    me: list[Any] = []
    me.append(me)
    assert (
        accepted(Net(options=options, odd=Odd(a=1), me=me, files=iter([1]), kind=Net, table={1: {2: {3: {}}}})).notes
        == ()
    )


def test_counters_are_left_as_the_passes_leave_them() -> None:
    net = Net(counting, calls=0)
    accepted(net)
    assert net.calls < 30


def test_parameters_that_forward_clamps_are_seen() -> None:
    """By `.data`, which leaves no trace in a parameter's version."""
    text = refused(lambda: accepted(Net(lambda net, x: (net.head.weight.data.mul_(0.9), x)[1])))
    assert "changes head.weight when it answers, even in eval mode" in text


def test_a_network_that_changes_where_nobody_looks_is_seen_by_its_answers() -> None:
    net, seen = Net(), []
    net.register_forward_hook(lambda part, images, logits: (seen.append(1), logits * (1 + (len(seen) > 50)))[1])
    model = accepted(net)

    def ask() -> Tensor:
        return model.module(model.sample(2)).detach()

    with state.same_answers(ask, "the network"):
        ask()

    def many() -> None:
        with state.same_answers(ask, "the network"):
            for _ in range(60):
                ask()

    assert refused(many).startswith("the network answers the same images otherwise after it has answered others;")


# --- forms of logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        lambda y: y[..., None, None],
        lambda y: y[:, None],
        lambda y: {"logits": y[..., None], "features": y.sum()},
    ],
    ids=["map", "token", "in a dictionary"],
)
def test_dimensions_of_size_one_are_taken_off(shape: Callable[[Tensor], Any]) -> None:
    class Shaped(Net):
        def forward(self, images: Tensor) -> Any:
            return shape(super().forward(images))

    model, expected = accepted(Shaped()), accepted(Net())
    assert model.notes[-1].endswith("were brought to the shape (images, classes).")
    for count in (1, 3):
        assert torch.equal(model.module(model.sample(count)), expected.module(model.sample(count)))


def test_a_network_that_loses_the_dimension_of_a_single_image_is_refused() -> None:
    """It would be right in torch, and its graph wrong."""

    class Squeezed(Net):
        def forward(self, images: Tensor) -> Any:
            return super().forward(images).squeeze()

    text = refused(lambda: accepted(Squeezed()))
    assert "gives a float32 tensor (10,) for one image where (1, 10) is expected; name the dimensions that" in text


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda net, x: x.half(), "its forward makes float16 tensors (half) where weights and images are float32"),
        (lambda net, x: x.to(torch.float64), "its forward makes float64 tensors (to) where weights and images"),
        (lambda net, x: x * net.scale, "its forward uses a float64 tensor (64,) that is neither parameter nor buffer"),
        (lambda net, x: x.to("meta"), "its forward moves tensors to meta (to), and a job chooses the device"),
    ],
)
def test_the_cause_of_a_pass_that_fails_is_named(step: Step, words: str) -> None:
    text = refused(lambda: accepted(Net(step, scale=torch.ones(64, dtype=torch.float64))))
    assert words in text
    assert "RuntimeError in test_answers.py, line " in text
    assert "preprocess" not in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
@pytest.mark.parametrize("step", [lambda net, x: x.cuda(), lambda net, x: x + torch.zeros(64, device="cuda")])
def test_a_network_that_wants_cuda_is_told_so(step: Step) -> None:
    assert "its forward moves tensors to another device (" in refused(lambda: accepted(Net(step)))
