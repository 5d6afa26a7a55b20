"""Datasets: each function takes the model (for its preprocessing and classes) and returns Data."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pq_sweep.types import Data, Model, Preprocess, Split, UserError

if TYPE_CHECKING:
    from PIL import Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
Labelled = list[tuple[Path, int]]

DIGITS_EVALUATION, DIGITS_CALIBRATION = 500, 200


def digits(model: Model, *, calibration: int = DIGITS_CALIBRATION) -> Data:
    """Return scikit-learn's 1,797 digits: 500 to evaluate, up to 200 to calibrate, the other 1,097 to train.

    The stratified order is fixed (it does not follow the job's seed), so the packaged weights never saw the
    evaluation images. A model with another input gets the digits enlarged and repeated over its channels.
    """
    from sklearn.datasets import load_digits

    if not 1 <= calibration <= DIGITS_CALIBRATION:
        raise UserError(
            f"dataset.calibration={calibration} does not fit: digits keeps 1 to {DIGITS_CALIBRATION} images."
        )
    raw = load_digits()
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    images = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    order = stratified_order(labels.tolist(), seed=0)
    whole = Split(labels, lambda indices: _fit(images[indices], model.preprocess))
    ends = np.cumsum([DIGITS_EVALUATION, DIGITS_CALIBRATION])
    evaluation, reserved, train = (whole.subset(part.tolist()) for part in np.split(order, ends))
    classes = tuple(str(digit) for digit in range(10))
    return Data(evaluation, reserved.take(calibration), train, classes, match_classes(model, classes))


def image_folder(model: Model, *, root: str, calibration: int = 64, seed: int = 0) -> Data:
    """Return the images of a folder of class folders; calibration images never are evaluation images.

    With `root/train` and `root/val`, calibration is a stratified, seeded part of train; a flat root is split. An
    image that stands on both sides under different names is left out of one: of train, or of a flat root's evaluation.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"dataset.root={root} is not a folder; give a folder with one sub-folder of images per class.")
    parts = [folder / "train", folder / "val"]
    split = all(part.is_dir() for part in parts)
    pool, classes = find_images(parts[0] if split else folder)
    if split:
        evaluation, evaluation_classes = find_images(parts[1])
        if classes != evaluation_classes:
            raise UserError(f"{parts[0]} and {parts[1]} do not have the same class folders.")
        pool = without_copies(pool, evaluation)
    if not 1 <= calibration < len(pool) + split:
        raise UserError(
            f"dataset.calibration={calibration} does not fit: {folder} has {len(pool)} images to take it from."
        )
    order = stratified_order([label for _, label in pool], seed=seed)
    chosen, rest = [pool[i] for i in order[:calibration]], [pool[i] for i in sorted(order[calibration:])]
    if not split:
        evaluation = without_copies(rest, chosen)
        if not evaluation:
            raise UserError(f"{folder} has only copies of its calibration images to evaluate; add images.")
    read = partial(_file_split, preprocess=model.preprocess)
    columns = match_classes(model, classes)
    train = read([pool[i] for i in order]) if split else None  # so that every part of it shows every class
    return Data(read(evaluation), read(chosen), train, classes, columns)


def stratified_order(labels: list[int], *, seed: int) -> np.ndarray:
    """Return all indices in a seeded order whose every prefix has the classes in nearly their own proportions."""
    rng = np.random.default_rng(seed)
    array = np.asarray(labels)
    rank = np.empty(len(array))
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(rank, kind="stable")


def find_images(folder: Path) -> tuple[Labelled, tuple[str, ...]]:
    """Return all image files with their class, and the class names, both sorted by name."""
    entries = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = {entry.name: sorted(p for p in entry.rglob("*") if p.suffix.lower() in EXTENSIONS) for entry in entries}
    if not any(found.values()):
        raise UserError(
            f"{folder} holds no images; expected one sub-folder per class with {', '.join(sorted(EXTENSIONS))}."
        )
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise UserError(f"{folder} has class folders without images: {', '.join(empty)}; fill or remove them.")
    return [(path, label) for label, paths in enumerate(found.values()) for path in paths], tuple(found)


def without_copies(images: Labelled, others: Labelled) -> Labelled:
    """Leave out every file whose bytes equal a file of `others`; only files of equal size are read."""
    sizes = {path.stat().st_size for path, _ in others}
    suspects = {path for path, _ in images if path.stat().st_size in sizes}
    wanted = {path.stat().st_size for path in suspects}
    known = {_digest(path) for path, _ in others if path.stat().st_size in wanted}
    return [(path, label) for path, label in images if path not in suspects or _digest(path) not in known]


def match_classes(model: Model, classes: tuple[str, ...]) -> Tensor | None:
    """Return the logit of each class of the data, or None if they are all of the model's, in order.

    Folders named by WordNet ids are found among ImageNet's 1,000; other names among the model's class names. A model
    that does not name its classes is taken to have them in the order of the data.
    """
    wnids = imagenet_wnids() if model.num_classes == 1000 else ()
    known = wnids if classes[0] in wnids else model.classes or ()
    missing = [name for name in classes if name not in known]
    if not missing:
        columns = [known.index(name) for name in classes]
        return None if columns == list(range(model.num_classes)) else torch.tensor(columns)
    if len(classes) == model.num_classes and not known:
        return None
    raise UserError(
        f"the model has {model.num_classes} classes and the data {len(classes)}, and {missing[0]!r} is none of the"
        " model's; name the class folders as the model does (or by WordNet id), or set model.num_classes and weights."
    )


def imagenet_wnids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes in torchvision's order."""
    return tuple(files("pq_sweep").joinpath("imagenet_wnids.txt").read_text().split())


def _fit(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Bring (N, 1, H, W) in [0, 1] to a model's size, channels and normalisation."""
    if images.shape[-1] != preprocess.size:
        images = torch.nn.functional.interpolate(images, size=preprocess.size, mode="bilinear")
    images = images.expand(-1, preprocess.channels, -1, -1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (images - mean) / std


def _file_split(images: Labelled, preprocess: Preprocess) -> Split:
    """Return a split that decodes its files when they are fetched, on all cores (PIL releases the lock)."""
    read = partial(read_image, preprocess=preprocess)

    def fetch(indices: list[int]) -> Tensor:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            return torch.stack(list(pool.map(read, [images[i][0] for i in indices])))

    return Split(torch.tensor([label for _, label in images]), fetch)


def read_image(path: Path, preprocess: Preprocess) -> Tensor:
    """Decode, orient, resize, crop and normalise one image: (C, H, W) float32; names the file if it cannot."""
    from PIL import Image, ImageOps
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    try:
        with Image.open(path) as file:
            image = _eight_bit(ImageOps.exif_transpose(file)).convert("RGB" if preprocess.channels == 3 else "L")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"cannot read the image {path} ({error}); repair or remove it.") from error
    image = F.resize(image, [preprocess.resize], InterpolationMode(preprocess.interpolation), antialias=True)
    tensor = F.to_tensor(F.center_crop(image, [preprocess.size]))
    return F.normalize(tensor, list(preprocess.mean), list(preprocess.std))


def _eight_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bit; Pillow's own conversion would cut it off at 255."""
    from PIL import Image

    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode.startswith("I") else image


def _digest(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()
