"""The weights of a network: which of them are pruned, and what tells two networks apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from pq_sweep.core.fingerprint import digest
from pq_sweep.types import Model

Target = tuple[nn.Module, str]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


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


def structure(model: Model) -> str:
    """Return a hash of the names and shapes of all parameters."""
    return digest({name: list(parameter.shape) for name, parameter in model.module.named_parameters()})


PLAIN = (int, float, str, tuple, type(None))  # options of layers that their repr need not show, such as heads


def network_state(model: Model) -> dict[str, Any]:
    """Return what a network computes with, as hashes: weights and buffers, layers with their options, and its input."""
    return network_structure(model) | {"weights": _values(model.module.state_dict())}


def network_structure(model: Model) -> dict[str, Any]:
    """Return what a network computes with apart from the values of its weights: shapes, layers, options and input."""
    state = model.module.state_dict()
    shapes = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in state.items()]
    options: dict[str, dict[str, Any]] = {}
    constants: dict[str, Tensor] = {}
    for name, part in model.module.named_modules():
        options[name] = {key: value for key, value in vars(part).items() if isinstance(value, PLAIN)}
        constants |= {f"{name}.{key}".lstrip("."): value for key, value in _tensors(part)}
    rest = {name: tensor for name, tensor in constants.items() if name not in state}
    layers = digest([repr(model.module), shapes, options])
    return {"layers": layers, "constants": _values(rest), "preprocess": repr(model.preprocess)}


def _tensors(part: Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of a layer and the tensors among its attributes."""

    for name, value in [*part._buffers.items(), *vars(part).items()]:
        if isinstance(value, torch.Tensor):
            yield name, value


def _values(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names and values of tensors."""

    found = hashlib.sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().cpu().contiguous()
        found.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        found.update(values.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
