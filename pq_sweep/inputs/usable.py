"""Networks whose weights cannot be read or changed, each refused in a sentence that says what it is."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pq_sweep.core.weights import LAYERS, each_once
from pq_sweep.types import UserError

QUANTIZED = re.compile(r"torch\.(ao\.)?nn\.(intrinsic\.)?quantized\b|torchao\.|bitsandbytes\.|optimum\.quanto\.")
PREPARED = re.compile(r"torch\.(ao\.)?(nn\.(intrinsic\.)?qat\b|quantization\.(observer|fake_quantize)\b)")


def require_usable(module: nn.Module, what: str) -> None:
    """Refuse a network whose weights cannot be read or changed."""
    for path, part in module.named_modules():
        _require_plain(part, path or "the network itself", what)
        if isinstance(part, LAYERS):
            _require_parameter(part, f"{path}.weight".lstrip("."), what)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    if not parameters:
        raise UserError(
            f"{what} has no parameters that a pruner or quantizer could change; return one that holds its weights as"
            " parameters."
        )
    for name, tensor in [*parameters.items(), *buffers.items()]:
        _require_values(tensor, name, what)
    _require_own_memory(parameters, buffers, what)


def _require_plain(part: nn.Module, path: str, what: str) -> None:
    """Refuse parts that are no Python code with FP32 weights."""
    kind = type(part).__name__
    if isinstance(part, torch.jit.ScriptModule):
        raise UserError(
            f"{what} is or holds TorchScript, which can be neither pruned nor exported; return the Python network that"
            " it was made from, with its state_dict loaded."
        )
    homes = [f"{base.__module__}." for base in type(part).__mro__]
    if any(home.startswith("torch.export.") for home in homes):
        raise UserError(
            f"{what} is or holds an exported program of torch.export, whose graph can be neither pruned nor trained nor"
            " put in eval mode; return the Python network that it was made from, with its state_dict loaded."
        )
    if any(QUANTIZED.match(home) for home in homes):
        raise UserError(
            f"{what} is quantized already, first in {path} ({kind}), which hides its FP32 weights; return the FP32"
            " network, and quantizer=int8 or int8_dynamic quantizes it."
        )
    if any(PREPARED.match(home) for home in homes):
        raise UserError(
            f"{what} is prepared for quantization, first in {path} ({kind}), which watches or rounds what passes;"
            " return the FP32 network, and quantizer=int8 calibrates and quantizes it."
        )


def _require_parameter(layer: nn.Module, name: str, what: str) -> None:
    """Refuse a layer whose weight is a plain tensor, unless a hook computes it, or has no floating point numbers."""
    weight = vars(layer).get("weight", layer._parameters.get("weight"))
    if not isinstance(weight, Tensor):
        return
    if not isinstance(weight, nn.Parameter) and not layer._forward_pre_hooks:
        raise UserError(f"{name} of {what} is a plain tensor, which no file would hold; make it an nn.Parameter.")
    if not weight.is_floating_point():
        kind = str(weight.dtype).removeprefix("torch.")
        raise UserError(f"{name} of {what} holds {kind} numbers, which do not multiply images; give it float32.")


def _require_values(tensor: Tensor, name: str, what: str) -> None:
    """Refuse a tensor whose values are not there, cannot change, or are not what they seem."""
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer) or tensor.is_meta:
        raise UserError(f"{name} of {what} has no values yet; load weights first.")
    if tensor.is_inference():
        raise UserError(
            f"{name} of {what} was made under torch.inference_mode(), where weights cannot change; make it outside."
        )
    if tensor.is_quantized or is_traceable_wrapper_subclass(tensor):
        kind = f"{tensor.dtype} tensor" if tensor.is_quantized else type(tensor).__name__
        raise UserError(f"{name} of {what} is a {kind}, which no pruner or quantizer can change; give plain float32.")
    if tensor.layout != torch.strided and not isinstance(tensor, nn.Parameter):
        raise UserError(f"the buffer {name} of {what} is {tensor.layout}; make it dense by to_dense().")


# --- memory ----------------------------------------------------------------------------------------------------------


def _require_own_memory(parameters: dict[str, nn.Parameter], buffers: dict[str, Tensor], what: str) -> None:
    """Refuse parameters that share part of their memory: what one counts, sets to zero or stores is not its own.

    Layers that share a whole parameter are fine, and so are parameters that lie side by side in one memory.
    """
    stored: dict[int, list[tuple[str, Tensor]]] = {}
    dense = [(name, one) for name, one in [*parameters.items(), *buffers.items()] if one.layout == torch.strided]
    for name, tensor in each_once(dense):
        stored.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for held in stored.values():
        for name, tensor in held:
            if name in parameters and _span(tensor) < tensor.numel():
                _refuse_overlap([name], what)
        _require_apart(sorted(held, key=lambda item: item[1].data_ptr()), parameters, what)


def _require_apart(held: list[tuple[str, Tensor]], parameters: dict[str, nn.Parameter], what: str) -> None:
    for number, (name, tensor) in enumerate(held):
        end = tensor.data_ptr() + _span(tensor) * tensor.element_size()
        for other, beside in held[number + 1 :]:
            if beside.data_ptr() >= end:
                break
            mixed = {name, other} & parameters.keys()
            if mixed and np.intersect1d(_addresses(tensor), _addresses(beside)).size:
                _refuse_overlap([name, other], what)


def _refuse_overlap(names: list[str], what: str) -> None:
    rest = f"{' and '.join(names)} of {what} share part of their memory" if len(names) > 1 else (
        f"values of {names[0]} of {what} share their memory with each other"
    )  # fmt: skip
    raise UserError(
        f"{rest}, so that none can be pruned, counted or stored alone; give each a memory of its own by clone(), or"
        " share a whole parameter."
    )


def _span(tensor: Tensor) -> int:
    """Return how many elements lie between the first and the last of a tensor, both included."""
    if not tensor.numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _addresses(tensor: Tensor) -> np.ndarray:
    """Return where in memory each element lies."""
    found = np.array(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = found[..., None] + np.arange(size) * (stride * tensor.element_size())
    return found.ravel()
