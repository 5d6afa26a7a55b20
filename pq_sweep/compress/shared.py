"""Layers whose parameters a network uses at several places: their channels cannot leave at one of them alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pq_sweep.compress.gradients import followed
from pq_sweep.core.weights import Memory, memory
from pq_sweep.types import Model


def shared_layers(model: Model) -> dict[nn.Module, str]:
    """Return the layers of which one pass uses a parameter at several places, with their names.

    These are layers that share a parameter, a layer that runs twice, and one whose parameter other code uses as well.
    """
    places = _places(model)
    names: dict[nn.Module, list[str]] = {}
    for name, part in model.module.named_modules(remove_duplicate=False):
        if any(len(places.get(key, ())) > 1 for key in _held_by(part)):
            names.setdefault(part, []).append(name or "the network itself")
    return {part: " = ".join(found) for part, found in names.items()}


def _places(model: Model) -> dict[Memory, set[int]]:
    """Return for each parameter the calls of layers that use it in one pass."""
    uses = _Uses()
    parts = [part for part in model.module.modules() if part._parameters]
    hooks = [part.register_forward_pre_hook(uses.enter) for part in parts]
    hooks += [part.register_forward_hook(uses.leave) for part in parts]
    try:
        images = model.sample()
        with followed(), uses:
            model.module(images)
    finally:
        for hook in hooks:
            hook.remove()
    return uses.places


class _Uses(TorchFunctionMode):
    """Notes where parameters are used: within a call of the layer that holds them, or at a place of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = count()
        self.running: list[tuple[int, list[Memory]]] = []
        self.places: dict[Memory, set[int]] = {}

    def enter(self, part: nn.Module, *_: Any) -> None:
        self.running.append((next(self.numbers), _held_by(part)))

    def leave(self, *_: Any) -> None:
        self.running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # Questions such as that for its device do not use a parameter.
        if any(tensor.grad_fn is not None for tensor in _tensors(result)):
            for tensor in _tensors([args, kwargs or {}]):
                if isinstance(tensor, nn.Parameter):
                    self._note(memory(tensor))
        return result

    def _note(self, key: Memory) -> None:
        call = next((number for number, held in reversed(self.running) if key in held), None)
        self.places.setdefault(key, set()).add(next(self.numbers) if call is None else call)


def _held_by(part: nn.Module) -> list[Memory]:
    return [memory(parameter) for parameter in part._parameters.values() if parameter is not None]


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
