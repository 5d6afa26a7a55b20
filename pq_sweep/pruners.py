"""Pruners: each changes the network in place and returns None or a record that lets the change be repeated.

Zero-fill pruners set weights to zero and keep the shapes; `remove` takes channels out of the network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

from pq_sweep.check import IMPORTANCES
from pq_sweep.types import Data, Model, UserError, choose

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


def remove(
    model: Model,
    data: Data,
    *,
    amount: float,
    importance: str,
    p: int,
    global_ranking: bool,
    round_to: int | None,
) -> dict[str, Any]:
    """Take the `amount` least important channels out of the network, with all that depends on them.

    Dependency graph by torch-pruning (Fang et al., DepGraph, CVPR 2023); the classifier keeps its classes. `p` is the
    norm of `importance=magnitude`; taylor and sensitivity take gradients on the calibration images. `round_to` keeps
    channel counts multiples of it. Returns the history from which `replay` repeats the removal.
    """
    module = model.module
    before = _parameters(module)
    rounding = _rounding(module, round_to)
    with _trainable(module):
        pruner = _pruner_class()(
            module,
            model.sample(),
            importance=_importance(model, data, importance, p),
            pruning_ratio=float(amount),
            global_pruning=global_ranking,
            round_to=rounding,
            ignored_layers=[classifier(model)],
            # The library's defaults are dictionaries shared by all pruners of the process.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
        )
        pruner.step()
    module.zero_grad(set_to_none=True)
    _refresh(module)
    if amount > 0 and _parameters(module) == before:
        raise UserError(
            f"pruner=remove with importance={importance} removed nothing at amount={amount} and round_to={rounding};"
            " try a larger amount or a smaller round_to."
        )
    return {"history": pruner.pruning_history(), "round_to": rounding}


def replay(model: Model, record: dict[str, Any]) -> None:
    """Repeat a removal on a freshly made network, so that the removed network's state_dict fits it."""
    import torch_pruning as tp

    with _trainable(model.module):
        graph = tp.DependencyGraph().build_dependency(model.module, model.sample())
        graph.load_pruning_history(record["history"])
    _refresh(model.module)


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


def classifier(model: Model) -> nn.Module:
    """Return the layer that gives the logits: the last one to run with one output per class."""
    ran: list[nn.Module] = []

    def note(layer: nn.Module, *_: Any) -> None:
        if model.num_classes in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None)):
            ran.append(layer)

    layers = [layer for layer in model.module.modules() if isinstance(layer, LAYERS)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model.module(model.sample())
    for hook in hooks:
        hook.remove()
    if not ran:
        raise UserError(f"no layer of the model gives {model.num_classes} outputs; check model.num_classes.")
    return ran[-1]


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


def _pruner_class() -> Any:
    """Return torch-pruning's pruner with a rounding that never gives up.

    The library rounds what is kept to the nearest multiple and leaves the layer whole where that is none: with
    round_to=8, 16 channels would become 8 at amount .5 and stay 16 at .6.
    """
    import torch_pruning as tp

    class Pruner(tp.pruner.BasePruner):
        def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
            kept = current_channels - n_pruned
            return current_channels - min(current_channels, max(round_to, kept - kept % round_to))

    return Pruner


def _importance(model: Model, data: Data, name: str, p: int) -> Any:
    """Return torch-pruning's importance of that name, with the gradients it needs in place.

    taylor is |sum w dL/dw| of a channel (Molchanov et al. 2019) with the gradient of the mean loss; sensitivity is
    the mean over images of |w dL/dw| (Mittal et al. 2018), so signs cannot cancel between images.
    """
    import torch_pruning as tp

    choose("pruner.importance", name, IMPORTANCES)
    if name == "bn_scale" and not any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.module.modules()
    ):
        raise UserError(
            "pruner.importance=bn_scale needs BatchNorm and this model has none; use magnitude, taylor or lamp."
        )
    if name in ("taylor", "sensitivity"):
        _gradients(model, data, absolute=name == "sensitivity")
    makers = {
        "random": tp.importance.RandomImportance,
        "magnitude": partial(tp.importance.GroupMagnitudeImportance, p=p),
        "taylor": partial(tp.importance.GroupTaylorImportance, multivariable=True),
        "sensitivity": tp.importance.GroupTaylorImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
    }
    return makers[name]()


def _gradients(model: Model, data: Data, *, absolute: bool) -> None:
    """Leave in `.grad` the mean over the calibration images of dL/dw, or of |dL/dw| (then image by image)."""
    parameters = list(model.module.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    images = data.calibration.batches(1 if absolute else 64, parameters[0].device)
    for batch, labels in tqdm(images, desc="gradients", disable=None, leave=False):
        loss = nn.functional.cross_entropy(data.logits(model.module(batch)), labels, reduction="sum")
        for total, grad in zip(totals, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                total += grad.abs() if absolute else grad
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total / len(data.calibration)


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _trainable(module: nn.Module) -> Iterator[None]:
    """Let every parameter require gradients for a while: torch-pruning silently removes nothing otherwise."""
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in module.named_parameters():  # by name: removal makes new parameters
            parameter.requires_grad_(flags[name])


def _rounding(module: nn.Module, round_to: int | None) -> int | None:
    """Round to a multiple of all head counts too, so that every attention head keeps a whole size."""
    heads = [part.num_heads for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    return math.lcm(round_to or 1, *heads) if heads else round_to


def _refresh(module: nn.Module) -> None:
    """Bring attributes in line with the removed channels: torchvision's ViT keeps its width in `hidden_dim`."""
    projection = getattr(module, "conv_proj", None)
    if isinstance(projection, nn.Conv2d) and hasattr(module, "hidden_dim"):
        setattr(module, "hidden_dim", projection.out_channels)  # noqa: B010  (mypy takes it for a parameter)
