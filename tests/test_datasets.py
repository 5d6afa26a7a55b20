"""Datasets: splits never overlap, labels meet the right logits, and images are prepared as torchvision does."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from pq_sweep.datasets import digits, image_folder, imagenet_wnids, read_image, stratified_order
from pq_sweep.models import digits_cnn, torchvision_model
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

both_layouts = pytest.mark.parametrize("layout", ["flat", "train_and_val"])


def model_of(num_classes: int, classes: tuple[str, ...] | None = None, preprocess: Preprocess = TINY) -> Model:
    return Model(nn.Flatten(), num_classes, preprocess, classes)


def contents(split: Split) -> list[bytes]:
    """Return each image as bytes, so that images are compared by what they show."""
    return [image.numpy().tobytes() for images, _ in split.batches(64) for image in images]


def draw(path: Path, seed: int, size: tuple[int, int] = (12, 10)) -> None:
    """Write an image of noise that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def fill(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """Make class folders with `counts` different images each, PNG and JPEG in turn."""
    for position, (name, count) in enumerate(counts.items()):
        for index in range(count):
            suffix = ".png" if index % 2 else ".JPEG"
            draw(folder / name / f"{index:03}{suffix}", seed + position * 1000 + index)
    return folder


def make_root(root: Path, layout: str, counts: dict[str, int]) -> Path:
    if layout == "flat":
        return fill(root, counts)
    fill(root / "train", counts)
    fill(root / "val", counts, seed=100_000)
    return root


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

    @pytest.mark.parametrize("calibration", [-1, 0, 201])
    def test_calibration_out_of_range_is_refused(self, calibration: int) -> None:
        text = refused(lambda: digits(digits_cnn(weights=None), calibration=calibration))
        assert f"dataset.calibration={calibration}" in text
        assert "1 to 200" in text

    def test_bigger_input_is_enlarged_and_normalised(self, data: Data) -> None:
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
        big = digits(model_of(10, preprocess=Preprocess(size=16, resize=20, mean=mean, std=std)), calibration=4)
        expected = nn.functional.interpolate(data.calibration.fetch([0, 1]), size=(16, 16), mode="bilinear")
        for channel in range(3):
            found = big.calibration.fetch([0, 1])[:, channel] * std[channel] + mean[channel]
            torch.testing.assert_close(found, expected[:, 0])

    def test_other_number_of_classes_is_refused(self) -> None:
        assert "7 classes and the data 10" in refused(lambda: digits(model_of(7)))


class TestStratifiedOrder:
    @pytest.mark.parametrize("counts", [(5, 5), (30, 10, 20), (1, 50), (7,)])
    def test_every_prefix_has_the_classes_in_proportion(self, counts: tuple[int, ...]) -> None:
        labels = np.repeat(np.arange(len(counts)), counts)
        order = stratified_order(labels.tolist(), seed=3)
        assert sorted(order.tolist()) == list(range(len(labels)))
        for size in range(1, len(labels) + 1):
            found = np.bincount(labels[order[:size]], minlength=len(counts))
            assert np.abs(found - size * np.asarray(counts) / len(labels)).max() <= 2

    def test_seed_decides(self) -> None:
        labels = [0, 1] * 20
        first, again, other = (stratified_order(labels, seed=seed).tolist() for seed in (0, 0, 1))
        assert first == again != other


class TestImageFolder:
    counts = {"cat": 12, "dog": 8, "owl": 4}  # noqa: RUF012

    @both_layouts
    def test_calibration_images_are_no_evaluation_images(self, tmp_path: Path, layout: str) -> None:
        data = image_folder(model_of(3), root=str(make_root(tmp_path, layout, self.counts)), calibration=6)
        calibration, evaluation = contents(data.calibration), contents(data.evaluation)
        assert not set(calibration) & set(evaluation)
        assert len(calibration) == 6
        assert len(evaluation) == (18 if layout == "flat" else 24)

    def test_flat_folder_has_no_training_images(self, tmp_path: Path) -> None:
        data = image_folder(model_of(3), root=str(fill(tmp_path, self.counts)), calibration=6)
        assert data.train is None
        assert "train/ and val/" in refused(data.training)

    def test_train_and_val_keep_their_roles(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "train_and_val", self.counts)
        data = image_folder(model_of(3), root=str(root), calibration=6)
        train, evaluation = contents(data.training()), contents(data.evaluation)
        assert len(train) == len(evaluation) == 24
        assert set(contents(data.calibration)) <= set(train)
        assert not set(train) & set(evaluation)

    def test_copies_in_a_flat_folder_do_not_cross_the_split(self, tmp_path: Path) -> None:
        """Every image of a class is there twice: without a check some copies would land on both sides."""
        root = fill(tmp_path, self.counts)
        for path in sorted((root / "cat").iterdir()):
            shutil.copy(path, path.with_name(f"copy_{path.name}"))
        data = image_folder(model_of(3), root=str(root), calibration=18)
        calibration, evaluation = set(contents(data.calibration)), set(contents(data.evaluation))
        assert not calibration & evaluation
        assert len(calibration | evaluation) == 24

    def test_copies_of_val_are_left_out_of_train(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, "train_and_val", self.counts)
        for path in sorted((root / "val" / "dog").iterdir()):
            shutil.copy(path, root / "train" / "dog" / f"copy_{path.name}")
        data = image_folder(model_of(3), root=str(root), calibration=24)
        assert len(data.evaluation) == 24
        assert not set(contents(data.training()) + contents(data.calibration)) & set(contents(data.evaluation))

    def test_folder_of_copies_leaves_nothing_to_evaluate_and_is_refused(self, tmp_path: Path) -> None:
        draw(tmp_path / "cat" / "one.png", 0)
        shutil.copy(tmp_path / "cat" / "one.png", tmp_path / "cat" / "two.png")
        assert str(tmp_path) in refused(lambda: image_folder(model_of(1), root=str(tmp_path), calibration=1))

    @both_layouts
    @pytest.mark.parametrize("calibration", [6, 12])
    def test_calibration_is_stratified(self, tmp_path: Path, layout: str, calibration: int) -> None:
        root = make_root(tmp_path, layout, self.counts)
        labels = image_folder(model_of(3), root=str(root), calibration=calibration).calibration.labels
        for label, count in enumerate(self.counts.values()):
            assert abs(int((labels == label).sum()) - calibration * count / 24) <= 1

    @both_layouts
    def test_labels_follow_the_class_folders(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        data = image_folder(model_of(3), root=str(root), calibration=6)
        assert data.classes == ("cat", "dog", "owl")
        truth = {
            read_image(path, TINY).numpy().tobytes(): data.classes.index(path.parent.name) for path in root.rglob("*.*")
        }
        for split in (data.evaluation, data.calibration):
            assert [truth[image] for image in contents(split)] == split.labels.tolist()

    @both_layouts
    def test_seed_decides_the_split(self, tmp_path: Path, layout: str) -> None:
        root = str(make_root(tmp_path, layout, self.counts))
        splits = [image_folder(model_of(3), root=root, calibration=6, seed=seed) for seed in (0, 0, 1)]
        first, again, other = (contents(data.calibration) for data in splits)
        assert first == again
        assert set(first) != set(other)

    def test_nested_and_hidden_folders(self, tmp_path: Path) -> None:
        fill(tmp_path, {"cat": 2, "dog": 2, ".cache": 3})
        draw(tmp_path / "cat" / "night" / "deep.PNG", 77)
        (tmp_path / "cat" / "notes.txt").write_text("no image")
        data = image_folder(model_of(2), root=str(tmp_path), calibration=1)
        assert len(data.evaluation) + len(data.calibration) == 5
        assert data.classes == ("cat", "dog")

    @both_layouts
    @pytest.mark.parametrize("calibration", [-1, 0, 25])
    def test_calibration_out_of_range_is_refused(self, tmp_path: Path, layout: str, calibration: int) -> None:
        root = make_root(tmp_path, layout, self.counts)
        text = refused(lambda: image_folder(model_of(3), root=str(root), calibration=calibration))
        assert f"dataset.calibration={calibration}" in text

    def test_flat_folder_keeps_an_image_to_evaluate(self, tmp_path: Path) -> None:
        root = str(fill(tmp_path, self.counts))
        assert len(image_folder(model_of(3), root=root, calibration=23).evaluation) == 1
        assert "24" in refused(lambda: image_folder(model_of(3), root=root, calibration=24))

    def test_different_classes_in_train_and_val_are_refused(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", {"cat": 2, "dog": 2})
        fill(tmp_path / "val", {"cat": 2, "owl": 2})
        assert "class folders" in refused(lambda: image_folder(model_of(2), root=str(tmp_path), calibration=1))

    def test_missing_folder_is_refused(self, tmp_path: Path) -> None:
        root = str(tmp_path / "absent")
        assert root in refused(lambda: image_folder(model_of(2), root=root))

    def test_file_as_folder_is_refused(self, tmp_path: Path) -> None:
        draw(tmp_path / "cat.png", 0)
        root = str(tmp_path / "cat.png")
        assert root in refused(lambda: image_folder(model_of(2), root=root))

    def test_empty_folder_is_refused(self, tmp_path: Path) -> None:
        assert str(tmp_path) in refused(lambda: image_folder(model_of(2), root=str(tmp_path)))

    @both_layouts
    def test_empty_class_folder_is_refused(self, tmp_path: Path, layout: str) -> None:
        root = make_root(tmp_path, layout, self.counts)
        (root / ("val/empty" if layout == "train_and_val" else "empty")).mkdir()
        assert "empty" in refused(lambda: image_folder(model_of(3), root=str(root), calibration=1))


class TestClasses:
    def columns(self, folder: Path, names: tuple[str, ...], model: Model) -> list[int] | None:
        """Return the logits that compete for a folder with these classes."""
        data = image_folder(model, root=str(fill(folder, dict.fromkeys(names, 2))), calibration=1)
        picked = data.logits(torch.arange(model.num_classes).repeat(2, 1))
        assert picked.shape == (2, len(names))
        return None if data.columns is None else picked[0].tolist()

    def test_wordnet_ids_pick_their_logits_among_imagenets(self, tmp_path: Path) -> None:
        found = self.columns(tmp_path, tuple(IMAGENETTE), model_of(1000, tuple(map(str, range(1000)))))
        assert found == list(IMAGENETTE.values())

    def test_imagenet_has_1000_different_ids(self) -> None:
        assert len(set(imagenet_wnids())) == 1000
        assert list(imagenet_wnids()) == sorted(imagenet_wnids())

    @pytest.mark.parametrize(
        ("known", "names", "columns"),
        [
            (("cat", "dog", "owl"), ("dog", "owl"), [1, 2]),
            (("owl", "dog", "cat"), ("cat", "dog", "owl"), [2, 1, 0]),
            (("cat", "dog"), ("cat", "dog"), None),
            (None, ("cat", "dog"), None),
        ],
        ids=["subset", "other order", "same", "model without names"],
    )
    def test_names_pick_their_logits(
        self, tmp_path: Path, known: tuple[str, ...] | None, names: tuple[str, ...], columns: list[int] | None
    ) -> None:
        assert self.columns(tmp_path, names, model_of(len(known or names), known)) == columns

    @pytest.mark.parametrize(
        ("model", "names", "unknown"),
        [
            (model_of(3, ("cat", "dog", "owl")), ("dog", "wolf"), "wolf"),
            (model_of(3), ("dog", "wolf"), "dog"),
            (model_of(1000), ("n01440764", "n99999999"), "n99999999"),
            (model_of(2, ("cat", "dog")), ("dog", "wolf"), "wolf"),
            (model_of(2, ("0", "1")), ("one", "zero"), "one"),
        ],
        ids=["subset", "model without names", "WordNet id", "as many", "as many, other words"],
    )
    def test_unknown_names_are_refused(
        self, tmp_path: Path, model: Model, names: tuple[str, ...], unknown: str
    ) -> None:
        fill(tmp_path, dict.fromkeys(names, 2))
        assert unknown in refused(lambda: image_folder(model, root=str(tmp_path), calibration=1))


def photo(size: tuple[int, int]) -> Image.Image:
    """Return smooth shapes with noise on them, so that resizing and cropping both show."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 9, height))
    waves = np.stack([np.sin(x + y), np.cos(x * y), np.sin(x) * np.cos(2 * y)], axis=-1)
    noise = np.random.default_rng(0).normal(0, 12, waves.shape)
    return Image.fromarray((waves * 100 + 128 + noise).clip(0, 255).astype(np.uint8))


class TestReadImage:
    @pytest.mark.parametrize("size", [(320, 200), (200, 320), (60, 50), (96, 96)])
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_equals_torchvisions_pipeline(self, tmp_path: Path, size: tuple[int, int], interpolation: str) -> None:
        from torchvision import transforms as T

        photo(size).save(tmp_path / "photo.jpg")
        preprocess = Preprocess(size=64, resize=80, interpolation=interpolation)
        pipeline = T.Compose(
            [
                T.Resize(80, T.InterpolationMode(interpolation)),
                T.CenterCrop(64),
                T.ToTensor(),
                T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            ]
        )
        expected = pipeline(Image.open(tmp_path / "photo.jpg").convert("RGB"))
        assert torch.equal(read_image(tmp_path / "photo.jpg", preprocess), expected)

    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [("L", ".png"), ("L", ".jpg"), ("1", ".png"), ("P", ".png"), ("RGBA", ".png"), ("CMYK", ".jpg")],
    )
    @pytest.mark.parametrize("channels", [1, 3])
    def test_modes_are_converted(self, tmp_path: Path, mode: str, suffix: str, channels: int) -> None:
        preprocess = Preprocess(size=32, resize=32, channels=channels, mean=(0.0,) * channels, std=(1.0,) * channels)
        converted = photo((32, 32)).convert(mode)
        converted.save(tmp_path / f"photo{suffix}", quality=100, subsampling=0)
        found = read_image(tmp_path / f"photo{suffix}", preprocess)
        expected = np.asarray(converted.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
        assert found.shape == (channels, 32, 32)
        assert np.abs(found.permute(1, 2, 0).numpy().squeeze() - expected).mean() < 0.02

    def test_16_bit_grey_keeps_its_shades(self, tmp_path: Path) -> None:
        ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32)
        Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "ramp.png")
        found = read_image(tmp_path / "ramp.png", Preprocess(size=32, resize=32, mean=(0.0,) * 3, std=(1.0,) * 3))
        np.testing.assert_allclose(found[0].numpy(), ramp / 65535, atol=0.01)

    @pytest.mark.parametrize(
        ("orientation", "turn"), [(3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)]
    )
    def test_exif_orientation_is_applied(self, tmp_path: Path, orientation: int, turn: Image.Transpose) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        photo((48, 40)).save(tmp_path / "turned.png", exif=exif)
        photo((48, 40)).transpose(turn).save(tmp_path / "upright.png")
        found, expected = (read_image(tmp_path / name, TINY) for name in ("turned.png", "upright.png"))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
    def test_unreadable_image_is_named(self, tmp_path: Path, damage: str) -> None:
        root = fill(tmp_path, {"cat": 2, "dog": 2})
        broken = root / "dog" / "001.png"
        kept = {"empty": b"", "text": b"no image at all", "truncated": broken.read_bytes()[:200]}
        broken.write_bytes(kept[damage])
        data = image_folder(model_of(2), root=str(root), calibration=1)
        assert str(broken) in refused(lambda: contents(data.evaluation) + contents(data.calibration))


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


def test_predictions_on_photographs_equal_a_plain_torchvision_loop(shared_data: Path, tmp_path: Path) -> None:
    """Every prediction of ResNet-18 among ImageNette's ten classes, four photographs of each."""
    for source in sorted((shared_data / "imagenette160" / "val").iterdir()):
        (tmp_path / source.name).mkdir()
        for path in sorted(source.iterdir())[:4]:
            (tmp_path / source.name / path.name).symlink_to(path)
    weights = shared_data / "weights" / "resnet18.pth"
    model = torchvision_model(name="resnet18", weights=str(weights))
    photographs = image_folder(model, root=str(tmp_path), calibration=1)
    with torch.no_grad():
        outputs = [photographs.logits(model.module(images)) for images, _ in photographs.evaluation.batches(13)]
    predicted = torch.cat(outputs).argmax(1)

    expected = plain_predictions(weights, tmp_path)
    assert predicted.tolist() == [expected[image] for image in contents(photographs.evaluation)]
    assert len(predicted) == 39
    assert (predicted == photographs.evaluation.labels).sum() >= 36
