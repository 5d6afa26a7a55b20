"""Rounding for a layer's output: against brute force where that is possible, and against the nearest integers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from pq_sweep.compress.rounding import descended, error, nearest, one_after_the_other, rounded

Array = NDArray[np.float64]


def problem(seed: int, inputs: int, rows: int = 10, samples: int = 40) -> tuple[Array, Array]:
    """Return rows of weights, and the moments of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    given = random.standard_normal((samples, inputs)) @ random.standard_normal((inputs, inputs))
    return random.standard_normal((rows, inputs)), given.T @ given / samples + 1e-6 * np.eye(inputs)


def least(rows: Array, hessian: Array, scale: Array, low: int, high: int) -> Array:
    """Try all codes."""
    grid = np.array(list(itertools.product(range(low, high + 1), repeat=rows.shape[1])), float)
    return np.array([error(row - grid * step, hessian).min() for row, step in zip(rows, scale, strict=True)])


@pytest.mark.parametrize(("inputs", "bits"), [(1, 2), (4, 2), (6, 2), (4, 3)])
def test_codes_are_within_limits_and_between_the_best_and_the_nearest(inputs: int, bits: int) -> None:
    rows, hessian = problem(inputs, inputs)
    scale, (low, high) = np.full((10, 1), 0.8), (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    codes = rounded(rows, hessian, scale, low, high)
    best = least(rows, hessian, scale, low, high)
    found, plain = (error(rows - z * scale, hessian) for z in (codes, nearest(rows, scale, low, high)))

    assert (codes == np.rint(codes)).all()
    assert codes.min() >= low
    assert codes.max() <= high
    assert (best <= found * (1 + 1e-12)).all()
    assert (found <= plain * (1 + 1e-12)).all()
    assert inputs == 1 or found.mean() < (0.6 * plain.mean() + 0.4 * best.mean())


def test_no_change_of_one_code_makes_it_better() -> None:
    rows, hessian = problem(0, 70)
    scale = np.full((10, 1), 0.5)
    codes = rounded(rows, hessian, scale, -8, 7)
    found = error(rows - codes * scale, hessian)
    for column, step in itertools.product(range(70), (-1, 1)):
        other = codes.copy()
        other[:, column] = np.clip(other[:, column] + step, -8, 7)
        assert (error(rows - other * scale, hessian) >= found * (1 - 1e-9)).all()


def test_blocks_of_inputs_change_no_code() -> None:
    """Errors are passed on in blocks of 64; one by one in plain arithmetic gives the same."""
    rows, hessian = problem(1, 100, rows=5, samples=300)
    scale, order = np.full((5, 1), 0.3), np.argsort(-np.diag(hessian), kind="stable")
    weights, moments, codes = rows[:, order].copy(), hessian[np.ix_(order, order)], np.zeros((5, 100))
    for place in range(100):  # GPTQ as it is written: what is left makes up for the error
        codes[:, place] = np.clip(np.rint(weights[:, place] / 0.3), -8, 7)
        inverse = np.linalg.inv(moments[place:, place:])
        wrong = (weights[:, place] - codes[:, place] * 0.3) / inverse[0, 0]
        weights[:, place:] -= wrong[:, None] * inverse[0]

    assert (one_after_the_other(rows, hessian, scale, -8, 7)[:, order] == codes).all()


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    rows, _ = problem(2, 20)
    scale = np.full((10, 1), 0.4)

    assert (rounded(rows, np.diag(np.arange(1.0, 21)), scale, -4, 3) == nearest(rows, scale, -4, 3)).all()


def test_a_scale_for_each_weight_is_taken() -> None:
    rows, hessian = problem(3, 12)
    scale = np.repeat([[0.2, 0.9]], 6, 1) * np.ones((10, 1))
    codes = rounded(rows, hessian, scale, -4, 3)
    plain = nearest(rows, scale, -4, 3)

    assert (error(rows - codes * scale, hessian) <= error(rows - plain * scale, hessian) * (1 + 1e-12)).all()
    assert (codes != plain).any()


def test_what_is_zero_stays_zero() -> None:
    rows, hessian = problem(4, 30)
    rows[:, ::3], rows[2] = 0, 0
    codes = rounded(rows, hessian, np.full((10, 1), 0.4), -4, 3)

    assert not codes[:, ::3].any()
    assert not codes[2].any()
    assert codes[0].any()


def test_descent_ends_where_it_starts_if_that_is_best() -> None:
    hessian = np.eye(3)
    codes = descended(np.array([[0.4, -1.2, 2.0]]), hessian, np.ones((1, 1)), -2, 1, np.array([[0.0, -1.0, 1.0]]))

    assert codes.tolist() == [[0, -1, 1]]
