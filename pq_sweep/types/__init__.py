"""The few nouns that every part of a job shares; importing them imports no framework."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from pq_sweep.types.errors import Stopped as Stopped
from pq_sweep.types.errors import UserError as UserError
from pq_sweep.types.errors import choose as choose
from pq_sweep.types.samples import TOO_FEW, are_labels, by_number, numbers, places

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
# What a component or a part of a job reports, as plain values.
Record = dict[str, Any]
# A function (source, target, data, *, form, stage) that writes the graph of a network in its precision, or a partial of
# one. @quantizer marks it with the precision, which `precision_of` returns.
Quantizer = Callable[..., Record | None]
# Returns what something depends on, as plain values; called only where that is looked up.
About = Callable[[], dict[str, Any]]
CLASSIFICATION = "classification"


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

    `licence` is the address of the terms of the network and its published weights. `notes` are sentences for the row:
    what was done to the network, or chosen for it, before it was measured. A network whose `task` is not
    classification maps something else to something else, and only its weights can be studied.
    """

    module: nn.Module
    num_classes: int
    preprocess: Preprocess = Preprocess()
    classes: tuple[str, ...] | None = None
    licence: str | None = None
    notes: tuple[str, ...] = ()
    task: str = CLASSIFICATION

    def sample(self, batch: int = 2) -> Tensor:
        """Return a seeded random input of the right shape, on the device of the network."""
        import torch

        shape = (batch, self.preprocess.channels, self.preprocess.size, self.preprocess.size)
        device = next(self.module.parameters()).device
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


# Images in memory at a time when they are hashed.
HASHED_AT_ONCE = 32
# Starting a thread and waiting for it takes a few tenths of a millisecond, in which a core copies about as many bytes.
BYTES_WORTH_A_THREAD = 2_000_000


@dataclass(frozen=True)
class Split:
    """Labelled images fetched by index: labels (N,) int64; `fetch` maps indices to (B, C, H, W) normalised float32.

    `names` say which images they are, such as their files. `marks` hash each image and how it is prepared, if that is
    cheaper than fetching it. If images are cheaper to move before they are normalised, `raw` fetches them as they are,
    such as uint8 (B, H, W, C), in any thread, and `finish` turns them into what `fetch` returns, on any device. `items`
    fetches images as a user's data set gives them, such as PIL images; loading makes a `fetch` of it. `notes` are
    phrases for the row, such as "samples came as dictionaries".
    """

    labels: Tensor
    fetch: Callable[[list[int]], Tensor]
    names: tuple[str, ...] | None = None
    marks: Callable[[list[int]], Iterable[str]] | None = None
    raw: Callable[[list[int]], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    items: Callable[[list[int]], list[Any]] | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of_raw(
        cls,
        labels: Tensor,
        raw: Callable[[list[int]], Tensor],
        finish: Callable[[Tensor], Tensor],
        *,
        names: tuple[str, ...] | None = None,
        marks: Callable[[list[int]], Iterable[str]] | None = None,
    ) -> Split:
        """Make a split of images that are normalised on the device where they are used."""
        return cls(labels, lambda indices: finish(raw(indices)), names, marks, raw, finish)

    @classmethod
    def of_tensors(cls, images: Tensor, labels: Tensor) -> Split:
        """Make a split of images (N, C, H, W) and labels (N,) that are in memory, also in arrays or lists."""
        if len(images) != len(labels):
            raise UserError(TOO_FEW.format(len(images), len(labels)))
        if isinstance(images, list | tuple) or isinstance(labels, list | tuple):
            return cls.of_dataset(list(zip(images, labels, strict=True)))
        return cls(labels, lambda indices: images[indices])

    @classmethod
    def of_dataset(cls, dataset: Any) -> Split:
        """Make a split of a data set whose samples are taken by number: (image, label) pairs, such as torchvision's.

        Dictionaries with one image and one label, further entries beside them, and the data set of a DataLoader that
        neither chooses samples nor changes them are taken too, and `notes` say so.
        """
        import torch

        samples, notes = by_number(dataset)
        image, label, how = places(samples[0]) if len(samples) else (0, 1, [])
        targets = getattr(samples, "targets", None)
        has_targets = are_labels(targets, samples, label)
        labels = targets if has_targets else [samples[i][label] for i in range(len(samples))]

        def items(indices: list[int]) -> list[Any]:
            return [samples[i][image] for i in indices]

        def fetch(indices: list[int]) -> Tensor:
            return torch.stack(items(indices))

        return cls(numbers(labels), fetch, items=items, notes=(*notes, *how))

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int, offset: int = 0) -> Split:
        """Return `count` images from `offset` on."""
        return self.subset(list(range(offset, min(offset + count, len(self)))))

    def subset(self, indices: list[int]) -> Split:
        """Return the images at `indices`, in that order."""
        names = self.names and tuple(self.names[i] for i in indices)
        marks, raw = self.marks and _at(indices, self.marks), self.raw and _at(indices, self.raw)
        items = self.items and _at(indices, self.items)
        return Split(self.labels[indices], _at(indices, self.fetch), names, marks, raw, self.finish, items, self.notes)

    def identity(self) -> str:
        """Return a SHA-256 (hex) of what each image shows to a network, of the images' order and of their labels.

        It is the same in every process. The identity of a subset depends on nothing but the images in it.
        """
        indices = list(range(len(self)))
        marks = self.marks(indices) if self.marks else hash_each(self.fetch, indices)
        whole = hashlib.sha256()
        for label, mark in zip(self.labels.tolist(), marks, strict=True):
            whole.update(f"{label} {mark}\n".encode())
        return whole.hexdigest()

    def batches(
        self, size: int, device: Any = "cpu", order: list[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images, labels) on `device` in batches of `size`, the last one possibly smaller.

        Raw images are fetched while the batch before is in use. They are copied on the device's current stream, so what
        computes with them has to run on that stream as well.
        """
        order = list(range(len(self))) if order is None else order
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        fetched = _ahead(_pinning(self.raw, device), parts) if self.raw else map(self.fetch, parts)
        for part, images in zip(parts, fetched, strict=True):
            there = images.to(device, non_blocking=self.raw is not None)
            yield self.finish(there) if self.finish else there, self.labels[part].to(device)


def _ahead(fetch: Callable[[list[int]], Tensor], parts: list[list[int]]) -> Iterator[Tensor]:
    """Yield the images of each part; where they are many bytes, a thread fetches the next ones meanwhile.

    Each thread ends with its batch and is waited for, so that none is left over whatever becomes of the caller.
    """
    if not parts:
        return
    images = fetch(parts[0])
    for part in parts[1:]:
        if images.nbytes < BYTES_WORTH_A_THREAD:
            yield images
            images = fetch(part)
        else:
            with ThreadPoolExecutor(1) as pool:
                following = pool.submit(fetch, part)
                pool.shutdown(wait=False)
                yield images
            images = following.result()
    yield images


def _pinning(fetch: Callable[[list[int]], Tensor], device: Any) -> Callable[[list[int]], Tensor]:
    """Have images that are for CUDA fetched to page-locked memory, from which the GPU copies them by itself."""
    import torch

    def fetch_pinned(indices: list[int]) -> Tensor:
        images = fetch(indices)
        with torch.cuda.device(device):  # in a new thread the first GPU is current, which may be someone else's
            pinned = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
        pinned.numpy()[...] = images.numpy()  # torch would start threads for it, which spin while they wait for more
        return pinned

    return fetch_pinned if torch.device(device).type == "cuda" else fetch


def _at(indices: list[int], call: Callable[[list[int]], T]) -> Callable[[list[int]], T]:
    """Return a call that takes positions within `indices` instead of indices."""
    return lambda inner: call([indices[i] for i in inner])


def hash_each(fetch: Callable[[list[int]], Tensor], indices: list[int], about: str = "") -> Iterator[str]:
    """Yield for each image a SHA-256 of its values, its shape and `about`; few of them are in memory at a time."""
    for start in range(0, len(indices), HASHED_AT_ONCE):
        for image in fetch(indices[start : start + HASHED_AT_ONCE]).detach().cpu().contiguous().numpy():
            yield hashlib.sha256(f"{about} {image.dtype} {image.shape}\n".encode() + image.tobytes()).hexdigest()


@dataclass(frozen=True)
class Data:
    """The images of a job. `columns` are the logits that compete when the data has a subset of the model's classes.

    `record` says for the result how the images came to be, such as how many were decoded. `notes` are sentences for the
    row: what was done to the images, or chosen of them, before anything was measured.
    """

    evaluation: Split
    calibration: Split
    train: Split | None
    classes: tuple[str, ...]
    columns: Tensor | None = None
    record: Callable[[], dict[str, Any]] = dict
    notes: tuple[str, ...] = ()

    def logits(self, output: Tensor) -> Tensor:
        """Keep the columns of (B, model classes) that belong to the classes of the data: (B, data classes)."""
        return output if self.columns is None else output[:, self.columns.to(output.device)]

    def identity(self, *parts: Split | None) -> list[Any]:
        """Return what an outcome depends on that used these parts of the data: images, and which logits compete."""
        columns = None if self.columns is None else self.columns.tolist()
        return [columns, *(part and part.identity() for part in parts)]

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


class Cache(Protocol):
    """Files that one job made and others need too, found by their kind and all that they depend on."""

    def rest_on(self, about: dict[str, Any]) -> None: ...

    def alone(self, kind: str, about: dict[str, Any]) -> AbstractContextManager[None]: ...

    def take(self, kind: str, about: dict[str, Any], folder: Path) -> dict[str, Any] | None: ...

    def put(self, kind: str, about: dict[str, Any], folder: Path, made: dict[str, Any], names: list[str]) -> None: ...


class Stage(Protocol):
    """Times a named part of a job, `with stage("export"): ...`, and keeps what is not to be done again.

    What is kept in the job serves the job itself if it is continued; what is kept in the cache serves every job.
    """

    folder: Path
    cache: Cache | None

    def __call__(self, name: str, *, alone: bool = False) -> AbstractContextManager[None]: ...

    def keep_in_job(self, name: str, make: Callable[[], Any], *files: Path) -> Any: ...

    def keep_in_both(self, name: str, about: About, make: Callable[[], Any], *files: Path) -> Any: ...

    def keep_in_cache(self, kind: str, about: About, make: Callable[[], Any], *files: Path) -> Any: ...

    def count_cached(self, name: str, seconds: float) -> None: ...


@dataclass(frozen=True)
class Workspace:
    """Where and how a job runs: its folder, device ("cpu" or "cuda:0"), CPU threads and stage timer.

    With `shared`, several sessions take turns: threads of one must not spin while another runs. `batch_sizes` are those
    that are timed; engines are tuned for them.
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
        """Name the library, its version and the part of it that executes."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Map images on the session's device to float32 logits on that device."""
        ...

    def close(self) -> None:
        """Free threads and memory."""
        ...


class RuntimeChoice(Protocol):
    """What `runtime=` chooses: a runtime, or a choice among runtimes by precision and device.

    `precisions` are listed by kind of device. `resolve` returns the runtime for a precision and a device, or raises a
    UserError if its options do not fit the device.
    """

    precisions: ClassVar[dict[str, tuple[str, ...]]]

    def resolve(self, precision: str, device: str) -> Runtime: ...


class Runtime(RuntimeChoice, Protocol):
    """Opens sessions: `require` refuses a device for which this machine lacks something, before anything is loaded."""

    def require(self, device: str) -> None: ...

    def open(self, model: Model, quantizer: Quantizer, data: Data, work: Workspace) -> Session: ...
