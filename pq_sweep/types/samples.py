"""Samples as a user's data set gives them: by number or not, as pairs, dictionaries or with more entries.

What has one plain meaning is taken and said, and everything else refused in a sentence that says how to wrap it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pq_sweep.types.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.data import DataLoader

TOO_FEW = "there are {} images and {} labels; give one label per image."
# What dictionaries call images and labels.
CALLED = ("image", "images", "img", "pixel_values"), ("label", "labels", "target", "targets")


def by_number(samples: Any) -> tuple[Any, list[str]]:
    """Return what gives samples by number, and how it came; or say how to make such a thing."""
    from torch.utils.data import DataLoader, IterableDataset

    if isinstance(samples, DataLoader):
        _require_plain(samples)
        inner, notes = by_number(samples.dataset)
        return inner, ["samples came in a DataLoader, whose data set was taken", *notes]
    if columns := _columns(samples):
        if len({len(column) for column in columns}) > 1:
            raise UserError(TOO_FEW.format(*map(len, columns)))
        return list(zip(*columns, strict=True)), ["samples came as all images and all labels"]
    numbered = hasattr(samples, "__len__") and hasattr(samples, "__getitem__")
    if not numbered or isinstance(samples, IterableDataset | Mapping):
        advice = "one of its entries" if isinstance(samples, Mapping) else "list(samples)) if they fit into memory"
        raise UserError(
            f"samples come as a {type(samples).__name__}, from which none can be taken by number; give"
            f" Split.of_dataset({advice.removesuffix(')')}, or a data set with __len__ and __getitem__."
        )
    return samples, []


def _require_plain(loader: DataLoader[Any]) -> None:
    """Refuse a DataLoader that gives other samples than its data set, unless these come in a stream anyway."""
    from torch.utils.data import IterableDataset, default_collate, default_convert

    collates = loader.collate_fn not in (default_collate, default_convert)
    names = [type(part).__name__ for part in (loader.sampler, loader.batch_sampler)]
    chooses = names[0] not in ("SequentialSampler", "RandomSampler") or names[1] not in ("BatchSampler", "NoneType")
    if (collates or chooses) and not isinstance(loader.dataset, IterableDataset):
        raise UserError(
            f"samples come in a DataLoader with a {'collate_fn' if collates else 'sampler'} of its own; give"
            " Split.of_dataset(loader.dataset) if that may be left out, else a list of (image, label) pairs."
        )


def _columns(samples: Any) -> list[Any]:
    """Return all images and all labels if that is what is given, in a pair or a dictionary."""
    if isinstance(samples, Mapping):
        found = [[samples[key] for key in samples if key in called] for called in CALLED]
        return [column for columns in found for column in columns] if [*map(len, found)] == [1, 1] else []
    if not isinstance(samples, tuple | list) or [hasattr(one, "shape") for one in samples] != [True, True]:
        return []
    images, labels = samples
    return [images, labels] if len(images.shape) > 2 and 0 < len(labels.shape) < 3 else []


def places(sample: Any) -> tuple[Any, Any, list[str]]:
    """Return where image and label are in a sample, and how it came unless it is an (image, label) pair."""
    if isinstance(sample, Mapping):
        keys = [[key for key in sample if key in called] for called in CALLED]
        if [*map(len, keys)] != [1, 1]:
            raise _unclear(f"dictionaries of {', '.join(map(str, sample))}")
        (image,), (label,) = keys
        return image, label, [f"samples came as dictionaries, of which {image} and {label} were taken"]
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        raise _unclear(f"a {type(sample).__name__} each")
    image, label = _image_and_label(sample)
    if (image, label, len(sample)) == (0, 1, 2):
        return image, label, []
    order = f"entry {image} as image and entry {label} as label"
    return image, label, [f"samples came with {len(sample)} entries and were taken with {order}"]


def _image_and_label(sample: Any) -> tuple[int, int]:
    """Return which entries of a sample are its image and its label: usually the first two."""
    images = [place for place, value in enumerate(sample) if _is_image(value)]
    labels = [place for place, value in enumerate(sample) if _is_number(value)]
    if not images or (images == [0] and (len(sample) == 2 or len(labels) != 1)):
        return 0, 1
    if len(images) == 1 and len(labels) == 1:
        return images[0], labels[0]
    if len(sample) == 2 and images == [0, 1]:  # for loading to judge
        return 0, 1
    raise _unclear(f"tuples of {', '.join(type(value).__name__ for value in sample)}")


def _unclear(what: str) -> UserError:
    """Return the error for samples of which nothing says what is image and what label."""
    return UserError(
        f"samples come as {what}, and nothing says which is the image and which the label; give (image, label) pairs,"
        " by a data set whose __getitem__ returns them."
    )


def _is_image(value: Any) -> bool:
    """Say whether a value may be an image: an array of two dimensions or more, or a PIL image."""
    return len(getattr(value, "shape", ())) > 1 or hasattr(value, "getbands")


def _is_number(value: Any) -> bool:
    """Say whether a value is a single number."""
    return isinstance(value, int | float) or getattr(value, "shape", None) == ()


def are_labels(targets: Any, samples: Any, place: Any) -> bool:
    """Say whether `targets` are what the data set gives as labels, by some of them; wrappers pass on those of another.

    Taking every label from the data set would decode every image.
    """
    if not hasattr(targets, "__len__") or len(targets) != len(samples):
        return False
    some = range(0, len(samples), max(1, len(samples) // 16))
    return all(bool((numbers([samples[i][place]]) == numbers([targets[i]])).all()) for i in some)


def numbers(labels: Any) -> Tensor:
    """Return labels as a tensor: class numbers (N,) as int64, anything else as it is, for loading to judge."""
    import torch

    try:
        rows = [torch.as_tensor(label) for label in labels] if isinstance(labels, list) else labels
        found = torch.stack(rows) if isinstance(rows, list) and rows else torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        kind, first = type(labels[0]).__name__, repr(labels[0])[:100]
        raise UserError(f"labels have to be the numbers of classes, and these are {kind}, first {first}.") from error
    whole = found.dim() == 1 and bool((found == found.to(torch.int64)).all())
    return found.to(torch.int64) if whole else found
