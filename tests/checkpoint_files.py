"""Weights as users bring them: states that no freshly made network has, and what tools wrap around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pq_sweep.inputs.digits_cnn import DigitsCNN
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Model

State = dict[str, Tensor]


def trained(seed: int = 42) -> State:
    """Return weights that no freshly made network has."""
    torch.manual_seed(seed)
    return {key: torch.randn_like(value.float()).to(value.dtype) for key, value in DigitsCNN().state_dict().items()}


def prefixed(state: State, prefix: str = "module.") -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def load_digits(folder: Path, content: Any, key: str | None = None, **options: Any) -> Model:
    """Save `content` by torch.save with `options` and load the network for digits from that file."""
    path = folder / "weights.pth"
    torch.save(content, path, **options)
    return digits_cnn(weights=str(path), key=key)
