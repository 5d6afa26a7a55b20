"""Second moments of the inputs of layers on calibration images: what a change of weights does to a layer's output.

A layer's outputs are rows of weights times columns of inputs: for a convolution the patches of its images. H = X X' is
the Hessian of the squared error of its output, up to a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pq_sweep.core.stored import (
    CONVOLUTIONS,
    OPERATORS,
    PRODUCTS,
    TRANSPOSED,
    Stored,
    attribute,
    output_axis,
    stored_weights,
)
from pq_sweep.core.weights import memory
from pq_sweep.types import Model, Split, UserError

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

Array = NDArray[np.float64]

DAMPING = 0.01  # share of the mean of the diagonal that is added to it, as in GPTQ and SparseGPT
WIDEST = 4608  # inputs that are looked at together; of wider layers only what is near the diagonal is
IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class Window:
    """How a convolution goes over its images, along each of their axes; a linear layer has none."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    pads: tuple[tuple[int, int], ...] = ()
    groups: int = 1
    transposed: bool = False
    mode: str = "constant"

    def columns(self, images: Tensor) -> Tensor:
        """Return the inputs of each output: (groups, inputs of a group times kernel, images times places)."""
        if not self.kernel:
            return images.flatten(0, -2).T[None]
        from torch.nn.functional import pad

        images = _spread(images, self.stride) if self.transposed else images
        images = pad(images, [end for ends in self.pads[::-1] for end in ends], mode=self.mode)
        for axis, (size, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            images = images.unfold(axis, dilation * (size - 1) + 1, 1 if self.transposed else stride)
            images = images[..., ::dilation]
        axes, count = list(range(images.dim())), len(self.kernel)
        places, kernel = axes[2 : 2 + count], axes[2 + count :]
        images = images.flip(kernel) if self.transposed else images
        outputs = images.shape[0] * math.prod(images.shape[axis] for axis in places)
        return images.permute(1, *kernel, 0, *places).reshape(self.groups, -1, outputs)

    def rows(self, weight: Any) -> Any:
        """Return a layer's weight (array or tensor) as rows: (groups, outputs of a group, inputs times kernel)."""
        if not self.transposed:
            return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)
        inputs, outputs, *kernel = weight.shape
        parts = weight.reshape(self.groups, inputs // self.groups, outputs, math.prod(kernel))
        return parts.swapaxes(1, 2).reshape(self.groups, outputs, -1)

    def weight(self, rows: Any, shape: Sequence[int]) -> Any:
        """Return what `rows` made rows of, in its shape."""
        if not self.transposed:
            return rows.reshape(*shape)
        inputs, outputs, *kernel = shape
        parts = rows.reshape(self.groups, outputs, inputs // self.groups, math.prod(kernel))
        return parts.swapaxes(1, 2).reshape(*shape)


def _spread(images: Tensor, stride: Sequence[int]) -> Tensor:
    """Put zeros between the pixels of images, as a transposed convolution of this stride does."""
    shape = [(size - 1) * step + 1 for size, step in zip(images.shape[2:], stride, strict=True)]
    found = images.new_zeros(*images.shape[:2], *shape)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    found[places] = images
    return found


class Moments:
    """The sum of X X' over the images seen so far, for each group of a layer and each block of its inputs."""

    def __init__(self, window: Window) -> None:
        self.window = window
        self.sums: list[Tensor] = []

    def add(self, *given: Tensor) -> None:
        """Add what a layer was given: images (B, C, ...), or (..., inputs) for each linear layer in it."""
        import torch

        for_each = [self.window.columns(images.detach().float()) for images in given]
        split = [columns.tensor_split(-(-columns.shape[1] // WIDEST), 1) for columns in for_each]
        found = [torch.cat([part @ part.transpose(1, 2) for part in parts]) for parts in zip(*split, strict=True)]
        self.sums = [old + new for old, new in zip(self.sums, found, strict=True)] if self.sums else found

    def problems(self, name: str) -> Iterator[tuple[int, slice, Array]]:
        """Yield for each group and block of inputs its number, the inputs and H (K, K), damped to be definite."""
        start = 0
        for block in self.sums:
            width = block.shape[1]
            for group, hessian in enumerate(block.cpu().numpy()):
                yield group, slice(start, start + width), damped(hessian.astype(float), name)
            start += width


def damped(hessian: Array, name: str) -> Array:
    """Return a positive definite H (K, K); inputs that are always zero get moments too, which hold their weights."""
    mean = float(np.trace(hessian)) / len(hessian)
    if not math.isfinite(mean) or not np.isfinite(hessian).all():
        raise UserError(
            f"the inputs of {name} on the calibration images are not finite, so nothing can be fitted to them; look for"
            " non-finite weights or images, or use pruner=l1 and quantizer.rounding=nearest."
        )
    return hessian + (DAMPING * mean or 1.0) * np.eye(len(hessian))


# Of a network of torch's


def window_of(layer: nn.Module) -> Window:
    """Return how a convolution or linear layer goes over its inputs."""
    part: Any = layer
    if not hasattr(part, "kernel_size"):
        return Window()
    one = (part.kernel_size, part.stride, part.dilation)
    if not part.transposed:
        ends = part._reversed_padding_repeated_twice
        pads = tuple(zip(ends[::2], ends[1::2], strict=True))[::-1]
        mode = "constant" if part.padding_mode == "zeros" else part.padding_mode
        return Window(*one, pads, part.groups, mode=mode)
    pads = _transposed_pads(*one, [(size, size) for size in part.padding], part.output_padding)
    return Window(*one, pads, part.groups, transposed=True)


def _transposed_pads(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    pads: Sequence[tuple[int, int]],
    more: Sequence[int],
) -> tuple[tuple[int, int], ...]:
    """Return how much the spread images of a transposed convolution are padded, or cut where that is negative."""
    reach = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    return tuple((far - low, far - high + end) for far, (low, high), end in zip(reach, pads, more, strict=True))


def layer_moments(model: Model, targets: Sequence[tuple[nn.Module, str]], split: Split) -> dict[Any, Moments]:
    """Run images through a network, and return the moments of the inputs of each weight that is seen to be used.

    A weight of several layers has those of all. Attention multiplies with its output projection out of sight.
    """
    import torch
    from tqdm import tqdm

    found = {target: Moments(_window_of(*target)) for target in targets}
    device = next(model.module.parameters()).device
    bar = tqdm(total=len(split), desc="layer inputs", disable=None, leave=False)
    with torch.no_grad(), _watching(model.module, found), bar:
        for images, _ in split.batches(IMAGES_AT_ONCE, device):
            model.module(images)
            bar.update(len(images))
    return {target: moments for target, moments in found.items() if moments.sums}


def _window_of(part: nn.Module, name: str) -> Window:
    """Return the window of a layer's weight; attention has projections of three inputs in one weight."""
    return Window(groups=3) if name == "in_proj_weight" else window_of(part)


@contextmanager
def _watching(module: nn.Module, found: dict[Any, Moments]) -> Iterator[None]:
    """Add to the moments of weights all that layers with them are given meanwhile."""
    by_memory = {memory(getattr(part, name)): moments for (part, name), moments in found.items()}

    def look(name: str, layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        given = [*positional, *named.values()]
        first = {"k_proj_weight": 1, "v_proj_weight": 2}.get(name, 0)
        by_memory[memory(getattr(layer, name))].add(*given[first : 3 if name == "in_proj_weight" else first + 1])

    hooks = [
        layer.register_forward_pre_hook(partial(look, name), with_kwargs=True)
        for layer in module.modules()
        for name, weight in layer._parameters.items()
        if weight is not None and memory(weight) in by_memory
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# Of a graph


def graph_moments(model: onnx.ModelProto, split: Split, names: set[str]) -> dict[str, tuple[Stored, Moments]]:
    """Return weights of a graph by these names, each with the moments of what it is multiplied with.

    Left out are products of more than two axes, and weights whose outputs lie along other axes in another operator.
    """
    import torch
    from tqdm import tqdm

    found, users = _with_users(model, names)
    run = _runner(model, sorted({name for name, _, _ in users}))
    with torch.no_grad(), tqdm(total=len(split), desc="layer inputs", disable=None, leave=False) as bar:
        for images, _ in split.batches(IMAGES_AT_ONCE):
            values = run(images.numpy())
            for name, weight, turned in users:
                given = torch.from_numpy(values[name])
                found[weight][1].add(given.transpose(-1, -2) if turned else given)
            bar.update(len(images))
    return found


# Of each use of a weight: what it is multiplied with, the weight's name, and whether the former has to be transposed.
_Use = tuple[str, str, bool]


def _with_users(model: onnx.ModelProto, names: set[str]) -> tuple[dict[str, tuple[Stored, Moments]], list[_Use]]:
    """Return weights with empty moments, and all uses of them."""
    weights = {each.name: each for each in stored_weights(model.graph) if each.scale is None and each.name in names}
    windows: dict[str, list[Window | None]] = {name: [] for name in weights}
    uses: list[_Use] = []
    for node in model.graph.node:
        for place, name in enumerate(node.input[:2] if node.op_type in OPERATORS else ()):
            if name in weights:
                dimensions = len(weights[name].item.dims)
                fits = (
                    node.input[1 - place] not in weights
                    and output_axis(node, place, dimensions) == weights[name].outputs
                )
                windows[name].append(_window(node, tuple(weights[name].item.dims)) if fits else None)
                uses.append((node.input[1 - place], name, _lies_across(node, place)))
    kept = {name: seen[0] for name, seen in windows.items() if seen[0] is not None and len(set(seen)) == 1}
    return {name: (weights[name], Moments(window)) for name, window in kept.items()}, [
        use for use in uses if use[1] in kept
    ]


def _lies_across(node: onnx.NodeProto, place: int) -> bool:
    """Say whether the inputs of a product lie along the last axis but one of what a weight is multiplied with."""
    if node.op_type not in PRODUCTS:
        return False
    return bool(attribute(node, "transA")) if place == 1 else not attribute(node, "transB")


def _window(node: onnx.NodeProto, shape: tuple[int, ...]) -> Window | None:
    """Return how an operator with a weight of this shape goes over its inputs, or None if it does so in another way."""
    if node.op_type in PRODUCTS:
        return Window() if len(shape) == 2 else None
    if node.op_type not in (*CONVOLUTIONS, *TRANSPOSED) or _text(node, "auto_pad") not in ("", "NOTSET"):
        return None
    kernel = shape[2:]
    ones, none = [1] * len(kernel), [0] * len(kernel)
    one = kernel, tuple(_numbers(node, "strides", ones)), tuple(_numbers(node, "dilations", ones))
    ends = _numbers(node, "pads", [*none, *none])
    pads = tuple(zip(ends[: len(kernel)], ends[len(kernel) :], strict=True))
    groups = attribute(node, "group", 1)
    if node.op_type in TRANSPOSED:
        if _numbers(node, "output_shape", []):
            return None
        return Window(*one, _transposed_pads(*one, pads, _numbers(node, "output_padding", none)), groups, True)
    return Window(*one, pads, groups)


def _numbers(node: onnx.NodeProto, name: str, otherwise: list[int]) -> list[int]:
    return next((list(each.ints) for each in node.attribute if each.name == name), otherwise)


def _text(node: onnx.NodeProto, name: str) -> str:
    return next((each.s.decode() for each in node.attribute if each.name == name), "")


def _runner(model: onnx.ModelProto, names: list[str]) -> Callable[[Any], dict[str, Any]]:
    """Return a function from images (B, C, H, W) to the activations of these names."""
    import onnx
    import onnxruntime
    import torch

    from pq_sweep.core.threads import one_thread

    seen, entry = onnx.ModelProto(), model.graph.input[0].name
    seen.CopyFrom(model)
    wanted = [name for name in names if name != entry]
    there = {item.name for item in seen.graph.output}
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in there)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level, settings.intra_op_num_threads = 3, torch.get_num_threads()
    session = onnxruntime.InferenceSession(seen.SerializeToString(), settings, providers=["CPUExecutionProvider"])

    def run(images: Any) -> dict[str, Any]:
        with one_thread():
            found = session.run(wanted, {entry: images})
        return {entry: images, **dict(zip(wanted, found, strict=True))}

    return run
