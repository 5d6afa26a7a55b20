"""Optimal Brain Surgeon: which weights of a layer go, and how those that stay make up for them.

Setting the weight v_j of a row to zero and changing the others as is best costs v_j^2 / G_jj, where G is the inverse of
H = X X', the products of the layer's inputs (Hassibi and Stork 1993). Dropping the cheapest, one after the other, is
OBC's way (Frantar and Alistarh 2022, arXiv 2208.11580). G is then another one for each row, which takes rows * inputs^3
steps. Wide layers lose their weights in rounds instead, and all rows share G: those that are cheapest go together, and
what stays is fitted again by least squares. That comes within .5 dB of one after the other on layers where both can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pq_sweep.compress.moments import Moments

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

ENTRIES_AT_ONCE = 1 << 20  # of inverses, few enough for a processor's cache
GREEDY = 3e8  # rows * inputs^3 up to which one weight goes after the other: a second or two
ROUNDS, FITTING, AT_LAST = 12, 5, 15  # and steps of conjugate gradients in each round and at the end


def thinned(rows: Sequence[Array], hessians: Sequence[Array], drop: int) -> list[Array]:
    """Set `drop` weights of a layer to zero and fit the others.

    `rows` (N, K) and `hessians` (K, K), positive definite, belong together: those of each group of a layer and each
    block of its inputs.
    """
    if drop <= 0:
        return list(rows)
    small = sum(each.size * each.shape[1] ** 2 for each in rows) <= GREEDY
    return _one_by_one(rows, hessians, drop) if small else _in_rounds(rows, hessians, drop)


def without(weight: Tensor, moments: Moments | None, drop: int, name: str) -> Tensor:
    """Return a layer's weight with `drop` zeros; without moments of its inputs the smallest go, and the others stay."""
    import torch

    values = weight.detach().cpu().double().numpy()
    if moments is None:
        (gone,) = _cheapest([np.abs(values)], drop)
        found = np.where(gone, 0, values)
    else:
        rows = moments.window.rows(values)
        problems = list(moments.problems(name))
        parts = thinned([rows[group][:, part] for group, part, _ in problems], [each for *_, each in problems], drop)
        rows = rows.copy()
        for (group, part, _), new in zip(problems, parts, strict=True):
            rows[group][:, part] = new
        found = moments.window.weight(rows, weight.shape)
    return torch.from_numpy(np.ascontiguousarray(found)).to(weight.dtype)


def _one_by_one(rows: Sequence[Array], hessians: Sequence[Array], drop: int) -> list[Array]:
    """Go on with each row until nothing is left, and drop the cheapest steps of all rows together."""
    found = [greedy(*each) for each in zip(rows, hessians, strict=True)] if len(rows) == 1 else _alike(rows, hessians)
    # a cheap step behind a dear one can only be had with it
    running = [np.maximum.accumulate(costs, 1) for _, costs in found]
    gone = _cheapest(running, drop)
    kept = [np.ones(each.shape, bool) for each in rows]
    for mask, (places, _), steps in zip(kept, found, gone, strict=True):
        np.put_along_axis(mask, places, ~steps, 1)
    return [least_squares(*each) for each in zip(rows, hessians, kept, strict=True)]


def _alike(rows: Sequence[Array], hessians: Sequence[Array]) -> list[tuple[NDArray[np.intp], Array]]:
    """Run `greedy` on many small problems of one shape at once, such as the channels of a depthwise convolution."""
    if len({each.shape for each in rows}) > 1:
        return [greedy(*each) for each in zip(rows, hessians, strict=True)]
    places, costs = greedy(np.concatenate(rows), np.repeat(np.stack(hessians), len(rows[0]), 0))
    return list(zip(np.split(places, len(rows)), np.split(costs, len(rows)), strict=True))


def _cheapest(costs: list[Array], count: int) -> list[Mask]:
    """Say which are the `count` smallest of all numbers; of equal ones the first."""
    flat = np.concatenate([each.ravel() for each in costs])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(flat, kind="stable")[:count]] = True
    parts = np.split(chosen, np.cumsum([each.size for each in costs])[:-1])
    return [part.reshape(each.shape) for part, each in zip(parts, costs, strict=True)]


def greedy(rows: Array, hessian: Array, drop: int | None = None) -> tuple[NDArray[np.intp], Array]:
    """Drop one weight after the other, each the one that costs least; `drop` of each row, by default all.

    Returns for each of `rows` (N, K) the places in the order in which they went, and what each cost, both (N, drop).
    `hessian` is (K, K) or (N, K, K) and positive definite.
    """
    most = max(1, ENTRIES_AT_ONCE // rows.shape[1] ** 2)
    parts = [slice(start, start + most) for start in range(0, len(rows), most)]
    found = [_greedy(rows[part], hessian if hessian.ndim == 2 else hessian[part], drop) for part in parts]
    return np.concatenate([places for places, _ in found]), np.concatenate([costs for _, costs in found])


def _greedy(rows: Array, hessian: Array, drop: int | None) -> tuple[NDArray[np.intp], Array]:
    (count, width), each, values = rows.shape, np.arange(len(rows)), rows.astype(float)
    inverse: Array = np.broadcast_to(np.linalg.inv(hessian), (count, width, width)).copy()
    gone, steps = np.zeros(rows.shape, bool), width if drop is None else drop
    places, costs = np.empty((count, steps), np.intp), np.empty((count, steps))
    for step in range(steps):
        own = np.einsum("nkk->nk", inverse)
        cost = np.where(gone, np.inf, values**2 / np.where(gone, 1, own))
        place = cost.argmin(1)
        places[:, step], costs[:, step] = place, cost[each, place]
        column, pivot = inverse[each, :, place], own[each, place]
        values -= column * (values[each, place] / pivot)[:, None]
        inverse -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        gone[each, place] = True
    return places, costs


def least_squares(rows: Array, hessian: Array, kept: Mask) -> Array:
    """Return the weights (N, K), zero where not kept, whose output is closest to that of `rows`."""
    most = max(1, ENTRIES_AT_ONCE // rows.shape[1] ** 2)
    parts = [slice(start, start + most) for start in range(0, len(rows), most)]
    return np.concatenate([_least_squares(rows[part], hessian, kept[part]) for part in parts])


def _least_squares(rows: Array, hessian: Array, kept: Mask) -> Array:
    # One system for all: a weight that is not kept gets the equation v = 0.
    both = kept[:, :, None] & kept[:, None, :]
    system = np.where(both, hessian, 0) + (~kept)[:, :, None] * np.eye(rows.shape[1])
    found = np.linalg.solve(system, np.where(kept, rows @ hessian, 0)[..., None])[..., 0]
    return np.asarray(np.where(kept, found, 0), dtype=float)


def _in_rounds(rows: Sequence[Array], hessians: Sequence[Array], drop: int) -> list[Array]:
    """Drop the same share of each problem, in rounds that become smaller."""
    ends = np.rint(np.cumsum([each.size for each in rows]) / sum(each.size for each in rows) * drop).astype(int)
    counts = np.diff(ends, prepend=0).tolist()
    return [_rounds(*each) for each in zip(rows, hessians, counts, strict=True)]


def _rounds(rows: Array, hessian: Array, drop: int) -> Array:
    worth = (1 / np.diag(np.linalg.inv(hessian))).astype(np.float32)
    moments, whole = hessian.astype(np.float32), rows.astype(np.float32)
    values, kept = whole.copy(), np.ones(rows.shape, bool)
    for number in range(1, ROUNDS + 1):
        count = round(drop * (1 - (1 - number / ROUNDS) ** 2))
        (gone,) = _cheapest([np.where(kept, values**2 * worth, -1)], count)
        kept = ~gone
        values = _closer(whole, moments, kept, np.where(kept, values, 0), FITTING)
    return np.asarray(_closer(whole, moments, kept, values, AT_LAST), dtype=float)


def _closer(rows: Any, hessian: Any, kept: Mask, values: Any, steps: int) -> Any:
    """Bring the kept weights closer to those of least squares, by conjugate gradients with a diagonal preconditioner.

    All rows share the products, each has its own step lengths.
    """
    scale, tiny = 1 / np.diag(hessian), np.finfo(np.float32).tiny
    rest = np.where(kept, (rows - values) @ hessian, 0)
    direction = rest * scale
    before = (rest * direction).sum(1)
    for _ in range(steps):
        product = np.where(kept, direction @ hessian, 0)
        length = before / np.maximum((direction * product).sum(1), tiny)
        values = values + length[:, None] * direction
        rest = rest - length[:, None] * product
        after = (rest * rest * scale).sum(1)
        direction = rest * scale + (after / np.maximum(before, tiny))[:, None] * direction
        before = after
    return values
