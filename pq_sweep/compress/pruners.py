"""Pruners that set weights to zero and keep the shapes: each changes the network in place.

The pruner that takes channels out of the network is in `pq_sweep.compress.removal`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from pq_sweep.core.weights import LAYERS as LAYERS  # users' own pruners import both from here
from pq_sweep.core.weights import Target, prunable
from pq_sweep.types import Data, Model, UserError

# NVIDIA's sparse tensor cores, which came with Ampere, compute faster with zeros in this pattern.
SPARSE_TENSOR_CORES = {"pattern": "2:4", "min_compute_capability": "8.0"}


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


def nm_sparsity(model: Model, data: Data, *, n: int, m: int) -> dict[str, Any]:
    """Keep the `n` largest |w| of every `m` consecutive input channels of each layer, at each place of its kernel.

    n=2, m=4 is the pattern of NVIDIA's sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378). Layers whose input
    channels, within a group of a grouped convolution, are no multiple of `m` cannot have it and stay dense, as do
    transposed convolutions. Returns how much became sparse, and what stayed dense and why.
    """
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    weights: dict[Target, nn.Parameter] = {(part, name): getattr(part, name) for part, name in prunable(model.module)}
    why_dense = {(part, name): why for (part, name), weight in weights.items() if (why := _why_dense(part, weight, m))}
    sparse = [target for target in weights if target not in why_dense]
    if not sparse:
        inputs = ", ".join(str(count) for count in sorted({weight.shape[1] for weight in weights.values()}))
        raise UserError(f"pruner.m={m} divides no layer's input channels, which are {inputs}; give an m that does.")
    for part, name in sparse:
        torch_prune.custom_from_mask(part, name, _largest(weights[part, name], n, m))
    _make_permanent(sparse)
    return {
        "pattern": f"{n}:{m}",
        "sparse": {"layers": len(sparse), "weights": sum(weights[target].numel() for target in sparse)},
        "dense": {"layers": len(why_dense), "weights": sum(weights[target].numel() for target in why_dense)},
        "why_dense": {names[weights[target]]: why for target, why in why_dense.items()},
        "sparse_tensor_cores": SPARSE_TENSOR_CORES,
    }


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
        getattr(part, name).data.add_(0.0)  # the mask left zeros of both signs, which compress worse


def _why_dense(part: nn.Module, weight: Tensor, m: int) -> str | None:
    """Say why the input channels (dimension 1) cannot be split into groups of `m`, or return None if they can."""
    if isinstance(part, nn.ConvTranspose2d):
        return "transposed convolution"
    if weight.shape[1] % m:
        share = " of a group" if getattr(part, "groups", 1) > 1 else ""
        return f"input channels{share}: {weight.shape[1]}, no multiple of {m}"
    return None


def _largest(weight: Tensor, n: int, m: int) -> Tensor:
    """Return a mask of the `n` largest |w| of every `m` along dimension 1; of equal ones the first is kept."""
    magnitudes = weight.detach().abs().unflatten(1, (-1, m))
    order = magnitudes.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(magnitudes).scatter_(2, order[:, :, :n], 1).flatten(1, 2)
