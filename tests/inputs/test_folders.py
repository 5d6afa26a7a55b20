"""Folders: splits are told from classes, links are followed as by torchvision, and what is not used is said."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SHORT
from conftest import Launch, refused, results
from image_folders import black_png, contents, draw, fill, load, model_of
from tiff_files import tiff

from pq_sweep.inputs.datasets import imagenet, imagenet_sample, imagenette, imagewoof
from pq_sweep.inputs.folders import EXTENSIONS, Splits, find_splits
from pq_sweep.inputs.images import find_images
from pq_sweep.types import Data

PETS = {"cat": 3, "dog": 3}


def make(root: Path, *splits: str, counts: dict[str, int] = PETS) -> Path:
    """Make splits of class folders, of which no two have an image in common."""
    for number, split in enumerate(splits):
        fill(root / split, counts, seed=100_000 * number)
    return root


def pictures(root: Path, *names: str) -> Path:
    """Make folders that hold images themselves."""
    for number, name in enumerate(names):
        for index in range(3):
            draw(root / name / f"{index}.png", 1000 * number + index)
    return root


def relative(root: Path) -> list[tuple[str, int]]:
    """Return the images that are found, and their labels."""
    return [(str(path.relative_to(root)), label) for path, label in find_images(root)[0]]


class TestSplits:
    @pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "test", "Val", "TEST", "Validation", "eval"])
    @pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
    def test_train_beside_another(self, tmp_path: Path, train: str, name: str) -> None:
        data = load(make(tmp_path, train, name))
        assert data.classes == ("cat", "dog")
        assert len(data.training()) == len(data.evaluation) == 6
        assert {path.split("/")[0] for path in data.evaluation.names or ()} == {name}
        assert {path.split("/")[0] for path in data.calibration.names or ()} == {train}
        assert data.notes == ()

    @pytest.mark.parametrize("name", ["val", "validation", "valid", "dev", "test", "Test"])
    def test_one_without_train_is_divided(self, tmp_path: Path, name: str) -> None:
        data = load(make(tmp_path, name), calibration=2)
        assert data.classes == ("cat", "dog")
        assert data.train is None
        assert (len(data.evaluation), len(data.calibration)) == (4, 2)

    @pytest.mark.parametrize(
        ("names", "taken"),
        [
            (("val", "test"), "val"),
            (("test", "validation"), "validation"),
            (("valid", "Validation"), "Validation"),
            (("dev", "valid"), "valid"),
            (("test", "dev"), "dev"),
            (("test", "valid", "validation", "dev", "VAL"), "VAL"),
        ],
    )
    @pytest.mark.parametrize("train", [("train",), ()])
    def test_first_of_several_is_taken_and_the_others_said(
        self,
        tmp_path: Path,
        names: tuple[str, ...],
        taken: str,
        train: tuple[str, ...],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        data = load(make(tmp_path, *train, *names))
        assert {path.split("/")[0] for path in data.evaluation.names or ()} == {taken}
        (note,) = data.notes
        unused = ", ".join(f"{name}/" for name in sorted(set(names) - {taken}))
        assert note == f"not used: {unused} of {tmp_path}, as {taken}/ is evaluated."
        assert caplog.messages == [note]

    def test_second_folder_to_train_on_is_said(self, tmp_path: Path) -> None:
        data = load(make(tmp_path, "train", "training", "val"))
        assert {path.split("/")[0] for path in data.calibration.names or ()} == {"train"}
        assert data.notes == (f"not used: training/ of {tmp_path}, as val/ is evaluated.",)

    def test_train_alone_is_refused_and_may_be_named_itself(self, tmp_path: Path) -> None:
        root = make(tmp_path, "train")
        text = refused(lambda: load(root))
        assert "train/ alone" in text
        assert f"dataset.root={root / 'train'}" in text
        assert len(load(root / "train", calibration=2).evaluation) == 4

    def test_picture_of_a_train_is_a_class(self, tmp_path: Path) -> None:
        data = load(pictures(tmp_path, "train", "bus", "test"), 3, calibration=0)
        assert data.classes == ("bus", "test", "train")
        assert len(data.evaluation) == 9

    def test_picture_of_a_train_with_folders_of_its_own(self, tmp_path: Path) -> None:
        pictures(tmp_path, "train", "bus")
        draw(tmp_path / "train" / "steam" / "9.png", 9)
        data = load(tmp_path, calibration=0)
        assert data.classes == ("bus", "train")
        assert data.evaluation.labels.tolist().count(1) == 4

    @pytest.mark.parametrize("names", [("train", "test"), ("train",), ("test",), ("train", "val", "test"), ("Valid",)])
    def test_splits_of_images_without_classes_are_refused(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        """As in competitions, where the class is in the file's name and that of test images unknown."""
        text = refused(lambda: load(pictures(tmp_path, *names)))
        assert "one sub-folder per class" in text
        assert all(f"{name}/" in text for name in names)

    def test_images_to_train_on_without_classes_are_refused(self, tmp_path: Path) -> None:
        text = refused(lambda: load(pictures(make(tmp_path, "val"), "train")))
        assert text.startswith(f"images in train/ of {tmp_path} lie in no class folder")

    def test_test_images_without_classes_are_not_used_which_is_said(self, tmp_path: Path) -> None:
        """As in ILSVRC 2012."""
        data = load(pictures(make(tmp_path, "train", "val"), "test"))
        assert len(data.evaluation) == 6
        assert data.notes == (f"not used: test/ of {tmp_path}, as val/ is evaluated.",)

    @pytest.mark.parametrize("splits", [("train", "val"), ("train",), ("test",), ("train", "validation", "test")])
    def test_splits_beside_class_folders_are_refused(self, tmp_path: Path, splits: tuple[str, ...]) -> None:
        text = refused(lambda: load(pictures(make(tmp_path, *splits), "bird"), 3))
        assert "bird/" in text
        assert all(f"{split}/" in text for split in splits)

    def test_stray_images_in_both_splits_do_not_make_classes_of_them(self, tmp_path: Path) -> None:
        pictures(make(tmp_path, "train", "test"), "train", "test", "bird")
        assert "named as splits" in refused(lambda: load(tmp_path, 3))

    def test_stray_images_in_a_split_are_said(self, tmp_path: Path) -> None:
        data = load(pictures(make(tmp_path, "train", "val"), "val"))
        assert len(data.evaluation) == 6
        assert data.notes == (
            f"{tmp_path / 'val'} holds image files outside its class folders, which are not used: 3.",
        )

    @pytest.mark.parametrize("beside", ["annotations", "lists"])
    def test_other_folders_without_images_do_not_matter(self, tmp_path: Path, beside: str) -> None:
        root = make(tmp_path, "train", "validation")
        (root / beside).mkdir()
        (root / beside / "labels.txt").write_text("cat")
        assert len(load(root).training()) == 6

    @pytest.mark.parametrize("splits", [("train", "Train", "val"), ("train", "val", "VAL"), ("Test", "test")])
    def test_splits_that_differ_in_case_are_refused(self, tmp_path: Path, splits: tuple[str, ...]) -> None:
        assert "keep the one that is meant" in refused(lambda: load(make(tmp_path, *splits)))

    def test_different_classes_are_named_by_their_folders(self, tmp_path: Path) -> None:
        make(tmp_path, "train")
        make(tmp_path, "validation", counts={"cat": 2, "owl": 2})
        text = refused(lambda: load(tmp_path))
        assert text == (
            f"{tmp_path}/train and {tmp_path}/validation do not have the same class folders; only one has dog, owl, so"
            " add what the other lacks, or give the folder to evaluate as dataset.root."
        )

    def test_different_classes_are_not_all_named_if_they_are_many(self, tmp_path: Path) -> None:
        """As in Tiny ImageNet, where val/ has all its images in one folder."""
        make(tmp_path, "train", counts={f"n{number}": 1 for number in range(9)})
        make(tmp_path, "val", counts={"images": 9})
        assert "only one has images, n0, n1, n2, n3 and 5 more, so" in refused(lambda: load(tmp_path, 9))

    def test_a_root_without_images_is_told_with_what_it_has(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        assert refused(lambda: load(tmp_path)).startswith(f"{tmp_path} holds no images; expected one sub-folder per")
        (tmp_path / "cat" / "0.heic").write_bytes(b"x")
        assert f"{tmp_path} holds no images, but cat/0.heic; expected" in refused(lambda: load(tmp_path))
        pictures(tmp_path, "cat")
        sentence = f"{tmp_path}/cat holds images such as 0.png and no class folders with any; put them into one sub-fol"
        assert refused(lambda: load(tmp_path / "cat")).startswith(sentence)

    def test_calibration_counts_usable_images(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        (tmp_path / "cat" / "0.png").write_text("none")
        assert f"{tmp_path} has 0 usable images to take it from; see the warnings" in refused(lambda: load(tmp_path, 1))

    def test_empty_split_is_none(self, tmp_path: Path) -> None:
        (make(tmp_path, "test") / "train" / "cat").mkdir(parents=True)
        assert find_splits(tmp_path) == Splits(tmp_path / "test")

    def test_hidden_splits_are_none(self, tmp_path: Path) -> None:
        assert find_splits(fill(make(tmp_path, ".train"), PETS)) == Splits(tmp_path)

    @pytest.mark.parametrize(
        ("dataset", "options"),
        [(imagenet, {}), (imagenet_sample, {}), (imagenette, {"size": 160}), (imagewoof, {"size": 160})],
    )
    def test_of_imagenet(self, tmp_path: Path, dataset: Callable[..., Data], options: dict[str, Any]) -> None:
        make(tmp_path, "train", "validation", "test", counts={"n01440764": 2, "n02102040": 2})
        options |= {"root": str(tmp_path), "calibration": 1, "evaluation": None, "seed": 0}
        data = dataset(model_of(1000), **options)
        assert data.classes == ("n01440764", "n02102040")
        assert {name.split("/")[0] for name in data.evaluation.names or ()} == {"validation"}
        assert data.notes == (f"not used: test/ of {tmp_path}, as validation/ is evaluated.",)


@pytest.mark.slow
def test_a_job_says_what_it_did_with_the_folders(tmp_path: Path, launch: Launch) -> None:
    """Digits as 32-bit TIFF in three splits, one of them a link: the right ones are measured, and the rest is said."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for index in range(300):
        split = ("train", "Validation", "test")[index % 3]
        folder = tmp_path / ("store" if split == "Validation" else f"root/{split}") / str(digits.target[index])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index}.tif").write_bytes(tiff(np.round(digits.images[index] * 255 / 16).astype("<i4")))
    (tmp_path / "root" / "Validation").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "0" / "black.png").write_bytes(black_png(8, 8))
    done = launch(
        *("dataset=image_folder", f"dataset.root={tmp_path / 'root'}", "dataset.calibration=10", "tracking=none"),
        *(*SHORT, f"hydra.run.dir={tmp_path / 'sweep'}"),
        env={"PQ_SWEEP_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    (result,) = results(tmp_path / "sweep")
    assert result["accuracy"]["samples"] == 101
    assert result["accuracy"]["top1"] > 0.9
    assert [len(result["notes"]), list(result["images"]["suspicious"])] == [
        *(2, [str(tmp_path / "root" / "Validation" / "0" / "black.png")])
    ]
    for note in result["notes"]:
        assert note[:20] in done.stdout
    with (tmp_path / "sweep" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["images_suspicious"] == "1"
    assert "not used: test/" in row["notes"]


class TestClassesThatMayBeSplits:
    @pytest.mark.parametrize("inner", [("train", "test"), ("Train", "val"), ("training", "validation", "test")])
    def test_splits_within_classes_are_refused(self, tmp_path: Path, inner: tuple[str, ...]) -> None:
        for number, name in enumerate(PETS):
            fill(tmp_path / name, dict.fromkeys(inner, 2), seed=number * 100_000)
        text = refused(lambda: load(tmp_path))
        assert f"{tmp_path / 'cat'} should be a class folder" in text

    def test_folder_above_the_splits_is_refused(self, tmp_path: Path) -> None:
        make(tmp_path / "pets", "train", "val")
        text = refused(lambda: load(tmp_path, 1))
        assert f"{tmp_path / 'pets'} should be a class folder and holds train/ and val/" in text

    @pytest.mark.parametrize("names", [("train_set", "val_set"), ("pets-test", "pets-train"), ("Train2017", "val2017")])
    def test_splits_by_other_names_are_refused(self, tmp_path: Path, names: tuple[str, ...]) -> None:
        text = refused(lambda: load(make(tmp_path, *names)))
        assert text.startswith(f"{', '.join(names)} in {tmp_path} hold sub-folders and are called like splits")

    def test_splits_with_unlike_folders_are_refused(self, tmp_path: Path) -> None:
        fill(tmp_path / "train_set", {"cat": 2, "dog": 2, "cow": 2})
        fill(tmp_path / "test_set", {"cat": 2, "dog": 2}, seed=100_000)
        assert "are called like splits" in refused(lambda: load(tmp_path))

    def test_splits_in_folders_of_their_own_names_are_refused(self, tmp_path: Path) -> None:
        for number, name in enumerate(("training_set", "test_set")):
            fill(tmp_path / name / name, PETS, seed=number * 100_000)
        assert "are called like splits" in refused(lambda: load(tmp_path))

    def test_trains_by_other_names_are_classes(self, tmp_path: Path) -> None:
        assert load(pictures(tmp_path, "bullet_train", "bus")).classes == ("bullet_train", "bus")

    def test_trains_by_day_and_night_are_a_class(self, tmp_path: Path) -> None:
        for number, name in enumerate(("bullet_train", "bus")):
            fill(tmp_path / name, {"day": 2, "night": 2}, seed=number * 100_000)
        data = load(tmp_path, calibration=0)
        assert data.classes == ("bullet_train", "bus")
        assert len(data.evaluation) == 8

    def test_splits_of_unknown_names_are_said(self, tmp_path: Path) -> None:
        data = load(make(tmp_path, "fold1", "fold2"))
        assert data.classes == ("fold1", "fold2")
        (note,) = data.notes
        assert note.startswith(f"all class folders of {tmp_path} hold the same sub-folders (cat, dog)")

    def test_classes_of_which_one_has_such_a_folder_are_not(self, tmp_path: Path) -> None:
        fill(tmp_path, PETS)
        draw(tmp_path / "cat" / "day" / "1.png", 7)
        draw(tmp_path / "dog" / "day" / "1.png", 8)
        assert load(tmp_path).notes == ()

    def test_classes_that_differ_in_case_are_two_and_said(self, tmp_path: Path) -> None:
        data = load(fill(tmp_path, {"Cat": 2, "cat": 2, "dog": 2}), 3, calibration=0)
        assert data.classes == ("Cat", "cat", "dog")
        assert data.notes == (f"the classes Cat and cat of {tmp_path} differ in upper and lower case alone.",)


class TestLinks:
    """What torchvision's ImageFolder finds is found, wherever links lead; it never ends where they lead in a circle."""

    def torchvisions(self, root: Path) -> list[tuple[str, int]]:
        from torchvision.datasets import ImageFolder

        return sorted((os.path.relpath(path, root), label) for path, label in ImageFolder(root).samples)

    def test_linked_folder_below_a_class(self, tmp_path: Path) -> None:
        make(tmp_path / "pets", "train", "validation")
        for number, name in enumerate(PETS):
            draw(tmp_path / "linked" / name / "own.png", 500 + number)
            (tmp_path / "linked" / name / "more").symlink_to(tmp_path / "pets" / "train" / name)
        assert sorted(relative(tmp_path / "linked")) == self.torchvisions(tmp_path / "linked")
        assert len(load(tmp_path / "linked", calibration=2).evaluation) == 6

    def test_links_of_every_kind(self, tmp_path: Path) -> None:
        store, root = fill(tmp_path / "store", {"a": 2, "b": 2, "c": 2}), tmp_path / "root"
        draw(store / "a" / "deep" / "er" / "x.png", 50)
        (root / "dog").mkdir(parents=True)
        (root / "cat").symlink_to(store / "a")  # a class
        (root / "dog" / "relative").symlink_to("../../store/b")
        (root / "dog" / "again").symlink_to(store / "b")  # by a second way
        (root / "dog" / "one.png").symlink_to(store / "c" / "001.png")
        (root / "dog" / "chain").symlink_to(tmp_path / "chain")
        (tmp_path / "chain").symlink_to(store / "c")
        (tmp_path / "link").symlink_to(root)  # the root
        assert sorted(relative(root)) == self.torchvisions(root)
        assert relative(tmp_path / "link") == relative(root)
        assert len(relative(root)) == 3 + 2 + 2 + 1 + 2

    @pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "../../../.."])
    def test_circles_end(self, tmp_path: Path, target: str) -> None:
        root = fill(tmp_path / "above" / "root", PETS)
        draw(root / "cat" / "deep" / "x.png", 60)
        (root / "cat" / "deep" / "loop").symlink_to(target)
        assert [name for name, _ in relative(root)] == [
            *("cat/000.JPEG", "cat/001.png", "cat/002.JPEG", "cat/deep/x.png"),
            *("dog/000.JPEG", "dog/001.png", "dog/002.JPEG"),
        ]

    def test_circle_outside_the_root(self, tmp_path: Path) -> None:
        fill(tmp_path / "store", {"cats": 2, "dogs": 2})
        (tmp_path / "store" / "cats" / "up").symlink_to(tmp_path / "store")
        (tmp_path / "root").mkdir()
        for name in ("cat", "dog"):
            (tmp_path / "root" / name).symlink_to(tmp_path / "store" / f"{name}s")
        assert [name for name, _ in relative(tmp_path / "root")] == [
            *("cat/000.JPEG", "cat/001.png", "dog/000.JPEG", "dog/001.png")
        ]

    def test_circle_behind_a_link(self, tmp_path: Path) -> None:
        fill(tmp_path / "store", {"cats": 2, "dogs": 2})
        (tmp_path / "store" / "cats" / "up").symlink_to(tmp_path / "store")
        draw(tmp_path / "root" / "cat" / "own.png", 80)
        (tmp_path / "root" / "cat" / "more").symlink_to(tmp_path / "store" / "cats")
        assert [name for name, _ in relative(tmp_path / "root")] == [
            *("cat/more/000.JPEG", "cat/more/001.png", "cat/own.png")
        ]

    def test_circle_of_two_classes(self, tmp_path: Path) -> None:
        root = fill(tmp_path, {"cat": 1, "dog": 1})
        (root / "cat" / "other").symlink_to(root / "dog")
        (root / "dog" / "other").symlink_to(root / "cat")
        assert [name for name, _ in relative(root)] == [
            *("cat/000.JPEG", "cat/other/000.JPEG", "dog/000.JPEG", "dog/other/000.JPEG")
        ]
        assert len(load(root, calibration=0).record()["suspicious"]) == 4

    def test_broken_links_are_left_out_and_named(self, tmp_path: Path) -> None:
        root = fill(tmp_path, PETS)
        broken = [root / "cat" / "more", root / "cat" / "itself", root / "dog" / "gone.png"]
        for path in broken:
            path.symlink_to(path if path.name == "itself" else tmp_path / "gone")
        (root / "dog" / "readme.txt").symlink_to(tmp_path / "gone")
        data = load(root, calibration=0)
        assert len(data.evaluation) == 6
        assert data.record()["left_out"].keys() == set(map(str, broken))

    @pytest.mark.parametrize("place", ["owl", "val"])
    def test_class_or_split_that_leads_nowhere_is_refused(self, tmp_path: Path, place: str) -> None:
        root = make(tmp_path, "train") if place == "val" else fill(tmp_path, PETS)
        (root / place).symlink_to(tmp_path / "gone")
        assert f"{root / place} is a link to nothing" in refused(lambda: load(root, 3))

    def test_linked_splits(self, tmp_path: Path) -> None:
        make(tmp_path / "store", "a", "b")
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "train").symlink_to(tmp_path / "store" / "a")
        (tmp_path / "root" / "test").symlink_to(tmp_path / "store" / "b")
        data = load(tmp_path / "root")
        assert len(data.training()) == len(data.evaluation) == 6
        assert not set(contents(data.training())) & set(contents(data.evaluation))


class TestFiles:
    def test_any_depth_and_nothing_hidden(self, tmp_path: Path) -> None:
        for index, name in enumerate(
            ["1.png", "a/2.png", "a/b/c/3.JPG", ".4.png", ".a/5.png", "a/.b/6.png", "a/._7.jpg"]
        ):
            draw(tmp_path / "cat" / name, index)
        assert relative(tmp_path) == [("cat/1.png", 0), ("cat/a/2.png", 0), ("cat/a/b/c/3.JPG", 0)]

    def test_kinds_are_torchvisions(self) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        assert set(IMG_EXTENSIONS) == EXTENSIONS

    @pytest.mark.parametrize("suffix", [".ppm", ".PGM"])
    def test_portable_maps(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / "cat" / f"one{suffix}"
        draw(path.with_suffix(".png"), 0).rename(path)
        assert find_images(tmp_path) == ([(path, 0)], ("cat",))

    def test_folder_named_as_an_image(self, tmp_path: Path) -> None:
        draw(tmp_path / "cat" / "night.png" / "1.png", 0)
        (tmp_path / "cat" / "void.png").mkdir()
        assert relative(tmp_path) == [("cat/night.png/1.png", 0), ("cat/void.png", 0)]

    @pytest.mark.parametrize("name", ["a b", "a,b", "a=b", "#1", "ä", "'q'", '"q"', "100%", "{x}", "a\nb", "-1", "猫"])
    def test_any_name_of_a_class(self, tmp_path: Path, name: str) -> None:
        data = load(fill(tmp_path, {name: 3, "zz": 3}), calibration=2)
        assert data.classes == tuple(sorted((name, "zz")))
        assert len(data.evaluation) == 4

    def test_name_that_is_no_text_is_refused(self, tmp_path: Path) -> None:
        root = fill(tmp_path, PETS)
        shutil.copytree(root / "cat", root / os.fsdecode(b"\xff\xfe"))
        text = refused(lambda: load(root, 3))
        assert r"\udcff\udcfe is not UTF-8" in text
        text.encode()

    def test_file_whose_name_is_no_text_can_be_named(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        root = fill(tmp_path, PETS)
        (root / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"no image")
        draw(root / "cat" / os.fsdecode(b"\xfe.png"), 70)
        data = load(root, calibration=0)
        assert r"cat/\udcfe.png" in (data.evaluation.names or ())
        for text in (*(data.evaluation.names or ()), *caplog.messages):
            text.encode()

    def test_folder_beside_splits_that_cannot_be_read_does_not_matter(self, tmp_path: Path) -> None:
        (make(tmp_path, "train", "val") / "lost+found").mkdir(mode=0)
        assert len(load(tmp_path).training()) == 6

    def test_folder_that_cannot_be_read_is_refused(self, tmp_path: Path) -> None:
        root = fill(tmp_path, PETS)
        (root / "cat" / "secret").mkdir(mode=0)
        if os.access(root / "cat" / "secret", os.R_OK):
            pytest.skip("this user may read every folder")
        assert f"{root / 'cat' / 'secret'} cannot be read" in refused(lambda: load(root))
