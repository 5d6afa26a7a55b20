"""Datasets: each function takes the model (for its preprocessing and classes) and returns Data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from pq_sweep.core.environment import cache_home
from pq_sweep.core.sentences import listed
from pq_sweep.inputs.classes import imagenet_wnids, match_classes, stratified_order, without_images
from pq_sweep.inputs.folders import find_splits
from pq_sweep.inputs.image_cache import ImageCache, normalise, printable
from pq_sweep.inputs.images import (
    Labelled,
    find_flat_images,
    find_images,
    first_readable,
    lazy_split_of,
    remarks,
    split_of,
    suspect_contradictions,
)
from pq_sweep.types import Data, Model, Preprocess, Split, UserError, choose, hash_each

log = logging.getLogger(__name__)

Found = tuple[Labelled, tuple[str, ...]]


@dataclass(frozen=True)
class Take:
    """How many images to set aside for calibration and to evaluate (None: all), and the seed of their order."""

    calibration: int
    evaluation: int | None
    seed: int


DIGITS_EVALUATION, DIGITS_CALIBRATION = 500, 200

GREY_OF_RGB = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow

FASTAI = "https://s3.amazonaws.com/fast-ai-imageclas"
# fast.ai publishes none: ImageNette's are those of torchvision, ImageWoof's those of catalyst (its issue 1265).
FASTAI_CHECKSUMS = {
    "imagenette2": "md5:fe2fc210e6bb7c5664d602c3cd71e612",
    "imagenette2-320": "md5:3df6f0d01a2c9592104656642f5e78a3",
    "imagenette2-160": "md5:e793b78cc4c9e9a4ccc0c1155377a412",
    "imagewoof2": "md5:9aafe18bcdb1632c4249a76c458465ba",
    "imagewoof2-320": "md5:0f46d997ec2264e97609196c95897a44",
    "imagewoof2-160": "md5:3d200a7be99704a0d7509be2a9fbfe15",
}


def digits(model: Model, *, calibration: int = DIGITS_CALIBRATION) -> Data:
    """Return scikit-learn's 1,797 digits: 500 to evaluate, up to 200 to calibrate, the other 1,097 to train.

    The stratified order is fixed (it does not follow the job's seed), so the packaged weights never saw the
    evaluation images. A model with another input gets the digits enlarged and repeated over its channels.
    """
    if not 0 <= calibration <= DIGITS_CALIBRATION:
        raise UserError(
            f"dataset.calibration={calibration} does not fit: digits keeps up to {DIGITS_CALIBRATION} images."
        )
    pixels, targets = _digits()
    labels = torch.as_tensor(targets, dtype=torch.int64)
    images = torch.as_tensor(pixels, dtype=torch.float32).unsqueeze(1) / 16
    order = stratified_order(labels.tolist(), seed=0)
    fit = partial(_fit, preprocess=model.preprocess)
    whole = Split(labels, lambda indices: fit(images[indices]), marks=_marks(images, model.preprocess))
    ends = np.cumsum([DIGITS_EVALUATION, DIGITS_CALIBRATION])
    evaluation, reserved, train = (whole.subset(part.tolist()) for part in np.split(order, ends))
    classes = tuple(str(digit) for digit in range(10))
    return Data(evaluation, reserved.take(calibration), train, classes, match_classes(model, classes))


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (1797, 8, 8) from 0 to 16 and labels; they are cached, as scikit-learn takes seconds to import."""
    path = cache_home() / f"digits-{version('scikit-learn')}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile), np.load(path) as kept:
        return kept["pixels"], kept["labels"]
    from sklearn.datasets import load_digits

    raw = load_digits()
    aside = path.with_name(f".{os.getpid()}-{path.name}")
    with suppress(OSError):  # a cache that cannot be written only costs time
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(aside, pixels=raw.images, labels=raw.target)
        aside.rename(path)
    return raw.images, raw.target


def image_folder(model: Model, *, root: str, calibration: int, evaluation: int | None, seed: int) -> Data:
    """Return the images of a folder of class folders; calibration images are never evaluation images.

    With `root/train` and `root/val`, calibration is a stratified, seeded part of train; a flat root (or `root/val`
    alone) is split. `find_splits` says which other names count as train and val. Files of the same bytes count as one
    image: copies of evaluation images are left out of train, and in a flat root copies of calibration images out of
    evaluation. `evaluation` takes that many images, stratified, instead of all.
    """
    folder, take = _folder(root), Take(calibration, evaluation, seed)
    splits = find_splits(folder)
    found = find_images(splits.evaluation)
    if splits.train is None:
        data = _divided(model, folder, found, take)
    else:
        pool = find_images(splits.train)
        _require_same_classes(splits.train, pool, splits.evaluation, found)
        data = _with_train(model, folder, pool[0], found, take)
    return _told(data, [*splits.notes, *remarks(splits.evaluation, *found)])


def imagenet(model: Model, *, root: str, calibration: int, evaluation: int | None, seed: int) -> Data:
    """Return ImageNet from `root/val` and, for calibration and training, `root/train`; folders are WordNet ids."""
    data = image_folder(model, root=root, calibration=calibration, evaluation=evaluation, seed=seed)
    return _of_imagenet(data, root)


def imagenet_sample(model: Model, *, root: str, calibration: int, evaluation: int | None, seed: int) -> Data:
    """Return a sample of ImageNet: class folders named by WordNet id, or files such as n01440764_tench.jpg."""
    folder = _folder(root)
    if any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir()):
        return imagenet(model, root=root, calibration=calibration, evaluation=evaluation, seed=seed)
    found = find_flat_images(folder)
    if not found[0]:
        raise UserError(f"{folder} holds no images; expected files named by WordNet id, such as n01440764_tench.jpg.")
    return _of_imagenet(_divided(model, folder, found, Take(calibration, evaluation, seed)), root)


def imagenette(
    model: Model, *, root: str | None, size: int | str, calibration: int, evaluation: int | None, seed: int
) -> Data:
    """Return ImageNette, ten easy classes of ImageNet; `size` is the short side in its files: 160, 320 or full."""
    folder = root or _fastai("imagenette2", size)
    return imagenet(model, root=str(folder), calibration=calibration, evaluation=evaluation, seed=seed)


def imagewoof(
    model: Model, *, root: str | None, size: int | str, calibration: int, evaluation: int | None, seed: int
) -> Data:
    """Return ImageWoof, ten dog breeds of ImageNet; `size` is the short side in its files: 160, 320 or full."""
    folder = root or _fastai("imagewoof2", size)
    return imagenet(model, root=str(folder), calibration=calibration, evaluation=evaluation, seed=seed)


def cifar10(model: Model, *, root: str | None, calibration: int, evaluation: int | None, seed: int) -> Data:
    """Return CIFAR-10: 10,000 test images to evaluate, 50,000 to calibrate and train; `root` holds its batches."""
    from torchvision.datasets import CIFAR10

    folder = _folder(root) if root else fetch_dataset(CIFAR10.url, "cifar10", f"md5:{CIFAR10.tgz_md5}")
    try:
        loaded = [CIFAR10(folder, train=train) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"{folder} does not hold CIFAR-10, whole and unchanged; expected {CIFAR10.base_folder} in it."
        ) from error
    pool, test = (_pixels_split(torch.from_numpy(part.data), part.targets, model.preprocess) for part in loaded)
    order = stratified_order(pool.labels.tolist(), seed=seed).tolist()
    _require_calibration(calibration, len(pool), folder)
    chosen = stratified_order(test.labels.tolist(), seed=seed)[:evaluation]
    classes = tuple(loaded[0].classes)
    parts = (test.subset(sorted(chosen.tolist())), pool.subset(order[:calibration]), pool.subset(order[calibration:]))
    data = Data(*parts, classes, match_classes(model, classes))
    return _told(data, [without_images(data.evaluation.labels, classes)])


def fake(model: Model, *, images: int, calibration: int, seed: int) -> Data:
    """Return seeded noise with random labels: right for latency and size, meaningless for accuracy."""
    shape = (model.preprocess.channels, model.preprocess.size, model.preprocess.size)

    def make(index: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))

    total = images + 2 * calibration
    labels = torch.randint(model.num_classes, (total,), generator=torch.Generator().manual_seed(seed))
    whole = Split(labels, lambda indices: torch.stack([make(index) for index in indices]))
    classes = model.classes or tuple(str(number) for number in range(model.num_classes))
    parts = (whole.take(images), whole.take(calibration, images), whole.take(calibration, images + calibration))
    return Data(*parts, classes)


def fetch_dataset(url: str, name: str, checksum: str) -> Path:
    """Download an archive once, check and unpack it, and return the folder that holds its content."""
    from pq_sweep.inputs.download import extract, fetch

    folder = cache_home() / "datasets" / name
    archive = folder.parent / url.rpartition("/")[2]
    if not folder.is_dir():
        fetch(url, archive, checksum=checksum, hint="or give dataset.root=/path")
        extract(archive, folder)
    return folder


def _fastai(name: str, size: int | str) -> Path:
    """Return the folder of a data set of fast.ai, downloaded if it is not there."""
    choose("dataset.size", str(size), ("160", "320", "full"))
    stem = name if size == "full" else f"{name}-{size}"
    return fetch_dataset(f"{FASTAI}/{stem}.tgz", stem, FASTAI_CHECKSUMS[stem]) / stem


def _folder(root: str) -> Path:
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(f"dataset.root={root} is not a folder; give a folder with one sub-folder of images per class.")
    return folder


def _of_imagenet(data: Data, root: str) -> Data:
    """Return the data if its classes are WordNet ids of ImageNet's 1,000 classes."""
    known = imagenet_wnids()
    unknown = [name for name in data.classes if name not in known]
    if unknown:
        raise UserError(
            f"{root} has the class {unknown[0]!r}, which is none of ImageNet's 1,000 WordNet ids (such as n01440764);"
            " use dataset=image_folder for other classes."
        )
    return data


def _divided(model: Model, root: Path, found: Found, take: Take) -> Data:
    """Return the data of images that have no training part: the calibration images are set aside from evaluation."""
    images, classes = found
    columns = match_classes(model, classes)
    cache = ImageCache(root, model.preprocess)
    order = _order(images, take.seed)
    chosen = first_readable(cache, order, take.calibration)
    _require_calibration(take.calibration, len(chosen), root)
    # From the end, so that the images to evaluate stay the same when there are more or fewer for calibration.
    taken = set(chosen)
    rest = [image for image in reversed(order) if image not in taken]
    kept = _evaluated(cache, rest, take, cache.digests(path for path, _ in chosen))
    if not kept:
        raise UserError(
            f"{root} has no usable image to evaluate beside the {len(chosen)} of dataset.calibration and their copies;"
            " see the warnings, add images or set aside fewer."
        )
    data = Data(split_of(cache, kept), split_of(cache, chosen), None, classes, columns, cache.record)
    return _with_doubts(data, cache, kept + chosen)


def _require_same_classes(train: Path, pool: Found, evaluation: Path, found: Found) -> None:
    if pool[1] != found[1]:
        different = listed(sorted(set(pool[1]) ^ set(found[1])), 5)
        raise UserError(
            f"{train} and {evaluation} do not have the same class folders; only one has {different}, so add what the"
            " other lacks, or give the folder to evaluate as dataset.root."
        )


def _with_train(model: Model, root: Path, pool: Labelled, found: Found, take: Take) -> Data:
    """Return the data of a root with a training part, `pool`, which the calibration images come from."""
    images, classes = found
    columns = match_classes(model, classes)
    cache = ImageCache(root, model.preprocess)
    usable = _evaluated(cache, _order(images, take.seed), take)
    if not usable:
        raise UserError(f"none of the evaluation images in {root} can be used; see the warnings.")
    known = cache.digests(path for path, _ in usable)
    order = _order(pool, take.seed)  # every part of this order shows every class
    chosen = first_readable(cache, order, take.calibration, known)
    _require_calibration(take.calibration, len(chosen), root)
    train = lazy_split_of(cache, order, known)
    data = Data(split_of(cache, usable), split_of(cache, chosen), train, classes, columns, cache.record)
    return _with_doubts(data, cache, usable + chosen)


def _with_doubts(data: Data, cache: ImageCache, prepared: Labelled) -> Data:
    """Return data with notes on what is doubtful about its image files, of which these are prepared."""
    suspect_contradictions(cache, prepared, data.classes)
    return _told(data, [without_images(data.evaluation.labels, data.classes), _suspicions(cache)])


def _suspicions(cache: ImageCache) -> str | None:
    """Say how many of the images that were decoded so far are suspicious, and why the first one is."""
    found = cache.suspicious()
    if not found:
        return None
    path, reason = next(iter(found.items()))
    return (
        f"suspicious images, which are used all the same: {len(found)}, first {printable(path)} ({reason}); result.json"
        " names each (images, suspicious)."
    )


def _told(data: Data, notes: Iterable[str | None]) -> Data:
    """Return data with further notes, each of which is logged as well."""
    said = tuple(note for note in notes if note)
    for note in said:
        log.warning("%s", note)
    return replace(data, notes=data.notes + said)


def _order(images: Labelled, seed: int) -> Labelled:
    return [images[i] for i in stratified_order([label for _, label in images], seed=seed)]


def _evaluated(cache: ImageCache, order: Labelled, take: Take, others: frozenset[str] = frozenset()) -> Labelled:
    """Return the usable images to evaluate, as many as `take` asks for, sorted by path."""
    return sorted(first_readable(cache, order, len(order) if take.evaluation is None else take.evaluation, others))


def _require_calibration(calibration: int, available: int, root: Path) -> None:
    if not 0 <= calibration <= available:
        raise UserError(
            f"dataset.calibration={calibration} does not fit: {root} has {max(available, 0)} usable images to take it"
            " from; see the warnings, or lower it."
        )


def _fit(images: Tensor, preprocess: Preprocess) -> Tensor:
    """Bring (N, 1 or 3, H, W) in [0, 1] to a model's size, channels and normalisation."""
    if images.shape[-1] != preprocess.size:
        images = torch.nn.functional.interpolate(images, size=preprocess.size, mode="bilinear")
    if preprocess.channels == 1 and images.shape[1] == 3:
        images = (images * torch.tensor(GREY_OF_RGB).view(1, 3, 1, 1)).sum(1, keepdim=True)
    images = images.expand(-1, preprocess.channels, -1, -1)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (images - mean) / std


def _pixels_split(pixels: Tensor, labels: list[int], preprocess: Preprocess) -> Split:
    """Return a split of RGB images (N, H, W, 3) uint8 in memory, brought to the model's size when fetched."""
    targets, marks = torch.tensor(labels), _marks(pixels, preprocess)
    if pixels.shape[1:] == (preprocess.size, preprocess.size, preprocess.channels):
        whole = pixels.numpy()  # torch would start threads to gather from it
        finish = partial(normalise, preprocess=preprocess)
        return Split.of_raw(targets, lambda indices: torch.from_numpy(whole[indices]), finish, marks=marks)

    def fetch(indices: list[int]) -> Tensor:
        return _fit(pixels[indices].permute(0, 3, 1, 2) / 255, preprocess)

    return Split(targets, fetch, marks=marks)


def _marks(images: Tensor, preprocess: Preprocess) -> Callable[[list[int]], Iterator[str]]:
    """Return a function that hashes images before they are brought to the model's size, and how that is done."""
    return lambda indices: hash_each(images.__getitem__, indices, repr(preprocess))
