"""What a component that trains calls after each epoch, so that somebody may look at the network on its way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

Call = Callable[[Tensor], Any]


class Observe(Protocol):
    """Is told how many epochs are done, 0 before the first, and may look at the network but not change it.

    `call` maps images to what the network gives, if that is not the network itself, such as with rounded weights. What
    is changed after the last epoch, such as BatchNorm's statistics, counts as one more.
    """

    def __call__(self, epoch: int, call: Call | None = None) -> None: ...


def unobserved(epoch: int, call: Call | None = None) -> None:
    """Look at nothing."""
