"""Image files as inputs: found by class, and made into splits whose unusable images are named and counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice, pairwise
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor

from pq_sweep.core.sentences import listed
from pq_sweep.inputs.folders import EXTENSIONS, SPLITS, images_below, images_in, subfolders
from pq_sweep.inputs.image_cache import ImageCache, normalise, printable
from pq_sweep.types import Split, UserError

Labelled = list[tuple[Path, int]]


def find_images(folder: Path) -> tuple[Labelled, tuple[str, ...]]:
    """Return all image files of a folder of class folders, and the class names, both sorted by name."""
    found = {entry.name: sorted(images_below(entry)) for entry in subfolders(folder)}
    if not any(found.values()):
        raise UserError(_without_images(folder))
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise UserError(f"{folder} has class folders without images: {', '.join(empty)}; fill or remove them.")
    _require_classes(folder, {name: _below(folder / name, images) for name, images in found.items()})
    return [(path, label) for label, paths in enumerate(found.values()) for path in paths], tuple(found)


def _without_images(folder: Path) -> str:
    """Say that a folder has no class folders with images, and what it has instead."""
    if loose := images_in(folder):
        return (
            f"{printable(folder)} holds images such as {printable(Path(loose[0].name))} and no class folders with any;"
            " put them into one sub-folder per class, or give the folder above if this is a class."
        )
    others = (Path(top, name) for top, _, names in os.walk(folder) for name in sorted(names) if name[0] != ".")
    other = next(others, None)
    instead = f", but {printable(other.relative_to(folder))}" if other else ""
    endings = ", ".join(sorted(EXTENSIONS))
    return f"{printable(folder)} holds no images{instead}; expected one sub-folder per class with {endings}."


def _require_classes(folder: Path, below: dict[str, set[str]]) -> None:
    """Refuse folders of which one cannot be a class, or that are splits by their names and what is in them."""
    for name, inner in below.items():
        _require_class(folder / name, inner)
    names = list(below)
    kinds = [[any(word in name.lower() for word in words) for name in names] for words in SPLITS]
    if (
        all(map(any, kinds))
        and all(map(any, zip(*kinds, strict=True)))
        and all(inner - {""} for inner in below.values())
    ):
        raise UserError(
            f"{listed(names, 5)} in {folder} hold sub-folders and are called like splits; call them train/ and val/"
            " with the class folders right below, or give one of them as dataset.root."
        )


def _require_class(folder: Path, below: set[str]) -> None:
    """Refuse a class folder of which the name is no text, or that holds splits, of which one is not to evaluate."""
    if printable(Path(folder.name)) != folder.name:
        raise UserError(f"the name of the class folder {printable(folder)} is not UTF-8; rename it.")
    splits = [[name for name in sorted(below) if name.lower() in names] for names in SPLITS]
    if all(splits):
        raise UserError(
            f"{folder} should be a class folder and holds {splits[0][0]}/ and {splits[1][0]}/; give it as dataset.root,"
            " or put splits above their class folders."
        )


def _below(folder: Path, images: list[Path]) -> set[str]:
    """Return the names of the folders in a class folder that have images; "" is the class folder itself."""
    depth = len(folder.parts)
    return {path.parts[depth] if len(path.parts) > depth + 1 else "" for path in images}


def _same(below: dict[str, set[str]]) -> list[str]:
    """Return the names of the sub-folders that have all images of each class, if they are the same in all classes."""
    first, *others = below.values()
    return sorted(first) if others and len(first) > 1 and "" not in first and all(o == first for o in others) else []


def remarks(folder: Path, images: Labelled, classes: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each thing by which a folder of class folders may be another than its user thinks."""
    if strays := images_in(folder):
        yield f"{folder} holds image files outside its class folders, which are not used: {len(strays)}."
    for first, second in pairwise(sorted(classes, key=str.lower)):
        if first.lower() == second.lower():
            yield f"the classes {first} and {second} of {folder} differ in upper and lower case alone."
    below = {classes[label]: _below(folder / classes[label], group) for label, group in _by_label(images)}
    if same := _same(below):
        yield (
            f"all class folders of {folder} hold the same sub-folders ({listed(same, 5)}); if they are splits and no"
            " classes, give one of them as dataset.root."
        )


def _by_label(images: Labelled) -> Iterator[tuple[int, list[Path]]]:
    """Yield the images of each class; they are sorted by class."""
    for label, group in groupby(images, key=itemgetter(1)):
        yield label, [path for path, _ in group]


def find_flat_images(folder: Path) -> tuple[Labelled, tuple[str, ...]]:
    """Return the image files that lie in a folder, classed by the word before the first `_`, as in n01440764_1.jpg."""
    paths = images_in(folder)
    classes = tuple(sorted({path.name.partition("_")[0] for path in paths}))
    return [(path, classes.index(path.name.partition("_")[0])) for path in paths], classes


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


def suspect_contradictions(cache: ImageCache, images: Labelled, classes: tuple[str, ...]) -> None:
    """Count prepared images as suspicious whose file is in another class too: one of the labels has to be wrong."""
    labels = dict(images)
    for group in cache.same(labels):
        for path in group:
            if others := sorted({classes[labels[other]] for other in group} - {classes[labels[path]]}):
                cache.suspect(path, f"a file of the same bytes is in the class {listed(others, 5)}")


def split_of(cache: ImageCache, images: Labelled) -> Split:
    """Return a split of images that are prepared and can be used."""
    paths = [path for path, _ in images]
    return Split.of_raw(
        torch.tensor([label for _, label in images], dtype=torch.int64),
        lambda indices: cache.pixels([paths[i] for i in indices]),
        partial(normalise, preprocess=cache.preprocess),
        names=tuple(printable(path.relative_to(cache.root)) for path in paths),
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
