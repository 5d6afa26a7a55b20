"""Folders of small images, the files that are none, and what torchvision alone makes of an image."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor, nn

from pq_sweep.inputs.datasets import image_folder
from pq_sweep.types import Data, Model, Preprocess, Split

TINY = Preprocess(size=8, resize=8, mean=(0.0,) * 3, std=(1.0,) * 3)
# Published positions of ImageNette's classes among ImageNet's 1,000.
IMAGENETTE = {
    "n01440764": 0,
    "n02102040": 217,
    "n02979186": 482,
    "n03000684": 491,
    "n03028079": 497,
    "n03394916": 566,
    "n03417042": 569,
    "n03425413": 571,
    "n03445777": 574,
    "n03888257": 701,
}


def model_of(num_classes: int, classes: tuple[str, ...] | None = None, preprocess: Preprocess = TINY) -> Model:
    return Model(nn.Flatten(), num_classes, preprocess, classes)


def load(root: Path, classes: int = 2, **options: Any) -> Data:
    """Return the data of a folder for a model that does not name its classes."""
    return image_folder(
        model_of(classes), **{"root": str(root), "calibration": 1, "evaluation": None, "seed": 0} | options
    )


def contents(split: Split) -> list[bytes]:
    """Return each image as bytes, so that images are compared by what they show."""
    return [image.numpy().tobytes() for images, _ in split.batches(64) for image in images]


def draw(path: Path, seed: int, size: tuple[int, int] = (12, 10)) -> Path:
    """Write an image of noise that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def fill(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Make class folders with `counts` different images each, PNG and JPEG in turn."""
    for position, (name, count) in enumerate(counts.items()):
        for index in range(count):
            suffix = ".png" if index % 2 else ".JPEG"
            draw(folder / name / f"{index:03}{suffix}", seed + position * 1000 + index)
    return folder


def make_root(root: Path, layout: str, counts: dict[str, int]) -> Path:
    """Make a root of one of three layouts; only the last one has other images in train/."""
    if layout == "flat":
        return fill(root, counts)
    fill(root / "val", counts, seed=100_000)
    if layout == "train_and_val":
        fill(root / "train", counts)
    return root


def files(root: Path) -> list[Path]:
    """Return the image files of a root of sound images."""
    return sorted(path for path in root.rglob("*.*") if path.is_file())


def photo(size: tuple[int, int]) -> Image.Image:
    """Return smooth shapes with noise on them, so that resizing and cropping both show."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 9, height))
    waves = np.stack([np.sin(x + y), np.cos(x * y), np.sin(x) * np.cos(2 * y)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray((waves * 100 + 128 + noise).clip(0, 255).astype(np.uint8))


def upright(path: Path, mode: str = "RGB") -> Image.Image:
    with Image.open(path) as file:
        return ImageOps.exif_transpose(file).convert(mode)


def torchvisions(image: Image.Image, preprocess: Preprocess) -> Tensor:
    """Prepare an image by torchvision's own transforms."""
    from torchvision import transforms as T

    pipeline = T.Compose(
        [
            T.Resize(preprocess.resize, T.InterpolationMode(preprocess.interpolation)),
            T.CenterCrop(preprocess.size),
            T.ToTensor(),
            T.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    return pipeline(image)


def labels_by_content(root: Path, classes: tuple[str, ...]) -> dict[bytes, int]:
    """Return the label of each sound image of a root by what it shows: the place of its folder among the classes."""
    return {
        torchvisions(upright(path), TINY).numpy().tobytes(): classes.index(path.parent.name) for path in files(root)
    }


def jpeg(size: tuple[int, int] = (40, 30), exif: bytes = b"") -> bytes:
    content = io.BytesIO()
    photo(size).save(content, "JPEG", quality=95, exif=exif)
    return content.getvalue()


def black_png(width: int, height: int) -> bytes:
    """Return a small file of a 1-bit image of any size."""
    packer = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row * min(512, height - start)) for start in range(0, height, 512))
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": rows + packer.flush(), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )


def _directory(path: Path) -> None:
    path.mkdir()


def _dangling(path: Path) -> None:
    path.symlink_to(path.with_name("absent.png"))


def _forbidden(path: Path) -> None:
    path.write_bytes(jpeg())
    path.chmod(0)


def _of(content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: void(path.write_bytes(content()))


def void(_: object) -> None:
    """Do nothing with a value."""


# How to put what is no image at a path, and a part of the reason that is to be given.
UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (_of(bytes), "the file is empty"),
    "truncated": (_of(lambda: jpeg()[:-400]), "truncated"),
    "text": (_of(lambda: b"this is no image at all\n"), "no image that Pillow can read"),
    "dangling link": (_dangling, "No such file"),
    "directory": (_directory, "Is a directory"),
    "no permission": (_forbidden, "Permission denied"),
    "20,000 x 20,000": (_of(lambda: black_png(20_000, 20_000)), "400000000 pixels"),
    "13,000 x 13,000": (_of(lambda: black_png(13_000, 13_000)), "13000x13000 pixels are too many"),
}
