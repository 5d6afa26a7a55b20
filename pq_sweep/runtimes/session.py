"""The session that all runtimes open: a call on one device, and proof of what runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[["Tensor"], "Tensor"]

BATCH = "batch"  # the name of the dimension that counts images in every graph


@dataclass
class CallSession:
    """A model as a call from float32 images to float32 logits; `close` drops the call and then runs `release`.

    Without a call there is only the artifact, built for another machine.
    """

    call: Call | None
    runtime: str
    engine: str
    device: str
    artifact: Path
    details: dict[str, Any]
    release: Callable[[], None] | None = None

    @property
    def runs(self) -> bool:
        """Say whether it can be called."""
        return self.call is not None

    def __call__(self, images: Tensor) -> Tensor:
        assert self.call, "the session is closed"
        return self.call(images)

    def close(self) -> None:
        """Free memory and threads: the threads of an idle ONNX Runtime would spin and disturb what is timed next."""
        self.call = None
        if self.release:
            self.release()


@dataclass(frozen=True)
class BySize:
    """Runs any number of images (N, C, H, W) by calls that each take a fixed number; the last ones are padded.

    In this way, evaluation uses the very engines, graphs and compiled code that are timed.
    """

    calls: dict[int, Call]

    def __call__(self, images: Tensor) -> Tensor:
        if call := self.calls.get(len(images)):
            return call(images)
        import torch

        return torch.cat([self._padded(part) for part in images.split(max(self.calls))])

    def _padded(self, images: Tensor) -> Tensor:
        import torch

        count = len(images)
        size = min(size for size in self.calls if size >= count)
        padding = images.new_zeros((size - count, *images.shape[1:]))
        return self.calls[size](torch.cat([images, padding]))[:count]
