"""What a function for a data set returns, checked once when it is loaded.

Pictures that nobody has prepared and labels in another form are put right, and a note for the row says so. Everything
else is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pq_sweep.inputs.apart import apart
from pq_sweep.inputs.classes import without_images
from pq_sweep.inputs.contract import class_names, described, require_type
from pq_sweep.inputs.pictures import Prepare, preparing
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

# Images that are fetched twice when data are loaded.
REPEATED = 16


def accepted_data(given: Any, model: Model, target: str) -> Data:
    """Return the data that the function `target` made: class numbers as labels, float32 images as the model takes."""
    data = require_type(given, Data, target, "Data(evaluation, calibration, train, classes)")
    data = _completed(_of_splits(data, target), model)
    data = replace(data, classes=class_names(data.classes, target))
    classes = _competing(data, model, target)
    splits: dict[str, Any] = {}
    said: dict[str, list[str]] = {}
    for name in ("evaluation", "calibration", "train"):
        if (part := getattr(data, name)) is not None or name == "evaluation":
            splits[name], notes = _accepted_split(part, name, model.preprocess, classes)
            for note in notes:
                said.setdefault(note, []).append(name)
    if not len(splits["evaluation"]):
        raise UserError(f"{target} gives no evaluation images; give at least one.")
    if not len(splits.get("train", ())):
        splits["train"] = None
    notes = [f"The {_together(parts)} {note}." for note, parts in said.items()]
    if not target.startswith("pq_sweep."):  # our own functions say so themselves, where it means something
        notes += filter(None, [without_images(splits["evaluation"].labels, data.classes)])
        notes += apart(splits, target)
    return replace(data, **splits, notes=(*data.notes, *notes))


def _of_splits(data: Data, target: str) -> Data:
    """Return data whose parts are splits; a data set, or what else has samples, is made one."""
    parts: dict[str, Any] = {name: getattr(data, name) for name in ("evaluation", "calibration", "train")}
    for name, part in parts.items():
        has_samples = hasattr(part, "__iter__") or hasattr(part, "__getitem__")
        if has_samples and not isinstance(part, str):
            parts[name] = Split.of_dataset(part)
        elif part is not None or name == "evaluation":
            require_type(part, Split, f"{name} of {target}", "Split")
    return replace(data, **parts)


def _completed(data: Data, model: Model) -> Data:
    """Fill in what may be left out: an empty calibration part, and the names of the classes."""
    if data.calibration is None:
        empty = replace(data.evaluation, labels=torch.zeros(0, dtype=torch.int64), names=None, items=None, raw=None)
        data = replace(data, calibration=empty)
    if isinstance(data.columns, list | tuple):
        data = replace(data, columns=torch.tensor(data.columns))
    if data.classes is None:
        names = model.classes if data.columns is None and model.classes else None
        count = model.num_classes if data.columns is None else len(data.columns)
        data = replace(data, classes=names or tuple(str(number) for number in range(count)))
    return data


def _together(names: list[str]) -> str:
    """Join names as a sentence does: "a, b and c"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _competing(data: Data, model: Model, target: str) -> int:
    """Return how many logits compete for an image."""
    if data.columns is None:
        if len(data.classes) != model.num_classes:
            raise UserError(
                f"{target} gives {len(data.classes)} names of classes for {model.num_classes} logits; give a name for"
                " each, or as columns the logit of each class."
            )
        return model.num_classes
    columns = data.columns.tolist()
    if len(columns) != len(data.classes) or not all(0 <= column < model.num_classes for column in columns):
        raise UserError(
            f"columns of {target} have to name one of the model's {model.num_classes} logits for each of the"
            f" {len(data.classes)} classes of the data."
        )
    return len(columns)


def _accepted_split(split: Split, name: str, preprocess: Preprocess, classes: int) -> tuple[Split, list[str]]:
    """Return a part of the data with labels and images as they have to be, and what was done to them."""
    if not len(split):
        return split, []
    labels, notes = _class_numbers(split.labels, name, classes)
    notes = [*split.notes, *notes]
    split = replace(split, labels=labels)
    if split.raw:
        _check_images(split.fetch([0]), [0], split, name, preprocess)
        return split, notes
    first = _fetched(split, [0], name)[0]
    prepare, how = preparing(first, preprocess)
    notes += how
    fetch = partial(_fetch, split, name, preprocess, prepare)
    fetch([0])
    _require_same(fetch, list(range(min(REPEATED, len(split)))), name)
    return replace(split, fetch=fetch, items=None), notes


def _require_same(fetch: Callable[[list[int]], Tensor], indices: list[int], name: str) -> None:
    """Refuse images that are others each time, as by augmentation; those to train on may be."""
    first = fetch(indices)
    if name != "train" and not torch.equal(first, fetch(indices)):
        raise UserError(
            f"the {name} images are others each time that they are fetched, so that no two answers could be compared;"
            " leave random augmentation and noise out of them, or seed them by the image's number."
        )


def _fetch(split: Split, name: str, preprocess: Preprocess, prepare: Prepare | None, indices: list[int]) -> Tensor:
    """Return images of a split, prepared if they have to be, and checked."""
    fetched = _fetched(split, indices, name)
    if prepare:
        _require_one_kind(fetched, indices, split, name)
        fetched = [prepare(item) for item in fetched]
    images = fetched if isinstance(fetched, Tensor) else _stacked(fetched, indices, split, name)
    _check_images(images, indices, split, name, preprocess)
    return images


def _require_one_kind(items: Any, indices: list[int], split: Split, name: str) -> None:
    """Refuse pictures among tensors: what is to be prepared is told by the first of them."""
    for index, item in zip(indices, items, strict=True):
        if isinstance(item, Tensor) != isinstance(items[0], Tensor):
            raise UserError(
                f"{_image(index, split, name)} is {described(item)} and another beside it {described(items[0])};"
                " give all images in one form."
            )


def _fetched(split: Split, indices: list[int], name: str) -> Any:
    return split.items(indices) if split.items else split.fetch(indices)


def _stacked(images: list[Any], indices: list[int], split: Split, name: str) -> Tensor:
    for index, image in zip(indices, images, strict=True):
        if not isinstance(image, Tensor):
            raise UserError(f"{_image(index, split, name)} is {described(image)}; give float32 tensors or PIL images.")
        if image.shape != images[0].shape:
            shapes = tuple(image.shape), tuple(images[0].shape)
            raise UserError(
                f"{_image(index, split, name)} is {shapes[0]} and another beside it {shapes[1]}; give tensors of one"
                " shape."
            )
    return torch.stack(images)


def _check_images(images: Any, indices: list[int], split: Split, name: str, preprocess: Preprocess) -> None:
    """Refuse a batch that is not float32 (B, channels, size, size) of finite values."""
    shape = (len(indices), preprocess.channels, preprocess.size, preprocess.size)
    if not isinstance(images, Tensor) or tuple(images.shape) != shape or images.dtype != torch.float32:
        raise UserError(
            f"the {name} images come as {described(images)} where float32 {shape} is expected, as the model's"
            " Preprocess says; bring them to that size, channels first, or correct preprocess."
        )
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        first = indices[int(finite.logical_not().nonzero()[0])]
        raise UserError(f"{_image(first, split, name)} has values that are not finite; leave it out or mend it.")


def _image(index: int, split: Split, name: str) -> str:
    return f"{name} image {split.names[index] if split.names else index}"


def _class_numbers(labels: Any, name: str, classes: int) -> tuple[Tensor, list[str]]:
    """Return labels (N,) int64, from one-hot rows too."""
    found, notes = _as_tensor(labels, name), []
    if found.dim() == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() == 2 and _one_hot(found):
        found = found.argmax(1)
        notes.append("labels came one-hot")
    if found.dim() != 1 or not bool((found == found.to(torch.int64)).all()):
        raise UserError(
            f"the {name} labels come as {described(found)}; give the number of the class of each image, as (N,) int64."
        )
    found = found.to(torch.int64)
    wrong = found[(found < 0) | (found >= classes)]
    if len(wrong):
        raise UserError(
            f"{len(wrong)} of {len(found)} {name} labels are none of the {classes} classes, first {int(wrong[0])};"
            f" labels are numbers from 0 to {classes - 1}, so {_how_to_mend(found, classes)}."
        )
    return found, notes


def _as_tensor(labels: Any, name: str) -> Tensor:
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the {name} labels come as {described(labels)}; give the number of the class of each image."
        ) from error


def _one_hot(labels: Tensor) -> bool:
    return bool(((labels == 0) | (labels == 1)).all()) and bool((labels.sum(1) == 1).all())


def _how_to_mend(labels: Tensor, classes: int) -> str:
    if int(labels.min()) == 1 and int(labels.max()) == classes:
        return "take 1 from each"
    return "leave out images without a class" if int(labels.min()) < 0 else "check them against the model's classes"
