"""The weights of a tensor: their errors follow exactly from sorting them once and adding them up."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pq_sweep.study.weights.errors import Floats, best_step, codes, decibels, products

CROSSINGS = 2**15  # of a weight from one code to the next that are gone through to find the best step
WIDTHS = (1e9, 4.0, 2.0, 1.5, 1.25, 1.12, 1.06, 1.03, 1.015, 1.008, 1.004, 1.002, 1.001)  # around the best step so far

Places = NDArray[np.intp]
Span = tuple[Floats, Floats, Places, Places]


class Sample:
    """The weights of a tensor in the order of their size, as shares of the largest magnitude, in float64.

    So numbers of any size can be squared. At least one weight has to be other than zero.
    """

    def __init__(self, values: NDArray[np.floating]) -> None:
        flat = np.sort(values.ravel())
        self.unit = float(max(abs(flat[0]), abs(flat[-1])))
        self.values: Floats = flat.astype(np.float64) / self.unit
        middle = int(np.searchsorted(self.values, 0.0))
        self.sides = -self.values[:middle][::-1], self.values[middle:]  # magnitudes of the negative ones and the others
        magnitudes = np.concatenate(self.sides)
        magnitudes.sort(kind="stable")  # which merges two sorted halves
        self.largest = 1.0
        self.middle = float(np.median(magnitudes[np.searchsorted(magnitudes, 0.0, side="right") :]))
        self._sums, self._squares = (_running(each, len(flat)) for each in (self.values, magnitudes**2))
        self.mean, self.power = float(self._sums[-1]), float(self._squares[-1])

    def below(self, x: Floats) -> tuple[Floats, Floats]:
        """Return the share of the weights below each x, and what they contribute to the mean."""
        places = np.searchsorted(self.values, x)
        return places / len(self.values), self._sums[places]

    def smallest(self, share: float) -> float:
        """Return what the share of the smallest magnitudes contributes to the power, in whole weights, rounded up."""
        kept = int((1 - share) * len(self.values))
        return float(self._squares[len(self.values) - kept])

    def quantized(self, step: float, bits: int) -> tuple[float, float]:
        """Return the signal-to-noise ratio of the weights quantized by a step, in dB, and the share that become 0."""
        integers = codes(bits)
        rounded = np.clip(np.rint(self.values / step), integers[0], integers[-1])
        error = float(np.mean((self.values - step * rounded) ** 2))
        return decibels(self.power, error), float(np.mean(rounded == 0))

    def kurtosis(self) -> float | None:
        """Return the sample kurtosis, 3 for a normal distribution; None for weights that are all the same."""
        squares = (self.values - self.values.mean()) ** 2
        spread = float(squares.mean())
        return float(np.mean(squares**2)) / spread**2 if self.values[0] < self.values[-1] else None


def _running(values: Floats, count: int) -> Floats:
    """Return the sum of the first 0, 1, 2, ... values over the number of weights."""
    return np.concatenate([[0.0], np.cumsum(values)]) / count


def best_step_of(sample: Sample, bits: int) -> float:
    """Return the step of the smallest error: among all steps for a small tensor, for a large one among those nearby.

    As the step falls, one weight after another crosses to its next code. For given codes q the best step is the mean of
    q w over that of q^2, and takes the square of the first over the second off the error. So the best of all codes is
    found by adding up these changes in their order. Of a large tensor only the crossings around the best step that
    `best_step` finds are gone through; the error of so many weights changes little from one to the next.
    """
    found = best_step(sample, bits)
    low, high = sample.middle / 2**bits, sample.largest
    for width in WIDTHS:
        window = max(low, found / width), min(high, found * width)
        spans = [_span(*side, *window) for side in _sides(sample, bits)]
        if sum(int(ends.sum() - starts.sum()) for _, _, starts, ends in spans) <= CROSSINGS:
            return _best_crossing(sample, bits, window[1], spans)
    return found


def _sides(sample: Sample, bits: int) -> list[tuple[Floats, Floats]]:
    """Return the magnitudes of the weights below and above zero, and the places between their codes."""
    places = np.arange(2 ** (bits - 1)) + 0.5
    return [(sample.sides[0], places), (sample.sides[1], places[:-1])]


def _span(magnitudes: Floats, places: Floats, low: float, high: float) -> Span:
    """Return for each place between codes which weights are there as the step falls from high to low."""
    return magnitudes, places, np.searchsorted(magnitudes, low * places), np.searchsorted(magnitudes, high * places)


def _best_crossing(sample: Sample, bits: int, high: float, spans: list[Span]) -> float:
    """Return the best step for the best codes that weights have as the step falls from high through all crossings."""
    weights = np.concatenate([_in_spans(magnitudes, starts, ends) for magnitudes, _, starts, ends in spans])
    places = np.concatenate([np.repeat(places, ends - starts) for _, places, starts, ends in spans])
    order = np.argsort(-weights / places)
    (crossed,), (squared,) = products(sample, np.array([high]), bits)
    crossed = crossed + _running(weights[order], count=len(sample.values))
    squared = squared + _running(2 * places[order], count=len(sample.values))
    best = int(np.argmax(crossed**2 / squared))
    return float(crossed[best] / squared[best])


def _in_spans(values: Floats, starts: Places, ends: Places) -> Floats:
    """Return the values of many slices one after another."""
    return np.concatenate([values[start:end] for start, end in zip(starts, ends, strict=True)])
