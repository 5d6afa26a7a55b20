"""Distributions whose integrals have closed forms: the normal one, and Student's t with two degrees of freedom."""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from pq_sweep.study.weights.errors import Floats, pruning_db, quantization_db

TAIL = 40.0  # beyond it lies nothing of a normal distribution in float64
WIDEST = 1e6  # range of a truncated t whose kurtosis is far above that of any tensor
KURTOSES = (1.9, 1000.0)  # over which the t is drawn; that of a range of nearly nothing, a uniform one, is 1.8


class Normal:
    """The standard normal distribution."""

    power, mean, largest = 1.0, 0.0, 8.0
    middle = float(ndtri(0.75))

    def below(self, x: Floats) -> tuple[Floats, Floats]:
        """Return P(w < x) and the mean that lies below x."""
        x = np.clip(x, -TAIL, TAIL)
        return ndtr(x), -density(x)

    def smallest(self, share: float) -> float:
        """Return the power of the weights between -t and t, which are the given share."""
        limit = self.limit(share)
        return share - 2 * limit * float(density(np.array(limit)))

    def limit(self, share: float) -> float:
        """Return the t between whose negative and itself a share of the weights lies."""
        return float(ndtri(0.5 + share / 2))


def density(x: Floats) -> Floats:
    """Return the density of the standard normal distribution."""
    found: Floats = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return found


class TruncatedT:
    """Student's t with two degrees of freedom between -reach and reach; its density falls with the third power.

    With s = sqrt(2 + x^2), the antiderivatives of p, x p, x^2 p and x^4 p are x / 2s, -1 / s, asinh(x / sqrt 2) - x / s
    and x s / 2 - 3 asinh(x / sqrt 2) + 2 x / s, before all is divided by what lies in the range.
    """

    mean = 0.0

    def __init__(self, reach: float) -> None:
        self.largest = reach
        self.whole = reach / _root(reach)  # what of the untruncated distribution lies in the range
        self.power = 2 * _second(reach) / self.whole
        self.middle = self.limit(0.5)
        self.kurtosis = 2 * _fourth(reach) / self.whole / self.power**2

    def below(self, x: Floats) -> tuple[Floats, Floats]:
        """Return P(w < x) and the mean that lies below x."""
        x = np.clip(x, -self.largest, self.largest)
        s = np.sqrt(2 + x**2)
        return 0.5 + x / (2 * s) / self.whole, (1 / _root(self.largest) - 1 / s) / self.whole

    def smallest(self, share: float) -> float:
        """Return the power of the weights between -t and t, which are the given share."""
        return 2 * _second(self.limit(share)) / self.whole

    def limit(self, share: float) -> float:
        """Return the t between whose negative and itself a share of the weights lies."""
        ratio = share * self.whole
        return ratio * math.sqrt(2 / (1 - ratio**2))


def _root(x: float) -> float:
    return math.sqrt(2 + x * x)


def _second(x: float) -> float:
    return math.asinh(x / math.sqrt(2)) - x / _root(x)


def _fourth(x: float) -> float:
    return x * _root(x) / 2 - 3 * math.asinh(x / math.sqrt(2)) + 2 * x / _root(x)


def t_of_kurtosis(kurtosis: float) -> TruncatedT:
    """Return the truncated t of a kurtosis, which grows with the range from 1.8 on."""

    def above(log_reach: float) -> float:
        return math.log(TruncatedT(math.exp(log_reach)).kurtosis / kurtosis)

    return TruncatedT(math.exp(brentq(above, math.log(0.1), math.log(WIDEST))))


def overtaking_kurtosis(bits: int) -> float:
    """Return the kurtosis of the truncated t from which on pruning keeps more than quantization of the same size."""

    def ahead(log_reach: float) -> float:
        weights = TruncatedT(math.exp(log_reach))
        return pruning_db(weights, bits) - quantization_db(weights, bits)

    return TruncatedT(math.exp(brentq(ahead, math.log(2), math.log(1e4), xtol=1e-7))).kurtosis
