"""Errors of distributions in closed form: the figures of the paper, other ways to compute them, and sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import t as student

from pq_sweep.study.weights.distributions import Normal, TruncatedT, overtaking_kurtosis, t_of_kurtosis
from pq_sweep.study.weights.errors import (
    Distribution,
    best_step,
    codes,
    pruning_db,
    quantization_db,
    quantization_errors,
    zeros,
)

BITS = range(2, 9)
# Of a standard normal distribution: optimal step, dB of quantization, share of zeros in %, dB of pruning to bits/16.
NORMAL = {
    2: (1.0484, 8.26, 39.99, 3.03),
    3: (0.6018, 13.91, 23.65, 4.30),
    4: (0.3386, 19.26, 13.44, 5.58),
    5: (0.1888, 24.53, 7.52, 6.91),
    6: (0.1042, 29.82, 4.15, 8.31),
    7: (0.0569, 35.16, 2.27, 9.82),
    8: (0.0308, 40.57, 1.23, 11.47),
}
QUANTIZED_T = (4.94, 8.36, 12.39, 17.15, 22.44, 28.05, 33.86)  # cut at 20, in dB
PRUNED_T = (6.96, 8.68, 10.27, 11.82, 13.40, 15.05, 16.81)
OVERTAKING = (8.87, 15.99, 28.35, 51.77, 97.71, 189.14, 370.98)


@pytest.mark.parametrize("bits", BITS)
def test_normal_weights(bits: int) -> None:
    step = best_step(Normal(), bits)
    found = step, quantization_db(Normal(), bits), 100 * zeros(Normal(), step), pruning_db(Normal(), bits)
    assert found == pytest.approx(NORMAL[bits], abs=0.005)
    assert step == pytest.approx(NORMAL[bits][0], abs=0.00005)


@pytest.mark.parametrize(("bits", "quantized", "pruned"), [*zip(BITS, QUANTIZED_T, PRUNED_T, strict=True)])
def test_heavy_tails(bits: int, quantized: float, pruned: float) -> None:
    weights = TruncatedT(20)
    assert (quantization_db(weights, bits), pruning_db(weights, bits)) == pytest.approx((quantized, pruned), abs=0.005)
    assert weights.kurtosis == pytest.approx(17.44, abs=0.005)


@pytest.mark.parametrize(("bits", "kurtosis"), [*zip(BITS, OVERTAKING, strict=True)])
def test_kurtosis_from_which_on_pruning_keeps_more(bits: int, kurtosis: float) -> None:
    assert overtaking_kurtosis(bits) == pytest.approx(kurtosis, abs=0.005)
    before, after = t_of_kurtosis(0.99 * kurtosis), t_of_kurtosis(1.01 * kurtosis)
    assert quantization_db(before, bits) > pruning_db(before, bits)
    assert quantization_db(after, bits) < pruning_db(after, bits)


@pytest.mark.parametrize("kurtosis", [1.81, 3.0, 17.0, 370.0, 1000.0])
def test_a_truncated_t_has_the_kurtosis_that_was_asked_for(kurtosis: float) -> None:
    weights = t_of_kurtosis(kurtosis)
    assert weights.kurtosis == pytest.approx(kurtosis, rel=1e-9)
    moments = [quad(lambda x, n=n: x**n * student.pdf(x, 2), 0, weights.largest, limit=500)[0] for n in (0, 2, 4)]
    assert moments[2] * moments[0] / moments[1] ** 2 == pytest.approx(kurtosis, rel=1e-6)
    assert weights.power == pytest.approx(moments[1] / moments[0], rel=1e-6)


@pytest.mark.parametrize("share", [0.125, 0.5, 0.875])
@pytest.mark.parametrize("weights", [Normal(), TruncatedT(20)], ids=["normal", "t"])
def test_a_limit_has_its_share_between(weights: Normal | TruncatedT, share: float) -> None:
    below, mean = weights.below(np.array([-weights.limit(share), weights.limit(share)]))
    assert below[1] - below[0] == pytest.approx(share)
    assert mean[0] == pytest.approx(mean[1])
    assert mean[0] < 0
    assert weights.below(np.array([-np.inf, np.inf]))[0].tolist() == pytest.approx([0, 1])


def drawn(weights: Normal | TruncatedT) -> np.ndarray:
    """Return a million random numbers of a distribution, by NumPy's own generators."""
    rng = np.random.default_rng(0)
    if isinstance(weights, Normal):
        return rng.standard_normal(1_000_000)
    values = rng.standard_t(2, 1_000_000)
    return values[np.abs(values) < weights.largest]


@pytest.mark.parametrize("weights", [Normal(), TruncatedT(20)], ids=["normal", "t"])
def test_sampling_agrees(weights: Normal | TruncatedT) -> None:
    values = drawn(weights)
    for bits in (2, 4, 8):
        step, integers = best_step(weights, bits), codes(bits)
        quantized = step * np.clip(np.rint(values / step), integers[0], integers[-1])
        kept = np.sort(np.abs(values))[: round((1 - bits / 16) * values.size)]
        found = [10 * math.log10(np.sum(values**2) / np.sum(lost**2)) for lost in (values - quantized, kept)]
        assert found == pytest.approx([quantization_db(weights, bits), pruning_db(weights, bits)], abs=0.06)
        assert np.mean(quantized == 0) == pytest.approx(zeros(weights, step), abs=0.003)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "weights", [Normal(), *map(TruncatedT, (1.0, 20.0, 1000.0))], ids=["normal", "1", "20", "1000"]
)
def test_no_step_is_better_than_the_best(weights: Distribution, bits: int) -> None:
    steps = np.geomspace(1e-4, 1, 5000) * weights.largest
    best = quantization_errors(weights, np.array([best_step(weights, bits)]), bits)[0]
    assert best <= quantization_errors(weights, steps, bits).min() * (1 + 1e-9)
