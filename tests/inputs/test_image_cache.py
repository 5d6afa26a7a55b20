"""Image cache: pixels as torchvision makes them, decoded once, and right after every change, race and crash."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from errno import EIO, ENOSPC
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from conftest import refused
from image_folders import TINY, UNUSABLE, black_png, draw, files, jpeg, photo, torchvisions, upright
from PIL import Image
from torch import Tensor

from pq_sweep import types
from pq_sweep.core.environment import cache_home
from pq_sweep.inputs import image_cache
from pq_sweep.inputs.image_cache import Decoded, ImageCache, decode, normalise
from pq_sweep.inputs.images import split_of
from pq_sweep.inputs.models import _preprocess
from pq_sweep.types import Preprocess, UserError

PHOTO = Preprocess(size=64, resize=80)
before_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.partition(".")[0]) < 13, reason=f"Pillow {PIL.__version__} cannot read such a file; 13.0 can"
)
GREY = Preprocess(size=64, resize=80, channels=1, mean=(0.4,), std=(0.3,))


def inputs(cache: ImageCache, paths: list[Path]) -> Tensor:
    """Return images of a cache as a network takes them."""
    return normalise(cache.pixels(paths), cache.preprocess)


def prepared(path: Path, preprocess: Preprocess) -> Tensor:
    """Return one image of a folder as an input."""
    cache = ImageCache(path.parent, preprocess)
    cache.prepare([path])
    assert cache.usable(path), cache.excluded
    return inputs(cache, [path])[0]


def turned(orientation: int, *others: tuple[int, int, int, bytes]) -> bytes:
    """Return an EXIF block that says how to turn an image, and other (tag, type, count, value)."""
    entries = [(0x0112, 3, 1, struct.pack("<I", orientation)), *others]
    directory = b"".join(struct.pack("<HHI4s", *entry) for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4)


class TestPixels:
    @pytest.mark.parametrize("size", [(320, 200), (200, 320), (60, 50), (96, 96)])
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_equal_torchvisions(self, tmp_path: Path, size: tuple[int, int], interpolation: str) -> None:
        photo(size).save(tmp_path / "photo.jpg")
        preprocess = replace(PHOTO, interpolation=interpolation)
        expected = torchvisions(Image.open(tmp_path / "photo.jpg").convert("RGB"), preprocess)
        assert torch.equal(prepared(tmp_path / "photo.jpg", preprocess), expected)

    @pytest.mark.parametrize("weights", ["ResNet18", "EfficientNet_B0", "Inception_V3", "ViT_B_16", "AlexNet"])
    def test_equal_the_transforms_of_weights(self, tmp_path: Path, weights: str) -> None:
        from torchvision import models

        transforms: Any = getattr(models, f"{weights}_Weights").IMAGENET1K_V1.transforms()
        photo((320, 250)).save(tmp_path / "photo.jpg")
        expected = transforms(Image.open(tmp_path / "photo.jpg").convert("RGB"))
        assert torch.equal(prepared(tmp_path / "photo.jpg", _preprocess(transforms)), expected)

    @pytest.mark.parametrize("preprocess", [PHOTO, GREY], ids=["RGB model", "grey model"])
    @pytest.mark.parametrize(
        ("mode", "name"),
        [
            ("RGB", "photo.png"),
            ("RGB", "photo.bmp"),
            ("RGB", "photo.TIFF"),
            ("RGB", "photo.webp"),
            ("L", "photo.png"),
            ("L", "photo.jpg"),
            ("1", "photo.png"),
            ("P", "photo.png"),
            ("PA", "photo.tif"),
            ("LA", "photo.png"),
            ("RGBA", "photo.png"),
            ("RGBA", "photo.webp"),
            ("CMYK", "photo.jpg"),
            ("CMYK", "photo.tif"),
            pytest.param("YCbCr", "photo.tif", marks=before_pillow_13),
        ],
    )
    def test_every_kind_equals_torchvisions(self, tmp_path: Path, mode: str, name: str, preprocess: Preprocess) -> None:
        path = tmp_path / name
        source = photo((120, 100))
        if mode in ("LA", "RGBA", "PA"):
            source.putalpha(Image.linear_gradient("L").resize(source.size))
        source.convert(mode).save(path)
        found = prepared(path, preprocess)
        expected = torchvisions(Image.open(path).convert("RGB" if preprocess.channels == 3 else "L"), preprocess)
        assert found.shape == (preprocess.channels, 64, 64)
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [("L", ".png"), ("L", ".jpg"), ("1", ".png"), ("P", ".png"), ("RGBA", ".png"), ("CMYK", ".jpg")],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_modes_are_converted(self, tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
        preprocess = Preprocess(size=32, resize=32, channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
        converted = photo((32, 32)).convert(mode)
        converted.save(tmp_path / f"photo{suffix}", quality=100, subsampling=0)
        found = prepared(tmp_path / f"photo{suffix}", preprocess)
        expected = np.asarray(converted.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
        assert found.shape == (channels, 32, 32)
        assert np.abs(found.permute(1, 2, 0).numpy().squeeze() - expected).mean() < 0.02

    def test_transparent_palette(self, tmp_path: Path) -> None:
        path = tmp_path / "photo.png"
        photo((120, 100)).convert("P").save(path, transparency=3)
        assert torch.equal(prepared(path, PHOTO), torchvisions(Image.open(path).convert("RGB"), PHOTO))

    @pytest.mark.parametrize("name", ["ramp.png", "ramp.tif"])
    @pytest.mark.parametrize("preprocess", [PHOTO, GREY], ids=["RGB model", "grey model"])
    def test_16_bit_grey_keeps_its_shades(self, tmp_path: Path, preprocess: Preprocess, name: str) -> None:
        ramp = np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16)
        Image.fromarray(ramp).save(tmp_path / name)
        found = prepared(tmp_path / name, preprocess)
        eight_bit = Image.fromarray((ramp // 257).astype(np.uint8))
        expected = torchvisions(eight_bit.convert("RGB" if preprocess.channels == 3 else "L"), preprocess)
        assert torch.equal(found, expected)
        shades = found[0].numpy() * preprocess.std[0] + preprocess.mean[0]
        np.testing.assert_allclose(shades, ramp[8:-8, 8:-8] / 65535, atol=0.01)

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_applied(self, tmp_path: Path, orientation: int, suffix: str) -> None:
        path = tmp_path / f"turned{suffix}"
        photo((120, 90)).save(path, exif=turned(orientation))
        found = prepared(path, PHOTO)
        assert torch.equal(found, torchvisions(upright(path), PHOTO))
        as_it_lies = torchvisions(Image.open(path).convert("RGB"), PHOTO)
        assert torch.equal(found, as_it_lies) == (orientation == 1)

    @pytest.mark.parametrize(
        ("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)]
    )
    def test_exif_orientation_is_that_of_an_upright_file(
        self, tmp_path: Path, orientation: int, turn: Image.Transpose
    ) -> None:
        photo((48, 40)).save(tmp_path / "turned.png", exif=turned(orientation))
        photo((48, 40)).transpose(turn).save(tmp_path / "upright.png")
        found, expected = (prepared(tmp_path / name, TINY) for name in ("turned.png", "upright.png"))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize(
        "exif",
        [
            turned(6, (0x0128, 11, 1, struct.pack("<f", 1.5))),
            turned(1)[:12],
            b"Exif\0\0nonsense",
            turned(0),
            turned(9),
        ],
        ids=["value of a wrong type", "cut off", "nonsense", "orientation 0", "orientation 9"],
    )
    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_damaged_exif_leaves_the_image_as_it_lies(self, tmp_path: Path, exif: bytes) -> None:
        (tmp_path / "photo.jpg").write_bytes(jpeg((120, 90), exif))
        expected = torchvisions(Image.open(tmp_path / "photo.jpg").convert("RGB"), PHOTO)
        assert torch.equal(prepared(tmp_path / "photo.jpg", PHOTO), expected)

    def test_image_of_another_kind_than_its_name_says(self, tmp_path: Path) -> None:
        """As in ImageNet, where n02105855_2933.JPEG is a PNG."""
        photo((120, 100)).save(tmp_path / "photo.JPEG", "PNG")
        expected = torchvisions(photo((120, 100)), PHOTO)
        assert torch.equal(prepared(tmp_path / "photo.JPEG", PHOTO), expected)

    def test_crop_bigger_than_the_image_is_padded(self, tmp_path: Path) -> None:
        photo((60, 50)).save(tmp_path / "photo.png")
        preprocess = replace(PHOTO, resize=40)
        assert torch.equal(prepared(tmp_path / "photo.png", preprocess), torchvisions(photo((60, 50)), preprocess))

    @pytest.mark.parametrize("pattern", ["imagenette160/val/*/*", "photos_ccby/*/*.png"])
    def test_photographs(self, shared_data: Path, pattern: str) -> None:
        from torchvision.models import ResNet18_Weights

        transforms = ResNet18_Weights.IMAGENET1K_V1.transforms()
        paths = sorted(shared_data.glob(pattern))[::40][:8]
        cache = ImageCache(shared_data, _preprocess(transforms))
        cache.prepare(paths)
        expected = [transforms(Image.open(path).convert("RGB")) for path in paths]
        assert len(paths) >= 7
        assert torch.equal(inputs(cache, paths), torch.stack(expected))


def shades(channels: int) -> Tensor:
    """Return images (2, 16, 16, C) that show every shade in every channel."""
    grey = torch.arange(256, dtype=torch.uint8).view(16, 16)
    return torch.stack([torch.stack([grey.roll(turn + 3 * c) for c in range(channels)], -1) for turn in (0, 1)])


def as_torchvision_does(pixels: Tensor, preprocess: Preprocess) -> Tensor:
    """Normalise by a plain number on the CPU, one step at a time."""
    images = pixels.permute(0, 3, 1, 2).to(torch.float32).div(255)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (preprocess.mean, preprocess.std))
    return ((images - mean) / std).contiguous()


class TestNormalise:
    @pytest.mark.parametrize("preprocess", [PHOTO, TINY, GREY], ids=["ImageNet", "none", "grey"])
    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_every_shade_is_the_same_to_the_bit(self, preprocess: Preprocess, device: str) -> None:
        pixels = shades(preprocess.channels)
        found = normalise(pixels.to(device), preprocess)
        assert found.device.type == device
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        assert torch.equal(found.cpu().view(torch.int32), as_torchvision_does(pixels, preprocess).view(torch.int32))

    def test_any_mean_and_deviation(self) -> None:
        for seed in range(200):
            mean, std = torch.rand(2, 3, generator=torch.Generator().manual_seed(seed)).add(0.01).tolist()
            preprocess = replace(PHOTO, mean=tuple(mean), std=tuple(std))
            assert torch.equal(normalise(shades(3), preprocess), as_torchvision_does(shades(3), preprocess))

    @pytest.mark.parametrize("size", [1, 3, 64])
    def test_batches_of_a_split(self, root: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(types, "BYTES_WORTH_A_THREAD", 0)
        split = split_of(use(root), [(path, 0) for path in files(root)])
        found = torch.cat([images for images, _ in split.batches(size, order=list(range(9, -1, -1)))])
        expected = torch.stack([torchvisions(upright(path), TINY) for path in files(root)[::-1]])
        assert torch.equal(found, expected)
        assert torch.equal(found, split.fetch(list(range(9, -1, -1))))

    def test_pixels_are_kept_as_they_are(self, root: Path) -> None:
        pixels = use(root).pixels(files(root)[:3])
        assert pixels.dtype == torch.uint8
        expected = [torchvisions(upright(path), TINY) for path in files(root)[:3]]
        assert torch.equal(pixels.permute(0, 3, 1, 2) / 255, torch.stack(expected))


class TestDecode:
    @pytest.mark.parametrize("width_and_height", [(20_000, 1), (1, 20_000), (20_000, 8), (8, 20_000)])
    @pytest.mark.parametrize(("resize", "fits"), [(8, True), (256, False)])
    def test_long_images_are_refused_where_they_would_be_huge(
        self, width_and_height: tuple[int, int], resize: int, fits: bool
    ) -> None:
        content = black_png(*width_and_height)
        preprocess = replace(TINY, resize=resize)
        if fits:
            assert (decode(content, preprocess).pixels == 0).all()
        else:
            with pytest.raises(UserError, match="too long for a short side of 256"):
                decode(content, preprocess)

    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
    @pytest.mark.filterwarnings("ignore")
    def test_damage_raises_nothing_but_a_reason(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # what is bigger takes long
        photo((16, 12)).save(tmp_path / "photo", kind, exif=turned(6))
        sound = np.frombuffer((tmp_path / "photo").read_bytes(), np.uint8)
        rng = np.random.default_rng(0)
        for _ in range(150):
            damaged = sound[: rng.integers(1, len(sound))].copy() if rng.random() < 0.2 else sound.copy()
            damaged[rng.integers(0, min(len(damaged), rng.choice([48, 300])), 3)] = rng.integers(0, 256, 3)
            with contextlib.suppress(UserError):
                assert decode(damaged.tobytes(), TINY).pixels.shape == (8, 8, 3)

    @pytest.mark.parametrize("error", [KeyError("tag"), EOFError(), struct.error("two\nlines"), ZeroDivisionError()])
    def test_whatever_pillow_raises_is_a_reason(self, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
        def fail(*_: Any) -> None:
            raise error

        monkeypatch.setattr(image_cache.Image, "open", fail)
        with pytest.raises(UserError, match=r"^(two lines|'tag'|EOFError|ZeroDivisionError)$"):
            decode(b"some", TINY)

    def test_lack_of_memory_is_no_fault_of_the_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError

        monkeypatch.setattr(image_cache.Image, "open", fail)
        with pytest.raises(MemoryError):
            decode(b"some", TINY)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of ten small images whose files are equally long."""
    for index in range(10):
        draw(tmp_path / "images" / f"{index}.bmp", index)
    return tmp_path / "images"


@pytest.fixture
def decodes(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is decoded, in any order."""
    seen: list[bytes] = []
    real = image_cache.decode

    def watched(content: bytes, preprocess: Preprocess) -> Decoded:
        seen.append(content)
        return real(content, preprocess)

    monkeypatch.setattr(image_cache, "decode", watched)
    return seen


def use(root: Path, paths: list[Path] | None = None, preprocess: Preprocess = TINY) -> ImageCache:
    """Prepare a folder's images in a new cache, as a new job does."""
    cache = ImageCache(root, preprocess)
    cache.prepare(files(root) if paths is None else paths)
    return cache


def require(cache: ImageCache, paths: list[Path]) -> None:
    """Compare what a cache gives with what the files hold now."""
    assert torch.equal(inputs(cache, paths), torch.stack([torchvisions(upright(path), TINY) for path in paths]))


class TestReuse:
    def test_second_job_decodes_nothing_and_gets_the_same(self, root: Path, decodes: list[bytes]) -> None:
        first = use(root)
        assert len(decodes) == 10
        second = use(root)
        assert len(decodes) == 10
        assert torch.equal(inputs(first, files(root)), inputs(second, files(root)))
        require(second, files(root))
        counts = [(cache.record()["decoded"], cache.record()["from_cache"]) for cache in (first, second)]
        assert counts == [(10, 0), (0, 10)]

    def test_order_and_repetition_are_as_asked(self, root: Path) -> None:
        chosen = [files(root)[index] for index in (7, 0, 7, 3)]
        require(use(root), chosen)

    def test_same_image_asked_twice_is_decoded_once(self, root: Path, decodes: list[bytes]) -> None:
        cache = use(root, [files(root)[0]] * 3)
        assert len(decodes) == 1
        assert cache.record()["decoded"] == 1

    def test_only_what_is_asked_for_is_decoded(self, root: Path, decodes: list[bytes]) -> None:
        use(root, files(root)[:3])
        cache = use(root, files(root)[1:5])
        assert len(decodes) == 5
        assert (cache.record()["decoded"], cache.record()["from_cache"]) == (2, 2)

    def test_changed_content_of_the_same_size_and_time_is_noticed(self, root: Path, decodes: list[bytes]) -> None:
        use(root)
        path, before = files(root)[4], files(root)[4].stat()
        while path.stat().st_ctime_ns == before.st_ctime_ns:
            draw(path, 99)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        after = path.stat()
        assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
        decodes.clear()
        require(use(root), files(root))
        assert decodes == [path.read_bytes()]

    def test_replaced_file_of_the_same_size_and_time_is_noticed(self, root: Path, decodes: list[bytes]) -> None:
        path, before = files(root)[4], files(root)[4].stat()
        use(root)
        other = draw(root.parent / "other.bmp", 99)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        time.sleep(0.02)
        other.replace(path)
        decodes.clear()
        require(use(root), files(root))
        assert len(decodes) == 1

    def test_link_to_another_file_is_noticed(self, root: Path) -> None:
        link = root / "link.bmp"
        link.symlink_to(files(root)[0])
        use(root)
        link.unlink()
        link.symlink_to(draw(root.parent / "other.bmp", 99))
        require(use(root), [link])

    def test_touched_file_is_decoded_again(self, root: Path, decodes: list[bytes]) -> None:
        before = inputs(use(root), files(root))
        os.utime(files(root)[2], ns=(1, 1))
        decodes.clear()
        cache = use(root)
        assert len(decodes) == 1
        assert torch.equal(inputs(cache, files(root)), before)
        assert len(use(root).record()["left_out"]) == len(decodes) - 1 == 0

    def test_deleted_file_is_left_out_until_it_is_back(self, root: Path, decodes: list[bytes]) -> None:
        paths = files(root)
        use(root)
        content = paths[3].read_bytes()
        paths[3].unlink()
        gone = use(root, paths)
        assert [gone.usable(path) for path in paths] == [index != 3 for index in range(10)]
        assert gone.record() | {"cache": ""} == {
            "decoded": 0,
            "from_cache": 9,
            "left_out": {str(paths[3]): "No such file or directory"},
            "suspicious": {},
            "cache": "",
        }
        decodes.clear()
        paths[3].write_bytes(content)
        back = use(root, paths)
        assert back.usable(paths[3])
        require(back, paths)
        assert decodes == [content]

    def test_added_and_renamed_files(self, root: Path, decodes: list[bytes]) -> None:
        use(root)
        decodes.clear()
        draw(root / "added.bmp", 50)
        (root / "0.bmp").rename(root / "renamed.bmp")
        require(use(root), files(root))
        assert len(decodes) == 2

    @pytest.mark.parametrize(
        ("change", "shared"),
        [
            ({"size": 6}, False),
            ({"resize": 9}, False),
            ({"interpolation": "bicubic"}, False),
            ({"channels": 1, "mean": (0.0,), "std": (1.0,)}, False),
            ({"mean": (0.5,) * 3, "std": (0.1,) * 3}, True),
        ],
        ids=["size", "resize", "interpolation", "channels", "normalisation"],
    )
    def test_only_another_transform_decodes_anew(
        self, root: Path, decodes: list[bytes], change: dict[str, Any], shared: bool
    ) -> None:
        other = replace(TINY, **change)
        use(root)
        decodes.clear()
        cache = use(root, preprocess=other)
        assert (cache.folder == ImageCache(root, TINY).folder) == shared
        assert len(decodes) == (0 if shared else 10)
        mode = "RGB" if other.channels == 3 else "L"
        expected = [torchvisions(upright(path, mode), other) for path in files(root)]
        assert torch.equal(inputs(cache, files(root)), torch.stack(expected))
        require(use(root), files(root))

    def test_roots_of_the_same_name_are_told_apart_and_links_followed(self, root: Path, decodes: list[bytes]) -> None:
        copy = shutil.copytree(root, root.parent / "elsewhere" / root.name)
        (root.parent / "link").symlink_to(root)
        folders = [use(folder).folder for folder in (root, copy, root.parent / "link")]
        assert folders[0] == folders[2] != folders[1]
        assert len(decodes) == 20

    @pytest.mark.parametrize("name", ["a b\n.bmp", "ä é.bmp", os.fsdecode(b"\xff.bmp"), "\u2028.bmp"])
    def test_any_file_name(self, root: Path, decodes: list[bytes], name: str) -> None:
        draw(root / "0.bmp", 0).rename(root / name)
        use(root)
        require(use(root), files(root))
        assert len(decodes) == 10

    def test_cache_says_what_it_is_of(self, root: Path) -> None:
        about = json.loads((use(root).folder / "about.json").read_text())
        assert about["root"] == str(root)
        assert about["size"] == 8


class TestUnusable:
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the package's own
    @pytest.mark.parametrize("kind", UNUSABLE)
    def test_is_left_out_with_a_reason_and_named_once(
        self, root: Path, kind: str, caplog: pytest.LogCaptureFixture, decodes: list[bytes]
    ) -> None:
        make, reason = UNUSABLE[kind]
        bad = root / "bad.jpg"
        make(bad)
        if kind == "no permission" and os.access(bad, os.R_OK):
            pytest.skip("this user may read every file")
        paths = [*files(root)[:2], bad, *files(root)[2:4]]
        with caplog.at_level(logging.WARNING):
            cache = use(root, paths)
            found = [[cache.usable(path) for path in paths] for _ in range(3)]
        assert found == [[True, True, False, True, True]] * 3
        (text,) = cache.record()["left_out"].values()
        assert reason in text
        assert "\n" not in text
        (warning,) = caplog.messages
        assert warning == f"image {bad} is left out: {text}"
        decodes.clear()
        assert not use(root, paths).usable(bad)
        assert decodes == []

    def test_copies_of_others_are_left_out(self, root: Path) -> None:
        cache = use(root)
        shutil.copy(root / "0.bmp", root / "copy.bmp")
        (root / "link.bmp").symlink_to(root / "0.bmp")
        cache.prepare(files(root))
        others = cache.digests([root / "0.bmp"])
        assert [path.name for path in files(root) if not cache.usable(path, others)] == [
            "0.bmp",
            "copy.bmp",
            "link.bmp",
        ]
        assert all("same bytes" in reason for reason in cache.record()["left_out"].values())

    def test_trouble_in_reading_is_not_remembered(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(path: Path) -> bytes:
            raise OSError(EIO, os.strerror(EIO))

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", fail)
            assert not any(use(root).usable(path) for path in files(root))
        cache = use(root)
        assert all(cache.usable(path) for path in files(root))
        require(cache, files(root))


class TestDamage:
    """Whatever a crash or a copy that broke off leaves behind, the next job is right."""

    def test_index_cut_off_anywhere(self, root: Path, decodes: list[bytes]) -> None:
        paths = files(root)[:4]
        index = use(root, paths).folder / "index.jsonl"
        whole = index.read_bytes()
        for end in range(0, len(whole), 61):
            index.write_bytes(whole[:end])
            complete = sum(line.endswith(b"}") for line in whole[:end].split(b"\n"))
            decodes.clear()
            require(use(root, paths), paths)
            assert len(decodes) == 4 - complete
            use(root, paths)
            assert len(decodes) == 4 - complete

    def test_pixels_cut_off_anywhere(self, root: Path, decodes: list[bytes]) -> None:
        paths = files(root)[:4]
        folder = use(root, paths).folder
        index, pixels = (folder / name for name in ("index.jsonl", "pixels.u8"))
        whole = index.read_bytes(), pixels.read_bytes()
        for end in range(0, len(whole[1]), 48):
            index.write_bytes(whole[0])
            pixels.write_bytes(whole[1][:end])
            decodes.clear()
            require(use(root, paths), paths)
            assert len(decodes) == 4 - end // (8 * 8 * 3)

    def test_lost_pixels_are_not_taken_from_the_image_that_came_instead(self, root: Path, decodes: list[bytes]) -> None:
        paths = files(root)
        pixels = use(root, paths[:4]).folder / "pixels.u8"
        os.truncate(pixels, 2 * 8 * 8 * 3)
        use(root, paths[4:8])
        decodes.clear()
        require(use(root, paths[:8]), paths[:8])
        assert sorted(decodes) == sorted(path.read_bytes() for path in paths[2:4])

    @pytest.mark.parametrize("count", [1, 100, 192, 300])
    def test_bytes_of_a_killed_writer_do_no_harm(self, root: Path, decodes: list[bytes], count: int) -> None:
        paths = files(root)
        pixels = use(root, paths[:4]).folder / "pixels.u8"
        with pixels.open("ab") as file:
            file.write(b"x" * count)
        decodes.clear()
        require(use(root, paths[:4]), paths[:4])
        assert decodes == []
        require(use(root, paths), paths)
        assert len(decodes) == 6
        require(use(root, paths), paths)
        assert len(decodes) == 6

    @pytest.mark.parametrize(
        "line", [b"5", b"[]", b"null", b"{}", b"\xff\xfe", b"\0\0\0", b'{"path": "0.bmp", "row": 3}']
    )
    def test_nonsense_in_the_index_is_passed_over(self, root: Path, decodes: list[bytes], line: bytes) -> None:
        index = use(root).folder / "index.jsonl"
        index.write_bytes(line + b"\n" + index.read_bytes() + line)
        decodes.clear()
        require(use(root), files(root))
        assert decodes == []

    @pytest.mark.parametrize("lost", ["pixels.u8", "index.jsonl", "."])
    def test_lost_files_are_made_anew(self, root: Path, decodes: list[bytes], lost: str) -> None:
        path = use(root).folder / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        decodes.clear()
        require(use(root), files(root))
        assert len(decodes) == 10


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Make every write beyond this size of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def no_space(_: int) -> Iterator[None]:
    """Let the disk say only when it is asked to keep what was written that it is full."""

    def fail(_: int) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_cache.os, "fsync", fail)
        yield


class TestNoRoom:
    @pytest.mark.parametrize("limited", [file_size_limit, no_space])
    def test_full_disk_is_said_and_the_rest_decoded_later(self, root: Path, limited: Callable[[int], Any]) -> None:
        big = replace(TINY, size=200, resize=200)
        cache = ImageCache(root, big)
        with limited(500_000):
            text = refused(lambda: cache.prepare(files(root)))
        assert "PQ_SWEEP_CACHE" in text
        assert str(cache.folder) in text
        expected = torch.stack([torchvisions(upright(path), big) for path in files(root)])
        cache.prepare(files(root))
        for again in (cache, use(root, preprocess=big)):
            assert torch.equal(inputs(again, files(root)), expected)

    def test_file_in_the_way_of_the_cache(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PQ_SWEEP_CACHE", str(files(root)[0]))
        assert "PQ_SWEEP_CACHE" in refused(lambda: use(root))

    @pytest.mark.parametrize("when", ["before", "later"])
    def test_folder_that_cannot_be_written(
        self, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
    ) -> None:
        monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))
        folder = tmp_path
        if when == "later":
            folder = use(root, files(root)[:1]).folder
            (folder / "about.json").chmod(0o444)
        folder.chmod(0o555)
        try:
            if os.access(folder, os.W_OK):
                pytest.skip("this user may write everywhere")
            assert "PQ_SWEEP_CACHE" in refused(lambda: use(root))
        finally:
            folder.chmod(0o755)

    def test_place_without_writing(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PQ_SWEEP_CACHE", "/proc/here")
        assert "PQ_SWEEP_CACHE" in refused(lambda: use(root))

    @pytest.mark.parametrize(
        ("variables", "expected"),
        [
            ({"PQ_SWEEP_CACHE": "/big/disk"}, "/big/disk"),
            ({"PQ_SWEEP_CACHE": "~/here"}, "/home/ann/here"),
            ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/pq_sweep"),
            ({"PQ_SWEEP_CACHE": "", "XDG_CACHE_HOME": ""}, "/home/ann/.cache/pq_sweep"),
        ],
        ids=["own", "own with ~", "XDG", "empty"],
    )
    def test_place(self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
        for name in ("PQ_SWEEP_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"HOME": "/home/ann", **variables}.items():
            monkeypatch.setenv(name, value)
        assert cache_home() == Path(expected)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_writing(root: Path, place: str, calls: int, preprocess: Preprocess) -> None:
    """Fill a cache in chunks of three images and be killed at the n-th call of what fills it."""
    owner = os if place == "fsync" else image_cache
    real = getattr(owner, place)
    left = iter(range(calls))

    def deadly(*arguments: Any) -> Any:
        if next(left, None) is None:
            die()
        return real(*arguments)

    setattr(owner, place, deadly)
    image_cache.CHUNK = 3
    use(root, preprocess=preprocess)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the fork of a process with threads
@pytest.mark.parametrize("size", [8, 48])  # 48: rows longer than a write buffer
@pytest.mark.parametrize(
    ("place", "calls"),
    [("decode", 0), ("decode", 7), ("asdict", 0), ("asdict", 4), ("asdict", 8), ("fsync", 0), ("fsync", 2)],
)
def test_killed_writer_loses_at_most_a_chunk(
    root: Path, decodes: list[bytes], place: str, calls: int, size: int
) -> None:
    preprocess = replace(TINY, size=size, resize=size)
    child = multiprocessing.get_context("fork").Process(
        target=killed_while_writing, args=(root, place, calls, preprocess)
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    index = ImageCache(root, preprocess).folder / "index.jsonl"
    kept = sum(line.endswith("}") for line in index.read_text().splitlines()) if index.exists() else 0
    assert kept == {"decode": 6 if calls else 0, "asdict": calls // 3 * 3, "fsync": calls * 3}[place]
    cache = use(root, preprocess=preprocess)
    assert len(decodes) == 10 - kept
    expected = [torchvisions(upright(path), preprocess) for path in files(root)]
    assert torch.equal(inputs(cache, files(root)), torch.stack(expected))


def fill_together(roots: list[Path], turn: int, barrier: Any, found: Any) -> None:
    """Use each folder's images a few at a time, at once with another process; `turn` -1 turns every second round."""
    for number, root in enumerate(roots):
        barrier.wait(120)
        cache = ImageCache(root, TINY)
        paths = files(root)[:: turn**number]
        for start in range(0, len(paths), 4):
            cache.prepare(paths[start : start + 4])
            inputs(cache, paths[: start + 4])
        found.put((root.name, len(cache.decoded), inputs(cache, files(root)).numpy().tobytes()))


@pytest.mark.slow
def test_processes_that_fill_a_cache_at_once_decode_each_image_once(tmp_path: Path) -> None:
    """One goes from the first image to the last, the other from the last to the first, or the same way."""
    roots = [tmp_path / f"root{number}" for number in range(6)]
    for root in roots:
        for index in range(24):
            draw(root / f"{index:02}.png", index)
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    children = [context.Process(target=fill_together, args=(roots, turn, barrier, found)) for turn in (1, -1)]
    for child in children:
        child.start()
    answers = [found.get(timeout=120) for _ in range(2 * len(roots))]
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    for root in roots:
        cache = use(root)
        require(cache, files(root))
        assert cache.record()["decoded"] == 0
        mine = [(decoded, pixels) for name, decoded, pixels in answers if name == root.name]
        assert sum(decoded for decoded, _ in mine) == 24
        assert {pixels for _, pixels in mine} == {inputs(cache, files(root)).numpy().tobytes()}
        lines = (cache.folder / "index.jsonl").read_text().split()
        assert len([line for line in lines if '"path":' in line]) == 24
        assert (cache.folder / "pixels.u8").stat().st_size == 24 * 8 * 8 * 3


@pytest.mark.slow
def test_writer_killed_at_any_moment(root: Path, tmp_path: Path, decodes: list[bytes]) -> None:
    """Kill a process that decodes many images at moments that nobody chose."""
    for index in range(10, 400):
        draw(root / f"{index}.bmp", index)
    context = multiprocessing.get_context("fork")
    image_cache.CHUNK, chunk = 8, image_cache.CHUNK
    try:
        for moment in range(8):
            preprocess = replace(TINY, resize=9 + moment)
            child = context.Process(target=use, args=(root, None, preprocess))
            child.start()
            time.sleep(0.05 + 0.04 * moment)
            child.kill()
            child.join()
            decodes.clear()
            cache = use(root, preprocess=preprocess)
            lines = (cache.folder / "index.jsonl").read_text().splitlines()
            assert len({json.loads(line)["path"] for line in lines if line.endswith("}")}) == 400
            assert sum(line.endswith("}") for line in lines) == 400
            chosen = files(root)[::40]
            expected = [torchvisions(upright(path), preprocess) for path in chosen]
            assert torch.equal(inputs(cache, chosen), torch.stack(expected))
    finally:
        image_cache.CHUNK = chunk
