"""The optimizer of the paper, QASSO (section 5): it decides which channels leave and how many bits each layer keeps.

The weights themselves are moved by any optimizer; this is what happens after each of its steps. Four stages follow each
other: all is learned (warm-up), steps are projected onto fewer and fewer bits (projection), redundant channels are
forgotten while bits are chosen (joint), and what is left is trained with fixed bits (cool-down).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor, nn

from pq_sweep.compress.geta.groups import Channels, Group, Part, zero
from pq_sweep.compress.geta.quantizer import Inputs, Learnable
from pq_sweep.compress.training import apply, zeros_of
from pq_sweep.types import Record, UserError

log = logging.getLogger(__name__)

START_BITS = 16  # of the warm-up
STAGES = {"warm-up": 0.1, "projection": 0.2, "joint": 0.3, "cool-down": 0.4}  # shares of all steps
# The constants of equations 13 and 14: how much of the way down is left to forgetting and to the step.
ETA, XI, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Course:
    """The stages of a training of so many steps, and the periods of two of them."""

    steps: int
    projections: int
    prunings: int

    def lengths(self) -> dict[str, int]:
        """Return how many steps each stage has."""
        ends = [round(share * self.steps) for share in accumulate(STAGES.values())]
        return {name: end - start for name, start, end in zip(STAGES, [0, *ends], ends, strict=False)}

    def place(self, step: int) -> tuple[str, int, int]:
        """Return the stage of a step, counted from 0, its number in the stage, and the length of the stage."""
        for name, length in self.lengths().items():
            if step < length:
                return name, step, length
            step -= length
        raise ValueError(f"a training of {self.steps} steps has no later one")

    def refuse_short(self) -> None:
        """Raise a UserError if a stage has fewer steps than periods."""
        needed = {"warm-up": 1, "projection": self.projections, "joint": 2 * self.prunings, "cool-down": 1}
        for name, length in self.lengths().items():
            if length < needed[name]:
                raise UserError(
                    f"recovery=geta has {length} steps for its {name}, which needs {needed[name]}; give more"
                    " recovery.epochs or training images, or fewer recovery.projections and recovery.prunings."
                )


@dataclass(frozen=True)
class Period:
    """Where a step is: the period of its stage, its number in it, and how many steps that period has."""

    number: int
    step: int
    steps: int

    @classmethod
    def of(cls, place: int, length: int, periods: int) -> Period:
        """Divide a stage of a length into periods, and find the step at a place."""
        bounds = [length * number // periods for number in range(periods + 1)]
        number = max(at for at in range(periods) if bounds[at] <= place)
        return cls(number, place - bounds[number], bounds[number + 1] - bounds[number])

    @property
    def is_last_step(self) -> bool:
        """Say whether the period ends with this step."""
        return self.step == self.steps - 1


@dataclass(frozen=True)
class Wanted:
    """What is to be reached: the share of channels that leave, and the bits of weights and of what layers take."""

    amount: float
    least: int
    most: int
    most_inputs: int

    def __post_init__(self) -> None:
        if not 0 <= self.amount < 1:
            raise UserError(
                f"recovery.amount={self.amount} is out of range; give the share of channels, 0 <= amount < 1."
            )
        if self.least > min(self.most, self.most_inputs):
            raise UserError(f"recovery.least_bits={self.least} is more than the most bits; lower it.")

    def channels(self, groups: list[Group]) -> int:
        """Return how many channels leave, or refuse more than all but one of each group."""
        total = sum(group.channels for group in groups)
        wanted, most = round(self.amount * total), total - len(groups)
        if wanted > most:
            raise UserError(
                f"recovery.amount={self.amount} wants {wanted} of {total} channels to leave, and each of the"
                f" {len(groups)} groups keeps one; give at most {int(1000 * most / total) / 1000}."
            )
        return wanted


@dataclass(frozen=True)
class Rules:
    """Which rules of the paper are followed: bits that fall step by step, and equations 13 and 14."""

    projection: bool = True
    joint: bool = True


@dataclass
class Qasso:
    """The state of the optimizer: which channels are gone or being forgotten, and how many bits are allowed.

    `inputs` are the quantizers of what layers take.
    """

    module: nn.Module
    groups: list[Group]
    weights: dict[str, Learnable]
    inputs: dict[str, Inputs]
    course: Course
    wanted: Wanted
    rules: Rules
    gone: Channels = field(default_factory=dict)
    redundant: Channels = field(default_factory=dict)
    before: dict[str, Tensor] = field(default_factory=dict)
    steps_before: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.course.refuse_short()
        self.channels, self.masks = self.wanted.channels(self.groups), zeros_of(self.module)

    def learned(self) -> list[nn.Parameter]:
        """Return what quantizers learn."""
        return [parameter for quantizer in self._quantizers() for parameter in quantizer.parameters()]

    def after_step(self, step: int, steps: int) -> None:
        """Do what belongs to a step of the weights' optimizer; `step` counts from 1."""
        stage, place, length = self.course.place(step - 1)
        with torch.no_grad():
            if stage == "projection":
                self._project(self._allowed(Period.of(place, length, self.course.projections).number + 1))
            elif stage == "joint":
                self._forget(Period.of(place, length, self.course.prunings))
                self._project(self._allowed(self.course.projections))
            elif stage == "cool-down":
                if place == 0:
                    self._settle()
            else:
                self._project({"weights": START_BITS, "inputs": START_BITS})
            zero(self.module, self.groups, self.gone)
            apply(self.masks)
            if self.course.place(min(step, steps - 1))[0] == "joint":
                self._remember()
            if place == length - 1:
                log.info("recovery=geta: %s ends: %s", stage, self.told())

    def state(self) -> Record:
        """Return what the optimizer goes on with after a stop."""
        learned = [[each.detach().clone() for each in quantizer.parameters()] for quantizer in self._quantizers()]
        kept = {"gone": self.gone, "redundant": self.redundant, "before": self.before, "steps": self.steps_before}
        fixed = not any(each.requires_grad for each in self.learned())
        return {**kept, "learned": learned, "fixed": fixed}

    @torch.no_grad()
    def restore(self, state: Record) -> None:
        """Take over what `state` returned."""
        self.gone, self.redundant = state["gone"], state["redundant"]
        device = next(self.module.parameters()).device
        self.before, self.steps_before = ({name: value.to(device) for name, value in state[kept].items()}
                                          for kept in ("before", "steps"))  # fmt: skip
        for quantizer, values in zip(self._quantizers(), state["learned"], strict=True):
            for parameter, value in zip(quantizer.parameters(), values, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(not state["fixed"])

    def _quantizers(self) -> list[Learnable]:
        return [*self.weights.values(), *self.inputs.values()]

    def told(self) -> str:
        """Return how many channels are gone and how many bits there are, in short."""
        bits = [each.bits() for each in self.weights.values()]
        gone, channels = sum(map(len, self.gone.values())), sum(group.channels for group in self.groups)
        return f"{gone} of {channels} channels gone, {sum(bits) / len(bits):.2f} bits on average"

    # --- bits --------------------------------------------------------------------------------------------------------

    def _allowed(self, periods: int) -> dict[str, float]:
        """Return the most bits after so many projections, which are reached step by step."""
        share = periods / self.course.projections if self.rules.projection else 1.0
        ends = {"weights": self.wanted.most, "inputs": self.wanted.most_inputs}
        return {name: START_BITS - (START_BITS - end) * share for name, end in ends.items()}

    def _project(self, most: dict[str, float]) -> None:
        for name, each in (("weights", self.weights), ("inputs", self.inputs)):
            for quantizer in each.values():
                quantizer.keep_within(self.wanted.least, most[name])

    def _settle(self) -> None:
        """Fix a whole number of bits for each quantizer, which then learns no more."""
        for most, each in ((self.wanted.most, self.weights), (self.wanted.most_inputs, self.inputs)):
            for quantizer in each.values():
                bits = min(most, max(self.wanted.least, round(quantizer.bits())))
                quantizer.log_step.copy_(quantizer.log_step_at(bits))
        for parameter in self.learned():
            parameter.requires_grad_(False)
            parameter.grad = None

    # --- channels ----------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        """Keep what the next step of the joint stage begins with."""
        names = {part.parameter for group in self.groups for part in group.parts}
        self.before = {name: self.module.get_parameter(name).detach().clone() for name in names}
        self.steps_before = {name: each.log_step.detach().clone() for name, each in self.weights.items()}

    def _forget(self, period: Period) -> None:
        """Forget redundant channels a little more; after the last step of a period they are gone."""
        if period.step == 0:
            share = (period.number + 1) / self.course.prunings
            self._choose(round(self.channels * share) - sum(map(len, self.gone.values())))
        if self.rules.joint:
            for name, each in self.weights.items():
                each.log_step.copy_(self.steps_before[name])
        for group in self.groups:
            if self.redundant.get(group.root):
                self._forget_of(group, period)
        if period.is_last_step:
            for root, channels in self.redundant.items():
                self.gone[root] = [*self.gone.get(root, []), *channels]
            self.redundant = {}

    def _choose(self, count: int) -> None:
        """Take the channels with the least saliency as redundant; one of each group stays."""
        scores = [
            (value, group.root, channel)
            for group in self.groups
            for channel, value in enumerate(self._saliency(group))
            if channel not in self.gone.get(group.root, ())
        ]
        left = {group.root: group.channels - len(self.gone.get(group.root, ())) for group in self.groups}
        for _, root, channel in sorted(scores):
            if count <= 0:
                return
            if left[root] > 1:
                self.redundant.setdefault(root, []).append(channel)
                left[root], count = left[root] - 1, count - 1

    def _saliency(self, group: Group) -> list[float]:
        """Return what each channel is worth: its size, and what the loss says of it, each in the mean one."""
        values = {part.parameter: self.module.get_parameter(part.parameter) for part in group.parts}
        size = group.sums({name: value.detach().square() for name, value in values.items()}).sqrt()
        worth = group.sums(
            {
                name: value.detach() * value.grad if value.grad is not None else torch.zeros_like(value)
                for name, value in values.items()
            }
        ).abs()
        whole: list[float] = sum(each / each.mean().clamp_min(1e-12) for each in (size, worth)).tolist()  # type: ignore[union-attr]
        return whole

    def _forget_of(self, group: Group, period: Period) -> None:
        """Do equations 6, 13 and 14 for the redundant channels of a group."""
        looks = [self._look(group, part) for part in group.parts]
        way, clipped = torch.cat([look.way for look in looks]), torch.cat([look.clipped for look in looks])
        left = period.steps - period.step
        rate = forget_rate(way, clipped, left) if self.rules.joint else 1 / left
        for look in looks:
            if look.quantizer and self.rules.joint:
                free = step_size(look.way, look.rest, rate)
                lowest = look.quantizer.log_step_at(self.wanted.least)
                look.quantizer.log_step.copy_(lowest if free is None else torch.tensor(free).log().to(lowest))
                look.quantizer.keep_within(self.wanted.least, self.wanted.most)
            before, rows = look.before, look.rows
            quantized = look.quantizer.codes(before) * look.quantizer.value if look.quantizer else before
            look.parameter[rows] = 0 if period.is_last_step or not rate else look.parameter[rows] - rate * quantized

    def _look(self, group: Group, part: Part) -> Look:
        """Look at the redundant rows of a parameter: how the optimizer moved them, and how they are rounded."""
        rows, parameter = group.rows(part, self.redundant[group.root]), self.module.get_parameter(part.parameter)
        before, quantizer = self.before[part.parameter][rows], self.weights.get(part.parameter)
        way = before - parameter.detach()[rows]
        clipped, rest = before, torch.zeros_like(before)
        if quantizer:
            clipped, rest = (before.sign() * each for each in (quantizer.clipped(before), quantizer.residual(before)))
        return Look(parameter, rows, before, quantizer, way.flatten(), clipped.flatten(), rest.flatten())


@dataclass(frozen=True)
class Look:
    """The redundant rows of a parameter: `way` is what the optimizer took off them, its rate times its direction."""

    parameter: nn.Parameter
    rows: Tensor
    before: Tensor
    quantizer: Learnable | None
    way: Tensor
    clipped: Tensor
    rest: Tensor


def forget_rate(way: Tensor, clipped: Tensor, left: int) -> float:
    """Return the forget rate of equation 13, at most 1; 0 says that so little is left that all of it goes at once.

    `left` are the steps of the period with this one. Equation 13's rate times gradient is the `way` of the optimizer.
    """
    if float(clipped.abs().mean()) <= EPSILON:
        return 0.0
    along = float(torch.dot(way, clipped))
    if along >= 0:
        return 1 / left
    return min(1.0, (1 - ETA) * float(way.square().sum()) / -along)


def step_size(way: Tensor, rest: Tensor, rate: float) -> float | None:
    """Return the step of equation 14, or None where any step leads down, so that the one of the least bits may be."""
    along = float(torch.dot(way, rest))
    if along >= 0 or rate == 0:
        return None
    return XI * ETA * float(way.square().sum()) / (rate * -along)
