"""The bound on rounding: below what brute force finds, equal to what another solver of the same program finds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pq_sweep.compress.rounding import error
from pq_sweep.study.layers.limits import Problem, bounded, certified, sampled

Array = NDArray[np.float64]


def layer(seed: int, inputs: int, rows: int, samples: int = 30) -> tuple[Array, Array]:
    """Return rows of weights and moments of inputs that depend on each other."""
    random = np.random.default_rng(seed)
    given = random.standard_normal((samples, inputs)) @ (np.eye(inputs) + random.standard_normal((inputs, inputs)) / 2)
    return random.standard_normal((rows, inputs)), given.T @ given


def limits_of(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def optimum(rows: Array, hessian: Array, scale: Array, bits: int) -> Array:
    """Try all codes."""
    low, high = limits_of(bits)
    grid = np.array(list(itertools.product(range(low, high + 1), repeat=rows.shape[1])), np.float64)
    squares = np.einsum("gi,ij,gj->g", grid, hessian, grid, optimize=True)
    return np.array([
        step**2 * (squares - 2 * grid @ (hessian @ (row / step))).min() + row @ hessian @ row
        for row, (step,) in zip(rows, scale, strict=True)
    ])  # fmt: skip


# 200 problems: ten rows for each of twenty layers.
CASES = [(inputs, bits, seed) for inputs, bits, seeds in [(1, 2, 1), (1, 3, 1), (2, 3, 2), (3, 2, 2), (4, 3, 4),
         (5, 3, 2), (6, 2, 4), (8, 2, 4)] for seed in range(seeds)]  # fmt: skip


@pytest.mark.parametrize(("inputs", "bits", "seed"), CASES)
def test_bound_optimum_and_heuristic_are_in_order(inputs: int, bits: int, seed: int) -> None:
    rows, hessian = layer(seed, inputs, 10, samples=4 if seed == 1 else 30)  # of four samples the moments are singular
    scale = {2: 1.05, 3: 0.6}[bits] * np.sqrt(np.square(rows).mean(1, keepdims=True))
    bound = bounded(rows, hessian, scale, *limits_of(bits))
    best = optimum(rows, hessian, scale, bits)
    definite = hessian + 1e-9 * np.trace(hessian) * np.eye(inputs)
    codes = sampled(rows, definite, scale, *limits_of(bits), bound, samples=10)
    found = error(rows - codes * scale, hessian)

    unit = np.trace(hessian) * scale[:, 0] ** 2
    assert (bound.error >= 0).all()
    assert (bound.error <= best + 1e-12 * unit).all()
    assert (best <= found + 1e-9 * unit).all()
    assert seed == 1 or found.mean() <= 1.6 * best.mean() + 1e-6 * unit.mean()


def test_there_are_two_hundred_problems() -> None:
    assert len(CASES) == 20


def test_any_multipliers_give_a_bound() -> None:
    rows, hessian = layer(0, 5, 20)
    scale, random = np.full((20, 1), 1.05), np.random.default_rng(0)
    problem, best = Problem.of(rows, hessian, scale, -2, 1), optimum(rows, hessian, scale, 2)
    seen = np.zeros(20)
    for size in (1e-9, 1e-3, 0.1, 1.0, 1e6):
        multipliers = size * random.exponential(size=(20, 10)) * np.repeat([1, random.choice(2)], 5)
        found = certified(problem, multipliers) * problem.unit
        seen = np.maximum(seen, found)
        assert (found <= best * (1 + 1e-12)).all()
    assert (certified(problem, -np.ones((20, 10))) * problem.unit <= best).all()
    assert (seen > 0).any()


def other_solver(problem: Problem, row: int) -> float:
    """Solve the same semidefinite program with Clarabel."""
    clarabel = pytest.importorskip("clarabel", reason="pip install clarabel")
    from scipy import sparse

    offset, low, high = problem.offset[row], problem.low[row], problem.high[row]
    width = len(offset)
    half = -problem.moments @ offset
    entries = [(i, j) for j in range(width + 1) for i in range(j + 1)]  # the upper triangle, column by column
    right, left = np.zeros(len(entries)), sparse.lil_matrix((len(entries), 2 * width + 1))
    for place, (i, j) in enumerate(entries):
        weight = 1 if i == j else np.sqrt(2)
        if j < width:
            right[place] = weight * problem.moments[i, j]
            if i == j:
                left[place, i], left[place, width + i] = 1, -1
        elif i < width:
            right[place] = weight * half[i]
            left[place, i], left[place, width + i] = -weight / 2, weight * (low[i] + high[i]) / 2
        else:
            left[place, 2 * width] = -1
    left = sparse.vstack([left.tocsc(), -sparse.eye(2 * width, 2 * width + 1)]).tocsc()
    cones: list[Any] = [clarabel.PSDTriangleConeT(width + 1), clarabel.NonnegativeConeT(2 * width)]
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    gain = np.concatenate([np.zeros(width), -low * high, [1.0]])
    empty = sparse.csc_matrix((2 * width + 1, 2 * width + 1))
    solved = clarabel.DefaultSolver(empty, gain, left, np.r_[right, np.zeros(2 * width)], cones, settings).solve()
    return float(offset @ problem.moments @ offset - solved.obj_val)


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "bits"), [(1, 2), (7, 2), (7, 3), (20, 4), (36, 2)])
def test_another_solver_agrees(inputs: int, bits: int) -> None:
    rows, hessian = layer(inputs, inputs, 3, samples=80)
    scale = np.full((3, 1), {2: 1.05, 3: 0.6, 4: 0.34}[bits])
    problem = Problem.of(rows, hessian, scale, *limits_of(bits))
    found = bounded(rows, hessian, scale, *limits_of(bits)).error / problem.unit

    assert found == pytest.approx([other_solver(problem, row) for row in range(3)], rel=1e-5)


def test_inputs_without_signal_and_rows_of_zeros_cost_nothing() -> None:
    rows, hessian = layer(0, 6, 4)
    rows[1], hessian[2], hessian[:, 2] = 0, 0, 0
    scale = np.full((4, 1), 1.05)
    bound = bounded(rows, hessian, scale, -2, 1)
    without = bounded(np.delete(rows, 2, 1), np.delete(np.delete(hessian, 2, 0), 2, 1), scale, -2, 1)

    assert bound.error == pytest.approx(without.error, rel=1e-9)
    assert bound.error[1] == 0
    assert not bounded(rows, np.zeros((6, 6)), scale, -2, 1).error.any()
