"""Passes of images through a user's network, and what makes one fail, in a sentence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pq_sweep.core.sentences import own_line
from pq_sweep.types import Model, UserError


@torch.no_grad()
def run(model: Model, images: Tensor, what: str, advice: str | None = None) -> Any:
    """Return what the network, called `what`, gives for images, or say why it does not take them."""
    try:
        return model.module(images)
    except Exception as error:
        advice = _cause(model, images) or advice or _preprocess(model)
        raise UserError(f"{what} fails on float32 images {tuple(images.shape)} ({_told(error)}); {advice}.") from error


def _preprocess(model: Model) -> str:
    size, channels = model.preprocess.size, model.preprocess.channels
    return f"its Preprocess says so: correct preprocess (size={size}, channels={channels}) or the network"


def _told(error: Exception) -> str:
    reason, line = " ".join(str(error).split()) or "no reason given", own_line(error)
    return f"{type(error).__name__}{line and f' in {line}'}: {reason[:300].rstrip('.')}"


def _cause(model: Model, images: Tensor) -> str | None:
    """Run a pass that fails once more, and say what it does to types of numbers or devices, if it does that."""
    with Strays(images) as strays:
        try:
            model.module(images)
        except Exception as error:
            strays.blame(error)
    return strays.cause


class Strays(TorchFunctionMode):
    """Finds the first tensor of a pass that has other floating point numbers, or another device, than the images."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.dtype, self.device = images.dtype, images.device
        self.running = ""
        self.cause: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments and at the result of a function."""
        for given in [value for value in [*args, *(kwargs or {}).values()] if self._strays(value)]:
            self.cause = self.cause or (
                f"its forward uses a {self._kind(given)} tensor {tuple(given.shape)} that is neither parameter nor"
                " buffer: register it by register_buffer, in float32"
            )
        self.running = getattr(func, "__name__", str(func))
        result = func(*args, **(kwargs or {}))
        if self.cause is None and self._strays(result):
            self.cause = self._made(self._kind(result), self.running)
        return result

    def blame(self, error: Exception) -> None:
        """Say whether the function that raised the error was to move a tensor to a device, and forget other causes."""
        text = str(error)
        if self.running in ("cuda", "to", "_cuda_init") or "CUDA enabled" in text or "NVIDIA" in text:
            self.cause = self.cause or self._moved("another device", self.running)
        elif not any(word in text for word in ("type", "Half", "Double", "BFloat16", "device", "cuda")):
            self.cause = None

    def _strays(self, value: Any) -> bool:
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return False
        return value.device != self.device or (value.is_floating_point() and value.dtype != self.dtype)

    def _kind(self, value: Tensor) -> str:
        return str(value.device) if value.device != self.device else str(value.dtype).removeprefix("torch.")

    def _made(self, kind: str, function: str) -> str:
        if kind.startswith(("cuda", "cpu", "meta", "mps", "xpu")):
            return self._moved(kind, function)
        return (
            f"its forward makes {kind} tensors ({function}) where weights and images are float32: take that out, as"
            " quantizers convert whole networks"
        )

    def _moved(self, where: str, function: str) -> str:
        by = function and f" ({function})"
        return (
            f"its forward moves tensors to {where}{by}, and a job chooses the device: take that out, or move"
            " them to that of a parameter"
        )


class Strangers(TorchFunctionMode):
    """Notes the Parameters that a pass uses and the network does not know, as layers in a plain list are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.known = {id(parameter) for parameter in module.parameters()}
        self.found: list[nn.Parameter] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of a function before it is called."""
        values = [*args, *(kwargs or {}).values()]
        self.found += [value for value in values if isinstance(value, nn.Parameter) and id(value) not in self.known]
        return func(*args, **(kwargs or {}))

    def refuse(self, what: str) -> None:
        """Raise a UserError if any was found."""
        if self.found:
            raise UserError(
                f"{what} uses weights that it does not hold itself, first of shape {tuple(self.found[0].shape)}; keep"
                " layers in nn.ModuleList or nn.ModuleDict, not in a list or dict."
            )
