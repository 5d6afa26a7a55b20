"""Image files as inputs: found by class, and made into splits whose unusable images are named and counted."""

from __future__ import annotations

from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from pq_sweep.inputs.image_cache import ImageCache, normalise
from pq_sweep.types import Split, UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
Labelled = list[tuple[Path, int]]


def find_images(folder: Path) -> tuple[Labelled, tuple[str, ...]]:
    """Return all image files of a folder of class folders, and the class names, both sorted by name."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {entry.name: sorted(path for path in entry.rglob("*") if _is_image(path)) for entry in entries}
    if not any(found.values()):
        raise UserError(
            f"{folder} holds no images; expected one sub-folder per class with {', '.join(sorted(EXTENSIONS))}."
        )
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise UserError(f"{folder} has class folders without images: {', '.join(empty)}; fill or remove them.")
    return [(path, label) for label, paths in enumerate(found.values()) for path in paths], tuple(found)


def find_flat_images(folder: Path) -> tuple[Labelled, tuple[str, ...]]:
    """Return the image files that lie in a folder, classed by the word before the first `_`, as in n01440764_1.jpg."""
    paths = sorted(path for path in folder.iterdir() if _is_image(path))
    classes = tuple(sorted({path.name.partition("_")[0] for path in paths}))
    return [(path, classes.index(path.name.partition("_")[0])) for path in paths], classes


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def readable(cache: ImageCache, images: Labelled, others: frozenset[str] = frozenset()) -> Labelled:
    """Decode images and return those that can be used."""
    cache.prepare([path for path, _ in images])
    return [(path, label) for path, label in images if cache.usable(path, others)]


def first_readable(cache: ImageCache, images: Labelled, count: int, others: frozenset[str] = frozenset()) -> Labelled:
    """Return the first `count` images that can be used, decoding no more than needed."""
    found: Labelled = []
    rest = iter(images)
    while len(found) < count and (more := list(islice(rest, count - len(found)))):
        found += readable(cache, more, others)
    return found


def split_of(cache: ImageCache, images: Labelled) -> Split:
    """Return a split of images that are prepared and can be used."""
    paths = [path for path, _ in images]
    return Split.of_raw(
        torch.tensor([label for _, label in images], dtype=torch.int64),
        lambda indices: cache.pixels([paths[i] for i in indices]),
        partial(normalise, preprocess=cache.preprocess),
        names=tuple(str(path.relative_to(cache.root)) for path in paths),
        marks=lambda indices: cache.marks(paths[i] for i in indices),
    )


def lazy_split_of(cache: ImageCache, images: Labelled, others: frozenset[str]) -> Split:
    """Return a split that decodes its images when they are fetched, as training may need few of very many.

    For an image that cannot be used, the next image of its class stands in. The identity reads no image: each file's
    path below the root, size, modification time and change time stand for its bytes. Stand-ins do not count in it.
    """
    members: dict[int, list[Path]] = {}
    for path, label in images:
        members.setdefault(label, []).append(path)
    place = {path: position for paths in members.values() for position, path in enumerate(paths)}

    def stand_in(path: Path, label: int) -> Path:
        paths = members[label]
        turned = (paths[(place[path] + step) % len(paths)] for step in range(1, len(paths)))
        found = next((other for other in turned if readable(cache, [(other, label)], others)), None)
        if found is None:
            raise UserError(f"no training image in {path.parent} can be used, first {path.name}; see the warnings.")
        return found

    def raw(indices: list[int]) -> Tensor:
        chosen = [images[i] for i in indices]
        cache.prepare([path for path, _ in chosen])
        return cache.pixels([path if cache.usable(path, others) else stand_in(path, label) for path, label in chosen])

    return Split.of_raw(
        torch.tensor([label for _, label in images], dtype=torch.int64),
        raw,
        partial(normalise, preprocess=cache.preprocess),
        marks=lambda indices: cache.marks_unread((images[i][0] for i in indices), others),
    )
