"""Datasets: splits never overlap, labels meet the right logits, and every data set is what its config says."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread, active_count, current_thread
from typing import Any

import numpy as np
import pytest
import torch
from conftest import python, refused
from cuda_stand_in import Machine
from image_folders import (
    IMAGENETTE,
    TINY,
    contents,
    draw,
    fill,
    labels_by_content,
    load,
    make_root,
    model_of,
    torchvisions,
    upright,
)
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from pq_sweep import types
from pq_sweep.inputs import datasets, download
from pq_sweep.inputs.datasets import (
    _pixels_split,
    cifar10,
    digits,
    fake,
    fetch_dataset,
    imagenet,
    imagenet_sample,
    imagenette,
    imagewoof,
)
from pq_sweep.inputs.models import digits_cnn, torchvision_model
from pq_sweep.types import Data, Model, Preprocess, Split, UserError

both_layouts = pytest.mark.parametrize("layout", ["flat", "train_and_val"])
each_layout = pytest.mark.parametrize("layout", ["flat", "val", "train_and_val"])


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None))


class TestDigits:
    def test_sizes(self, data: Data) -> None:
        assert len(data.evaluation) >= 500
        assert [len(split) for split in (data.evaluation, data.calibration, data.training())] == [500, 200, 1097]

    def test_splits_share_no_image(self, data: Data) -> None:
        parts = [contents(split) for split in (data.evaluation, data.calibration, data.training())]
        assert len(set().union(*parts)) == sum(len(part) for part in parts) == 1797

    def test_labels_stay_with_their_images(self, data: Data) -> None:
        from sklearn.datasets import load_digits

        raw = load_digits()
        keys = [(image / 16).astype(np.float32).tobytes() for image in raw.images]
        truth = dict(zip(keys, raw.target.tolist(), strict=True))
        for split in (data.evaluation, data.calibration, data.training()):
            assert [truth[image] for image in contents(split)] == split.labels.tolist()

    @pytest.mark.parametrize("name", ["evaluation", "calibration", "train"])
    def test_splits_are_stratified(self, data: Data, name: str) -> None:
        parts = [data.evaluation, data.calibration, data.training()]
        overall = torch.bincount(torch.cat([part.labels for part in parts])) / 1797
        split: Split = getattr(data, name)
        found = torch.bincount(split.labels, minlength=10)
        assert (found - overall * len(split)).abs().max() <= 2

    def test_order_is_fixed(self, data: Data) -> None:
        """The packaged weights were trained beside exactly these evaluation images, whatever the seed."""
        torch.manual_seed(1)
        np.random.seed(1)
        again = contents(digits(digits_cnn(weights=None)).evaluation)
        assert again == contents(data.evaluation)
        assert hashlib.sha256(b"".join(again)).hexdigest()[:16] == "1fa18f238c172109"

    def test_less_calibration_is_a_prefix_and_moves_nothing_else(self, data: Data) -> None:
        less = digits(digits_cnn(weights=None), calibration=8)
        assert contents(less.calibration) == contents(data.calibration)[:8]
        assert contents(less.evaluation) == contents(data.evaluation)
        assert contents(less.training()) == contents(data.training())

    @pytest.mark.parametrize("calibration", [-1, 201])
    def test_calibration_out_of_range_is_refused(self, calibration: int) -> None:
        text = refused(lambda: digits(digits_cnn(weights=None), calibration=calibration))
        assert f"dataset.calibration={calibration}" in text
        assert "up to 200" in text

    def test_calibration_may_be_none_at_all(self, data: Data) -> None:
        none = digits(digits_cnn(weights=None), calibration=0)
        assert len(none.calibration) == 0
        assert contents(none.evaluation) == contents(data.evaluation)

    def test_bigger_input_is_enlarged_and_normalised(self, data: Data) -> None:
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        big = digits(model_of(10, preprocess=Preprocess(size=16, resize=20, mean=mean, std=std)), calibration=4)
        expected = nn.functional.interpolate(data.calibration.fetch([0, 1]), size=(16, 16), mode="bilinear")
        for channel in range(3):
            found = big.calibration.fetch([0, 1])[:, channel] * std[channel] + mean[channel]
            torch.testing.assert_close(found, expected[:, 0])

    def test_other_number_of_classes_is_refused(self) -> None:
        assert "7 classes and the data 10" in refused(lambda: digits(model_of(7)))


class TestImageFolder:
    counts = {"cat": 12, "dog": 8, "owl": 4}  # noqa: RUF012

    @each_layout
    @pytest.mark.parametrize("calibration", [0, 6])
    def test_calibration_images_are_no_evaluation_images(self, tmp_path: Path, layout: str, calibration: int) -> None:
        data = load(make_root(tmp_path, layout, self.counts), 3, calibration=calibration)
        calibrating, evaluation = contents(data.calibration), contents(data.evaluation)
        assert not set(calibrating) & set(evaluation)
        assert len(set(calibrating)) == len(calibrating) == calibration
        assert len(set(evaluation)) == len(evaluation) == (24 if layout == "train_and_val" else 24 - calibration)

    @pytest.mark.parametrize("layout", ["flat", "val"])
    def test_root_without_train_has_no_training_images(self, tmp_path: Path, layout: str) -> None:
        data = load(make_root(tmp_path, layout, self.counts), 3, calibration=6)
        assert data.train is None
        assert "train/ and val/" in refused(data.training)

    def test_train_and_val_keep_their_roles(self, tmp_path: Path) -> None:
        data = load(make_root(tmp_path, "train_and_val", self.counts), 3, calibration=6)
        train, evaluation = contents(data.training()), contents(data.evaluation)
        assert len(train) == len(evaluation) == 24
        assert set(contents(data.calibration)) <= set(train)
        assert not set(train) & set(evaluation)
        assert data.evaluation.names is not None
        assert data.calibration.names is not None
        assert {name.split("/")[0] for name in data.evaluation.names} == {"val"}
        assert {name.split("/")[0] for name in data.calibration.names} == {"train"}

    def test_training_images_are_not_decoded_before_they_are_used(self, tmp_path: Path) -> None:
        data = load(make_root(tmp_path, "train_and_val", self.counts), 3, calibration=6)
        assert data.record()["decoded"] == 24 + 6
        data.training().fetch([0, 1, 2])
        assert data.record()["decoded"] == 24 + 6  # the first ones of the same order
        contents(data.training())
        assert data.record()["decoded"] == 24 + 24

    @pytest.mark.parametrize("copy", [shutil.copy, lambda path, new: new.symlink_to(path), os.link])
    def test_copies_in_a_flat_folder_do_not_cross_the_split(self, tmp_path: Path, copy: Callable[..., Any]) -> None:
        """Every image of a class is there twice: without a check some copies would land on both sides."""
        root = fill(tmp_path, self.counts)
        for path in sorted((root / "cat").iterdir()):
            copy(path, path.with_name(f"copy_{path.name}"))
        data = load(root, 3, calibration=18)
        calibration, evaluation = set(contents(data.calibration)), set(contents(data.evaluation))
        assert not calibration & evaluation
        assert len(calibration | evaluation) == 24
        assert len(data.evaluation) + len(data.record()["left_out"]) == 36 - 18

    @pytest.mark.parametrize("copy", [shutil.copy, lambda path, new: new.symlink_to(path), os.link])
    def test_copies_of_val_are_left_out_of_train(self, tmp_path: Path, copy: Callable[..., Any]) -> None:
        root = make_root(tmp_path, "train_and_val", self.counts)
        for path in sorted((root / "val" / "dog").iterdir()):
            copy(path, root / "train" / "dog" / f"copy_{path.name}")
        data = load(root, 3, calibration=24)
        assert len(data.evaluation) == 24
        assert not set(contents(data.training()) + contents(data.calibration)) & set(contents(data.evaluation))
        assert len(data.record()["left_out"]) == 8
        assert "dataset.calibration=25" in refused(lambda: load(root, 3, calibration=25))

    def test_folder_of_copies_leaves_nothing_to_evaluate_and_is_refused(self, tmp_path: Path) -> None:
        draw(tmp_path / "cat" / "one.png", 0)
        shutil.copy(tmp_path / "cat" / "one.png", tmp_path / "cat" / "two.png")
        assert str(tmp_path) in refused(lambda: load(tmp_path, 1))

    @both_layouts
    @pytest.mark.parametrize("calibration", [6, 12])
    def test_calibration_is_stratified(self, tmp_path: Path, layout: str, calibration: int) -> None:
        labels = load(make_root(tmp_path, layout, self.counts), 3, calibration=calibration).calibration.labels
        for label, count in enumerate(self.counts.values()):
            assert abs(int((labels == label).sum()) - calibration * count / 24) <= 1

    @each_layout
    @pytest.mark.parametrize("evaluation", [1, 6, 12, 1000])
    def test_evaluation_takes_so_many_in_proportion(self, tmp_path: Path, layout: str, evaluation: int) -> None:
        root = make_root(tmp_path, layout, self.counts)
        data, again, other = (load(root, 3, calibration=6, evaluation=evaluation, seed=seed) for seed in (0, 0, 1))
        available = 24 if layout == "train_and_val" else 18
        assert len(data.evaluation) == min(evaluation, available)
        assert data.evaluation.names == again.evaluation.names == tuple(sorted(data.evaluation.names or ()))
        assert (set(data.evaluation.names or ()) == set(other.evaluation.names or ())) == (
            evaluation == 1000 and layout == "train_and_val"
        )
        if evaluation < available:
            counts = torch.bincount(data.evaluation.labels, minlength=3)
            assert (counts - evaluation * torch.tensor([12, 8, 4]) / 24).abs().max() <= 1.5
        assert not set(contents(data.evaluation)) & set(contents(data.calibration))

    @each_layout
    def test_fewer_images_decode_fewer(self, tmp_path: Path, layout: str) -> None:
        data = load(make_root(tmp_path, layout, self.counts), 3, calibration=6, evaluation=5)
        assert data.record()["decoded"] == 11

    @each_layout
    def test_images_to_evaluate_do_not_depend_on_those_to_calibrate(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        chosen = [load(root, 3, calibration=count, evaluation=6).evaluation.names for count in (0, 4, 18)]
        assert chosen[0] == chosen[1] == chosen[2]

    @each_layout
    def test_labels_follow_the_class_folders(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        data = load(root, 3, calibration=6)
        assert data.classes == ("cat", "dog", "owl")
        truth = labels_by_content(root, data.classes)
        for split in (data.evaluation, data.calibration, data.train or data.evaluation):
            assert [truth[image] for image in contents(split)] == split.labels.tolist()

    @each_layout
    def test_names_say_which_image_it_is(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        data = load(root, 3, calibration=6)
        for split in (data.evaluation, data.calibration):
            assert split.names is not None
            expected = [torchvisions(upright(root / name), TINY).numpy().tobytes() for name in split.names]
            assert contents(split) == expected

    @both_layouts
    def test_seed_decides_the_split(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        first, again, other = (contents(load(root, 3, calibration=6, seed=seed).calibration) for seed in (0, 0, 1))
        assert first == again
        assert set(first) != set(other)

    def test_nested_and_hidden_folders(self, tmp_path: Path) -> None:
        fill(tmp_path, {"cat": 2, "dog": 2, ".cache": 3})
        draw(tmp_path / "cat" / "night" / "deep.PNG", 77)
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        data = load(tmp_path)
        assert len(data.evaluation) + len(data.calibration) == 5
        assert data.classes == ("cat", "dog")

    @each_layout
    @pytest.mark.parametrize("calibration", [-1, 25])
    def test_calibration_out_of_range_is_refused(self, tmp_path: Path, layout: str, calibration: int) -> None:
        root = make_root(tmp_path, layout, self.counts)
        text = refused(lambda: load(root, 3, calibration=calibration))
        assert f"dataset.calibration={calibration}" in text

    @pytest.mark.parametrize("layout", ["flat", "val"])
    def test_an_image_is_kept_to_evaluate(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        assert len(load(root, 3, calibration=23).evaluation) == 1
        assert "24" in refused(lambda: load(root, 3, calibration=24))

    def test_missing_folder_is_refused(self, tmp_path: Path) -> None:
        assert str(tmp_path / "absent") in refused(lambda: load(tmp_path / "absent"))

    def test_file_as_folder_is_refused(self, tmp_path: Path) -> None:
        path = draw(tmp_path / "cat.png", 0)
        assert str(path) in refused(lambda: load(path))

    def test_empty_folder_is_refused(self, tmp_path: Path) -> None:
        assert str(tmp_path) in refused(lambda: load(tmp_path))

    @both_layouts
    def test_empty_class_folder_is_refused(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        (root / ("val/empty" if layout == "train_and_val" else "empty")).mkdir()
        assert "empty" in refused(lambda: load(root, 3))


class TestClassesWithoutImages:
    """A class that no image is left of to evaluate is said, whatever took the others."""

    names = tuple(f"c{number:02}" for number in range(35))

    def test_one_image_per_class(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        data = load(fill(tmp_path, dict.fromkeys(self.names, 1)), 35, calibration=10)
        seen = set(data.evaluation.labels.tolist())
        assert len(seen) == len(data.evaluation) == 25
        absent = [name for label, name in enumerate(self.names) if label not in seen]
        assert data.notes == (f"classes without an image to evaluate: 10 of 35 ({', '.join(absent[:5])} and 5 more).",)
        assert caplog.messages == list(data.notes)

    @each_layout
    def test_fewer_images_than_classes(self, tmp_path: Path, layout: str) -> None:
        data = load(make_root(tmp_path, layout, {"cat": 4, "dog": 4, "owl": 4}), 3, calibration=3, evaluation=2)
        (absent,) = {0, 1, 2} - set(data.evaluation.labels.tolist())
        assert data.notes == (f"classes without an image to evaluate: 1 of 3 ({data.classes[absent]}).",)

    def test_class_of_which_nothing_can_be_read(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "train_and_val", {"cat": 2, "dog": 2})
        for path in (root / "val" / "dog").iterdir():
            path.write_bytes(b"")
        assert load(root).notes == ("classes without an image to evaluate: 1 of 2 (dog).",)

    def test_copies_of_calibration_images(self, tmp_path: Path) -> None:
        root = fill(tmp_path, {"cat": 1, "dog": 9})
        shutil.copy(root / "cat" / "000.JPEG", root / "cat" / "copy.JPEG")
        data = load(root, calibration=8)
        assert 0 in data.calibration.labels.tolist()
        assert data.notes == ("classes without an image to evaluate: 1 of 2 (cat).",)

    def test_files_of_imagenet_of_which_each_is_a_class(self, tmp_path: Path) -> None:
        for index, name in enumerate(IMAGENETTE):
            draw(tmp_path / f"{name}_thing.JPEG", index)
        data = imagenet_sample(model_of(1000), root=str(tmp_path), **OPTIONS)
        assert data.notes[0].startswith("classes without an image to evaluate: 2 of 10 (n")

    @each_layout
    def test_nothing_is_said_if_all_are_there(self, tmp_path: Path, layout: str) -> None:
        assert load(make_root(tmp_path, layout, {"cat": 3, "dog": 3}), calibration=2).notes == ()


OPTIONS: dict[str, Any] = {"calibration": 2, "evaluation": None, "seed": 0}


class TestImageNet:
    names = ("n01440764", "n02102040", "n03888257")
    columns = (0, 217, 701)

    def make(self, root: Path, layout: str, names: tuple[str, ...]) -> Path:
        """Make a root of class folders, or of files that are named by their class."""
        if layout != "files":
            return make_root(root, layout, dict.fromkeys(names, 4))
        for number, name in enumerate(names):
            for index in range(4):
                draw(root / f"{name}_thing_{index}.JPEG", number * 10 + index)
        return root

    @pytest.mark.parametrize(
        ("dataset", "layout"),
        [
            (imagenet, "flat"),
            (imagenet, "val"),
            (imagenet, "train_and_val"),
            (imagenet_sample, "flat"),
            (imagenet_sample, "files"),
        ],
    )
    def test_ids_pick_their_logits(self, tmp_path: Path, dataset: Callable[..., Data], layout: str) -> None:
        root = self.make(tmp_path, layout, self.names)
        data = dataset(model_of(1000), root=str(root), **OPTIONS)
        assert data.classes == self.names
        assert data.columns is not None
        assert data.columns.tolist() == list(self.columns)
        assert len(data.evaluation) == (12 if layout == "train_and_val" else 10)
        for split in (data.evaluation, data.calibration):
            assert split.names is not None
            ids = [next(wnid for wnid in self.names if wnid in name) for name in split.names]
            assert [self.names[label] for label in split.labels.tolist()] == ids

    @pytest.mark.parametrize("dataset", [imagenette, imagewoof])
    def test_root_of_ones_own(self, tmp_path: Path, dataset: Callable[..., Data]) -> None:
        root = self.make(tmp_path, "train_and_val", self.names)
        data = dataset(model_of(1000), root=str(root), size=160, **OPTIONS)
        assert data.classes == self.names
        assert len(data.training()) == 12

    @pytest.mark.parametrize(
        ("dataset", "layout", "options"),
        [
            (imagenet, "flat", {}),
            (imagenette, "train_and_val", {"size": 160}),
            (imagewoof, "val", {"size": 160}),
            (imagenet_sample, "flat", {}),
            (imagenet_sample, "files", {}),
        ],
    )
    @pytest.mark.parametrize("model", [model_of(1000), model_of(2)], ids=["1,000 classes", "as many classes"])
    @pytest.mark.parametrize("names", [("n01440764", "n99999999"), ("cat", "n01440764")])
    def test_unknown_id_is_refused(
        self,
        tmp_path: Path,
        dataset: Callable[..., Data],
        layout: str,
        options: dict[str, Any],
        model: Model,
        names: tuple[str, str],
    ) -> None:
        root = self.make(tmp_path, layout, names)
        text = refused(lambda: dataset(model, root=str(root), **options, **OPTIONS))
        assert repr("cat" if "cat" in names else "n99999999") in text

    @pytest.mark.parametrize("name", ["photo.jpg", "dog_1.jpg"])
    def test_file_without_id_is_refused(self, tmp_path: Path, name: str) -> None:
        self.make(tmp_path, "files", self.names)
        draw(tmp_path / name, 99)
        text = refused(lambda: imagenet_sample(model_of(1000), root=str(tmp_path), **OPTIONS))
        assert repr(name.partition("_")[0]) in text

    def test_files_in_a_clone_are_found(self, tmp_path: Path) -> None:
        self.make(tmp_path, "files", self.names)
        (tmp_path / ".git").mkdir()
        assert len(imagenet_sample(model_of(1000), root=str(tmp_path), **OPTIONS).evaluation) == 10

    def test_sample_without_images_is_refused(self, tmp_path: Path) -> None:
        text = refused(lambda: imagenet_sample(model_of(1000), root=str(tmp_path), **OPTIONS))
        assert "n01440764_tench.jpg" in text

    def test_sample_of_unusable_images(self, tmp_path: Path) -> None:
        self.make(tmp_path, "files", self.names)
        bad = tmp_path / "n01440764_bad.jpg"
        bad.write_bytes(b"")
        data = imagenet_sample(model_of(1000), root=str(tmp_path), **OPTIONS)
        assert data.record()["left_out"] == {str(bad): "the file is empty"}

    @pytest.mark.parametrize(
        ("dataset", "size", "archive"),
        [
            (imagenette, 160, "imagenette2-160"),
            (imagenette, "320", "imagenette2-320"),
            (imagenette, "full", "imagenette2"),
            (imagewoof, 160, "imagewoof2-160"),
            (imagewoof, 320, "imagewoof2-320"),
            (imagewoof, "full", "imagewoof2"),
        ],
    )
    def test_size_chooses_the_archive(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        dataset: Callable[..., Data],
        size: int | str,
        archive: str,
    ) -> None:
        self.make(tmp_path / archive, "train_and_val", self.names)
        asked = []
        monkeypatch.setattr(datasets, "fetch_dataset", lambda *arguments: asked.append(arguments) or tmp_path)
        data = dataset(model_of(1000), root=None, size=size, **OPTIONS)
        assert len(data.evaluation) == 12
        ((url, name, checksum),) = asked
        assert url.endswith(f"/{archive}.tgz")
        assert name == archive
        assert checksum.startswith("md5:")

    @pytest.mark.parametrize("dataset", [imagenette, imagewoof])
    def test_other_size_is_refused(self, dataset: Callable[..., Data]) -> None:
        text = refused(lambda: dataset(model_of(1000), root=None, size=224, **OPTIONS))
        assert "dataset.size=224" in text
        assert "160, 320, full" in text

    def test_archive_is_fetched_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path))
        fetched: list[Any] = []
        monkeypatch.setattr(download, "fetch", lambda *arguments, **options: fetched.append((arguments, options)))
        monkeypatch.setattr(download, "extract", lambda archive, folder: folder.mkdir(parents=True))
        folders = [fetch_dataset("https://example.org/things.tgz", "things", "md5:0") for _ in range(2)]
        assert folders == [tmp_path / "datasets" / "things"] * 2
        ((arguments, options),) = fetched
        assert arguments == ("https://example.org/things.tgz", tmp_path / "datasets" / "things.tgz")
        assert options["checksum"] == "md5:0"
        assert "dataset.root" in options["hint"]


CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SMALL = Preprocess(size=32, resize=32, mean=(0.0,) * 3, std=(1.0,) * 3)


class TestCifar10:
    """An imitation of CIFAR-10's files, with ten images in each batch."""

    @pytest.fixture
    def root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        from torchvision.datasets import CIFAR10

        folder = tmp_path / CIFAR10.base_folder
        folder.mkdir()

        def write(name: str, content: dict[str, Any]) -> str:
            data = pickle.dumps(content)
            (folder / name).write_bytes(data)
            return hashlib.md5(data, usedforsecurity=False).hexdigest()

        sums = {name: write(name, self.batch(number)) for number, name in enumerate(self.batches)}
        monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in self.batches[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [[name, sums[name]] for name in self.batches[5:]])
        meta = write("batches.meta", {"label_names": list(CIFAR_CLASSES)})
        monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": meta})
        return tmp_path

    batches = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")

    def batch(self, number: int) -> dict[str, Any]:
        """Return ten images whose colours say which batch and image they are of; the classes are in turn."""
        data = np.random.default_rng(number).integers(0, 256, (10, 3072), dtype=np.uint8)
        return {"data": data, "labels": [(index + number) % 10 for index in range(10)]}

    def truth(self) -> dict[bytes, int]:
        """Return the label of each image by what it shows under torchvision's ToTensor."""
        found = {}
        for number in range(6):
            batch = self.batch(number)
            for pixels, label in zip(batch["data"], batch["labels"], strict=True):
                image = Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0))
                found[torchvisions(image, SMALL).numpy().tobytes()] = label
        return found

    def test_images_labels_and_parts(self, root: Path) -> None:
        data = cifar10(model_of(10, preprocess=SMALL), root=str(root), calibration=8, evaluation=None, seed=0)
        truth, parts = self.truth(), (data.evaluation, data.calibration, data.training())
        assert [len(part) for part in parts] == [10, 8, 42]
        for part in parts:
            assert [truth[image] for image in contents(part)] == part.labels.tolist()
        assert len({image for part in parts for image in contents(part)}) == 60
        assert data.classes == CIFAR_CLASSES
        assert data.columns is None
        test_images = list(truth)[50:]
        assert contents(data.evaluation) == test_images

    def test_evaluation_takes_so_many_in_order(self, root: Path) -> None:
        model = model_of(10, preprocess=SMALL)
        all_of_them = contents(cifar10(model, root=str(root), calibration=0, evaluation=None, seed=0).evaluation)
        data, again, other = (
            cifar10(model, root=str(root), calibration=10, evaluation=4, seed=seed) for seed in (0, 0, 1)
        )
        assert (
            contents(data.evaluation)
            == contents(again.evaluation)
            == sorted(contents(data.evaluation), key=all_of_them.index)
        )
        assert contents(data.calibration) == contents(again.calibration)
        assert len(data.evaluation) == len(set(data.evaluation.labels.tolist())) == 4
        assert sorted(data.calibration.labels.tolist()) == list(range(10))
        assert contents(data.evaluation) + contents(data.calibration) != contents(other.evaluation) + contents(
            other.calibration
        )

    def test_classes_without_an_image_to_evaluate_are_said(self, root: Path) -> None:
        model = model_of(10, preprocess=SMALL)
        few, whole = (cifar10(model, root=str(root), **(OPTIONS | {"evaluation": count})) for count in (4, None))
        absent = [name for label, name in enumerate(CIFAR_CLASSES) if label not in few.evaluation.labels.tolist()]
        assert few.notes == (f"classes without an image to evaluate: 6 of 10 ({', '.join(absent[:5])} and 1 more).",)
        assert whole.notes == ()

    @pytest.mark.parametrize("calibration", [-1, 51])
    def test_calibration_out_of_range_is_refused(self, root: Path, calibration: int) -> None:
        call = lambda: cifar10(model_of(10), root=str(root), calibration=calibration, evaluation=None, seed=0)  # noqa: E731
        assert f"dataset.calibration={calibration}" in refused(call)

    def test_grey_model_gets_grey(self, root: Path) -> None:
        """Pillow rounds its grey to whole shades."""
        grey = Preprocess(size=32, resize=32, channels=1, mean=(0.2,), std=(0.5,))
        colour, found = (
            cifar10(model_of(10, preprocess=preprocess), root=str(root), **OPTIONS).evaluation.fetch([0, 3])
            for preprocess in (SMALL, grey)
        )
        assert found.shape == (2, 1, 32, 32)
        for image, expected in zip(found, colour, strict=True):
            shades = Image.fromarray((expected * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).convert("L")
            difference = image[0] * 0.5 + 0.2 - torch.from_numpy(np.asarray(shades, dtype=np.float32)) / 255
            assert difference.abs().max() < 1 / 255

    def test_bigger_model_gets_enlarged_images(self, root: Path) -> None:
        big = Preprocess(size=224, resize=256)
        small, found = (
            cifar10(model_of(10, preprocess=preprocess), root=str(root), **OPTIONS).evaluation.fetch([0, 3])
            for preprocess in (SMALL, big)
        )
        enlarged = nn.functional.interpolate(small, size=(224, 224), mode="bilinear")
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (big.mean, big.std))
        torch.testing.assert_close(found, (enlarged - mean) / std)

    @pytest.mark.parametrize("damage", ["missing folder", "empty folder", "missing batch", "changed batch", "no meta"])
    def test_folder_that_is_not_cifar10_is_refused(self, root: Path, damage: str) -> None:
        folder = root / "cifar-10-batches-py"
        if damage == "missing folder":
            root = root / "absent"
        elif damage == "empty folder":
            shutil.rmtree(folder)
        elif damage == "changed batch":
            (folder / "test_batch").write_bytes(b"changed")
        else:
            (folder / {"missing batch": "data_batch_3", "no meta": "batches.meta"}[damage]).unlink()
        assert str(root) in refused(lambda: cifar10(model_of(10), root=str(root), **OPTIONS))

    def test_other_number_of_classes_is_refused(self, root: Path) -> None:
        assert "airplane" in refused(lambda: cifar10(model_of(1000), root=str(root), **OPTIONS))

    def test_without_a_root_it_is_fetched(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []
        monkeypatch.setattr(datasets, "fetch_dataset", lambda *arguments: asked.append(arguments) or root)
        assert len(cifar10(model_of(10), root=None, **OPTIONS).evaluation) == 10
        ((url, name, checksum),) = asked
        assert url.endswith("cifar-10-python.tar.gz")
        assert name == "cifar10"
        assert checksum == "md5:c58f30108f718f92721af3b95e74349a"


class TestFake:
    grey = Preprocess(size=5, resize=5, channels=1, mean=(0.0,), std=(1.0,))

    @pytest.mark.parametrize("preprocess", [TINY, grey], ids=["RGB", "grey"])
    def test_parts_are_as_asked_and_share_no_image(self, preprocess: Preprocess) -> None:
        data = fake(model_of(7, preprocess=preprocess), images=20, calibration=6, seed=3)
        parts = (data.evaluation, data.calibration, data.training())
        assert [len(part) for part in parts] == [20, 6, 6]
        assert len({image for part in parts for image in contents(part)}) == 32
        image = data.evaluation.fetch([0, 1])
        assert image.shape == (2, preprocess.channels, preprocess.size, preprocess.size)
        assert image.dtype == torch.float32
        assert all(0 <= label < 7 for part in parts for label in part.labels.tolist())
        assert data.classes == tuple("0123456")
        assert data.columns is None

    def test_seed_decides(self) -> None:
        first, again, other = (fake(model_of(7), images=20, calibration=6, seed=seed) for seed in (0, 0, 1))
        assert contents(first.evaluation) == contents(again.evaluation)
        assert first.evaluation.labels.tolist() == again.evaluation.labels.tolist()
        assert not set(contents(first.evaluation)) & set(contents(other.evaluation))

    def test_calibration_may_be_none_at_all(self) -> None:
        data = fake(model_of(7, tuple("abcdefg")), images=3, calibration=0, seed=0)
        assert [len(data.evaluation), len(data.calibration)] == [3, 0]
        assert data.classes == tuple("abcdefg")


class Pairs(Dataset[tuple[Tensor, int]]):
    """Five images whose value is their index, with labels 10, 11, ..."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 2, 2), float(index)), 10 + index


class PairsWithTargets(Pairs):
    def __init__(self, targets: Any) -> None:
        self.targets = targets


class PairsWithChangedTargets(PairsWithTargets):
    """As torchvision's datasets with a `target_transform`: `targets` are the labels before it."""

    target_transform = staticmethod(lambda target: target + 10)


class TestSplit:
    images = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 1, 2, 2)
    labels = torch.arange(10, 15)

    @pytest.fixture
    def split(self) -> Split:
        return Split.of_tensors(self.images, self.labels)

    @pytest.mark.parametrize(
        "dataset",
        [
            Pairs(),
            PairsWithTargets([10, 11, 12, 13, 14]),
            PairsWithTargets(torch.arange(10, 15)),
            PairsWithTargets(np.arange(10, 15, dtype=np.uint8)),
            PairsWithChangedTargets([0, 1, 2, 3, 4]),
        ],
        ids=["no targets", "list", "tensor", "uint8 array", "target_transform"],
    )
    def test_of_dataset(self, dataset: Pairs) -> None:
        split = Split.of_dataset(dataset)
        assert len(split) == 5
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.labels, self.labels)
        assert torch.equal(split.fetch([3, 0]), self.images[[3, 0]])

    def test_of_tensors(self, split: Split) -> None:
        assert len(split) == 5
        assert torch.equal(split.fetch([3, 0]), self.images[[3, 0]])

    @pytest.mark.parametrize(
        ("count", "offset", "expected"),
        [(2, 0, [10, 11]), (2, 3, [13, 14]), (9, 0, [10, 11, 12, 13, 14]), (3, 4, [14])],
    )
    def test_take(self, split: Split, count: int, offset: int, expected: list[int]) -> None:
        taken = split.take(count, offset)
        assert taken.labels.tolist() == expected
        assert (next(taken.batches(9))[0][:, 0, 0, 0] + 10).tolist() == expected

    def test_subset_of_a_subset(self, split: Split) -> None:
        inner = split.subset([4, 2, 0]).subset([2, 0])
        assert inner.labels.tolist() == [10, 14]
        assert inner.fetch([1, 0])[:, 0, 0, 0].tolist() == [4, 0]

    @pytest.mark.parametrize(("size", "sizes"), [(2, [2, 2, 1]), (5, [5]), (64, [5]), (1, [1] * 5)])
    def test_batches_cover_every_image_once(self, split: Split, size: int, sizes: list[int]) -> None:
        batches = list(split.batches(size))
        assert [len(images) for images, _ in batches] == sizes
        assert torch.equal(torch.cat([images for images, _ in batches]), self.images)
        assert torch.equal(torch.cat([labels for _, labels in batches]), self.labels)

    def test_batches_in_another_order(self, split: Split) -> None:
        labels = [labels.tolist() for _, labels in split.batches(2, order=[4, 0, 3])]
        assert labels == [[14, 10], [13]]


class Source:
    """Images in two steps, of which is noted when and in which thread they are fetched: image i is (i, 2, 3, 4)."""

    def __init__(self, count: int = 8, error: int | None = None) -> None:
        self.error, self.asked, self.done = error, [0] * count, [Event() for _ in range(count)]
        self.threads: list[Thread] = []
        self.finishing: list[Thread] = []
        self.alive: list[weakref.ref[Tensor]] = []

    @property
    def split(self) -> Split:
        return Split.of_raw(torch.arange(len(self.asked)), self.raw, self.finish)

    def raw(self, indices: list[int]) -> Tensor:
        self.threads.append(current_thread())
        for index in indices:
            self.asked[index] += 1
            if index == self.error:
                raise UserError("image is damaged.")
        images = torch.stack([torch.tensor([[[index, 2, 3, 4]]], dtype=torch.uint8) for index in indices])
        self.alive.append(weakref.ref(images))
        for index in indices:
            self.done[index].set()
        return images

    def finish(self, images: Tensor) -> Tensor:
        self.finishing.append(current_thread())
        return images.permute(0, 3, 1, 2).float()

    def await_end(self) -> None:
        """Wait until no thread that fetches is left."""
        for thread in self.threads:
            if thread is not current_thread():
                thread.join(10)
                assert not thread.is_alive()


class TestAhead:
    """Images that are fetched by a thread while the batch before is in use."""

    @pytest.fixture(autouse=True)
    def every_batch_is_worth_a_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(types, "BYTES_WORTH_A_THREAD", 0)

    @pytest.mark.parametrize("order", [None, [5, 0, 5, 3, 1], [2], []])
    @pytest.mark.parametrize("size", [1, 2, 3, 8, 9])
    def test_batches_are_those_of_fetch(self, order: list[int] | None, size: int) -> None:
        split = Source().split
        found = [(images, labels.tolist()) for images, labels in split.batches(size, order=order)]
        order = list(range(8)) if order is None else order
        parts = [order[start : start + size] for start in range(0, len(order), size)]
        assert [labels for _, labels in found] == parts
        for (images, _), part in zip(found, parts, strict=True):
            assert torch.equal(images, split.fetch(part))

    def test_subset_of_a_subset(self) -> None:
        part = Source().split.subset([7, 6, 5, 4, 3]).take(3, 1)
        found = [(images[:, 0, 0, 0].tolist(), labels.tolist()) for images, labels in part.batches(2, order=[2, 0, 1])]
        assert found == [([4, 6], [4, 6]), ([5], [5])]

    def test_next_batch_is_fetched_meanwhile_and_no_more(self) -> None:
        source = Source()
        for number, _ in enumerate(source.split.batches(2)):
            following = 2 * number + 2
            if following < 8:
                assert source.done[following].wait(10)
            source.await_end()  # nothing runs on while a batch is in use
            assert source.asked == [1] * min(8, following + 2) + [0] * (8 - min(8, following + 2))
            assert sum(image() is not None for image in source.alive) <= 2
        assert source.asked == [1] * 8

    def test_images_are_finished_by_who_uses_them(self) -> None:
        """They belong to the CUDA stream and the gradient mode of that thread."""
        source = Source()
        list(source.split.batches(2))
        assert set(source.finishing) == {current_thread()}
        assert current_thread() not in source.threads[1:]

    @pytest.mark.parametrize("after", [0, 1, 2])
    def test_stopped_early(self, after: int) -> None:
        source = Source()
        batches = source.split.batches(2)
        for _ in range(after):
            next(batches)
        before = active_count()
        del batches
        assert active_count() <= before
        assert not any(thread.is_alive() for thread in source.threads if thread is not current_thread())
        assert source.asked[2 * after + 2 :] == [0] * len(source.asked[2 * after + 2 :])

    def test_error_of_who_uses_them(self) -> None:
        source = Source()

        def use() -> None:
            for _ in source.split.batches(2):
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as caught:
            use()
        source.await_end()  # although the traceback still holds the generator
        assert caught.tb is not None
        assert source.asked == [1, 1, 1, 1, 0, 0, 0, 0]

    @pytest.mark.parametrize("error", range(8))
    def test_error_in_fetching_comes_in_its_turn(self, error: int) -> None:
        source = Source(error=error)
        batches = source.split.batches(2)
        assert [len(next(batches)[0]) for _ in range(error // 2)] == [2] * (error // 2)
        assert refused(lambda: next(batches)) == "image is damaged."
        source.await_end()

    def test_nobody_asks(self) -> None:
        source, before = Source(), active_count()
        batches = source.split.batches(2)
        assert source.asked == [0] * 8
        assert active_count() == before
        del batches

    def test_small_batches_start_no_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        source = Source()
        monkeypatch.setattr(types, "BYTES_WORTH_A_THREAD", 9)
        assert len(list(source.split.batches(2))) == 4
        assert set(source.threads) == {current_thread()}

    def test_what_others_fetch_stays_in_their_thread(self) -> None:
        """It may draw random numbers, or hold what belongs to one thread."""
        source = Source()
        alone = Split(source.split.labels, lambda indices: source.raw(indices).float())
        assert len(list(alone.batches(2))) == 4
        assert set(source.threads) == {current_thread()}

    def test_page_locked_images_are_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What pages are locked for is a GPU, so that here they are not.

        Locking makes a context on the current device, which in a new thread is the first one: someone else's, maybe.
        """
        machine, source = Machine().install(monkeypatch), Source()
        batches = [images for images, _ in source.split.batches(2, "cuda:1")]
        assert set(source.threads) > {current_thread()}
        assert machine.pinned_on == [1] * 4
        assert torch.equal(torch.cat(batches), source.finish(source.raw(list(range(8)))))
        assert types._pinning(source.raw, "cpu") == source.raw

    @pytest.mark.gpu
    def test_on_cuda(self) -> None:
        pixels = torch.randint(256, (50, 9, 9, 3), dtype=torch.uint8)
        split = _pixels_split(pixels, [0] * 50, PHOTO)
        found = torch.cat([images.cpu() for images, _ in split.batches(8, "cuda")])
        assert torch.equal(found, split.fetch(list(range(50))))


PHOTO = Preprocess(size=9, resize=9)


@pytest.mark.parametrize("size", [9, 18])
def test_pixels_in_memory_are_normalised_as_by_torchvision(size: int) -> None:
    pixels = torch.randint(256, (20, 9, 9, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = _pixels_split(pixels, [0] * 20, replace(PHOTO, size=size))
    enlarged = pixels.permute(0, 3, 1, 2) / 255
    if size != 9:
        enlarged = nn.functional.interpolate(enlarged, size=size, mode="bilinear")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (PHOTO.mean, PHOTO.std))
    expected = (enlarged - mean) / std
    assert torch.equal(split.fetch(list(range(20))), expected)
    assert torch.equal(torch.cat([images for images, _ in split.batches(7)]), expected)


class TestIdentity:
    images = torch.rand(70, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(70) % 7

    @pytest.fixture
    def split(self) -> Split:
        return Split.of_tensors(self.images, self.labels)

    def changed(self, index: int) -> Split:
        """Return the split with another label for one image."""
        labels = self.labels.clone()
        labels[index] += 1
        return Split.of_tensors(self.images, labels)

    def test_same_images_are_the_same(self, split: Split) -> None:
        again = Split.of_tensors(self.images.clone(), self.labels.clone())
        assert split.identity() == again.identity()
        assert re.fullmatch("[0-9a-f]{64}", split.identity())

    @pytest.mark.parametrize("index", [0, 31, 32, 69])
    def test_a_pixel_or_a_label_changes_it(self, split: Split, index: int) -> None:
        images = self.images.clone()
        images[index, 1, 2, 3] += 1e-6
        found = {other.identity() for other in (split, Split.of_tensors(images, self.labels), self.changed(index))}
        assert len(found) == 3

    def test_order_and_number_change_it(self, split: Split) -> None:
        turned = split.subset([1, 0, *range(2, 70)])
        images_alone = Split.of_tensors(turned.fetch(list(range(70))), self.labels)
        parts = [split, turned, images_alone, split.take(69), split.take(69, 1), split.take(0), split.subset([0, 0])]
        assert len({part.identity() for part in parts}) == len(parts)

    def test_shape_changes_it(self, split: Split) -> None:
        assert split.identity() != Split.of_tensors(self.images.view(70, 3, 2, 8), self.labels).identity()

    def test_a_subset_is_what_it_contains(self, split: Split) -> None:
        chosen = [40, 3, 3, 69]
        alone = Split.of_tensors(self.images[chosen], self.labels[chosen])
        assert split.subset(chosen).identity() == alone.identity()
        assert split.take(67, 3).subset([37, 0, 0, 66]).identity() == alone.identity()
        assert split.subset([5, *chosen, 6]).take(4, 1).identity() == alone.identity()
        assert self.changed(7).subset(chosen).identity() == alone.identity()
        assert split.take(70).identity() == split.identity()

    def test_few_images_are_in_memory_at_a_time(self, split: Split) -> None:
        asked: list[int] = []
        watched = Split(split.labels, lambda indices: asked.append(len(indices)) or split.fetch(indices))
        assert watched.identity() == split.identity()
        assert sum(asked) == 70
        assert max(asked) < 40

    def test_of_a_dataset(self) -> None:
        pairs = Split.of_dataset(Pairs())
        assert pairs.identity() == Split.of_tensors(TestSplit.images, TestSplit.labels).identity()

    @pytest.mark.parametrize("option", [{"size": 16}, {"mean": (0.1,)}, {"std": (0.1,)}, {"channels": 3}])
    def test_preprocessing_of_digits_changes_it(self, data: Data, option: dict[str, Any]) -> None:
        model = digits_cnn(weights=None)
        values = {"mean": model.preprocess.mean * 3, "std": model.preprocess.std * 3} if "channels" in option else {}
        other = digits(replace(model, preprocess=replace(model.preprocess, **option | values)))
        assert digits(model).evaluation.identity() == data.evaluation.identity()
        assert other.evaluation.identity() != data.evaluation.identity()

    def test_parts_of_digits(self, data: Data) -> None:
        parts = (data.evaluation, data.calibration, data.training())
        assert len({part.identity() for part in parts}) == 3
        less = digits(digits_cnn(weights=None), calibration=8)
        assert less.calibration.identity() == data.calibration.take(8).identity()

    @pytest.mark.slow
    def test_another_process_finds_the_same(self, data: Data, environment: dict[str, str], tmp_path: Path) -> None:
        code = """
from pq_sweep.inputs.datasets import digits, fake
from pq_sweep.inputs.models import digits_cnn
model = digits_cnn(weights=None)
print(digits(model).training().identity(), fake(model, images=9, calibration=2, seed=1).evaluation.identity())
"""
        done = python(["-c", code], tmp_path, environment)
        noise = fake(digits_cnn(weights=None), images=9, calibration=2, seed=1)
        assert done.stdout.split() == [data.training().identity(), noise.evaluation.identity()], done.stderr


def plain_predictions(weights: Path, root: Path) -> dict[bytes, int]:
    """Answer for each prepared photograph by torchvision alone, one image at a time."""
    from torchvision.models import ResNet18_Weights, resnet18

    network = resnet18().eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    transform = ResNet18_Weights.IMAGENET1K_V1.transforms()
    answers = {}
    for path in sorted(root.glob("*/*")):
        image = transform(Image.open(path).convert("RGB"))
        with torch.no_grad():
            logits = network(image.unsqueeze(0))[0, list(IMAGENETTE.values())]
        answers[image.numpy().tobytes()] = int(logits.argmax())
    return answers


@pytest.mark.slow
def test_predictions_on_photographs_equal_a_plain_torchvision_loop(shared_data: Path, tmp_path: Path) -> None:
    """Every prediction of ResNet-18 among ImageNette's ten classes, four photographs of each."""
    for source in sorted((shared_data / "imagenette160" / "val").iterdir()):
        (tmp_path / source.name).mkdir()
        for path in sorted(source.iterdir())[:4]:
            (tmp_path / source.name / path.name).symlink_to(path)
    weights = shared_data / "weights" / "resnet18.pth"
    model = torchvision_model(name="resnet18", weights=str(weights))
    photographs = imagenet(model, root=str(tmp_path), calibration=1, evaluation=None, seed=0)
    with torch.no_grad():
        outputs = [photographs.logits(model.module(images)) for images, _ in photographs.evaluation.batches(13)]
    predicted = torch.cat(outputs).argmax(1)

    expected = plain_predictions(weights, tmp_path)
    assert predicted.tolist() == [expected[image] for image in contents(photographs.evaluation)]
    assert len(predicted) == 39
    assert (predicted == photographs.evaluation.labels).sum() >= 36
