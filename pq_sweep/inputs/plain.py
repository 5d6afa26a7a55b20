"""Networks that hold plain float32 weights, each in a memory of its own, whatever their weights were stored in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import memory
from pq_sweep.inputs.parametrized import fold

# How much larger than its tensors a memory may be, such as that of a file of safetensors with its header.
SLACK = 1.01


def settled(module: nn.Module) -> list[str]:
    """Have a network hold plain float32 weights, and return a sentence for each thing that was done for that."""
    return _dense(module) + _compact(module) + _float32(module) + fold(module)


def _dense(module: nn.Module) -> list[str]:
    """Store parameters in the usual layout instead of a sparse one, layers that share one still sharing it."""
    made: dict[int, nn.Parameter] = {}
    names = [name for name, parameter in module.named_parameters() if parameter.layout != torch.strided]
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.layout != torch.strided:
                grown = parameter.requires_grad
                dense = made.setdefault(id(parameter), nn.Parameter(parameter.detach().to_dense(), grown))
                part._parameters[name] = dense
    return [f"{listed(names)}, stored sparsely, became dense with the same values."] if names else []


def _compact(module: nn.Module) -> list[str]:
    """Copy tensors that are slices of a larger memory, all of which a file would hold; what is shared stays shared.

    The weights of recurrent layers lie in one memory on a GPU on purpose, with gaps.
    """
    apart = {id(one) for part in module.modules() if isinstance(part, nn.RNNBase) for one in part.parameters()}
    stored: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if id(tensor) not in apart and tensor.layout == torch.strided:
            stored.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    names = []
    for held in stored.values():
        values = {memory(tensor): tensor for _, tensor in held}
        alike = all(tensor.stride() == values[memory(tensor)].stride() for _, tensor in held)
        if alike and held[0][1].untyped_storage().nbytes() > SLACK * sum(tensor.nbytes for tensor in values.values()):
            copies = {key: tensor.detach().clone() for key, tensor in values.items()}
            for tensor, copy in [(tensor, copies[memory(tensor)]) for _, tensor in held]:
                tensor.data = copy
            names += [name for name, _ in held]
    return (
        [f"{listed(names)}, cut out of a larger memory that a file would hold whole, became copies."] if names else []
    )


def _float32(module: nn.Module) -> list[str]:
    tensors = [*module.parameters(), *module.buffers()]
    others = sorted({str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point()} - {"float32"})
    if not others:
        return []
    module.float()
    return [f"The network's {' and '.join(others)} weights were converted to float32."]
