"""Samples of more than 8 bits, or none of bits at all, as shades of 8: scaled by what their file says they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pq_sweep.types import UserError

# Tags of TIFF 6.0.
BITS, PHOTOMETRIC, MOST, PLANES, SAMPLE_FORMAT, TYPED_MOST = 258, 262, 281, 284, 339, 341
SIGNED = 2
SEPARATE = 2
# White of samples of which the file only says that they are whole numbers, or floats: the first that none exceeds.
WHOLE, FLOAT = (255, 65535), (1, 255, 65535)
# An image that stays below this share of white is suspicious where the file does not say what white is.
DARK = 1 / 4


@dataclass(frozen=True)
class Samples:
    """What a file says of its samples: of `whites`, the first that no sample exceeds is white.

    `said` is a white that the file names, instead of the most that fits into its samples.
    """

    kind: str = "8-bit"
    whites: tuple[int, ...] = (255,)
    said: int | None = None
    inverted: bool = False


@dataclass(frozen=True)
class Scale:
    """Which value of what kind of samples became white, unless they were of 8 bits, and a doubt about it."""

    kind: str | None = None
    white: int | None = None
    doubt: str | None = None


def samples_of(file: Image.Image) -> Samples:
    """Return what a picture, or its opened file, says of its samples; once decoded, Pillow has forgotten most of it."""
    if isinstance(file, TiffImageFile):
        return _of_tiff(file)
    tiles = file.tile if isinstance(file, ImageFile.ImageFile) else []
    decoder, _, _, arguments = tiles[0] if tiles else ("", None, 0, ())
    if decoder in ("ppm", "ppm_plain") and isinstance(arguments, tuple) and file.mode != "1":
        most = int(arguments[-1])  # Pillow scales by it, grey samples to 16 bits and colours to 8
        return _sixteen_bit(65535 if most < 65535 else None) if most > 255 else Samples()
    if file.format in ("PNG", "PPM") and (file.mode.startswith("I") or str(arguments).endswith("16B")):
        return _sixteen_bit()
    return _of_mode(file.mode)


def eight_bit(image: Image.Image, samples: Samples) -> tuple[Image.Image, Scale]:
    """Return a decoded image with samples of 8 bits; a UserError says why it is unknown what they show."""
    if image.mode.startswith(("I", "F")):
        return _scaled(np.asarray(image), samples)
    if image.mode in ("LAB", "La"):  # Pillow converts them to nothing else
        image = image.convert({"LAB": "RGB", "La": "LA"}[image.mode])
    return image, Scale(doubt=_doubt_of_bytes(image, samples))


def _of_mode(mode: str) -> Samples:
    """Return what a mode of Pillow alone says."""
    if mode.startswith("I;16"):
        return _sixteen_bit()
    return {"I": Samples("32-bit", WHOLE), "F": Samples("float", FLOAT)}.get(mode, Samples())


def _sixteen_bit(said: int | None = None) -> Samples:
    return Samples("16-bit", (65535,), said)


def _of_tiff(file: TiffImageFile) -> Samples:
    tags: Any = file.tag_v2
    bits, signed = max(tags.get(BITS, (1,))), max(tags.get(SAMPLE_FORMAT, (1,))) == SIGNED
    if bits <= 8:
        return Samples("signed 8-bit") if signed else Samples()
    if bits < 32 and tags.get(PLANES) == SEPARATE and file.tile and file.tile[0][0] == "raw":
        raise UserError(f"its samples of {bits} bits lie in planes, which Pillow reads wrongly; save it without planes")
    if file.mode == "F":
        found = Samples("float", FLOAT)
    elif bits == 32:
        found = Samples("32-bit", WHOLE)
    elif signed:
        found = Samples("signed 16-bit", (255, 32767))
    else:
        most = 2**bits - 1
        found = Samples(f"{bits}-bit", (most,), most if bits < 16 else None)
    # Pillow itself inverts samples of 8 bits alone.
    return _as_declared(found, _declared(tags), inverted=tags.get(PHOTOMETRIC) == 0)


def _declared(tags: Any) -> int | None:
    """Return the most that samples can be as the file has it, if it is that of so many bits, or 1.

    Other values are the most that is in this one image, as TIFF 6.0 has it: scaled by them, a dark image would be as
    bright as its neighbours.
    """
    most = max(tags.get(TYPED_MOST) or tags.get(MOST) or (0,))
    if most == 1 or (255 <= most <= 65535 and most == int(most) and int(most) & (int(most) + 1) == 0):
        return int(most)
    return None


def _as_declared(samples: Samples, most: int | None, *, inverted: bool) -> Samples:
    """Return samples with the white that is declared, if their kind can have it."""
    said, whites = samples.said, samples.whites
    if most is not None and most <= whites[-1] and (most > 1 or samples.kind == "float"):
        said, whites = most, (most, *(white for white in whites if white > most))
    return Samples(samples.kind, whites, said, inverted)


def _scaled(values: np.ndarray, samples: Samples) -> tuple[Image.Image, Scale]:
    """Return grey values as shades of 8 bits, each of equally many values; floats are rounded to 8 or 16 bits first."""
    white, high = _white(values, samples)
    whole = max(white, 255)
    if values.dtype.kind == "f":
        values = np.rint(values * (whole / white))
    values = values.astype(np.int32)
    values = whole - values if samples.inverted else values
    shades = (values * 255 // whole).clip(0, 255).astype(np.uint8)
    doubt = None
    if white != samples.said and high <= white * DARK:
        doubt = f"its {samples.kind} samples go up to {high:g} only, and {white} was taken as white"
    return Image.fromarray(shades), Scale(samples.kind, white, doubt)


def _white(values: np.ndarray, samples: Samples) -> tuple[int, float]:
    """Return the value that is white, and the highest one; values are cut off where rounding would do so as well."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UserError("it has samples that are no numbers, or infinite")
    slack = 0.5 / 255 if values.dtype.kind == "f" else 0
    white = next((white for white in samples.whites if high <= white * (1 + slack)), None)
    if white is None or low < -slack * white:
        raise UserError(
            f"its {samples.kind} samples go from {low:g} to {high:g}, and nothing says which are black and white; save"
            " it with 8 or 16 bits"
        )
    return white, high


def _doubt_of_bytes(image: Image.Image, samples: Samples) -> str | None:
    """Say what is doubtful about samples that Pillow itself brought to 8 bits."""
    if samples.kind == "8-bit":
        return None
    extrema = image.getextrema()
    bands = [extrema] if isinstance(extrema[0], (int, float)) else extrema
    high = max(high for (_, high), name in zip(bands, image.getbands(), strict=True) if name != "A")
    if samples.kind == "signed 8-bit":
        return "its 8-bit samples have a sign, and were taken without it" if high > 127 else None
    if samples.said and samples.said < 65535:
        raise UserError(f"its {samples.kind} colours have {samples.said} as white, and Pillow keeps too little of them")
    if not samples.said and high <= 255 * DARK:
        return f"its {samples.kind} colours stay below a quarter of white"
    return None
