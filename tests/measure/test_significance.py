"""How sure a drop of accuracy is: against a numeric solution of the same equation, and against simulated truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from pq_sweep.measure.significance import drop_interval, mcnemar

RUNS = 1000
# Images, and the shares of those that only the model before and only the one after gets right.
TRUTHS = [
    (500, 0.02, 0.01),
    (500, 0.05, 0.0),
    (200, 0.1, 0.1),
    (1000, 0.005, 0.005),
    (500, 0.3, 0.02),
    (100, 0.03, 0.02),
]


@pytest.mark.parametrize(("samples", "before", "after"), TRUTHS)
def test_the_interval_covers_the_truth_in_95_of_100_runs(samples: int, before: float, after: float) -> None:
    random = np.random.default_rng(0)
    covered = 0
    for only_before, only_after, _ in random.multinomial(samples, [before, after, 1 - before - after], RUNS):
        low, high = drop_interval(int(only_before), int(only_after), samples)
        covered += low <= before - after <= high

    assert 0.93 <= covered / RUNS <= 0.97


def numeric_score(drop: float, only_before: int, only_after: int, samples: int) -> float:
    """Return the score statistic at a true drop, with the likeliest share found by search."""
    rest = samples - only_before - only_after

    def unlikelihood(share: float) -> float:
        shares = (share + drop, share, 1 - 2 * share - drop)
        counts = (only_before, only_after, rest)
        return -sum(count * math.log(max(part, 1e-300)) for part, count in zip(shares, counts, strict=True) if count)

    bounds = (max(0.0, -drop), (1 - drop) / 2)
    share = minimize_scalar(unlikelihood, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = samples * (2 * share + drop - drop * drop)
    return (only_before - only_after - samples * drop) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("only_before", "only_after", "samples"), [(12, 2, 50), (5, 1, 500), (40, 35, 500), (3, 9, 100), (190, 2, 500)]
)
def test_the_ends_of_the_interval_are_where_the_score_is_a_quantile(
    only_before: int, only_after: int, samples: int
) -> None:
    low, high = drop_interval(only_before, only_after, samples)

    assert numeric_score(low, only_before, only_after, samples) == pytest.approx(norm.ppf(0.975), rel=1e-3)
    assert numeric_score(high, only_before, only_after, samples) == pytest.approx(norm.ppf(0.025), rel=1e-3)


def test_the_other_way_round_it_is_the_other_sign() -> None:
    low, high = drop_interval(12, 3, 200)
    assert drop_interval(3, 12, 200) == pytest.approx((-high, -low))


@pytest.mark.parametrize("samples", [1, 10, 500, 50_000])
def test_equal_answers_are_no_proof_of_equal_models(samples: int) -> None:
    low, high = drop_interval(0, 0, samples)
    # The score interval of a share of 0 reaches to z^2 / (n + z^2).
    z2 = norm.ppf(0.975) ** 2

    assert -low == pytest.approx(high)
    assert high == pytest.approx(z2 / (samples + z2), rel=1e-6)


@pytest.mark.parametrize(("only_before", "only_after", "end"), [(10, 0, 1.0), (0, 10, -1.0)])
def test_all_answers_lost_or_won_is_the_end_of_the_scale(only_before: int, only_after: int, end: float) -> None:
    interval = drop_interval(only_before, only_after, 10)

    assert end in interval
    assert 0 < abs(interval[0] if end == 1 else interval[1]) < 1


@pytest.mark.parametrize(
    ("only_before", "only_after", "expected"),
    # Twice the binomial tail: (1 + 14 + 91) / 2^14, and all of 5 on one side.
    [(12, 2, 2 * 106 / 2**14), (5, 0, 2 / 2**5), (7, 7, 1.0), (0, 0, 1.0)],
)
def test_mcnemar_is_twice_the_binomial_tail(only_before: int, only_after: int, expected: float) -> None:
    assert mcnemar(only_before, only_after) == pytest.approx(expected)
    assert mcnemar(only_after, only_before) == pytest.approx(expected)
