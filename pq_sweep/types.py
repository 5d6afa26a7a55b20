"""The few nouns that every part of a job shares; importing them imports no framework."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset


class UserError(ValueError):
    """What was asked for cannot be done; the message is one sentence that says what would be right."""


class Stopped(BaseException):
    """SIGTERM came: scancel, preemption, or a machine that shuts down. No `except Exception` may swallow it."""


def choose(name: str, value: str, valid: tuple[str, ...]) -> str:
    """Return `value` if it is one of `valid`, else raise a UserError that lists them."""
    if value not in valid:
        raise UserError(f"{name}={value} is not known; valid are: {', '.join(valid)}.")
    return value


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes an input: short side to `resize`, centre crop of `size`, [0, 1], normalised (pixels)."""

    size: int = 224
    resize: int = 256
    channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class Model:
    """A trained network and what it expects: `module` maps (B, C, H, W) float32 to (B, num_classes) logits.

    `licence` is the address of the terms of the network and its published weights.
    """

    module: nn.Module
    num_classes: int
    preprocess: Preprocess = Preprocess()
    classes: tuple[str, ...] | None = None
    licence: str | None = None

    def sample(self, batch: int = 2) -> Tensor:
        """Return a seeded random input of the right shape, on the device of the network."""
        import torch

        shape = (batch, self.preprocess.channels, self.preprocess.size, self.preprocess.size)
        device = next(self.module.parameters()).device
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


@dataclass(frozen=True)
class Split:
    """Labelled images fetched by index: labels (N,) int64; `fetch` maps indices to (B, C, H, W) normalised float32.

    `names` say which images they are, such as their files.
    """

    labels: Tensor
    fetch: Callable[[list[int]], Tensor]
    names: tuple[str, ...] | None = None

    @classmethod
    def of_tensors(cls, images: Tensor, labels: Tensor) -> Split:
        """Make a split of images (N, C, H, W) and labels (N,) that are in memory."""
        return cls(labels, lambda indices: images[indices])

    @classmethod
    def of_dataset(cls, dataset: Dataset[Any]) -> Split:
        """Make a split of a map-style dataset of (image tensor, label) pairs, such as torchvision's."""
        import torch

        size = len(dataset)  # type: ignore[arg-type]
        targets = None if getattr(dataset, "target_transform", None) else getattr(dataset, "targets", None)
        labels = [int(dataset[i][1]) for i in range(size)] if targets is None else targets
        return cls(
            torch.as_tensor(labels).to(torch.int64), lambda indices: torch.stack([dataset[i][0] for i in indices])
        )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int, offset: int = 0) -> Split:
        """Return `count` images from `offset` on."""
        return self.subset(list(range(offset, min(offset + count, len(self)))))

    def subset(self, indices: list[int]) -> Split:
        """Return the images at `indices`, in that order."""
        names = self.names and tuple(self.names[i] for i in indices)
        return Split(self.labels[indices], lambda inner: self.fetch([indices[i] for i in inner]), names)

    def batches(
        self, size: int, device: Any = "cpu", order: list[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) on `device` in batches of `size`, the last one possibly smaller."""
        order = list(range(len(self))) if order is None else order
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            yield self.fetch(chosen).to(device), self.labels[chosen].to(device)


@dataclass(frozen=True)
class Data:
    """The images of a job. `columns` are the logits that compete when the data has a subset of the model's classes.

    `record` says for the result how the images came to be, such as how many were decoded.
    """

    evaluation: Split
    calibration: Split
    train: Split | None
    classes: tuple[str, ...]
    columns: Tensor | None = None
    record: Callable[[], dict[str, Any]] = dict

    def logits(self, output: Tensor) -> Tensor:
        """Keep the columns of (B, model classes) that belong to the classes of the data: (B, data classes)."""
        return output if self.columns is None else output[:, self.columns.to(output.device)]

    def calibrating(self) -> Split:
        """Return the calibration images, or a UserError if none were set aside."""
        if not len(self.calibration):
            raise UserError("calibration images are needed and there are none; give dataset.calibration=64 or so.")
        return self.calibration

    def training(self) -> Split:
        """Return the training images, or a UserError if the data has none."""
        if self.train is None:
            raise UserError("this dataset has no training images; give it a root with train/ and val/ folders.")
        return self.train


class Stage(Protocol):
    """Times a named part of a job, `with stage("export"): ...`, and keeps what a continued job need not do again."""

    folder: Path

    def __call__(self, name: str) -> AbstractContextManager[None]: ...

    def keep(self, name: str, make: Callable[[], Any], *files: Path) -> Any: ...

    def cached(self, name: str, seconds: float) -> None: ...


@dataclass(frozen=True)
class Workspace:
    """Where and how a job runs: its folder, device ("cpu" or "cuda:0"), CPU threads and stage timer.

    With `shared`, several sessions take turns: threads of one must not spin while another runs. `batch_sizes` are those
    that are timed, for which engines are tuned.
    """

    folder: Path
    device: str
    threads: int
    stage: Stage
    shared: bool = False
    batch_sizes: tuple[int, ...] = (1,)


class Session(Protocol):
    """A model ready to run on one device, and proof of what runs it."""

    runtime: str
    device: str
    artifact: Path
    details: dict[str, Any]

    @property
    def engine(self) -> str:
        """Name the library, its version and what of it executes."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Map images on the session's device to float32 logits on that device."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


class Quantizer(Protocol):
    """Says `precision` and writes the graph in it: `form` is "cpu" or "tensorrt"."""

    precision: str

    def __call__(self, source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> dict[str, Any]: ...


class Runtime(Protocol):
    """Realises a precision on a device kind; `precisions` lists which."""

    precisions: ClassVar[dict[str, tuple[str, ...]]]

    def resolve(self, precision: str, device: str) -> Runtime: ...

    def require(self, device: str) -> None: ...

    def open(self, model: Model, quantizer: Any, data: Data, work: Workspace) -> Session: ...
