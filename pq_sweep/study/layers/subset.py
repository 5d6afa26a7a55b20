"""The best weights of a row to keep, proven: branch and bound over the steps of Optimal Brain Surgeon.

A node has weights that are gone, weights that stay for good and free ones. Dropping a free weight j from there costs
l_j = v_j^2 / G_jj, where v are the weights with the others making up for those that are gone, and G is the inverse of H
without those. Dropping a set S costs v_S G_SS^-1 v_S'. That is at least the largest l_j of S, and at least the sum of
its l_j divided by the largest eigenvalue of the correlations of G among the free weights.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pq_sweep.compress.obs import greedy

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

AT_ONCE = 1 << 21  # entries of the inverses that are worked on at a time
ALIKE = 1e-9  # share by which a set has to be better to count as better


@dataclass(frozen=True)
class Subset:
    """Which weights of a row stay, the error, and whether no other choice of as many has a smaller one."""

    kept: Mask
    error: float
    proven: bool
    seconds: float
    nodes: int


@dataclass(frozen=True)
class _Nodes:
    inverse: Array
    values: Array
    cost: Array
    free: Mask
    gone: Mask

    def __len__(self) -> int:
        return len(self.cost)

    def of(self, rows: Any) -> _Nodes:
        return _Nodes(*(getattr(self, field.name)[rows] for field in fields(self)))

    def and_(self, others: _Nodes) -> _Nodes:
        return _Nodes(*(np.concatenate([getattr(self, f.name), getattr(others, f.name)]) for f in fields(self)))

    def losses(self) -> Array:
        """Return what dropping each free weight costs (N, K), infinite for the others."""
        own = np.einsum("nkk->nk", self.inverse)
        return np.where(self.free, self.values**2 / np.where(self.free, own, 1), np.inf)


def best_subset(row: Array, hessian: Array, keep: int, limit_s: float) -> Subset:
    """Find the `keep` weights of a row (K,) with which its output can be closest to the whole row's.

    `hessian` (K, K) is positive definite. After `limit_s` seconds the best found so far is returned as not proven.
    """
    start, drop = time.perf_counter(), len(row) - keep
    unit = float(row @ hessian @ row)
    if drop <= 0 or unit <= 0:
        return Subset(np.arange(len(row)) >= max(drop, 0), 0.0, True, time.perf_counter() - start, 0)
    places, costs = greedy(row[None], hessian / unit, drop)
    best, gone = float(costs.sum()), np.isin(np.arange(len(row)), places)
    nothing = np.zeros((1, len(row)), bool)
    inverse: Array = np.asarray(np.linalg.inv(hessian / unit), dtype=float)
    stack, nodes = [_Nodes(inverse[None], row[None], np.zeros(1), ~nothing, nothing)], 0
    most = max(1, AT_ONCE // row.size**2)
    while stack and time.perf_counter() - start < limit_s:
        here = stack.pop()
        if len(here) > most:
            stack.append(here.of(slice(None, -most)))
            here = here.of(slice(-most, None))
        nodes += len(here)
        here, found, places_found = _looked_at(here, drop, best)
        if found < best:
            best, gone = found, places_found
        if len(here):
            stack.append(_children(here, drop))
    return Subset(~gone, best * unit, not stack, time.perf_counter() - start, nodes)


def _looked_at(here: _Nodes, drop: int, best: float) -> tuple[_Nodes, float, Mask]:
    """Return the nodes below which something better may be, and the best set that is found at once.

    That is each node's cheapest weights where one is left to drop, which is exact.
    """
    todo, losses = drop - here.gone.sum(1), here.losses()
    order = np.sort(losses, 1)
    last = np.where(todo == 1, here.cost + order[:, 0], math.inf)
    first = int(last.argmin())
    gone = here.gone[first].copy()
    gone[losses[first].argmin()] = True
    found = float(last[first])
    best = min(best, found) * (1 - ALIKE)
    each = np.arange(len(here))
    dearest = order[each, todo - 1]
    together = np.where(np.isinf(order), 0, order).cumsum(1)[each, todo - 1] / _largest(here)
    # a free weight that alone costs too much stays for good
    free = here.free & (here.cost[:, None] + losses < best)
    open_ = (todo > 1) & (here.cost + np.maximum(dearest, together) < best) & (free.sum(1) >= todo)
    return _Nodes(here.inverse, here.values, here.cost, free, here.gone).of(open_), found, gone


def _largest(here: _Nodes) -> Array:
    """Return what no eigenvalue of the correlations of the free weights exceeds (N,)."""
    own = np.einsum("nkk->nk", here.inverse)
    size = np.where(here.free, 1 / np.sqrt(np.where(here.free, own, 1)), 0)
    alike = here.inverse * size[:, :, None] * size[:, None, :]
    squared = alike @ alike
    fourth = np.sqrt(np.sqrt(np.square(squared).sum((1, 2))))
    found: Array = np.maximum(np.minimum(np.abs(alike).sum(2).max(1), fourth), 1)
    return found * (1 + 1e-12)


def _children(here: _Nodes, drop: int) -> _Nodes:
    """Return two nodes for each: the weight that costs most stays for good, or goes."""
    each = np.arange(len(here))
    losses = here.losses()
    place = np.where(here.free, losses, -1).argmax(1)
    free, gone = here.free.copy(), here.gone.copy()
    free[each, place], gone[each, place] = False, True
    column, pivot = here.inverse[each, :, place], here.inverse[each, place, place]
    values = here.values - column * (here.values[each, place] / pivot)[:, None]
    inverse = here.inverse - column[:, :, None] * (column / pivot[:, None])[:, None, :]
    values[each, place] = 0
    dropped = _Nodes(inverse, values, here.cost + losses[each, place], free, gone)
    enough = free.sum(1) >= drop - here.gone.sum(1)
    return dropped.and_(_Nodes(here.inverse, here.values, here.cost, free, here.gone).of(enough))
