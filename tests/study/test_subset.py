"""Exact pruning: the set that brute force finds, or the best one so far, which is not called proven."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from pq_sweep.compress.obs import greedy, least_squares
from pq_sweep.study.layers.subset import best_subset

Array = NDArray[np.float64]


def row_and_moments(seed: int, inputs: int, alike: float = 1.0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    given = random.standard_normal((3 * inputs, inputs)) @ (
        np.eye(inputs) + alike * random.standard_normal((inputs, inputs))
    )
    return random.standard_normal(inputs), given.T @ given


def brute_force(row: Array, hessian: Array, keep: int) -> float:
    sets = np.array(list(itertools.combinations(range(len(row)), keep)))
    kept = np.zeros((len(sets), len(row)), bool)
    np.put_along_axis(kept, sets, True, 1)
    rows = least_squares(np.broadcast_to(row, kept.shape), hessian, kept) - row
    return float(np.einsum("nk,kl,nl->n", rows, hessian, rows).min())


@pytest.mark.parametrize("keep", [1, 3, 6, 9, 11])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_of_brute_force_is_found(seed: int, keep: int) -> None:
    row, hessian = row_and_moments(seed, 12)
    found = best_subset(row, hessian, keep, 60)
    fitted = least_squares(row[None], hessian, found.kept[None])[0] - row

    assert found.proven
    assert found.kept.sum() == keep
    assert found.error == pytest.approx(brute_force(row, hessian, keep), rel=1e-9)
    assert fitted @ hessian @ fitted == pytest.approx(found.error, rel=1e-7)
    assert found.error <= greedy(row[None], hessian, 12 - keep)[1].sum() * (1 + 1e-9)


def test_the_greedy_way_is_not_always_the_best() -> None:
    rows = [row_and_moments(seed, 12) for seed in range(4)]
    better = [greedy(row[None], moments, 6)[1].sum() / best_subset(row, moments, 6, 60).error for row, moments in rows]

    assert max(better) > 1.01


def test_a_time_limit_holds_and_nothing_is_called_proven() -> None:
    row, hessian = row_and_moments(0, 60)
    start = time.perf_counter()
    found = best_subset(row, hessian, 30, 0.2)

    assert not found.proven
    assert time.perf_counter() - start < 5
    assert found.kept.sum() == 30
    assert found.error <= greedy(row[None], hessian, 30)[1].sum() * (1 + 1e-9)


@pytest.mark.parametrize(("keep", "error"), [(5, 0), (9, 0), (0, 1)])
def test_everything_and_nothing_may_be_kept(keep: int, error: float) -> None:
    row, hessian = row_and_moments(0, 5)
    found = best_subset(row, hessian, keep, 10)

    assert found.proven
    assert found.kept.sum() == min(keep, 5)
    assert found.error == pytest.approx(error * row @ hessian @ row, rel=1e-9)


def test_one_weight_and_a_row_of_zeros() -> None:
    alone = best_subset(np.array([2.0]), np.array([[3.0]]), 0, 10)
    nothing = best_subset(np.zeros(4), np.eye(4), 2, 10)

    assert (alone.error, alone.proven) == (12.0, True)
    assert (nothing.error, nothing.proven, nothing.kept.sum()) == (0.0, True, 2)
