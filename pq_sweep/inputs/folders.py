"""Folders of images: which are splits and which classes, and the image files below them, linked folders included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pq_sweep.inputs.image_cache import printable
from pq_sweep.types import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})  # torchvision's
# Device and inode of a folder.
Place = tuple[int, int]
# Names of splits, in any case; of those to evaluate, the first that is there is taken.
TRAIN = ("train", "training")
EVALUATION = ("val", "validation", "valid", "dev", "eval", "evaluation", "test", "testing")
SPLITS = (TRAIN, EVALUATION)


@dataclass(frozen=True)
class Splits:
    """The folder that has the class folders to evaluate, that to train on, and a sentence for each split left aside."""

    evaluation: Path
    train: Path | None = None
    notes: tuple[str, ...] = ()


def is_image(name: str) -> bool:
    """Say whether a file is an image by its name; hidden files are none, such as those of macOS."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")  # noqa: PTH122


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted by name; a link that leads nowhere is refused where it may be a class."""
    lost = next((entry for entry in _visible(folder) if _leads_nowhere(entry)), None)
    if lost:
        raise UserError(
            f"{printable(folder / lost.name)} is a link to nothing; restore what it links to, or remove it."
        )
    return _folders(folder)


def images_in(folder: Path) -> list[Path]:
    """Return the image files that lie in a folder itself."""
    return [folder / entry.name for entry in _visible(folder) if is_image(entry.name) and not _is_folder(entry)]


def images_below(folder: Path, above: frozenset[Place] = frozenset()) -> Iterator[Path]:
    """Yield the image files at any depth below a folder.

    Linked folders are followed, as torchvision does, but none to a folder that it lies in. A link that leads nowhere
    counts as an image that cannot be read, and so does a folder that is called like an image and has none.
    """
    place = _place(folder)
    if place in above:
        return
    if not above or folder.is_symlink():
        above |= frozenset(map(_place, folder.resolve().parents))
    for entry in _visible(folder):
        if _is_folder(entry):
            below = images_below(folder / entry.name, above | {place})
            first = next(below, None)
            if first or is_image(entry.name):
                yield first or folder / entry.name
            yield from below
        elif is_image(entry.name) or _leads_nowhere(entry):
            yield folder / entry.name


def find_splits(root: Path) -> Splits:
    """Return the splits of a root; a root of class folders is itself one to evaluate.

    A folder that is named as a split is one if it has class folders. If it has images beside other folders, it is a
    class that happens to be called so.
    """
    folders = subfolders(root)
    named = [folder for folder in folders if _kind(folder) is not None]
    splits = [folder for folder in named if any(map(_has_images, _folders(folder)))]
    classes = [folder for folder in folders if named and folder not in named and _has_images(folder)]
    if not classes:
        return _chosen(root, splits, [folder for folder in named if folder not in splits and _has_images(folder)])
    if len(splits) > 1 or any(not images_in(folder) for folder in splits):
        raise UserError(
            f"{root} holds {_names(splits)}, named as splits, beside class folders such as {_names(classes[:1])}; move"
            " either elsewhere, or give dataset.root the folder whose sub-folders are the classes."
        )
    return Splits(root)


def _chosen(root: Path, splits: list[Path], unsorted: list[Path]) -> Splits:
    """Return which of a root's splits to use; those that are `unsorted` have images in no class folder."""
    train, evaluation = (_in_order(root, splits, names) for names in SPLITS)
    unusable = [folder for folder in unsorted if not evaluation or _kind(folder) == TRAIN]
    if unusable:
        raise UserError(
            f"images in {_names(unusable)} of {root} lie in no class folder; put them into one sub-folder per class."
        )
    if train and not evaluation:
        raise UserError(
            f"{root} holds {_names(train)} alone, and accuracy on training images says nothing; add val/ with other"
            f" images, or give dataset.root={train[0]} to measure on them anyway."
        )
    if not evaluation:
        return Splits(root)
    taken = [evaluation[0], *train[:1]]
    unused = [folder for folder in splits + unsorted if folder not in taken]
    notes = [f"not used: {_names(unused)} of {root}, as {evaluation[0].name}/ is evaluated."] if unused else []
    return Splits(evaluation[0], train[0] if train else None, tuple(notes))


def _in_order(root: Path, splits: list[Path], names: tuple[str, ...]) -> list[Path]:
    """Return the splits of these names, in the order of the names; two that differ in case alone are refused."""
    found = [folder for name in names for folder in splits if folder.name.lower() == name]
    for first, second in pairwise(found):
        if first.name.lower() == second.name.lower():
            raise UserError(f"{root} holds both {_names([first, second])}; keep the one that is meant.")
    return found


def _kind(folder: Path) -> tuple[str, ...] | None:
    """Return the names of splits among which a folder's name is."""
    return next((names for names in SPLITS if folder.name.lower() in names), None)


def _names(folders: list[Path]) -> str:
    return ", ".join(f"{folder.name}/" for folder in folders)


def _place(folder: Path) -> Place:
    """Return what tells a folder from all others, by whatever way one came to it."""
    state = folder.stat()
    return state.st_dev, state.st_ino


def _has_images(folder: Path) -> bool:
    """Say whether a folder has images; one that cannot be read, such as a disk's lost+found, has none to use."""
    try:
        return next(images_below(folder), None) is not None
    except UserError:
        return False


def _folders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _visible(folder) if _is_folder(entry)]


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    """Return what a folder holds and does not hide, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(
            f"{printable(folder)} cannot be read ({error.strerror or error}); make it readable, or remove it."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Say whether an entry is a link to a folder that is gone, as far as its name tells."""
    return entry.is_symlink() and "." not in entry.name and not os.path.exists(entry.path)  # noqa: PTH110
