"""What a user's function returns, in words; and the refusal of what is of another type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from pq_sweep.types import UserError


def require_type(given: Any, expected: type[Any], target: str, how: str) -> Any:
    """Return what `target` gave if it is of the expected type, or say how to return that."""
    if not isinstance(given, expected):
        raise UserError(f"{target} gives {described(given)}; return pq_sweep.types.{how}, see docs/inputs.md.")
    return given


def class_names(given: Any, what: str) -> tuple[str, ...]:
    """Return the names of classes in order, from a list or array, or from a dictionary with the number of each.

    Such dictionaries are torchvision's class_to_idx and the id2label of Hugging Face.
    """
    names = given.tolist() if isinstance(given, np.ndarray) and given.ndim == 1 else given
    if isinstance(given, Mapping):
        pairs = [(name, number) if isinstance(number, int) else (number, name) for name, number in given.items()]
        numbered = {int(number): name for name, number in pairs if str(number).isdecimal()}
        names = [numbered.get(number) for number in range(len(given))]
    if not isinstance(names, list | tuple) or not all(isinstance(name, str | int) for name in names):
        raise UserError(f"{what} gives classes={described(given)}; give the names of the classes in order, or None.")
    return tuple(map(str, names))


def described(value: Any) -> str:
    """Say in a few words what a value is."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} {tuple(value.shape)}"
    if isinstance(value, str | int | float | type(None)):
        return repr(value)
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
