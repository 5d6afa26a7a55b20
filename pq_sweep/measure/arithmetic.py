"""The multiply-accumulates of one image, and the operations for which none are counted."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from pq_sweep.core.dispatch import without_compiler
from pq_sweep.core.weights import each_once
from pq_sweep.types import Model

Shape = torch.Size
# Operations of torch's that compute and are no products of matrices: it is no use to say how many these would be.
OTHERWISE = ("_fft", "_linalg", "linalg", "_sparse")
OWN = ("aten", "prim", "prims")


def arithmetic(model: Model) -> tuple[int, list[str]]:
    """Count the multiply-accumulates of one image in convolutions and matrix products, and name what is not counted."""
    formulas = _formulas()
    others = _Others(formulas)
    with _counting(formulas) as counter, others:
        model.module(model.sample(1))
    return int(counter.get_total_flops() // 2), list(others.found)


def arithmetic_by_weight(model: Model) -> dict[str, int]:
    """Count the multiply-accumulates of one image by the name of the weight, "" where no parameter is multiplied.

    Recurrent layers count for the largest of their weights. The network may have been converted to any floating type.
    """
    images = model.sample(1).to(next(model.module.parameters()).dtype)
    with _counting(_formulas()) as counter, _ByWeight(counter, model.module) as found:
        model.module(images)
    return found.macs


@contextmanager
def _counting(formulas: dict[Any, Callable[..., int]]) -> Iterator[FlopCounterMode]:
    """Count what a network computes meanwhile, without gradients."""
    without_compiler(_FlopCounterMode)
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with torch.no_grad(), _attention_in_single_steps(), counter:
        yield counter


@contextmanager
def _attention_in_single_steps() -> Iterator[None]:
    """Have attention run as products of matrices: the counter knows neither its fast path nor every fused kernel."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@without_compiler
class _Others(TorchDispatchMode):
    """Notes operations of a pass that compute and for which nothing is counted: those of libraries, and transforms."""

    supports_higher_order_operators = True

    def __init__(self, counted: Container[Any]) -> None:
        super().__init__()
        self.counted = counted
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the name of an operation that gives tensors."""
        result = func(*args, **(kwargs or {}))
        space, _, name = str(func).partition(".")
        computes = isinstance(result, torch.Tensor | tuple | list) and isinstance(func, torch._ops.OpOverload)
        if computes and func.overloadpacket not in self.counted and (space not in OWN or name.startswith(OTHERWISE)):
            self.found[f"{space}.{name.partition('.')[0]}"] = None
        return result


@without_compiler
class _ByWeight(TorchDispatchMode):
    """Tells by which parameter the operations of a pass multiply, with a counter that is entered before."""

    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode, module: nn.Module) -> None:
        super().__init__()
        self.counter = counter
        # A view of a weight, such as its transpose, lies in the weight's memory.
        self.places = [
            (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes, name)
            for name, parameter in each_once(module.named_parameters())
        ]
        self.macs: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at what the counter counts for an operation."""
        before = self.counter.get_total_flops()
        result = func(*args, **(kwargs or {}))
        if counted := self.counter.get_total_flops() - before:
            name = self._weight(args)
            self.macs[name] = self.macs.get(name, 0) + counted // 2
        return result

    def _weight(self, args: Any) -> str:
        """Return the name of the parameter that is largest among the arguments of an operation."""
        several = (each if isinstance(each, list | tuple) else [each] for each in args)
        tensors = [each for some in several for each in some if isinstance(each, torch.Tensor)]
        for tensor in sorted(tensors, key=torch.Tensor.numel, reverse=True):
            for start, end, name in self.places:
                if start <= tensor.data_ptr() < end:
                    return name
        return ""


# --- what torch's counter does not know ------------------------------------------------------------------------------


def _dot(one: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(one)


def _addmv(_: Shape, matrix: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(matrix)


def _addbmm(_: Shape, one: Shape, other: Shape, *__: Any, **___: Any) -> int:
    return 2 * prod(one) * other[-1]


def _bilinear(one: Shape, weight: Shape, other: Shape, *_: Any, **__: Any) -> int:
    """Each pair of the two inputs is multiplied with the weight of each output."""
    return 2 * prod(one) * other[-1] * weight[0]


def _distances(one: Shape, other: Shape, *_: Any, **__: Any) -> int:
    return 2 * prod(one) * other[-2]


def _deformable(images: Shape, weight: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


def _recurrent(inputs: Shape, weights: list[Shape], *_: Any, **__: Any) -> int:
    """Each step of each sequence goes through all matrices, those of both directions and of all layers."""
    return 2 * prod(inputs[:-1]) * sum(prod(weight) for weight in weights if len(weight) == 2)


def _recurrent_layer(inputs: Shape, *weights: Any, **__: Any) -> int:
    return _recurrent(inputs, list(weights[:2]))


FORMULAS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _dot,
    torch.ops.aten.dot: _dot,
    torch.ops.aten.vdot: _dot,
    torch.ops.aten.addmv: _addmv,
    torch.ops.aten.addbmm: _addbmm,
    torch.ops.aten._trilinear: _bilinear,
    torch.ops.aten._cdist_forward: _distances,
    torch.ops.aten._euclidean_dist: _distances,
    torch.ops.aten.mkldnn_rnn_layer: _recurrent_layer,
    torch.ops.aten._cudnn_rnn: _recurrent,
    torch.ops.aten.miopen_rnn: _recurrent,
}


def _formulas() -> dict[Any, Callable[..., int]]:
    """Return how operations are counted; those of torchvision are known once a network's code has imported it."""
    known = hasattr(torch.ops.torchvision, "deform_conv2d")
    return FORMULAS | ({torch.ops.torchvision.deform_conv2d: _deformable} if known else {})
