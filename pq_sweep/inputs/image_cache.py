"""Image files decoded and resized once, and kept as pixels in a memory-mapped cache across jobs and sweeps."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from pq_sweep.core.environment import cache_home
from pq_sweep.inputs.samples import Scale, eight_bit, samples_of
from pq_sweep.types import Preprocess, UserError

# Instead of this warning, an image that is too large is left out with a sentence that says so.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

log = logging.getLogger(__name__)

# To be raised when the same file and transform give other pixels than before.
CACHE_FORMAT = 2
CHUNK = 256


@dataclass(frozen=True)
class Entry:
    """What the cache knows about a file: its state when decoded, and the row of its pixels or why it has none.

    `kind`, `white` and `doubt` are those of the scale by which its samples became pixels.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    digest: str
    row: int | None
    error: str | None = None
    kind: str | None = None
    white: int | None = None
    doubt: str | None = None

    def describes(self, state: os.stat_result) -> bool:
        """Say whether the file is untouched; a user can set a file's modification time, but not its change time."""
        return (self.size, self.mtime_ns, self.ctime_ns) == (state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@dataclass(frozen=True)
class Decoded:
    """An image as (H, W, C) uint8, and how its samples were scaled."""

    pixels: np.ndarray
    scale: Scale


@dataclass
class ImageCache:
    """Pixels (H, W, C) uint8 of image files under `root` after resizing and cropping, kept across jobs and sweeps.

    The cache is two files that only grow: rows of pixels, and lines of JSON, one per decoded file; of several lines for
    one file, the last counts. A line is written after its row, by one process at a time, so no reader sees half an
    image, even if the writer was killed.
    """

    root: Path
    preprocess: Preprocess
    decoded: set[Path] = field(default_factory=set)
    used: set[Path] = field(default_factory=set)
    excluded: dict[Path, str] = field(default_factory=dict)
    doubted: dict[Path, str] = field(default_factory=dict)
    entries: dict[str, Entry] = field(default_factory=dict)
    names: dict[Path, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        transform = {
            "size": self.preprocess.size,
            "resize": self.preprocess.resize,
            "channels": self.preprocess.channels,
            "interpolation": self.preprocess.interpolation,
        }
        pixels = {**transform, "pillow": PIL.__version__, "format": CACHE_FORMAT}
        about = {"root": str(self.root.resolve()), **pixels}
        key = _hash(about)[:12]
        self.transform = _hash([pixels, list(self.preprocess.mean), list(self.preprocess.std)])
        self.folder = cache_home() / "images" / f"{self.root.resolve().name}-{self.preprocess.size}px-{key}"
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "about.json").write_text(json.dumps(about, indent=1))
            self._load()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Return the shape of an image."""
        return self.preprocess.size, self.preprocess.size, self.preprocess.channels

    def prepare(self, paths: list[Path]) -> None:
        """Decode files that are new or changed; of jobs that start at once, one decodes and the others wait."""
        paths = list(dict.fromkeys(paths))
        self.used.update(paths)
        if not self._stale(paths):
            return
        with _writing(self.folder), FileLock(self.folder / "lock"):
            self._load()  # another job may have decoded them meanwhile
            stale = self._stale(paths)
            with tqdm(total=len(stale), desc="decoding images", disable=None, leave=False) as bar:
                for chunk in _chunks(stale, CHUNK):
                    self._append(chunk)
                    bar.update(len(chunk))

    def usable(self, path: Path, others: frozenset[str] = frozenset()) -> bool:
        """Say whether a prepared image can be used; name and count it if it is unreadable, or a copy of `others`."""
        entry = self.entries[self._name(path)]
        reason = entry.error or ("a file of the same bytes is in the other split" if entry.digest in others else None)
        if reason and path not in self.excluded:
            self.excluded[path] = reason
            log.warning("image %s is left out: %s", printable(path), reason)
        return reason is None

    def digests(self, paths: Iterable[Path]) -> frozenset[str]:
        """Return the SHA-256 of prepared files."""
        return frozenset(self.entries[self._name(path)].digest for path in paths)

    def pixels(self, paths: list[Path]) -> Tensor:
        """Return prepared images as they are kept, (B, H, W, C) uint8."""
        rows = np.array([self.entries[self._name(path)].row for path in paths], dtype=np.int64)
        # Whole rows only, as another job may be in the middle of one.
        kept = np.memmap(self.folder / "pixels.u8", np.uint8, "r", shape=(self._rows(), *self.shape))
        return torch.from_numpy(kept[rows])

    def marks(self, paths: Iterable[Path]) -> Iterator[str]:
        """Yield for each prepared image a hash of its file's bytes, not its path, and of how it becomes an input."""
        for path in paths:
            yield f"{self.entries[self._name(path)].digest} {self.transform}"

    def marks_unread(self, paths: Iterable[Path], others: frozenset[str] = frozenset()) -> Iterator[str]:
        """Yield such hashes without reading the files: path below the root, size and times stand for the bytes."""
        about = _hash([self.transform, sorted(others)])
        for path in paths:
            state = _stat(path)
            yield _hash([about, self._name(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns])

    def same(self, paths: Iterable[Path]) -> list[list[Path]]:
        """Return the groups of prepared images whose files are the same to the byte."""
        groups: dict[str, list[Path]] = {}
        for path in paths:
            groups.setdefault(self.entries[self._name(path)].digest, []).append(path)
        return [group for group in groups.values() if len(group) > 1]

    def suspect(self, path: Path, reason: str) -> None:
        """Count an image as suspicious; it is used all the same."""
        self.doubted[path] = reason

    def suspicious(self) -> dict[Path, str]:
        """Return the images in use that probably do not show what they should, and why."""
        entries = {path: self.entries[self._name(path)] for path in self.used - self.excluded.keys()}
        usual = _usual_whites(entries.values())
        found = {}
        for path, entry in entries.items():
            if reason := self.doubted.get(path) or entry.doubt or _unlike(entry, usual):
                found[path] = reason
        return dict(sorted(found.items()))

    def record(self) -> dict[str, Any]:
        """Return how many images were decoded or came from the cache, and which were left out or doubted, and why."""
        read = {path for path in self.used if self.entries[self._name(path)].digest}
        return {
            "decoded": len(self.decoded),
            "from_cache": len(read - self.decoded),
            "left_out": {str(path): reason for path, reason in sorted(self.excluded.items())},
            "suspicious": {str(path): reason for path, reason in self.suspicious().items()},
            "cache": str(self.folder),
        }

    def _name(self, path: Path) -> str:
        name = self.names.get(path)
        if name is None:  # pathlib takes half as long for it as copying an image takes
            name = self.names[path] = str(path.relative_to(self.root))
        return name

    def _stale(self, paths: list[Path]) -> list[Path]:
        known = ((path, self.entries.get(self._name(path))) for path in paths)
        return [path for path, entry in known if entry is None or not entry.describes(_stat(path))]

    def _load(self) -> None:
        """Read the index; a torn last line was left by a writer that was killed.

        Row numbers only grow. If a line's row is not above all rows before it, then the rows from that number on had
        been lost when the line was written.
        """
        rows, top = self._rows(), -1
        index = self.folder / "index.jsonl"
        self.entries = {name: entry for name, entry in self.entries.items() if not entry.digest}  # never in the index
        for line in index.read_text(errors="replace").splitlines() if index.exists() else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
                values = json.loads(line)
                name, entry = values.pop("path"), Entry(**values)
                if entry.row is not None:
                    if entry.row <= top:
                        self._forget(entry.row)
                    top = entry.row
                self.entries[name] = entry
        self._forget(rows)

    def _forget(self, first: int) -> None:
        """Drop the entries that have their pixels in this row or after it."""
        self.entries = {name: entry for name, entry in self.entries.items() if entry.row is None or entry.row < first}

    def _rows(self) -> int:
        pixels = self.folder / "pixels.u8"
        return pixels.stat().st_size // int(np.prod(self.shape)) if pixels.exists() else 0

    def _append(self, paths: list[Path]) -> None:
        """Decode files on all cores and add them: pixels first, then the lines that point to them."""
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            read = list(pool.map(self._read, paths))
        row = self._rows()
        added = {}
        lines = [""]  # ends a line that a killed writer left open
        with (self.folder / "pixels.u8").open("ab") as pixels:
            pixels.truncate(row * int(np.prod(self.shape)))
            for path, (entry, image) in zip(paths, read, strict=True):
                if image is not None:
                    pixels.write(image.tobytes())
                    entry, row = replace(entry, row=row), row + 1
                added[self._name(path)] = entry
                if entry.digest:  # else it could not be read, but perhaps can be another time
                    self.decoded.add(path)
                    lines.append(json.dumps({"path": self._name(path), **asdict(entry)}))
            pixels.flush()
            os.fsync(pixels.fileno())
        with (self.folder / "index.jsonl").open("a") as index:
            index.write("\n".join([*lines, ""]))
        self.entries |= added

    def _read(self, path: Path) -> tuple[Entry, np.ndarray | None]:
        """Read and decode one file; the state is taken first, so that a later change is noticed."""
        state = _stat(path)
        entry = Entry(state.st_size, state.st_mtime_ns, state.st_ctime_ns, "", None)
        try:
            content = _content(path, state)
            entry = replace(entry, digest=hashlib.sha256(content).hexdigest())
            image = decode(content, self.preprocess)
        except UserError as problem:
            return replace(entry, error=str(problem)), None
        except OSError as problem:
            return replace(entry, error=problem.strerror or str(problem)), None
        return replace(entry, **vars(image.scale)), image.pixels


def normalise(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Turn (B, H, W, C) uint8 into normalised float32 (B, C, H, W) on its device; the bits are the same on all.

    Every divisor is a tensor on the device: if it were a plain number, CUDA would multiply by its reciprocal instead.
    There is one per channel, since a single one for all channels would be slower on a CPU.
    """
    white = [255.0] * len(preprocess.mean)
    values = (torch.tensor(value, device=pixels.device) for value in (white, preprocess.mean, preprocess.std))
    scale, mean, std = (value.view(-1, 1, 1) for value in values)
    images = pixels.permute(0, 3, 1, 2).contiguous().to(torch.float32)  # reordering is quickest while they are bytes
    return images.div_(scale).sub_(mean).div_(std)


def decode(content: bytes, preprocess: Preprocess) -> Decoded:
    """Decode, orient, resize and crop an image file to (H, W, C) uint8; a UserError says why that is impossible."""
    if not content:
        raise UserError("the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as file:
            _refuse_huge(*file.size, preprocess.resize)
            return fit(file, preprocess)
    except UnidentifiedImageError as error:
        raise UserError("it is no image that Pillow can read" + _advice(content)) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow raises almost anything on a damaged file
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error


def fit(picture: Image.Image, preprocess: Preprocess) -> Decoded:
    """Scale to 8 bits, orient, resize and crop a picture to (H, W, C) uint8."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as F

    samples = samples_of(picture)
    image, scale = eight_bit(_upright(picture), samples)
    image = image.convert("RGB" if preprocess.channels == 3 else "L")
    image = F.resize(image, [preprocess.resize], InterpolationMode(preprocess.interpolation), antialias=True)
    pixels = np.asarray(F.center_crop(image, [preprocess.size]))
    pixels = pixels.reshape(preprocess.size, preprocess.size, preprocess.channels)
    if (pixels == pixels[0, 0]).all():
        scale = replace(scale, doubt="all of its pixels have the same value")
    return Decoded(pixels, scale)


def printable(path: Path) -> str:
    """Return a path as text that can be written anywhere, whatever bytes its name has."""
    return str(path).encode(errors="backslashreplace").decode()


def _usual_whites(entries: Iterable[Entry]) -> dict[str, int]:
    """Return, for each kind of samples, the white by which most of the images of that kind were scaled."""
    counts: dict[str, Counter[int]] = {}
    for entry in entries:
        if entry.kind and entry.white:
            counts.setdefault(entry.kind, Counter())[entry.white] += 1
    return {kind: max(of_kind, key=lambda white: (of_kind[white], white)) for kind, of_kind in counts.items()}


def _unlike(entry: Entry, usual: dict[str, int]) -> str | None:
    """Say whether an image was scaled otherwise than most of its kind, so that it is brighter or darker than they."""
    if entry.kind is None or entry.white == usual[entry.kind]:
        return None
    return (
        f"{entry.white} was taken as white of its {entry.kind} samples, and {usual[entry.kind]} of those of most others"
    )


def _advice(content: bytes) -> str:
    """Say what would be right where a file is not even opened because of its samples."""
    if content[:4] not in (b"II*\0", b"MM\0*"):
        return ""
    return ": a TIFF that is damaged, or has samples other than of 8, 16 or 32 bits; save it with 8 or 16 bits"


def _hash(content: Any) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _refuse_huge(width: int, height: int, resize: int) -> None:
    """Refuse images that would fill the memory: too many pixels, or so long that they are huge once resized."""
    limit = Image.MAX_IMAGE_PIXELS or 0
    resized = resize * resize * max(width, height) // min(width, height)
    if limit and max(width * height, resized) > limit:
        raise UserError(
            f"{width}x{height} pixels are too many, or too long for a short side of {resize}"
            f" (PIL.Image.MAX_IMAGE_PIXELS is {limit})"
        )


def _upright(image: Image.Image) -> Image.Image:
    """Turn a photograph as its EXIF block says; if only that block is damaged, the image is used as it is."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow also rewrites the block, which can raise almost anything
        return image


def _content(path: Path, state: os.stat_result) -> bytes:
    """Return the bytes of a file; reading a pipe would wait for ever for somebody who writes into it."""
    if stat.S_ISFIFO(state.st_mode) or stat.S_ISCHR(state.st_mode):
        raise OSError("it is a pipe or a device and no file")
    return path.read_bytes()


def _stat(path: Path) -> os.stat_result:
    """Return a file's state; a dangling link or a file that vanished counts as an empty file."""
    try:
        return path.stat()
    except OSError:
        return os.stat_result([0] * 10)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the image cache {folder} cannot be written ({error.strerror or error}); set PQ_SWEEP_CACHE to a folder"
            " that can and has room."
        ) from error


def _chunks(items: list[Path], size: int) -> Iterator[list[Path]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
