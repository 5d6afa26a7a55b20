"""Image files as inputs: what is found, what is left out, what takes its place, and a sweep over such a folder."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SHORT
from conftest import ROOT, TESTS, Launch, python, refused, results
from image_folders import (
    TINY,
    UNUSABLE,
    contents,
    draw,
    files,
    fill,
    labels_by_content,
    load,
    make_root,
    torchvisions,
    upright,
)
from PIL import Image

from pq_sweep.inputs import image_cache
from pq_sweep.inputs.image_cache import ImageCache
from pq_sweep.inputs.images import (
    Labelled,
    find_flat_images,
    find_images,
    first_readable,
    lazy_split_of,
    readable,
    split_of,
)
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Preprocess, Split

COUNTS = {"cat": 6, "dog": 6}


def spoil(path: Path) -> Path:
    """Make an image unreadable."""
    path.write_bytes(b"no image")
    return path


class TestFind:
    def test_class_folders(self, tmp_path: Path) -> None:
        fill(tmp_path, {"dog": 2, "cat": 1, ".cache": 3})
        draw(tmp_path / "cat" / "night" / "deep.PNG", 77)
        draw(tmp_path / "cat" / ".hidden.png", 78)
        draw(tmp_path / "stray.png", 79)
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        images, classes = find_images(tmp_path)
        assert classes == ("cat", "dog")
        found = [(str(path.relative_to(tmp_path)), label) for path, label in images]
        assert found == [("cat/000.JPEG", 0), ("cat/night/deep.PNG", 0), ("dog/000.JPEG", 1), ("dog/001.png", 1)]

    def test_links_to_class_folders_are_followed(self, tmp_path: Path) -> None:
        fill(tmp_path / "elsewhere", COUNTS)
        (tmp_path / "root").mkdir()
        for name in COUNTS:
            (tmp_path / "root" / name).symlink_to(tmp_path / "elsewhere" / name)
        images, classes = find_images(tmp_path / "root")
        assert len(images) == 12
        assert classes == ("cat", "dog")

    @pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".TIFF"])
    def test_kinds(self, tmp_path: Path, suffix: str) -> None:
        path = draw(tmp_path / "cat" / f"one{suffix}", 0)
        assert find_images(tmp_path) == ([(path, 0)], ("cat",))

    def test_folder_without_images_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        assert str(tmp_path) in refused(lambda: find_images(tmp_path))

    def test_class_folders_without_images_are_named(self, tmp_path: Path) -> None:
        fill(tmp_path, COUNTS)
        for name in ("hollow", "void"):
            (tmp_path / name).mkdir()
        assert "hollow, void" in refused(lambda: find_images(tmp_path))

    def test_flat_files(self, tmp_path: Path) -> None:
        for index, name in enumerate(["n02_dog_2.jpg", "n01_cat.JPEG", "n02_dog_1.png", ".n03_x.png", "alone.png"]):
            draw(tmp_path / name, index)
        (tmp_path / "README.md").write_text("no image")
        images, classes = find_flat_images(tmp_path)
        assert classes == ("alone.png", "n01", "n02")
        found = [(path.name, label) for path, label in images]
        assert found == [("alone.png", 0), ("n01_cat.JPEG", 1), ("n02_dog_1.png", 2), ("n02_dog_2.jpg", 2)]


class TestReadable:
    @pytest.fixture
    def cache(self, tmp_path: Path) -> ImageCache:
        return ImageCache(fill(tmp_path, {"cat": 12}), TINY)

    def test_keeps_the_order(self, cache: ImageCache) -> None:
        images = find_images(cache.root)[0][::-1]
        spoil(images[4][0])
        assert readable(cache, images) == images[:4] + images[5:]

    @pytest.mark.parametrize("count", [0, 1, 5, 10, 12])
    def test_first_readable_takes_the_next_and_decodes_no_more(self, cache: ImageCache, count: int) -> None:
        images = find_images(cache.root)[0]
        for index in (0, 3):
            spoil(images[index][0])
        usable = [image for index, image in enumerate(images) if index not in (0, 3)]
        assert first_readable(cache, images, count) == usable[:count]
        assert len(cache.decoded) == {0: 0, 1: 2, 5: 7, 10: 12, 12: 12}[count]

    def test_first_readable_passes_over_copies(self, cache: ImageCache) -> None:
        images = find_images(cache.root)[0]
        cache.prepare([images[1][0]])
        found = first_readable(cache, images, 3, cache.digests([images[1][0]]))
        assert found == [images[0], *images[2:4]]

    def test_names_go_with_the_images(self, cache: ImageCache) -> None:
        split = split_of(cache, readable(cache, find_images(cache.root)[0]))
        assert split.names is not None
        assert split.names[0] == "cat/000.JPEG"
        part = split.subset([7, 2, 5]).take(2, 1)
        assert part.names == (split.names[2], split.names[5])
        expected = torch.stack([torchvisions(upright(cache.root / name), TINY) for name in part.names])
        assert torch.equal(part.fetch([0, 1]), expected)


class TestStandIns:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return fill(tmp_path, COUNTS)

    def split(self, root: Path, others: frozenset[str] = frozenset()) -> tuple[ImageCache, Split]:
        cache = ImageCache(root, TINY)
        return cache, lazy_split_of(cache, find_images(root)[0], others)

    def expected(self, *paths: Path) -> torch.Tensor:
        return torch.stack([torchvisions(upright(path), TINY) for path in paths])

    def test_nothing_is_decoded_before_it_is_fetched(self, root: Path) -> None:
        cache, split = self.split(root)
        assert len(split) == 12
        assert not cache.decoded
        assert torch.equal(split.fetch([3, 3, 9]), self.expected(files(root)[3], files(root)[3], files(root)[9]))
        assert len(cache.decoded) == 2

    @pytest.mark.parametrize(
        ("bad", "index", "stand_in"),
        [([1], 1, 2), ([1, 2], 1, 3), ([5], 5, 0), ([0, 1, 2, 3, 4], 2, 5), ([11], 11, 6), ([6, 11], 11, 7)],
    )
    def test_next_of_the_class_stands_in(self, root: Path, bad: list[int], index: int, stand_in: int) -> None:
        paths = files(root)
        for position in bad:
            spoil(paths[position])
        cache, split = self.split(root)
        assert torch.equal(split.fetch([index]), self.expected(paths[stand_in]))
        assert split.labels.tolist() == [0] * 6 + [1] * 6
        assert str(paths[index]) in cache.record()["left_out"]

    def test_evaluation_images_are_not_trained_on(self, root: Path) -> None:
        cache, _ = self.split(root)
        cache.prepare(files(root)[:1])
        _, split = self.split(root, cache.digests(files(root)[:1]))
        assert torch.equal(split.fetch([0]), self.expected(files(root)[1]))

    def test_file_that_vanishes_while_it_is_trained_on(self, root: Path) -> None:
        paths = files(root)
        _, split = self.split(root)
        before = split.fetch(list(range(12)))
        paths[2].unlink()
        assert torch.equal(split.fetch([2, 4]), before[[3, 4]])

    def test_class_without_usable_images_is_refused(self, root: Path) -> None:
        for path in files(root / "dog"):
            spoil(path)
        _, split = self.split(root)
        assert len(split.fetch([0])) == 1
        assert str(root / "dog") in refused(lambda: split.fetch([0, 7]))


def touch(path: Path) -> None:
    """Give a file another time of modification."""
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


class TestIdentity:
    """Of splits of files that are decoded, and of those that are not until they are fetched."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        return fill(tmp_path / "root", COUNTS)

    def split(self, root: Path, preprocess: Preprocess = TINY, images: Labelled | None = None) -> Split:
        cache = ImageCache(root, preprocess)
        return split_of(cache, readable(cache, images or find_images(root)[0]))

    def lazy(self, root: Path, preprocess: Preprocess = TINY, others: frozenset[str] = frozenset()) -> Split:
        return lazy_split_of(ImageCache(root, preprocess), find_images(root)[0], others)

    def test_no_image_is_fetched(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        split, cache = self.split(root), ImageCache(root, TINY)
        monkeypatch.delattr(ImageCache, "pixels")
        assert len(split.identity()) == 64
        assert len(lazy_split_of(cache, find_images(root)[0], frozenset()).identity()) == 64
        assert not cache.decoded

    def test_same_images_elsewhere_are_the_same(self, root: Path, tmp_path: Path) -> None:
        shutil.copytree(root, tmp_path / "copy")
        assert self.split(root).identity() == self.split(root).identity() == self.split(tmp_path / "copy").identity()

    def test_content_changes_it(self, root: Path) -> None:
        before = self.split(root)
        image = np.asarray(Image.open(files(root)[1])).copy()
        image[0, 0, 0] ^= 1
        Image.fromarray(image).save(files(root)[1])
        after = self.split(root)
        assert before.identity() != after.identity()
        assert before.subset([0, 2, 11]).identity() == after.subset([0, 2, 11]).identity()

    def test_order_and_labels_change_it(self, root: Path) -> None:
        images = find_images(root)[0]
        others = [images[::-1], images[:-1], [(path, 1 - label) for path, label in images]]
        found = {self.split(root, images=chosen).identity() for chosen in (images, *others)}
        assert len(found) == 4

    @pytest.mark.parametrize("make", ["split", "lazy"])
    @pytest.mark.parametrize(
        "option",
        [
            {"size": 6},
            {"resize": 9},
            {"channels": 1, "mean": (0.0,), "std": (1.0,)},
            {"interpolation": "bicubic"},
            {"mean": (0.0, 0.0, 0.1)},
            {"std": (1.0, 1.0, 0.9)},
        ],
        ids=lambda option: next(iter(option)),
    )
    def test_preprocessing_changes_it(self, root: Path, make: str, option: dict[str, Any]) -> None:
        of = getattr(self, make)
        assert of(root).identity() != of(root, replace(TINY, **option)).identity()

    @pytest.mark.parametrize("make", ["split", "lazy"])
    def test_another_pillow_changes_it(self, root: Path, make: str, monkeypatch: pytest.MonkeyPatch) -> None:
        before = getattr(self, make)(root).identity()
        monkeypatch.setattr(image_cache.PIL, "__version__", "0.1")
        assert getattr(self, make)(root).identity() != before

    @pytest.mark.parametrize("make", ["split", "lazy"])
    def test_a_subset_is_what_it_contains(self, root: Path, make: str) -> None:
        whole = getattr(self, make)(root)
        part = whole.subset([7, 2, 5, 2])
        assert part.identity() == whole.take(9, 1).subset([6, 1, 4, 1]).identity()
        assert part.identity() != whole.subset([2, 7, 5, 2]).identity()
        assert whole.take(12).identity() == whole.identity()

    def test_subset_of_files_is_that_of_the_same_files_alone(self, root: Path) -> None:
        images = find_images(root)[0]
        assert self.split(root).take(4, 2).identity() == self.split(root, images=images[2:6]).identity()

    @pytest.mark.parametrize(
        "change",
        [lambda path: draw(path, 99), touch, lambda path: path.rename(path.with_name("other.png"))],
        ids=["content", "time", "name"],
    )
    def test_files_that_are_not_decoded(self, root: Path, change: Callable[[Path], object]) -> None:
        before = self.lazy(root).identity()
        assert self.lazy(root).identity() == before
        change(files(root)[3])
        assert self.lazy(root).identity() != before

    def test_decoding_and_fetching_change_nothing(self, root: Path) -> None:
        split = self.lazy(root)
        before = split.identity()
        split.fetch(list(range(12)))
        assert split.identity() == before == self.lazy(root).identity()

    def test_images_not_to_be_trained_on_change_it(self, root: Path) -> None:
        assert self.lazy(root).identity() != self.lazy(root, TINY, frozenset({"a"})).identity()

    @pytest.mark.slow
    def test_another_process_finds_the_same(self, root: Path, environment: dict[str, str]) -> None:
        code = f"""
from pathlib import Path
from image_folders import TINY
from test_images import TestIdentity
print(TestIdentity().split(Path({str(root)!r})).identity(), TestIdentity().lazy(Path({str(root)!r})).identity())
"""
        here = os.pathsep.join(map(str, (ROOT, TESTS, Path(__file__).parent)))
        done = python(["-c", code], root, environment | {"PYTHONPATH": here})
        assert done.stdout.split() == [self.split(root).identity(), self.lazy(root).identity()], done.stderr


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
class TestUnusableImages:
    @pytest.mark.parametrize("layout", ["flat", "train_and_val"])
    @pytest.mark.parametrize("kind", [*UNUSABLE])
    def test_one_of_each_kind_is_left_out(
        self, tmp_path: Path, kind: str, layout: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        root = make_root(tmp_path, layout, COUNTS)
        truth = labels_by_content(root, ("cat", "dog"))
        bad = (root / "val" if layout == "train_and_val" else root) / "cat" / "0025.jpg"
        UNUSABLE[kind][0](bad)
        if kind == "no permission" and os.access(bad, os.R_OK):
            pytest.skip("this user may read every file")
        with caplog.at_level(logging.WARNING):
            data = load(root, calibration=4)
        record = data.record()
        assert list(record["left_out"]) == [str(bad)]
        assert UNUSABLE[kind][1] in record["left_out"][str(bad)]
        assert [message for message in caplog.messages if str(bad) in message] == caplog.messages
        assert len(caplog.messages) == 1
        assert len(data.calibration) == 4
        assert len(data.evaluation) == (8 if layout == "flat" else 12)
        for split in (data.evaluation, data.calibration):
            assert [truth[image] for image in contents(split)] == split.labels.tolist()

    @pytest.mark.parametrize("shape", [(20_000, 1), (20_000, 8)])
    def test_long_image_of_a_small_model_is_used(self, tmp_path: Path, shape: tuple[int, int]) -> None:
        root = fill(tmp_path, COUNTS)
        draw(root / "cat" / "long.png", 5, shape)
        data = load(root)
        assert data.record()["left_out"] == {}
        truth = labels_by_content(root, ("cat", "dog"))
        assert [truth[image] for image in contents(data.evaluation)] == data.evaluation.labels.tolist()

    @pytest.mark.parametrize("layout", ["flat", "train_and_val"])
    def test_calibration_takes_the_next_of_its_order(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, {"cat": 20, "dog": 20})
        before = load(root, calibration=10)
        pool = root / "train" if layout == "train_and_val" else root
        first = set(contents(before.calibration)[:3])
        for path in files(pool):
            if torchvisions(upright(path), TINY).numpy().tobytes() in first:
                spoil(path)
        after = load(root, calibration=10)
        assert contents(after.calibration)[:7] == contents(before.calibration)[3:]
        assert len(after.calibration) == 10
        assert len(after.record()["left_out"]) == 3
        assert abs(int(after.calibration.labels.sum()) - 5) <= 2
        assert not set(contents(after.calibration)) & set(contents(after.evaluation))

    @pytest.mark.parametrize("layout", ["flat", "val", "train_and_val"])
    def test_evaluation_keeps_its_number(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, {"cat": 20, "dog": 20})
        before = load(root, calibration=4, evaluation=12)
        assert before.evaluation.names is not None
        bad = spoil(root / before.evaluation.names[5])
        after = load(root, calibration=4, evaluation=12)
        assert after.evaluation.names is not None
        assert len(after.evaluation) == len(before.evaluation) == 12
        assert {root / name for name in before.evaluation.names} - {root / name for name in after.evaluation.names} == {
            bad
        }

    def test_training_takes_a_stand_in(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "train_and_val", COUNTS)
        bad = spoil(files(root / "train" / "cat")[2])
        data = load(root)
        train = data.training()
        truth = {
            image: label
            for path in files(root / "train")
            if path != bad
            for image, label in [(torchvisions(upright(path), TINY).numpy().tobytes(), int(path.parent.name == "dog"))]
        }
        found = contents(train)
        assert len(found) == len(train) == 12
        assert [truth[image] for image in found] == train.labels.tolist()
        assert sorted(Counter(found).values()) == [1] * 10 + [2]
        assert str(bad) in data.record()["left_out"]

    @pytest.mark.parametrize("calibration", [0, 2])
    @pytest.mark.parametrize("layout", ["flat", "val", "train_and_val"])
    def test_nothing_to_evaluate_is_refused(self, tmp_path: Path, layout: str, calibration: int) -> None:
        root = make_root(tmp_path, layout, COUNTS)
        for path in files(root / "val" if layout != "flat" else root):
            spoil(path)
        assert str(root) in refused(lambda: load(root, calibration=calibration))

    def test_nothing_to_calibrate_with_is_refused(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "train_and_val", COUNTS)
        for path in files(root / "train"):
            spoil(path)
        assert "dataset.calibration=4" in refused(lambda: load(root, calibration=4))
        assert len(load(root, calibration=0).evaluation) == 12


@pytest.mark.slow
class TestSweep:
    """Two sweeps of two jobs over a small folder of which two files are no images."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        root = fill(tmp_path / "digits", {"3": 12, "7": 12})
        for name in ("3/0025.jpg", "7/0005.png"):
            spoil(root / name)
        return root

    def test_left_out_images_are_told_and_nothing_is_decoded_twice(
        self, tmp_path: Path, root: Path, launch: Launch
    ) -> None:
        env = {"PQ_SWEEP_CACHE": str(tmp_path / "cache")}
        sweeps = [tmp_path / name for name in ("first", "second")]
        for sweep in sweeps:
            done = launch(
                *("-m", "pruner=none,l1", "dataset=image_folder", f"dataset.root={root}", "dataset.calibration=4"),
                *("tracking=none", *SHORT, f"hydra.sweep.dir={sweep}"),
                env=env,
            )
            assert done.returncode == 0, done.stderr
            assert "2 images of image_folder were left out" in done.stdout
            self.require_consistent(sweep, root)
        first, second = (results(sweep) for sweep in sweeps)
        assert [job["images"]["decoded"] for job in first + second] == [26, 0, 0, 0]
        assert [job["images"]["from_cache"] for job in first + second] == [0, 26, 26, 26]
        assert [job["accuracy"] for job in first] == [job["accuracy"] for job in second]
        for job in ("0", "1"):
            found = [(sweep / job / "predictions.npy").read_bytes() for sweep in sweeps]
            assert found[0] == found[1]
        assert str(tmp_path / "cache") in first[0]["images"]["cache"]

    def require_consistent(self, sweep: Path, root: Path) -> None:
        """Check what each job says of its images, and its predictions against those of torch alone."""
        for index, job in enumerate(results(sweep)):
            assert job["images"]["evaluation"] == 20
            assert job["images"]["calibration"] == 4
            assert job["images"]["train"] == 0
            assert set(job["images"]["left_out"]) == {str(root / "3/0025.jpg"), str(root / "7/0005.png")}
            assert (sweep / str(index) / "job.log").read_text().count("is left out") == 2
        (table,) = sweep.glob("baseline/*/images.csv")
        with table.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["class"] for row in rows] == [row["image"].split("/")[0] for row in rows]
        assert len({row["image"] for row in rows}) == 20
        model = digits_cnn()
        images = [torchvisions(upright(root / row["image"], "L"), model.preprocess) for row in rows]
        with torch.no_grad():
            answers = model.module(torch.stack(images))[:, [3, 7]].argmax(1)
        assert [row["baseline"] for row in rows] == [("3", "7")[answer] for answer in answers]
        for predictions in (table.with_name("predictions.npy"), sweep / "0" / "predictions.npy"):
            assert np.load(predictions).tolist() == answers.tolist()

    def test_folder_of_which_nothing_can_be_used(self, root: Path, launch: Launch) -> None:
        for path in files(root):
            spoil(path)
        done = launch("dataset=image_folder", f"dataset.root={root}", "dataset.calibration=0", "tracking=none", *SHORT)
        assert done.returncode == 1
        assert f"{root} has no usable image to evaluate" in done.stdout + done.stderr
        assert "Traceback (most recent" not in done.stdout + done.stderr

    def test_cache_that_cannot_be_written(self, tmp_path: Path, root: Path, launch: Launch) -> None:
        (tmp_path / "cache").write_text("in the way")
        done = launch(
            *("dataset=image_folder", f"dataset.root={root}", "tracking=none", *SHORT),
            env={"PQ_SWEEP_CACHE": str(tmp_path / "cache")},
        )
        assert done.returncode == 1
        assert "set PQ_SWEEP_CACHE to a folder" in done.stdout + done.stderr
        assert "Traceback (most recent" not in done.stdout + done.stderr
