"""TIFF files of all kinds of samples, also of those that Pillow cannot write."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import numpy as np

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, OFFSETS, SAMPLES, ROWS, COUNTS = (
    256,
    257,
    258,
    259,
    262,
    273,
    277,
    278,
    279,
)
LEAST, MOST, PLANES, EXTRA, SAMPLE_FORMAT, TYPED_LEAST, TYPED_MOST = 280, 281, 284, 338, 339, 340, 341
FORMATS = {"u": 1, "i": 2, "f": 3}
Tags = dict[int, list[int] | list[float]]


def tiff(values: np.ndarray, tags: Tags | None = None, *, planes: bool = False) -> bytes:
    """Return an uncompressed TIFF of grey (H, W) or colours (H, W, C), in the byte order and type of the values."""
    height, width, samples = (*values.shape, 1)[:3]
    order = ">" if values.dtype.byteorder == ">" else "<"
    about: Tags = {
        BITS: [values.dtype.itemsize * 8] * samples,
        PHOTOMETRIC: [2 if samples > 1 else 1],
        SAMPLE_FORMAT: [FORMATS[values.dtype.kind]] * samples,
        PLANES: [2 if planes else 1],
    }
    parts = [values[..., band].tobytes() for band in range(samples)] if planes else [values.tobytes()]
    return packed(parts, width, height, {SAMPLES: [samples], **about, **(tags or {})}, order)


def twelve_bit(values: np.ndarray) -> bytes:
    """Return an uncompressed TIFF of grey values (H, W) of 12 bits, W even: two of them lie in three bytes."""
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    lying = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    height, width = values.shape
    return packed([lying.tobytes()], width, height, {SAMPLES: [1], BITS: [12], PHOTOMETRIC: [1]})


def packed(parts: list[bytes], width: int, height: int, tags: Tags, order: str = "<") -> bytes:
    """Return a TIFF of these strips and tags."""
    size = len(parts[0])
    offsets = [8 + number * size for number in range(len(parts))]
    strips: Tags = {OFFSETS: offsets, COUNTS: [size] * len(parts), ROWS: [height], COMPRESSION: [1]}
    entries = sorted({WIDTH: [width], HEIGHT: [height], **strips, **tags}.items())
    start = 8 + size * len(parts)
    start += start % 2
    beside = start + 2 + 12 * len(entries) + 4
    directory, behind = struct.pack(order + "H", len(entries)), b""
    for tag, numbers in entries:
        kind, letter = (12, "d") if any(isinstance(number, float) for number in numbers) else (4, "I")
        content = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(content) > 4:
            behind, content = behind + content, struct.pack(order + "I", beside + len(behind))
        directory += struct.pack(order + "HHI", tag, kind, len(numbers)) + content
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", start)
    return (header + b"".join(parts)).ljust(start, b"\0") + directory + bytes(4) + behind


def pgm(values: Iterable[Iterable[int]], most: int, *, plain: bool = False) -> bytes:
    """Return a PGM (grey, (H, W)) or PPM (colours, (H, W, 3)) of which `most` is white."""
    pixels = np.asarray(values)
    kind = {(2, False): 5, (3, False): 6, (2, True): 2, (3, True): 3}[pixels.ndim, plain]
    header = f"P{kind}\n{pixels.shape[1]} {pixels.shape[0]}\n{most}\n".encode()
    if plain:
        return header + " ".join(map(str, pixels.ravel().tolist())).encode()
    return header + pixels.astype(">u2" if most > 255 else np.uint8).tobytes()
