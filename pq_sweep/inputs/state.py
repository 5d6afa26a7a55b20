"""What a network keeps between its answers: weights and buffers, attributes, variables of its class and its module."""

from __future__ import annotations

import hashlib
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from itertools import islice
from types import CellType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import KEPT_ELSEWHERE
from pq_sweep.types import UserError

SCALARS = (bool, int, float, complex, str, bytes, type(None))
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState)
CONTAINERS = (list, tuple, set, frozenset, deque, Mapping)
# How many entries of a container, and how many containers within each other, are looked at.
LOOKED_AT, DEPTH = 100, 3
# Passes in which answers have to stay the same if something changes, and where counters are then put.
PASSES, FAR = 8, (10**6 - 1, 10**6)
NEW = object()
# Shares of the largest logit by which answers may differ that are computed by the same or by other kernels.
SAME_WAY, OTHER_WAY = 1e-4, 1e-3


@dataclass(frozen=True)
class Place:
    """Where code keeps a value: an entry of a dictionary, or an attribute of a class or of a closure's cell."""

    holder: Any
    name: str

    def read(self) -> Any:
        return self.holder[self.name] if isinstance(self.holder, dict) else getattr(self.holder, self.name)

    def write(self, value: Any) -> None:
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        else:
            setattr(self.holder, self.name, value)

    def remove(self) -> None:
        """Take an attribute away that was not there before."""
        if isinstance(self.holder, dict):
            self.holder.pop(self.name, None)


class Kept:
    """The marks of all that a network keeps; `changes` tells what has changed since."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.tensors = _tensors(module)
        self.values = {name: _copied(place.read()) for name, place in _places(module).items()}
        self.marks = {name: _mark(value) for name, value in self.values.items()}

    def require_same_tensors(self, what: str) -> None:
        """Raise a UserError if a parameter or buffer has changed."""
        now = _tensors(self.module)
        if changed := [name for name in now if now[name] != self.tensors.get(name)]:
            raise UserError(
                f"{what} changes {changed[0]} when it answers, even in eval mode; change it only if self.training."
            )

    def changes(self) -> dict[str, Place]:
        """Return where values have changed, by name."""
        found = _places(self.module)
        return {name: place for name, place in found.items() if self.marks.get(name, NEW) != _mark(place.read())}

    def put_back(self, changes: dict[str, Place]) -> None:
        """Have the network keep what it kept at first."""
        for name, place in changes.items():
            if name in self.values:
                place.write(_copied(self.values[name]))
            else:
                place.remove()


def judged(kept: Kept, answer: Callable[[], Tensor], what: str) -> list[str]:
    """Refuse a network whose answers depend on what it changes when it answers, or return a note on that.

    What it computes once and keeps, and what it remembers of the last images, needs no note.
    """
    if not (changes := kept.changes()):
        return []
    if drawing := [name for name, place in changes.items() if isinstance(place.read(), GENERATORS)]:
        raise UserError(
            f"{what} draws random numbers from {drawing[0]} when it answers, even in eval mode, so that no two answers"
            " are alike; draw only if self.training."
        )
    names, since = listed(list(changes)), Kept(kept.module)
    if not _stays_same(changes, answer):
        raise UserError(
            f"{what} changes {names} when it answers, and with it what it answers next; let answers depend on nothing"
            " but weights and images."
        )
    going_on = listed(list(since.changes()))
    if _is_stale(kept, changes, answer):
        raise UserError(
            f"{what} keeps {names} from its first answer on, and does not compute it anew when its weights change, as"
            " by pruning; compute it at each call, or forget it in train()."
        )
    note = f"The network changes {going_on} when it answers; its answers stayed the same in {PASSES} passes."
    return [note] if going_on else []


def _stays_same(changes: dict[str, Place], answer: Callable[[], Tensor]) -> bool:
    """Say whether answers stay the same over some passes, and after as many as no test could run."""
    first = answer()
    if not all(alike(answer(), first) for _ in range(PASSES - 1)):
        return False
    counters = [place for place in changes.values() if type(place.read()) in (int, float)]
    try:
        return not counters or all(alike(_answer_at(counters, far, answer), first) for far in FAR)
    except UserError:
        return False


def _answer_at(counters: list[Place], number: int, answer: Callable[[], Tensor]) -> Tensor:
    """Return the answer with all counters at this number, and put them back."""
    before = [place.read() for place in counters]
    for place, value in zip(counters, before, strict=True):
        place.write(type(value)(number))
    try:
        return answer()
    finally:
        for place, value in zip(counters, before, strict=True):
            place.write(value)


def _is_stale(kept: Kept, changes: dict[str, Place], answer: Callable[[], Tensor]) -> bool:
    """Say whether a network with other weights answers by what it has computed from those that it had."""
    with _halved(kept.module):
        forget(kept.module)
        old = answer()
        kept.put_back(changes)
        new = answer()
    kept.put_back(changes)
    answer()  # an export that found nothing kept would have the network keep what is no tensor
    return not alike(old, new)


@contextmanager
def _halved(module: nn.Module) -> Iterator[None]:
    """Halve all weights for a while, which is exact in both directions."""
    weights = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(0.5)
        try:
            yield
        finally:
            for weight in weights:
                weight.mul_(2)


def forget(module: nn.Module) -> None:
    """Have a network forget what it has computed from its weights, as many do when they are to be trained.

    Weights stay as they are: some networks merge parts of them in eval mode.
    """
    if any(type(part).train is not nn.Module.train for part in module.modules()):
        before = {tensor: tensor.detach().clone() for tensor in [*module.parameters(), *module.buffers()]}
        with suppress(Exception), torch.no_grad():
            module.train()
            module.eval()
            for tensor in [tensor for tensor, values in before.items() if not torch.equal(tensor, values)]:
                tensor.copy_(before[tensor])
    module.eval()


def alike(one: Tensor, other: Tensor, share: float = SAME_WAY) -> bool:
    """Say whether answers are the same up to this share of the largest: sums may run in another order."""
    return one.shape == other.shape and float((one - other).abs().max()) <= share * float(other.abs().max())


@contextmanager
def same_answers(answer: Callable[[], Tensor], what: str) -> Iterator[None]:
    """Raise a UserError if a network answers otherwise after all that is inside than before."""
    before = answer()
    yield
    if not alike(answer(), before, OTHER_WAY):
        raise UserError(
            f"{what} answers the same images otherwise after it has answered others; let answers depend on nothing but"
            " weights and images."
        )


def _tensors(module: nn.Module) -> dict[str, Any]:
    return {name: _mark(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}


def _places(module: nn.Module) -> dict[str, Place]:
    """Return where a network's own code may keep values between calls."""
    found: dict[str, Place] = {}
    for path, part in module.named_modules():
        for name in [name for name in vars(part) if name not in KEPT_ELSEWHERE]:
            found[f"{path}.{name}".lstrip(".")] = Place(vars(part), name)
    for kind in {type(part) for part in module.modules()}:
        found |= _of_class(kind)
    return found


def _of_class(kind: type[nn.Module]) -> dict[str, Place]:
    """Return the variables of a class of the user's own, and those that its functions take from around them."""
    found: dict[str, Place] = {}
    for base in [base for base in kind.__mro__ if not base.__module__.startswith(("torch", "builtins"))]:
        for name, value in vars(base).items():
            if _is_data(value) and not name.startswith("__"):
                found[f"{base.__name__}.{name}"] = Place(base, name)
            elif isinstance(value := inspect.unwrap(value) if callable(value) else value, FunctionType):
                found |= _around(value)
    return found


def _around(function: FunctionType) -> dict[str, Place]:
    """Return the variables of its module, and of functions around it, that a function names."""
    names, cells = function.__code__.co_names, function.__closure__ or ()
    found = {name: Place(function.__globals__, name) for name in names if _is_data(function.__globals__.get(name))}
    inner = zip(function.__code__.co_freevars, cells, strict=True)
    return found | {name: Place(cell, "cell_contents") for name, cell in inner if _is_data(_content(cell))}


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name that has no value yet
        return None


def _is_data(value: Any) -> bool:
    """Say whether a value is data."""
    return value is not None and isinstance(value, (*SCALARS, *GENERATORS, *CONTAINERS, Tensor, np.ndarray))


def _copied(value: Any) -> Any:
    return copy(value) if type(value) in (list, dict, set, deque) else value


def _mark(value: Any, depth: int = DEPTH) -> Any:
    """Return something that differs if a value has changed, and for what does not let itself be read its identity."""
    try:
        return _read(value, depth)
    except Exception:
        return id(value)


def _read(value: Any, depth: int) -> Any:
    if isinstance(value, SCALARS):
        return repr(value)
    if isinstance(value, Tensor):
        return _mark_of_tensor(value)
    if isinstance(value, np.ndarray):
        return value.shape, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, GENERATORS):
        state: Any = getattr(value, "getstate", None) or getattr(value, "get_state", None)
        return repr(state() if state else getattr(value, "bit_generator").state)  # noqa: B009
    if isinstance(value, CONTAINERS):
        items = value.items() if isinstance(value, Mapping) else value
        return len(value), [_mark(item, depth - 1) for item in islice(items, LOOKED_AT)] if depth else None
    if type(value).__module__ in ("itertools", "collections"):
        return repr(value)
    if depth and hasattr(value, "__dict__") and not isinstance(value, type | nn.Module) and not callable(value):
        return [(name, _mark(item, depth - 1)) for name, item in vars(value).items()]
    return id(value)


def _mark_of_tensor(tensor: Tensor) -> Any:
    """Return a hash of the values; of parameters, which may be large, their sum, beside the number of their changes."""
    values = tensor.detach()
    if values.layout != torch.strided or values.is_quantized or values.is_meta:
        return id(tensor)
    if isinstance(tensor, nn.Parameter):
        return tensor._version, str(float(values.sum()))
    raw = values.cpu().contiguous().flatten().view(torch.uint8).numpy()
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw.data).digest()
