"""The size of a network itself: parameters, zeros, and arithmetic."""

from __future__ import annotations

import torch

from pq_sweep.core.result import Counts
from pq_sweep.core.weights import parameters_once, prunable, structure
from pq_sweep.types import Model


def count(model: Model, known: Counts | None = None) -> Counts:
    """Count parameters, multiply-accumulates of one image, and zeros among the prunable weights.

    What layers share counts once, and without prunable weights sparsity is 0. `known` are the figures of the network
    before it was changed: if all shapes are the same, so is the arithmetic.
    """
    shapes = structure(model)
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
        macs=known.macs if known and known.structure == shapes else macs(model),
    )


def macs(model: Model) -> int:
    """Count the multiply-accumulates of one image in convolutions and matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the single operator of attention's fast path; torch 2.10's does not know its fused
    # kernel either.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.module(model.sample(1))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops() // 2)
