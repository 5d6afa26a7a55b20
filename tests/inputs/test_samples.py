"""Samples: whatever their type and range, images show what they should, or are named and counted."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_folders import TINY, black_png, files, load, photo, upright
from PIL import Image
from tiff_files import EXTRA, LEAST, MOST, PHOTOMETRIC, TYPED_LEAST, TYPED_MOST, packed, pgm, tiff, twelve_bit

from pq_sweep.inputs.image_cache import Decoded, ImageCache, decode
from pq_sweep.types import Preprocess, UserError

SIZE = 16
GREY = Preprocess(size=SIZE, resize=SIZE, channels=1, mean=(0.0,), std=(1.0,))
COLOUR = Preprocess(size=SIZE, resize=SIZE, mean=(0.0,) * 3, std=(1.0,) * 3)
SHADES = np.arange(256).reshape(SIZE, SIZE)  # every one of 8 bits
RAMP = np.linspace(0, 65535, SIZE * SIZE).astype(int).reshape(SIZE, SIZE)
RAMP12 = np.linspace(0, 4095, SIZE * SIZE).astype(int).reshape(SIZE, SIZE)


def png(values: np.ndarray) -> bytes:
    return saved(Image.fromarray(values), "PNG")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def shown(content: bytes) -> np.ndarray:
    """Return an image as a model with one channel gets it, (16, 16)."""
    return decode(content, GREY).pixels[..., 0].astype(int)


def doubt(content: bytes, preprocess: Preprocess = GREY) -> str:
    return decode(content, preprocess).scale.doubt or ""


def reason(content: bytes) -> str:
    """Return why a file is left out."""
    with pytest.raises(UserError) as caught:
        decode(content, GREY)
    return str(caught.value)


class TestScaledByWhatTheFileSays:
    @pytest.mark.parametrize(
        ("content", "white"),
        [
            (png(RAMP.astype(np.uint16)), 65535),
            (tiff(RAMP.astype("<u2")), 65535),
            (tiff(RAMP.astype(">u2")), 65535),
            (saved(Image.fromarray(RAMP.astype(np.uint16)), "TIFF", compression="tiff_lzw"), 65535),
            (pgm(RAMP, 65535), 65535),
            (pgm(RAMP, 65535, plain=True), 65535),
            (twelve_bit(RAMP12), 4095),
            (tiff(RAMP12.astype("<u2"), {MOST: [4095]}), 4095),
            (tiff(RAMP12.astype(">u2"), {MOST: [4095]}), 4095),
            (tiff((RAMP12 // 4).astype("<u2"), {MOST: [1023]}), 1023),
            (tiff(RAMP12.astype("<i4"), {MOST: [4095]}), 4095),
            (tiff(RAMP12.astype("<f4"), {TYPED_MOST: [4095.0]}), 4095),
            (tiff((RAMP // 2).astype("<i2")), 32767),
            (tiff((RAMP // 2).astype(">i2")), 32767),
        ],
        ids=[
            *("PNG", "TIFF", "big-endian TIFF", "compressed TIFF", "PGM", "plain PGM", "12 bits", "12 of 16 bits"),
            *(
                "12 of 16 bits, big-endian",
                "10 of 16 bits",
                "12 of 32 bits",
                "12 bits as floats",
                "16 bits with a sign",
            ),
            "16 bits with a sign, big-endian",
        ],
    )
    def test_grey(self, content: bytes, white: int) -> None:
        highest = {65535: RAMP, 4095: RAMP12, 1023: RAMP12 // 4, 32767: RAMP // 2}[white]
        assert (shown(content) == highest * 255 // white).all()
        assert doubt(content) == ""
        assert decode(content, GREY).scale.white == white

    @pytest.mark.parametrize(
        ("values", "tags", "white"),
        [
            (RAMP12.astype(np.uint16), {LEAST: 0, MOST: 4095}, 4095),
            (SHADES.astype(np.float32), {TYPED_LEAST: 0.0, TYPED_MOST: 255.0}, 255),
            ((SHADES / 255).astype(np.float32), {TYPED_MOST: 1.0}, 1),
            ((SHADES // 16 / 255).astype(np.float32), {TYPED_MOST: 1.0}, 1),
        ],
        ids=["12 bits", "floats to 255", "floats to 1", "dark floats"],
    )
    def test_tags_that_pillow_wrote(self, values: np.ndarray, tags: dict[int, float], white: int) -> None:
        content = saved(Image.fromarray(values), "TIFF", tiffinfo=tags)
        assert np.abs(shown(content) - values * (255 / white)).max() < 1
        assert doubt(content) == ""

    @pytest.mark.parametrize("plain", [False, True])
    @pytest.mark.parametrize("most", [15, 255, 1000, 4095, 65535])
    def test_pgm_of_any_most(self, most: int, plain: bool) -> None:
        values = np.linspace(0, most, SIZE * SIZE).astype(int).reshape(SIZE, SIZE)
        content = pgm(values, most, plain=plain)
        assert np.abs(shown(content) - values * 255 / most).max() <= 1
        assert doubt(content) == ""

    @pytest.mark.parametrize("most", [255, 1000, 4095, 65535])
    def test_ppm_of_any_most(self, most: int) -> None:
        values = np.linspace(0, most, SIZE * SIZE * 3).astype(int).reshape(SIZE, SIZE, 3)
        found = decode(pgm(values, most), COLOUR)
        assert np.abs(found.pixels - values * 255 / most).max() <= 1
        assert found.scale.doubt is None

    @pytest.mark.parametrize("plain", [False, True])
    def test_pbm(self, plain: bool) -> None:
        bits = np.random.default_rng(0).integers(0, 2, (SIZE, SIZE))
        pixels = " ".join(map(str, bits.ravel())).encode() if plain else np.packbits(bits, axis=1).tobytes()
        content = f"P{1 if plain else 4}\n{SIZE} {SIZE}\n".encode() + pixels
        assert (shown(content) == 255 - 255 * bits).all()

    @pytest.mark.parametrize("content", [pgm(RAMP12 // 8, 4095), twelve_bit(RAMP12 // 8)], ids=["PGM", "TIFF"])
    def test_dark_image_is_as_dark_as_it_says(self, content: bytes) -> None:
        assert doubt(content) == ""
        assert shown(content).max() == 31

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_16_bit_colours_keep_their_high_bytes_as_in_pillow(self, order: str) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype(f"{order}u2")
        assert (decode(tiff(values), COLOUR).pixels == values >> 8).all()

    @pytest.mark.parametrize("values", [RAMP.astype("<u2"), (RAMP / 65535).astype("<f4"), RAMP.astype("<f4")])
    def test_zero_is_white_where_the_file_says_so(self, values: np.ndarray) -> None:
        inverted = shown(tiff(values, {PHOTOMETRIC: [0]}))
        assert np.abs(inverted - (255 - shown(tiff(values)))).max() <= 1
        assert inverted[0, 0] == 255

    def test_8_bits_where_zero_is_white_are_pillows(self) -> None:
        assert (shown(tiff(SHADES.astype("u1"), {PHOTOMETRIC: [0]})) == 255 - SHADES).all()

    @pytest.mark.parametrize("most", [3977, 40000, 100, 1, 0])
    def test_most_of_one_image_is_not_taken_as_white(self, most: int) -> None:
        """TIFF 6.0 has it for statistics: a dark image would be as bright as its neighbour."""
        values = RAMP.clip(0, most).astype("<u2")
        assert (shown(tiff(values, {MOST: [most]})) == shown(tiff(values))).all()

    def test_declared_white_below_the_samples_is_passed_over(self) -> None:
        assert (shown(tiff(RAMP.astype("<u2"), {MOST: [4095]})) == RAMP // 257).all()


class TestScaledByValues:
    """The file only says that its samples are whole numbers of 32 bits, have a sign, or are floats."""

    @pytest.mark.parametrize("kind", ["<i4", ">i4", "<u4", "<i2", "<f4", ">f4"])
    def test_shades_of_8_bits(self, kind: str) -> None:
        content = tiff(SHADES.astype(kind))
        assert (shown(content) == SHADES).all()
        assert (shown(content) == np.asarray(Image.open(io.BytesIO(content)).convert("L"))).all()
        assert doubt(content) == ""

    @pytest.mark.parametrize("kind", ["<i4", ">i4", "<u4", "<f4", ">f4"])
    def test_shades_of_16_bits(self, kind: str) -> None:
        content = tiff(RAMP.astype(kind))
        assert (shown(content) == RAMP // 257).all()
        assert doubt(content) == ""

    @pytest.mark.parametrize("kind", ["<f4", ">f4"])
    def test_floats_from_0_to_1(self, kind: str) -> None:
        content = tiff((SHADES / 255).astype(kind))
        assert (shown(content) == SHADES).all()
        assert doubt(content) == ""

    @pytest.mark.parametrize("white", [1, 255])
    def test_floats_are_rounded(self, white: int) -> None:
        values = ((SHADES + 0.4) / 255 * white).astype("<f4")
        assert (shown(tiff(values)) == SHADES).all()

    def test_floats_from_pillow_itself(self) -> None:
        content = saved(Image.fromarray((SHADES / 255).astype(np.float32)), "TIFF")
        assert (shown(content) == SHADES).all()

    @pytest.mark.parametrize("white", [1, 255, 65535])
    def test_what_rounding_left_over_is_cut_off(self, white: int) -> None:
        """As after resizing: a ten-thousandth above white or below black."""
        values = SHADES / 255 * white
        values[0, 0], values[-1, -1] = -white * 1e-4, white * 1.0001
        assert np.abs(shown(tiff(values.astype("<f4"))) - SHADES).max() <= 1

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            (np.where(SHADES == 7, -1, SHADES).astype("<i4"), "go from -1 to 255"),
            (np.where(SHADES == 7, -1024, RAMP12).astype("<i2"), "go from -1024 to 4095"),
            (np.where(SHADES == 7, 70_000, SHADES).astype("<i4"), "go from 0 to 70000"),
            ((SHADES * 2**23).astype("<u4"), "go from"),
            ((SHADES / 255 - 0.5).astype("<f4"), "go from -0.5 to 0.5"),
            ((SHADES * 1000.0).astype("<f4"), "go from 0 to 255000"),
            (np.where(SHADES == 7, np.nan, SHADES).astype("<f4"), "no numbers, or infinite"),
            (np.where(SHADES == 7, np.inf, SHADES).astype("<f4"), "no numbers, or infinite"),
            (np.where(SHADES == 7, -np.inf, SHADES).astype("<f4"), "no numbers, or infinite"),
            (SHADES.astype("<f8"), "TIFF"),
            (SHADES.astype("<f2"), "TIFF"),
        ],
        ids=[
            *("negative", "Hounsfield units", "more than 16 bits", "all of 32 bits", "negative floats", "large floats"),
            *("NaN", "inf", "-inf", "float64", "float16"),
        ],
    )
    def test_what_has_no_known_shade_is_left_out(self, values: np.ndarray, said: str) -> None:
        assert said in reason(tiff(values))


@pytest.mark.filterwarnings("ignore:Palette images")
class TestColours:
    def test_planes_of_16_bits_are_left_out_as_pillow_reads_them_wrongly(self) -> None:
        values = np.random.default_rng(0).integers(0, 65536, (SIZE, SIZE, 3)).astype("<u2")
        assert "planes" in reason(tiff(values, planes=True))

    def test_planes_of_8_bits_are_read(self) -> None:
        values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
        assert (decode(tiff(values, planes=True), COLOUR).pixels == values).all()

    def test_12_of_16_bits_are_left_out_as_pillow_keeps_4_of_them(self) -> None:
        values = np.random.default_rng(0).integers(0, 4096, (SIZE, SIZE, 3)).astype("<u2")
        assert "4095" in reason(tiff(values, {MOST: [4095] * 3}))

    @pytest.mark.parametrize("preprocess", [GREY, COLOUR], ids=["grey model", "RGB model"])
    def test_lab_equals_pillows(self, preprocess: Preprocess) -> None:
        content = saved(photo((SIZE, SIZE)).convert("RGB"), "TIFF")
        lab = Image.open(io.BytesIO(content)).convert("LAB")
        content = saved(lab, "TIFF")
        expected = np.asarray(lab.convert("RGB").convert("RGB" if preprocess is COLOUR else "L"))
        assert (decode(content, preprocess).pixels.squeeze() == expected).all()

    @pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "PA"])
    def test_transparency_is_dropped_as_in_torchvision(self, tmp_path: Path, mode: str) -> None:
        image = photo((SIZE, SIZE))
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        content = saved(image.convert(mode), "TIFF" if mode == "PA" else "PNG")
        (tmp_path / "photo").write_bytes(content)
        assert (decode(content, COLOUR).pixels == np.asarray(upright(tmp_path / "photo"))).all()


def rgb(values: np.ndarray) -> np.ndarray:
    return np.stack([values] * 3, -1)


SUSPICIOUS: dict[str, tuple[Callable[[], bytes], str]] = {
    "12 bits in a PNG of 16": (lambda: png(RAMP12.astype(np.uint16)), "go up to 4095 only, and 65535"),
    "14 bits in a TIFF of 16": (lambda: tiff((RAMP // 4).astype("<u2")), "go up to 16383 only, and 65535"),
    "12 bits in a PGM of 16": (lambda: pgm(RAMP12, 65535), "go up to 4095 only, and 65535"),
    "12 bits in 32": (lambda: tiff(RAMP12.astype("<i4")), "go up to 4095 only, and 65535"),
    "12 bits in 16 with a sign": (lambda: tiff(RAMP12.astype("<i2")), "go up to 4095 only, and 32767"),
    "0 to 16 in 32 bits": (lambda: tiff((SHADES // 16).astype("<i4")), "go up to 15 only, and 255"),
    "0 to 16 as floats": (lambda: tiff((SHADES / 16).astype("<f4")), "only, and 255"),
    "12 bits in colours of 16": (lambda: tiff(rgb(RAMP12).astype("<u2")), "stay below a quarter of white"),
    "12 bits in PPM of 16": (lambda: pgm(rgb(RAMP12), 65535), "stay below a quarter of white"),
    "12 bits in colours of 16, opaque": (
        lambda: tiff(np.concatenate([rgb(RAMP12), np.full((SIZE, SIZE, 1), 65535)], -1).astype("<u2"), {EXTRA: [2]}),
        "stay below a quarter of white",
    ),
    "8 bits with a sign": (lambda: tiff(SHADES.astype("u1"), {339: [2]}), "have a sign"),
    "8 bits in 16": (lambda: png(SHADES.astype(np.uint16)), "the same value"),
    "black": (lambda: black_png(20, 20), "the same value"),
    "one colour": (lambda: saved(Image.new("RGB", (20, 20), (200, 10, 3)), "PNG"), "the same value"),
    "float zeros": (lambda: tiff(np.zeros((4, 4), "<f4")), "the same value"),
    "palette of 8 bits in 16": (lambda: colour_map(1), "the same value"),
}


def colour_map(scale: int) -> bytes:
    """Return a TIFF whose colours come from a map of 16 bits, of which Pillow takes the high ones."""
    tags = {258: [8], PHOTOMETRIC: [3], 277: [1], 320: [shade * scale for _ in range(3) for shade in range(256)]}
    return packed([SHADES.astype("u1").tobytes()], SIZE, SIZE, tags)


class TestSuspicious:
    @pytest.mark.parametrize("kind", SUSPICIOUS)
    def test_is_used_and_said(self, kind: str) -> None:
        make, said = SUSPICIOUS[kind]
        preprocess = COLOUR if "colour" in kind or "PPM" in kind else GREY
        assert said in doubt(make(), preprocess)

    def test_map_of_colours_as_it_should_be_is_none(self) -> None:
        content = colour_map(257)
        assert doubt(content) == ""
        assert (shown(content) == SHADES).all()

    @pytest.mark.parametrize(
        "content",
        [
            png((SHADES // 16).astype(np.uint8)),
            png((RAMP * 3 // 11).astype(np.uint16)),
            tiff((SHADES * 3 // 11).astype("<f4")),
            tiff(rgb(RAMP * 3 // 11).astype("<u2")),
        ],
        ids=["8 bits", "16 bits", "floats", "colours of 16 bits"],
    )
    def test_dark_photograph_is_none(self, content: bytes) -> None:
        """What has 8 bits may be as dark as it likes, and other samples have a quarter of white at least."""
        assert doubt(content, COLOUR) == ""

    def test_is_counted_named_and_kept(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        root = tmp_path / "root"
        for name, content in {"cat/a": 0, "cat/b": 1, "dog/a": 2, "dog/b": 3}.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / f"{name}.png").write_bytes(png(np.roll(SHADES, content).astype(np.uint8)))
        flat = root / "cat" / "flat.png"
        flat.write_bytes(black_png(20, 20))
        for _ in range(2):  # decoded, and from the cache
            caplog.clear()
            data = load(root, calibration=0)
            assert len(data.evaluation) == 5
            assert data.record()["suspicious"] == {str(flat): "all of its pixels have the same value"}
            assert data.record()["left_out"] == {}
            (note,) = data.notes
            assert note.startswith(f"suspicious images, which are used all the same: 1, first {flat} (")
            assert caplog.messages == [note]

    @pytest.mark.parametrize(
        ("usual", "other", "whites"),
        [
            ((SHADES * 1.0).astype("<f4"), (SHADES / 255).astype("<f4"), (255, 1)),
            ((SHADES / 255).astype("<f4"), (SHADES * 1.0).astype("<f4"), (1, 255)),
            (RAMP.astype("<i4"), SHADES.astype("<i4"), (65535, 255)),
        ],
        ids=["bright float", "dark float", "32 bits"],
    )
    def test_scale_of_one_image_alone_is_said(
        self, tmp_path: Path, usual: np.ndarray, other: np.ndarray, whites: tuple[int, int]
    ) -> None:
        (tmp_path / "cat").mkdir()
        for number in range(3):
            (tmp_path / "cat" / f"{number}.tif").write_bytes(tiff(np.roll(usual, number)))
        assert load(tmp_path, 1, calibration=0).record()["suspicious"] == {}
        (tmp_path / "cat" / "odd.tif").write_bytes(tiff(other))
        ((path, text),) = load(tmp_path, 1, calibration=0).record()["suspicious"].items()
        assert path == str(tmp_path / "cat" / "odd.tif")
        assert text.startswith(f"{whites[1]} was taken as white")
        assert f"and {whites[0]} of those of most others" in text

    def test_image_in_two_classes(self, tmp_path: Path) -> None:
        for name in ("cat/a.png", "cat/b.png", "dog/c.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(png(np.roll(SHADES, ord(name[4])).astype(np.uint8)))
        (tmp_path / "dog" / "link.png").symlink_to(tmp_path / "cat" / "a.png")
        data = load(tmp_path, calibration=0)
        assert len(data.evaluation) == 4
        assert data.record()["suspicious"] == {
            str(tmp_path / "cat" / "a.png"): "a file of the same bytes is in the class dog",
            str(tmp_path / "dog" / "link.png"): "a file of the same bytes is in the class cat",
        }

    def test_what_is_left_out_is_not_counted_twice(self, tmp_path: Path) -> None:
        """A copy of an image to evaluate, both black, is left out of calibration."""
        for split in ("train", "val"):
            (tmp_path / split / "cat").mkdir(parents=True)
            (tmp_path / split / "cat" / "black.png").write_bytes(black_png(20, 20))
        (tmp_path / "train" / "cat" / "other.png").write_bytes(png(SHADES.astype(np.uint8)))
        record = load(tmp_path, 1, calibration=1).record()
        assert list(record["suspicious"]) == [str(tmp_path / "val" / "cat" / "black.png")]

    def test_pipe_is_left_out(self, tmp_path: Path) -> None:
        """Reading it would wait for ever."""
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "a.png").write_bytes(png(SHADES.astype(np.uint8)))
        os.mkfifo(tmp_path / "cat" / "pipe.png")
        data = load(tmp_path, 1, calibration=0)
        assert data.record()["left_out"] == {str(tmp_path / "cat" / "pipe.png"): "it is a pipe or a device and no file"}


@pytest.mark.filterwarnings("ignore:Palette images")
class TestEightBitsAreAsBefore:
    """Pixels are those of Pillow and torchvision alone, whatever the mode and the file."""

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(
        ("mode", "kind"),
        [
            *(("1", kind) for kind in ("PNG", "BMP", "TIFF", "PPM")),
            *(("L", kind) for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP")),
            *(("LA", kind) for kind in ("PNG", "TIFF")),
            *(("P", kind) for kind in ("PNG", "BMP", "TIFF", "GIF")),
            ("PA", "TIFF"),
            *(("RGB", kind) for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP")),
            *(("RGBA", kind) for kind in ("PNG", "TIFF", "WEBP", "BMP")),
            *(("CMYK", kind) for kind in ("JPEG", "TIFF")),
        ],
    )
    def test_same_pixels(self, mode: str, kind: str, channels: int) -> None:
        from torchvision.transforms import functional as F

        image = photo((40, 30))
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        content = saved(image.convert(mode), kind)
        preprocess = COLOUR if channels == 3 else GREY
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = Image.open(io.BytesIO(content)).convert("RGB" if channels == 3 else "L")
        expected = F.center_crop(F.resize(expected, [SIZE], antialias=True), [SIZE])
        found: Decoded = decode(content, preprocess)
        assert (found.pixels.squeeze() == np.asarray(expected)).all()
        assert found.scale.doubt is None
        assert found.scale.kind is None


@pytest.mark.parametrize("kind", ["<i4", "<f4"])
def test_digits_as_other_samples_are_those_of_8_bits(tmp_path: Path, kind: str) -> None:
    """What made 95 % of right answers 11 %: digits as TIFF of 32-bit numbers from 0 to 255."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for name in ("wanted", "found"):
        (tmp_path / name).mkdir()
    for index in range(20):
        grey = np.round(digits.images[index] / 16 * 255)
        (tmp_path / "wanted" / f"{index:02}.tif").write_bytes(tiff(grey.astype("u1")))
        (tmp_path / "found" / f"{index:02}.tif").write_bytes(tiff(grey.astype(kind)))
    caches = [ImageCache(tmp_path / name, TINY) for name in ("wanted", "found")]
    for cache in caches:
        cache.prepare(files(cache.root))
    wanted, found = (cache.pixels(files(cache.root)) for cache in caches)
    assert (wanted == found).all()
    assert caches[1].suspicious() == {}


def test_unassociated_alpha_of_grey_is_dropped() -> None:
    values = np.stack([SHADES, np.full_like(SHADES, 255)], -1).astype("u1")
    content = tiff(values, {PHOTOMETRIC: [1], EXTRA: [2]})
    assert (shown(content) == SHADES).all()
