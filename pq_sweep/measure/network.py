"""The size of a network itself: parameters, zeros, and arithmetic."""

from __future__ import annotations

from pq_sweep.core.result import Counts
from pq_sweep.core.weights import parameters_once, prunable, structure
from pq_sweep.measure.arithmetic import arithmetic
from pq_sweep.types import Model


def count(model: Model, known: Counts | None = None) -> Counts:
    """Count parameters, multiply-accumulates of one image, and zeros among the prunable weights.

    What layers share counts once, and without prunable weights sparsity is 0. `known` are the figures of the network
    before it was changed: if all shapes are the same, so is the arithmetic.
    """
    shapes = structure(model)
    if known and known.structure == shapes:
        macs, uncounted = known.macs, known.uncounted
    else:
        macs, uncounted = arithmetic(model)
    parameters = parameters_once(model.module)
    weights = [getattr(part, name) for part, name in prunable(model.module)]
    total = sum(weight.numel() for weight in weights)
    zeros = total - sum(int(weight.count_nonzero()) for weight in weights)
    return Counts(
        params=sum(parameter.numel() for parameter in parameters),
        nonzero_params=sum(int(parameter.count_nonzero()) for parameter in parameters),
        weights=total,
        sparsity=zeros / total if total else 0.0,
        structure=shapes,
        macs=macs,
        uncounted=uncounted or None,
    )
