"""Rounding the weights of a layer so that its output changes least, given the second moments of its inputs.

A row of weights w is replaced by v = scale * z with whole numbers z between limits. The layer's output then changes by
E = (v - w) H (v - w)', where H = X X' has the products of its inputs. Finding the best z is NP-hard; `rounded` is a
heuristic. Its first part rounds one input after the other and lets those that follow make up for the error so far: GPTQ
(Frantar et al. 2023, arXiv 2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv 2307.13304). Its second part
changes single codes as long as that helps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cholesky

Array = NDArray[np.float64]

AT_ONCE = 64  # inputs whose errors are passed on to the others in one product
WIDE = 2048  # inputs from which on the second start, from the nearest codes, is not worth its time
SWEEPS = 10  # over all codes; most layers are done after three or four
WORTH_IT = 1e-9  # share of a code's own part of the error that a change has to save


def nearest(rows: Array, scale: Array, low: int, high: int) -> Array:
    """Return the whole numbers (N, K) whose multiples of a scale (N, 1) or (N, K) are closest to each weight."""
    return np.clip(np.rint(rows / scale), low, high)


def rounded(rows: Array, hessian: Array, scale: Array, low: int, high: int) -> Array:
    """Return codes (N, K) for rows of weights (N, K) with an error as small as the heuristic finds.

    `hessian` is (K, K) and positive definite, `scale` (N, 1) or (N, K). Weights that are zero get the code zero, so
    that what was pruned stays pruned. No row is worse than rounded to the nearest.
    """
    plain = nearest(rows, scale, low, high)
    passed_on = one_after_the_other(rows, hessian, scale, low, high)
    best, least = plain, error(rows - plain * scale, hessian)
    for start in (passed_on, plain) if rows.shape[1] <= WIDE else (passed_on,):
        codes = descended(rows, hessian, scale, low, high, start)
        found = error(rows - codes * scale, hessian)
        best, least = np.where((found <= least)[:, None], codes, best), np.minimum(found, least)
    return best


def one_after_the_other(rows: Array, hessian: Array, scale: Array, low: int, high: int) -> Array:
    """Round one input after the other, those with the largest moments first, to what the errors so far ask for."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    weights, scales = rows[:, order], np.broadcast_to(scale, rows.shape)[:, order]
    # H = R R' with an upper triangle R, so E is the sum over k of the squares of the sum over j <= k of e_j R_jk.
    factor = cholesky(hessian[np.ix_(order[::-1], order[::-1])], lower=True)[::-1, ::-1]
    codes, errors = np.empty_like(weights), np.zeros_like(weights)
    for start in range(0, len(order), AT_ONCE):
        before = errors[:, :start] @ factor[:start, start : start + AT_ONCE]
        for place in range(start, min(start + AT_ONCE, len(order))):
            passed_on = before[:, place - start] + errors[:, start:place] @ factor[start:place, place]
            wanted = weights[:, place] + passed_on / factor[place, place]
            chosen = np.clip(np.rint(wanted / scales[:, place]), low, high)
            codes[:, place] = np.where(weights[:, place] == 0, 0, chosen)
            errors[:, place] = weights[:, place] - codes[:, place] * scales[:, place]
    found = np.empty_like(codes)
    found[:, order] = codes
    return found


def descended(rows: Array, hessian: Array, scale: Array, low: int, high: int, codes: Array) -> Array:
    """Give each code in turn its best value beside the others, until no change of a single code makes E smaller."""
    codes, scales = codes.copy(), np.broadcast_to(scale, rows.shape)
    slopes, active = (rows - codes * scales) @ hessian, np.arange(len(rows))
    for _ in range(SWEEPS):
        changed = _sweep(rows, hessian, scales, (low, high), codes, slopes, active)
        active = active[changed]
        if not len(active):
            break
    return codes


def _sweep(
    rows: Array,
    hessian: Array,
    scales: Array,
    limits: tuple[int, int],
    codes: Array,
    slopes: Array,
    active: NDArray[np.intp],
) -> NDArray[np.bool_]:
    """Go once over all codes of the active rows, change them and their slopes, and say which rows have changed."""
    there = np.zeros(len(active), bool)
    for start in range(0, rows.shape[1], AT_ONCE):
        part = slice(start, start + AT_ONCE)
        moved, slope = np.zeros_like(slopes[active, part]), slopes[active, part]
        for place in range(moved.shape[1]):
            column = start + place
            step, curve = scales[active, column], hessian[column, column]
            now, wanted = codes[active, column], slope[:, place]
            best = np.clip(now + np.rint(wanted / (curve * step)), *limits) - now
            saved = best * step * (2 * wanted - curve * best * step)
            best = np.where((saved > WORTH_IT * curve * step**2) & (rows[active, column] != 0), best, 0)
            codes[active, column] += best
            moved[:, place] = best * step
            slope -= moved[:, place, None] * hessian[column, part]
        touched = moved.any(1)
        slopes[active[touched]] -= moved[touched] @ hessian[part]
        there |= touched
    return there


def error(difference: Array, hessian: Array) -> Array:
    """Return d H d' for each row d (N, K)."""
    found: Array = np.einsum("nk,nk->n", difference @ hessian, difference)
    return found
