"""What a user's function returns, in words; and the refusal of what is of another type."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from pq_sweep.types import UserError


def require_type(given: Any, expected: type[Any], target: str, how: str) -> Any:
    """Return what `target` gave if it is of the expected type, or say how to return that."""
    if not isinstance(given, expected):
        raise UserError(f"{target} gives {described(given)}; return pq_sweep.types.{how}, see docs/inputs.md.")
    return given


def described(value: Any) -> str:
    """Say in a few words what a value is."""
    if isinstance(value, Tensor | np.ndarray):
        kind = "tensor" if isinstance(value, Tensor) else "numpy array"
        return f"a {str(value.dtype).removeprefix('torch.')} {kind} {tuple(value.shape)}"
    if isinstance(value, str | int | float | type(None)):
        return repr(value)
    return f"a {type(value).__module__}.{type(value).__qualname__}".replace("builtins.", "")
