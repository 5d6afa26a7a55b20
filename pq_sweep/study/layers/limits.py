"""What no rounding of a layer's weights can do better: a bound on the error, and a heuristic to set beside it.

A row of weights w becomes scale * z, z whole numbers from low to high, and the layer's output changes by
E = scale^2 (z - a) H (z - a)' with a = w / scale. With z = k + y, where k is a rounded down, y satisfies
y (y - 1) >= 0, as whole numbers do, and (y - l) (y - u) <= 0 for the limits l and u less k. For all multipliers
lam, mu >= 0 of these the minimum over real y of the Lagrangian is a bound on E. The largest such bound is a
semidefinite program (Park and Boyd, Optimization Letters 12, 2018; the box of the limits is added here), which is
solved by a primal-dual interior-point method (Helmberg, Rendl, Vanderbei and Wolkowicz, SIAM J. Optimization 6, 1996).
Whatever multipliers that finds, `certified` is a bound that holds.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from pq_sweep.compress.rounding import descended, error, nearest, rounded

Array = NDArray[np.float64]

STEPS = 60  # some fifteen to thirty are usual
CLOSE = 1e-6  # what may be left between the bound and the program's optimum, as a share of the bound
LEAST = 1e-9  # a bound of less than that, in units of the moments, is as good as none
START = (1e-6, 0.1)  # limits of the multipliers at the beginning, in units of the mean of H's diagonal
OF_THE_WAY = 0.9  # to the edge of what is allowed that a step goes at most
SMALLER, LITTLE_SMALLER = 0.1, 0.5  # share of the gap that a step aims at, and after a short step


@dataclass(frozen=True)
class Problem:
    """Rows in units of their codes: y is to be near `offset` (N, K) between `low` and `high` (N, K), all less `base`.

    `moments` (K, K) has a diagonal of mean 1, and an error in its units is `unit` (N,) times as large in those of E.
    """

    moments: Array
    offset: Array
    low: Array
    high: Array
    base: Array
    unit: Array

    def of_rows(self, rows: Any) -> Problem:
        """Return the problem of some rows."""
        parts = (self.offset, self.low, self.high, self.base, self.unit)
        return Problem(self.moments, *(part[rows] for part in parts))

    @classmethod
    def of(cls, rows: Array, hessian: Array, scale: Array, low: int, high: int) -> Problem:
        """Return the problem of `rows` (N, K) with a scale (N, 1) each, shifted to the codes below them."""
        exact = rows / scale
        base = np.clip(np.floor(exact), low, high - 1)
        mean = float(np.trace(hessian)) / len(hessian)
        return cls(hessian / mean, exact - base, low - base, high - base, base, mean * scale[:, 0] ** 2)


@dataclass(frozen=True)
class Bound:
    """A bound on the error of each row (N,), and the mean (N, K) and covariance (N, K, K) of the relaxed codes."""

    error: Array
    mean: Array
    spread: Array


@dataclass(frozen=True)
class _State:
    """Multipliers, and the second moments that relax y: matrices are of y and, last, of 1.

    `multipliers` (N, 2K+1) are lam, mu and the least value of the Lagrangian's y-part; `slack` (N, 2K) says how far the
    moments (N, K+1, K+1) are within the two conditions; `matrix` (N, K+1, K+1) is the Lagrangian's.
    """

    multipliers: Array
    matrix: Array
    moments: Array
    slack: Array

    def of_rows(self, rows: Any) -> _State:
        """Return the state of some rows."""
        return _State(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Any, others: _State) -> None:
        """Take over some rows from elsewhere."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(others, field.name)

    def gap(self) -> Array:
        """Return how far the bound is from the program's optimum at most (N,)."""
        product = np.einsum("nij,nij->n", self.matrix, self.moments)
        found: Array = product + (self.slack * self.multipliers[:, :-1]).sum(1)
        return found


def bounded(rows: Array, hessian: Array, scale: Array, low: int, high: int) -> Bound:
    """Return a bound on the least error of each of `rows` (N, K) that holds for every algorithm.

    `scale` is (N, 1), and there are at least four codes. Inputs without any signal, which cannot matter, are left out.
    """
    seen = np.diag(hessian) > 0
    mean, spread = np.zeros(rows.shape), np.zeros((*rows.shape, rows.shape[1]))
    if not seen.any():
        return Bound(np.zeros(len(rows)), mean, spread)
    problem = Problem.of(rows[:, seen], hessian[np.ix_(seen, seen)], scale, low, high)
    best, state = _solved(problem)
    middle = state.moments[:, :-1, -1]
    mean[:, seen] = problem.base + middle
    spread[np.ix_(np.arange(len(rows)), seen, seen)] = state.moments[:, :-1, :-1] - middle[:, :, None] * middle[:, None]
    return Bound(best * problem.unit, mean, spread)


def _solved(problem: Problem) -> tuple[Array, _State]:
    """Return the best bound found for each row, and the last state."""
    state, count = _start(problem), len(problem.offset)
    best, active, shares = np.zeros(count), np.arange(count), np.full(count, LITTLE_SMALLER)
    for _ in range(STEPS):
        length = _stepped(problem, state, active, shares)
        now = state.of_rows(active)
        best[active] = np.maximum(best[active], certified(problem.of_rows(active), now.multipliers[:, :-1]))
        shares[active] = np.where(length > OF_THE_WAY / 2, SMALLER, LITTLE_SMALLER)
        active = active[(now.gap() > CLOSE * np.maximum(best[active], LEAST)) & (length > 0)]
        if not len(active):
            break
    return best, state


def _stepped(problem: Problem, state: _State, rows: NDArray[np.intp], shares: Array) -> Array:
    """Go one step with these rows, and return how much of it could be gone.

    That is nothing for rows so near the edge that rounding decides, whose bounds found so far hold.
    """
    try:
        found, length = _step(problem.of_rows(rows), state.of_rows(rows), shares[rows])
    except np.linalg.LinAlgError:
        if len(rows) == 1:
            return np.zeros(1)
        halves = np.split(rows, [len(rows) // 2])
        return np.concatenate([_stepped(problem, state, half, shares) for half in halves])
    state.put(rows, found)
    return length


def certified(problem: Problem, multipliers: Array) -> Array:
    """Return for each row a bound that holds whatever the multipliers (N, 2K) are and however they were found.

    Of const + y M y' + 2 v y', the minimum is const - v M^-1 v'. M is factored less a small share of the unit matrix,
    more than rounding changes, so that M is positive definite if that succeeds. What rounding leaves of the solution is
    bounded by its residual, and that of the sums by their terms. Where nothing can be said the bound is 0.
    """
    multipliers = np.maximum(multipliers, 0)
    matrix, linear = _lagrangian(problem, multipliers)
    width = linear.shape[1]
    epsilon = width * float(np.finfo(float).eps)
    found = np.zeros(len(linear))
    for row, (here, half) in enumerate(zip(matrix, linear, strict=True)):
        least = 16 * epsilon * float(np.abs(here).sum(1).max())
        try:
            factor = cho_factor(here - 2 * least * np.eye(width), lower=True)
        except np.linalg.LinAlgError:
            continue
        solution = cho_solve(factor, half)
        rest = half - here @ solution
        offset, box = problem.offset[row], (multipliers[row, width:] * problem.low[row] * problem.high[row])
        terms = [offset * (problem.moments @ offset), box, -half * solution, -solution * rest]
        size = np.abs(offset) @ np.abs(problem.moments) @ np.abs(offset) + sum(np.abs(term).sum() for term in terms[1:])
        value = sum(term.sum() for term in terms) - rest @ rest / least - 64 * epsilon * size
        found[row] = max(value, 0.0)
    return found


def _lagrangian(problem: Problem, multipliers: Array) -> tuple[Array, Array]:
    """Return the matrix (N, K, K) and half the linear part (N, K) of the Lagrangian in y."""
    lam, mu = np.split(multipliers, 2, axis=1)
    matrix = problem.moments + (mu - lam)[:, :, None] * np.eye(lam.shape[1])
    linear = -problem.offset @ problem.moments + lam / 2 - mu * (problem.low + problem.high) / 2
    return matrix, linear


def _start(problem: Problem) -> _State:
    """Return a state well within all conditions: y with mean 1/2 and second moment 1, and equal multipliers."""
    count, width = problem.offset.shape
    start = float(np.clip(np.linalg.eigvalsh(problem.moments)[0] / 2, *START))
    multipliers = np.repeat([[start, 2 * start]], width, 1) * np.ones((count, 1))
    matrix, linear = _lagrangian(problem, multipliers)  # positive definite for any moments
    last = 2 * (linear * np.linalg.solve(matrix, linear[..., None])[..., 0]).sum(1) + start
    moments = np.full((count, width + 1, width + 1), 0.25) + 0.75 * np.eye(width + 1)
    moments[:, :-1, -1] = moments[:, -1, :-1] = 0.5
    whole = np.block([[matrix, linear[:, :, None]], [linear[:, None, :], last[:, None, None]]])
    slack = np.concatenate([np.full((count, width), 0.5), _within(problem, moments)], 1)
    return _State(np.concatenate([multipliers, last[:, None]], 1), whole, moments, slack)


def _within(problem: Problem, moments: Array) -> Array:
    """Return how far second moments of y are within the box: -(y - l) (y - u) on average (N, K)."""
    own, middle = np.einsum("nkk->nk", moments)[:, :-1], moments[:, :-1, -1]
    return (problem.low + problem.high) * middle - own - problem.low * problem.high


def _conditions(problem: Problem) -> tuple[Array, Array, Array]:
    """Return what the multipliers do to the matrix and to the bound: one adds e w' + w e' to the former.

    e is (K+1, 2K+1), w is (N, K+1, 2K+1) and the gain of the bound (N, 2K+1), a column for each multiplier.
    """
    count, width = problem.offset.shape
    unit, last = np.eye(width + 1), np.zeros((width + 1, 1))
    last[-1] = 1
    ends = np.concatenate([unit[:, :-1], unit[:, :-1], last], 1)
    others = np.concatenate([-unit[:, :-1], unit[:, :-1], last], 1)[None] / 2 * np.ones((count, 1, 1))
    others[:, -1, :width] += 0.5
    others[:, -1, width:-1] -= (problem.low + problem.high) / 2
    gain = np.concatenate([np.zeros((count, width)), problem.low * problem.high, -np.ones((count, 1))], 1)
    return ends, others, gain


def _step(problem: Problem, state: _State, share: Array) -> tuple[_State, Array]:
    """Go one step towards where all products of the conditions are `share` (N,) of what they are now on average.

    Returns the state there, and how much of the step to it could be gone (N,).
    """
    width = problem.offset.shape[1]
    ends, others, gain = _conditions(problem)
    target = share * state.gap() / (3 * width + 1)
    inverse = _symmetric(np.linalg.inv(state.matrix))

    def products(matrix: Array) -> tuple[Array, Array, Array]:
        half = matrix @ others
        return ends.T @ matrix @ ends, half.swapaxes(1, 2) @ ends, half.swapaxes(1, 2) @ others

    (ee, we, ww), (ie, iwe, iww) = products(state.moments), products(inverse)
    system = we * iwe.swapaxes(1, 2) + we.swapaxes(1, 2) * iwe + ww * ie + ee * iww
    sizes, slack = state.multipliers[:, :-1], state.slack
    np.einsum("nkk->nk", system)[:, :-1] += slack / sizes
    wanted = gain + target[:, None] * 2 * np.einsum("nkk->nk", iwe)
    wanted[:, :-1] += target[:, None] / sizes
    own = np.einsum("nkk->nk", system)
    if not (own > 0).all():
        raise np.linalg.LinAlgError
    scaled = 1 / np.sqrt(own)  # the multipliers may be of very different sizes
    even = system * scaled[:, :, None] * scaled[:, None, :]
    change = scaled * np.linalg.solve(even, (scaled * wanted)[..., None])[..., 0]
    matrix = 2 * _symmetric((others * change[:, None, :]) @ ends.T)
    moments = _symmetric(target[:, None, None] * inverse - state.moments - state.moments @ matrix @ inverse)
    slacks = target[:, None] / sizes - slack - slack * change[:, :-1] / sizes
    first = np.minimum(_way(state.matrix, matrix), _way_of_numbers(sizes, change[:, :-1]))[:, None]
    second = np.minimum(_way(state.moments, moments), _way_of_numbers(slack, slacks))[:, None]
    new = _State(
        state.multipliers + first * change,
        state.matrix + first[..., None] * matrix,
        state.moments + second[..., None] * moments,
        slack + second * slacks,
    )
    return new, np.minimum(first, second)[:, 0]


def _symmetric(matrix: Any) -> Array:
    return np.asarray((matrix + matrix.swapaxes(1, 2)) / 2, dtype=float)


def _way(matrix: Array, change: Array) -> Array:
    """Return how much of a change (N, K, K) leaves positive definite matrices positive definite, at most all."""
    factor = np.linalg.cholesky(matrix)
    half = np.linalg.solve(factor, change)
    least = np.linalg.eigvalsh(np.linalg.solve(factor, half.swapaxes(1, 2)))[:, 0]
    return np.minimum(1, OF_THE_WAY / np.maximum(-least, 1e-300))


def _way_of_numbers(values: Array, change: Array) -> Array:
    """Return how much of a change (N, K) leaves positive numbers positive, at most all."""
    return np.minimum(1, OF_THE_WAY / np.maximum((-change / values).max(1), 1e-300))


def sampled(
    rows: Array, hessian: Array, scale: Array, low: int, high: int, bound: Bound, *, samples: int, seed: int = 0
) -> Array:
    """Return codes (N, K): the best of the heuristic of jobs and of rounded samples of the relaxed codes, improved.

    Samples are normal with the mean and covariance that come with the bound (Park and Boyd 2018).
    """
    random = np.random.default_rng(seed)
    best = rounded(rows, hessian, scale, low, high)
    least = error(rows - best * scale, hessian)
    values, vectors = np.linalg.eigh(bound.spread)
    root = vectors * np.sqrt(np.maximum(values, 0))[:, None, :]
    for _ in range(samples):
        drawn = bound.mean + np.einsum("nij,nj->ni", root, random.standard_normal(rows.shape))
        codes = descended(rows, hessian, scale, low, high, nearest(drawn, np.ones((1, 1)), low, high))
        found = error(rows - codes * scale, hessian)
        best, least = np.where((found < least)[:, None], codes, best), np.minimum(found, least)
    return best
