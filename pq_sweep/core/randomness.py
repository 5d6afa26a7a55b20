"""The state of torch's random numbers, with which what is continued goes on as it would have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def random_states() -> dict[str, Tensor]:
    """Return the state of torch's random numbers, with which what is continued goes on as it would have."""
    states = {"random": torch.get_rng_state()}
    return states | ({"random_cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_random(states: dict[str, Any]) -> None:
    """Restore what `random_states` returned; on a machine without its device, as far as that goes."""
    torch.set_rng_state(states["random"].cpu())
    if "random_cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["random_cuda"].cpu())
