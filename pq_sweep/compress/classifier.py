"""The layer that gives a network's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pq_sweep.core.weights import LAYERS
from pq_sweep.types import Model, UserError


def classifier(model: Model) -> nn.Module:
    """Return the layer that gives the logits: the last one to run with one output per class."""
    ran: list[nn.Module] = []

    def note(layer: nn.Module, *_: Any) -> None:
        if model.num_classes in (getattr(layer, "out_features", None), getattr(layer, "out_channels", None)):
            ran.append(layer)

    layers = [layer for layer in model.module.modules() if isinstance(layer, LAYERS)]
    if not layers:
        raise UserError("the network has no convolution or linear layer that could lose channels; use pruner=none.")
    hooks = [layer.register_forward_hook(note) for layer in layers]
    with torch.no_grad():
        model.module(model.sample())
    for hook in hooks:
        hook.remove()
    if not ran:
        raise UserError(f"no layer of the model gives {model.num_classes} outputs; check model.num_classes.")
    return ran[-1]
