"""Passes that can be followed backwards, even if the network's own code forbids gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CUT = (Tensor.detach, Tensor.detach_, Tensor.data.__get__)  # type: ignore[attr-defined]


class _Uncut(TorchFunctionMode):
    """Lets neither torch.no_grad nor detach cut a pass."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CUT:
            return args[0]
        if func is torch._C._set_grad_enabled:
            return func(True)
        # A parameter that requires gradients refuses to be changed where they are recorded.
        within = torch.no_grad() if _changes_parameter(func, args) else nullcontext()
        with within:
            return func(*args, **(kwargs or {}))


def _changes_parameter(func: Any, args: Any) -> bool:
    name = getattr(func, "__name__", "")
    inplace = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name.startswith("__i")
    return inplace and bool(args) and isinstance(args[0], nn.Parameter)


@contextmanager
def followed() -> Iterator[None]:
    """Let gradients pass through torch.no_grad, torch.inference_mode and detach, and compile nothing.

    Answers stay the same.
    """
    kind = torch.inference_mode
    enter, leave = kind.__enter__, kind.__exit__
    kind.__enter__, kind.__exit__ = _nothing, _nothing  # type: ignore[method-assign]
    try:
        with torch.compiler.set_stance("force_eager"), torch.enable_grad(), _Uncut():
            yield
    finally:
        kind.__enter__, kind.__exit__ = enter, leave  # type: ignore[method-assign]


def _nothing(*_: Any) -> None:
    """Enter or leave no mode."""
