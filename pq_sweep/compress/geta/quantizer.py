"""Rounding by learned numbers: a step, the largest value and a power (section 3 of the paper).

All three are learned by the straight-through estimator. Step and largest value are learned as logarithms, so that they
stay above zero however fast they learn, and move in proportion to themselves at 16 bits as at 2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pq_sweep.compress.weight_only import Grid

TINY = 1e-12
POWERS = (0.5, 2.0)  # between which the power stays


class Learnable:
    """The rounding of one tensor: step d, largest value q_m and power t of equations 1 to 3.

    What is rounded becomes d times a whole number, whatever the power: d alone is the scale in a file.
    """

    signed = True  # one of the bits of equation 3 is for the sign

    def __init__(self, values: Tensor, bits: float) -> None:
        most = values.detach().abs().amax().float().clamp_min(TINY)
        self.log_most = nn.Parameter(most.log())
        self.power = nn.Parameter(torch.ones_like(most))
        self.log_step = nn.Parameter(self.log_step_at(bits))

    @property
    def value(self) -> Tensor:
        """Return the step."""
        return self.log_step.exp()

    @property
    def grid(self) -> Grid:
        """Return the integers of the nearest whole number of bits, as many below zero as above."""
        return Grid(max(2, round(self.bits())), narrow=True)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is learned."""
        return [self.log_step, self.log_most, self.power]

    def log_reach(self) -> Tensor:
        """Return the logarithm of the largest value that is rounded to, q_m to the power of t."""
        return self.power * self.log_most

    @torch.no_grad()
    def log_step_at(self, bits: float) -> Tensor:
        """Return the logarithm of the step of so many bits: equation 3, solved for d."""
        return self.log_reach() - math.log(2 ** (bits - self.signed) - 1)

    @torch.no_grad()
    def bits(self) -> float:
        """Return the bits of equation 3, which need not be whole."""
        return float(torch.log2((self.log_reach() - self.log_step).exp() + 1)) + self.signed

    @torch.no_grad()
    def keep_within(self, low: float, high: float) -> None:
        """Project the step onto those of a range of bits (algorithm 3), and the power onto its own range."""
        self.power.clamp_(*POWERS)
        self.log_step.clamp_(self.log_step_at(high), self.log_step_at(low))

    def clipped(self, values: Tensor) -> Tensor:
        """Return the magnitudes of values, raised and clipped (equation 10)."""
        magnitudes, most = values.detach().abs(), self.log_most.exp()
        raised = magnitudes.clamp_min(TINY) ** self.power
        return torch.where(magnitudes <= most, torch.where(magnitudes > 0, raised, 0), self.log_reach().exp())

    def residual(self, values: Tensor) -> Tensor:
        """Return how far magnitudes are rounded, in steps (equation 11)."""
        parts = self.clipped(values) / self.value
        return parts.round() - parts

    def rounded(self, values: Tensor) -> Tensor:
        """Return the values as multiples of the step; gradients pass the rounding, and stop where it clips."""
        parts, inside = self.clipped(values) / self.value, values.detach().abs() <= self.log_most.detach().exp()
        found = values.detach().sign() * self.value * (parts + (parts.round() - parts).detach())
        passes = torch.where(inside, values, values.detach())
        return found + (passes - passes.detach())

    @torch.no_grad()
    def codes(self, values: Tensor) -> Tensor:
        """Return the whole numbers that values are rounded to."""
        return values.sign() * (self.clipped(values) / self.value).round()


class Inputs(Learnable):
    """The rounding of what a layer takes: the power is one, as no file has another, and ends are those of integers."""

    def __init__(self, values: Tensor, bits: float) -> None:
        self.signed = bool((values < 0).any())
        super().__init__(values, bits)
        self.power.requires_grad_(False)

    @property
    def grid(self) -> Grid:
        """Return the integers of the nearest whole number of bits."""
        return Grid(max(2, round(self.bits())), signed=self.signed)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is learned."""
        return [self.log_step, self.log_most]

    def rounded(self, values: Tensor) -> Tensor:
        """Return the values as multiples of the step."""
        most = self.log_most.exp()
        low = -(most + self.value) if self.signed else torch.zeros_like(most)
        cut = torch.minimum(torch.maximum(values, low), most)
        parts = cut / self.value
        return (parts + (parts.round() - parts).detach()) * self.value
