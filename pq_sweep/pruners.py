"""Pruners that set weights to zero and keep the shapes: each changes the network in place.

What takes channels out of the network is in `pq_sweep.removal`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.nn.utils import prune as torch_prune

from pq_sweep.types import Data, Model

Target = tuple[nn.Module, str]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def none(model: Model, data: Data, *, amount: float = 0.0) -> None:
    """Leave the network as it is; `amount` is ignored, so that one grid can hold the baseline too."""


def random(model: Model, data: Data, *, amount: float, every_weight: bool = False) -> None:
    """Zero a random `amount` of each layer's weights."""
    _each(model, partial(torch_prune.random_unstructured, amount=float(amount)), every_weight)


def l1(model: Model, data: Data, *, amount: float, every_weight: bool = False) -> None:
    """Zero the `amount` smallest |w| of each layer (Han et al. 2015)."""
    _each(model, partial(torch_prune.l1_unstructured, amount=float(amount)), every_weight)


def l1_global(model: Model, data: Data, *, amount: float, every_weight: bool = False) -> None:
    """Zero the `amount` smallest |w| over all layers of the network together."""
    targets = prunable(model.module, every_weight)
    torch_prune.global_unstructured(targets, pruning_method=torch_prune.L1Unstructured, amount=float(amount))
    _make_permanent(targets)


def ln_structured(model: Model, data: Data, *, amount: float, n: float, dim: int, every_weight: bool = False) -> None:
    """Zero the `amount` slices with the smallest Ln norm of each layer: dim 0 neurons, dim 1 their inputs."""
    _each(model, partial(torch_prune.ln_structured, amount=float(amount), n=n, dim=dim), every_weight)


def random_structured(model: Model, data: Data, *, amount: float, dim: int, every_weight: bool = False) -> None:
    """Zero a random `amount` of each layer's slices: dim 0 neurons, dim 1 their inputs."""
    _each(model, partial(torch_prune.random_structured, amount=float(amount), dim=dim), every_weight)


def prunable(module: nn.Module, every_weight: bool = False) -> list[Target]:
    """List what is pruned: weights of convolutions and linear layers, and the input projections of attention.

    MultiheadAttention holds its input projections as bare parameters. `every_weight` takes every module with a
    `weight` instead (BatchNorm and LayerNorm too), as PQ Bench did.
    """
    found: list[Target] = []
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            names = (
                ["in_proj_weight"]
                if part.in_proj_weight is not None
                else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
            )
            found += [(part, name) for name in names]
        elif isinstance(part, LAYERS) or (every_weight and isinstance(getattr(part, "weight", None), nn.Parameter)):
            found.append((part, "weight"))
    return found


def _each(model: Model, method: Any, every_weight: bool) -> None:
    """Prune each target by itself; a slice-wise method leaves out tensors with fewer dimensions than it needs."""
    targets = prunable(model.module, every_weight)
    dim = method.keywords.get("dim")
    if dim is not None:
        targets = [(part, name) for part, name in targets if getattr(part, name).dim() > max(dim, 1)]
    for part, name in targets:
        method(part, name)
    _make_permanent(targets)


def _make_permanent(targets: list[Target]) -> None:
    for part, name in targets:
        torch_prune.remove(part, name)
