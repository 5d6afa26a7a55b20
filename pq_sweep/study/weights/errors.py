"""What quantizing and pruning cost weights of any distribution, known by a formula or as a tensor.

Kuzmin et al., *Pruning vs Quantization: Which is Better?*, 2023, section 3 and appendix A. Codes are the integers from
-2^(bits-1) to 2^(bits-1)-1, of which a positive step makes levels. A weight takes the nearest level, so what lies
beyond the outermost ones is clipped. With the codes q of the weights w, the mean squared error is

    E[w^2] - 2 step E[q w] + step^2 E[q^2],

and both expectations follow from how much of the distribution, and of its mean, lies below each midpoint of two levels.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FULL_BITS = 16  # of the format that sizes are relative to
LOSSLESS_DB = 200.0  # above it is only the rounding of float64
COARSE, FINE, ZOOMS = 65, 17, 4  # steps that are tried over the whole range, and around the best of them
SETTLING = 4  # times that the best step for given codes, and the codes for given steps, are taken in turn


class Distribution(Protocol):
    """Weights: the mean of their squares, their mean, the median of their magnitudes, and the largest of these."""

    power: float
    mean: float
    middle: float
    largest: float

    def below(self, x: Floats) -> tuple[Floats, Floats]:
        """Return the share of the weights below each x, and what they contribute to the mean."""
        ...

    def smallest(self, share: float) -> float:
        """Return what the given share of weights, those with the smallest magnitudes, contributes to `power`."""
        ...


def codes(bits: int) -> Floats:
    """Return the integers that stand for weights, as floating point numbers."""
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=np.float64)


def products(weights: Distribution, steps: Floats, bits: int) -> tuple[Floats, Floats]:
    """Return the means of code times weight and of the squared code for each step."""
    integers = codes(bits)
    share, mean = weights.below(steps[:, None] * (integers[1:] - 0.5))
    shares = np.diff(share, prepend=0.0, append=1.0)
    means = np.diff(mean, prepend=0.0, append=weights.mean)
    return means @ integers, shares @ integers**2


def quantization_errors(weights: Distribution, steps: Floats, bits: int) -> Floats:
    """Return the mean squared error of weights quantized by each step."""
    crossed, squared = products(weights, steps, bits)
    found: Floats = weights.power - 2 * steps * crossed + steps**2 * squared
    return found


def best_step(weights: Distribution, bits: int) -> float:
    """Return the step of the smallest error.

    It lies between half the median magnitude over 2^(bits-1), up to which the error falls, since at least half of the
    weights are clipped at most halfway, and the largest magnitude. Steps are tried over this range and then ever closer
    around the best; at last the step that is best for given codes is taken in turn with the codes.
    """
    steps = np.geomspace(weights.middle / 2**bits, weights.largest, COARSE)
    for _ in range(ZOOMS):
        at = int(np.argmin(quantization_errors(weights, steps, bits)))
        steps = np.geomspace(steps[max(at - 1, 0)], steps[min(at + 1, len(steps) - 1)], FINE)
    step = steps[[int(np.argmin(quantization_errors(weights, steps, bits)))]]
    for _ in range(SETTLING):
        crossed, squared = products(weights, step, bits)
        step = crossed / squared
    return float(step[0])


def quantization_db(weights: Distribution, bits: int) -> float:
    """Return the signal-to-noise ratio of weights quantized with the best step, in dB."""
    step = np.array([best_step(weights, bits)])
    return decibels(weights.power, float(quantization_errors(weights, step, bits)[0]))


def pruning_db(weights: Distribution, bits: int) -> float:
    """Return the signal-to-noise ratio of weights of which the largest magnitudes stay, bits of every 16, in dB."""
    return decibels(weights.power, weights.smallest(1 - bits / FULL_BITS))


def zeros(weights: Distribution, step: float) -> float:
    """Return the share of weights that a step makes zero."""
    share, _ = weights.below(np.array([-step / 2, step / 2]))
    return float(share[1] - share[0])


def decibels(power: float, error: float) -> float:
    """Return a signal-to-noise ratio in dB; infinity stands for no loss beyond the rounding of float64."""
    found = 10 * math.log10(power / error) if error > 0 else math.inf
    return found if found < LOSSLESS_DB else math.inf
