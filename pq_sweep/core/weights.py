"""The weights of a network: which of them are pruned, and what tells two networks apart."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import Module

from pq_sweep.core.fingerprint import digest
from pq_sweep.types import Model

T = TypeVar("T", bound=Tensor)
Target = tuple[nn.Module, str]
Memory = tuple[int, int]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def prunable(module: nn.Module, every_weight: bool = False) -> list[Target]:
    """List what is pruned: weights of convolutions and linear layers, and the input projections of attention.

    MultiheadAttention holds its input projections as bare parameters. `every_weight` takes every module with a
    `weight` instead (BatchNorm and LayerNorm too), as PQ Bench did. A weight that several layers share is listed once,
    by the first of them.
    """
    found: dict[Memory, Target] = {}
    for part in module.modules():
        for name in _weights_of(part, every_weight):
            found.setdefault(memory(getattr(part, name)), (part, name))
    return list(found.values())


def _weights_of(part: nn.Module, every_weight: bool) -> list[str]:
    """Name the weights of one layer that are pruned."""
    if isinstance(part, nn.MultiheadAttention):
        separate = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        return separate if part.in_proj_weight is None else ["in_proj_weight"]
    weight = getattr(part, "weight", None)
    whole = isinstance(part, LAYERS) and isinstance(weight, Tensor)
    return ["weight"] if whole or (every_weight and isinstance(weight, nn.Parameter)) else []


def prunable_by_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is pruned by the first name that it has in the network."""
    wanted = {memory(getattr(part, name)) for part, name in prunable(module)}
    return {name: parameter for name, parameter in each_once(module.named_parameters()) if memory(parameter) in wanted}


def memory(tensor: Tensor) -> Memory:
    """Tell a tensor by its place in memory: layers share a weight as one Parameter, or as two that hold one memory."""
    return (tensor.data_ptr(), tensor.numel()) if tensor.data_ptr() else (id(tensor), 0)


def each_once(named: Iterable[tuple[str, T]]) -> list[tuple[str, T]]:
    """Keep of tensors that share their memory the first."""
    first: dict[Memory, tuple[str, T]] = {}
    for name, tensor in named:
        first.setdefault(memory(tensor), (name, tensor))
    return list(first.values())


def parameters_once(module: nn.Module) -> list[nn.Parameter]:
    """Return every parameter, those that layers share once."""
    return [parameter for _, parameter in each_once(module.named_parameters())]


def untouched(module: nn.Module) -> list[str]:
    """Say, if it is over half, which share of the parameters no pruner sets to zero, and in which kinds of layers."""
    seen = {memory(getattr(part, name)) for part, name in prunable(module)}
    kinds: Counter[str] = Counter()
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and memory(parameter) not in seen:
                seen.add(memory(parameter))
                kinds[_kind(part, name)] += parameter.numel()
    total = sum(parameter.numel() for parameter in parameters_once(module))
    if 2 * kinds.total() <= total:
        return []
    most = ", ".join(f"{kind} {count / total:.0%}" for kind, count in kinds.most_common(3) if count >= 0.01 * total)
    return [
        f"{kinds.total() / total:.0%} of the parameters are of kinds that no pruner sets to zero ({most}): amount and"
        " sparsity speak of the others."
    ]


def _kind(part: nn.Module, name: str) -> str:
    """Say what kind of parameter a layer holds by this name."""
    kind = type(part).__name__
    if isinstance(part, LAYERS):
        return f"{name} of {kind}"
    return kind if type(part).__module__.startswith("torch.nn") else f"own parameters of {kind}"


def load_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state of an equal network, whose layers may have dots in their names.

    torch loads these too, but takes their entries for unexpected ones.
    """
    missing, unexpected = module.load_state_dict(state, strict=False)
    if missing or not module.state_dict().keys() >= set(unexpected):
        raise ValueError(f"the state is of another network: {missing} are missing and {unexpected} are unexpected")


def structure(model: Model) -> str:
    """Return a hash of the names and shapes of all parameters."""
    return digest({name: list(parameter.shape) for name, parameter in model.module.named_parameters()})


# Attributes that every layer has: its parts, parameters, buffers and hooks.
KEPT_ELSEWHERE = frozenset(vars(nn.Module()))
PLAIN = (int, float, str, type(None))  # options of layers that their repr need not show, such as heads


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
        options[name] = {key: _plain(value) for key, value in vars(part).items() if key not in KEPT_ELSEWHERE}
        constants |= {f"{name}.{key}".lstrip("."): value for key, value in _tensors(part)}
    rest = {name: tensor for name, tensor in constants.items() if name not in state}
    layers = digest([repr(model.module), shapes, options, shared_names(state)])
    return {"layers": layers, "constants": _values(rest), "preprocess": repr(model.preprocess)}


def _plain(value: Any) -> Any:
    """Return an attribute of a layer as plain values, functions by their names and arrays by their hash."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, partial):
        return [_plain(value.func), _plain(value.args), _plain(value.keywords)]
    if isinstance(value, np.ndarray):
        return hashlib.sha256(value.tobytes()).hexdigest()
    return value if isinstance(value, PLAIN) else getattr(value, "__qualname__", None)


def shared_names(state: Mapping[str, Tensor]) -> list[list[str]]:
    """List the names of each tensor that has several: the graph of such a network holds it once."""
    names: dict[Memory, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(memory(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


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
