"""The multiply-accumulates of one image, and the operations for which none are counted."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from pq_sweep.types import Model

Shape = torch.Size
# Operations of torch's that compute and are no products of matrices: it is no use to say how many these would be.
OTHERWISE = ("_fft", "_linalg", "linalg", "_sparse")
OWN = ("aten", "prim", "prims")


def arithmetic(model: Model) -> tuple[int, list[str]]:
    """Count the multiply-accumulates of one image in convolutions and matrix products, and name what is not counted."""
    formulas = _formulas()
    images, others = model.sample(1), _Others(formulas)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_attention_in_single_steps())
        counter = stack.enter_context(FlopCounterMode(display=False, custom_mapping=formulas))
        stack.enter_context(others)
        model.module(images)
    return int(counter.get_total_flops() // 2), list(others.found)


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
