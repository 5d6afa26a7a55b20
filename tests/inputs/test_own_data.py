"""What a user's data function returns: put right and said where that is plain, refused in one sentence otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import refused
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, SubsetRandomSampler, TensorDataset
from torchvision.transforms import functional as F

from pq_sweep.inputs.apart import COMPARED
from pq_sweep.inputs.own_data import accepted_data
from pq_sweep.inputs.own_model import accepted_model
from pq_sweep.types import Data, Model, Preprocess, Split

TEN = tuple("0123456789")
GREY = Preprocess(size=8, resize=8, channels=1, mean=(0.25,), std=(0.5,))
COLOUR = Preprocess(size=8, resize=10)


class Pairs(Dataset[Any]):
    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.images[index], self.labels[index]


def grey_bytes(count: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8), dtype=np.uint8)


def colour_bytes(count: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 12, 16, 3), dtype=np.uint8)


def floats(count: int = 30) -> Tensor:
    return torch.from_numpy(grey_bytes(count)).unsqueeze(1) / 255


LABELS = torch.arange(30) % 10


def model_of(preprocess: Preprocess = GREY) -> Model:
    return Model(nn.Linear(1, 10), 10, preprocess)


def data_of(images: Any, labels: Any = LABELS, **options: Any) -> Data:
    """Return data of (image, label) pairs of which the first 20 are for evaluation."""
    parts = [Split.of_dataset(Pairs(images[a:b], labels[a:b])) for a, b in ((0, 20), (20, 25), (25, 30))]
    return Data(*parts, **{"classes": TEN} | options)


def accepted(data: Any, preprocess: Preprocess = GREY) -> Data:
    return accepted_data(data, model_of(preprocess), "mine.make")


def images_of(split: Split) -> Tensor:
    return torch.cat([images for images, _ in split.batches(7)])


def test_sound_data_are_left_as_they_are() -> None:
    found = accepted(data_of(floats()))
    assert found.notes == ()
    assert torch.equal(images_of(found.evaluation), floats()[:20])
    assert found.evaluation.labels.dtype == torch.int64
    assert found.evaluation.labels.tolist() == LABELS[:20].tolist()


def prepared(picture: Image.Image, preprocess: Preprocess) -> Tensor:
    """What torchvision makes of a picture as the model's Preprocess says."""
    image = F.center_crop(F.resize(picture, [preprocess.resize], antialias=True), [preprocess.size])
    return F.normalize(F.to_tensor(image), list(preprocess.mean), list(preprocess.std))


@pytest.mark.parametrize(
    ("bytes_", "preprocess", "make"),
    [
        (grey_bytes(), GREY, Image.fromarray),
        (colour_bytes(), COLOUR, Image.fromarray),
        (colour_bytes(), COLOUR, lambda array: array),
        (colour_bytes(), COLOUR, lambda array: torch.from_numpy(array).permute(2, 0, 1)),
        (grey_bytes(), GREY, lambda array: array),
        (grey_bytes(), GREY, lambda array: torch.from_numpy(array)[None]),
    ],
    ids=["grey PIL", "PIL", "array", "tensor", "grey array", "grey tensor"],
)
def test_pictures_are_prepared_as_the_model_says(bytes_: np.ndarray, preprocess: Preprocess, make: Any) -> None:
    found = accepted(data_of([make(array) for array in bytes_]), preprocess)
    expected = torch.stack([prepared(Image.fromarray(array), preprocess) for array in bytes_[:20]])
    assert torch.allclose(images_of(found.evaluation), expected, atol=1e-6)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("The evaluation, calibration and train images came as ")
    assert "were resized, cropped and normalised as the model's Preprocess says." in found.notes[0]


@pytest.mark.parametrize(
    "make",
    [lambda image: image.numpy(), lambda image: image.double(), lambda image: image.double().numpy()],
    ids=["numpy", "double", "double numpy"],
)
def test_other_floats_become_float32_tensors(make: Any) -> None:
    found = accepted(data_of([make(image) for image in floats()]))
    assert torch.equal(images_of(found.evaluation), floats()[:20])
    assert "float32" in found.notes[0]


COLOURS = torch.rand(30, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("images", "preprocess", "how"),
    [
        (floats().permute(0, 2, 3, 1), GREY, "with channels last and were turned to channels first"),
        (COLOURS.permute(0, 2, 3, 1), COLOUR, "with channels last and were turned to channels first"),
        (COLOURS.permute(0, 2, 3, 1).numpy(), COLOUR, "with channels last and were turned to channels first"),
        (floats()[:, 0], GREY, "without channels and were given one"),
    ],
    ids=["grey", "colours", "array", "no channels"],
)
def test_channels_that_are_plainly_elsewhere_are_put_first(images: Any, preprocess: Preprocess, how: str) -> None:
    found = accepted(data_of(images), preprocess)
    assert torch.equal(images_of(found.evaluation), (COLOURS if preprocess is COLOUR else floats())[:20])
    assert found.notes[-1] == f"The evaluation, calibration and train images came {how}."
    assert len(found.notes) == (2 if isinstance(images, np.ndarray) else 1)


def test_images_whose_channels_may_be_first_stay_as_they_are() -> None:
    cubes = torch.rand(30, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    found = accepted(data_of(cubes), Preprocess(size=3, resize=3))
    assert torch.equal(images_of(found.evaluation), cubes[:20])
    assert found.notes == ()


def test_half_images_become_float32() -> None:
    found = accepted(Data(Split.of_tensors(floats().half(), LABELS), Split.of_tensors(floats(), LABELS), None, TEN))
    assert torch.equal(images_of(found.evaluation), floats().half().float())
    assert found.notes == ("The evaluation images came as float16 and were converted to float32.",)


@pytest.mark.parametrize(
    "labels",
    [
        torch.nn.functional.one_hot(LABELS, 10),
        torch.nn.functional.one_hot(LABELS, 10).float().numpy(),
        [row.tolist() for row in torch.nn.functional.one_hot(LABELS, 10)],
    ],
    ids=["tensor", "array", "lists"],
)
def test_one_hot_labels_are_read(labels: Any) -> None:
    found = accepted(data_of(floats(), labels))
    assert found.evaluation.labels.tolist() == LABELS[:20].tolist()
    assert found.notes == ("The evaluation, calibration and train labels came one-hot.",)


@pytest.mark.parametrize(
    "labels",
    [LABELS.tolist(), LABELS.numpy(), LABELS.to(torch.uint8), LABELS.float(), list(LABELS), LABELS[:, None]],
    ids=["list", "numpy", "uint8", "float", "tensors", "column"],
)
def test_class_numbers_of_any_type_are_read(labels: Any) -> None:
    found = accepted(data_of(floats(), labels))
    assert found.evaluation.labels.dtype == torch.int64
    assert found.evaluation.labels.tolist() == LABELS[:20].tolist()


def test_an_empty_training_part_is_none() -> None:
    data = data_of(floats())
    assert accepted(Data(data.evaluation, data.calibration, data.train.take(0), TEN)).train is None


def spoilt(value: float, index: int) -> Tensor:
    images = floats()
    images[index, 0, 3, 3] = value
    return images


def one_larger() -> list[Tensor]:
    return [*floats()[:3], torch.zeros(1, 9, 9), *floats()[4:]]


REFUSED = {
    "no Data": (lambda: Split.of_tensors(floats(), LABELS), "mine.make gives a pq_sweep.types.Split; return"),
    "no evaluation": (lambda: Data(None, None, None, TEN), "evaluation of mine.make gives None; return pq_sweep.types"),
    "no Split": (lambda: Data("a.npz", None, None, TEN), "evaluation of mine.make gives 'a.npz'; return pq_sweep.type"),
    "from one": (lambda: data_of(floats(), LABELS + 1), "are numbers from 0 to 9, so take 1 from each"),
    "minus": (lambda: data_of(floats(), torch.where(LABELS == 3, -1, LABELS)), "2 of 20 evaluation labels are none of"),
    "too many": (lambda: data_of(floats(), LABELS * 2), "check them against the model's classes"),
    "names": (lambda: data_of(floats(), [TEN[n] for n in LABELS]), "these are str, first '0'"),
    "soft": (lambda: data_of(floats(), torch.full((30, 10), 0.1)), "labels come as a float32 tensor (20, 10)"),
    "halves": (lambda: data_of(floats(), LABELS + 0.5), "labels come as a float32 tensor (20,)"),
    "many hot": (lambda: data_of(floats(), torch.ones(30, 10)), "labels come as a float32 tensor (20, 10)"),
    "empty": (lambda: Data(data_of(floats()).evaluation.take(0), data_of(floats()).calibration, None, TEN),
              "mine.make gives no evaluation images"),
    "wide": (lambda: data_of(nn.functional.pad(floats(), (0, 4))), "(1, 1, 8, 12) where float32 (1, 1, 8, 8)"),
    "colour": (lambda: data_of(floats().expand(-1, 3, -1, -1)), "(1, 3, 8, 8) where float32 (1, 1, 8, 8)"),
    "no channels": (lambda: data_of(floats()[:, 0, :7]), "(1, 7, 8) where float32 (1, 1, 8, 8)"),
    "bytes": (lambda: data_of([torch.zeros(2, 8, 8, dtype=torch.uint8)] * 30), "(2, 8, 8), which are no (H, W), (H, W"),
    "bytes both ways": (lambda: data_of([torch.zeros(3, 8, 3, dtype=torch.uint8)] * 30), "may be first or last; give"),
    "channels last": (lambda: data_of(nn.functional.pad(floats(), (0, 4)).permute(0, 2, 3, 1)), "(1, 8, 12, 1) where"),
    "colours last": (lambda: data_of(floats().permute(0, 2, 3, 1).expand(-1, -1, -1, 3)), "(1, 8, 8, 3) where"),
    "integers": (lambda: data_of((floats() * 16).to(torch.int64)), "come as a int64 tensor (1, 1, 8, 8)"),
    "mixed": (lambda: data_of([Image.fromarray(grey_bytes()[0]), *floats()[1:]]), "give all images in one form"),
    "uint16": (lambda: data_of(list(grey_bytes().astype(np.uint16))), "image 0 is a uint16 numpy array (8, 8);"),
    "classes": (lambda: data_of(floats(), classes=10), "mine.make gives classes=10; give the names of the classes"),
    "paths": (lambda: data_of(["a.png"] * 30), "evaluation image 0 is 'a.png'"),
    "numbers of classes": (lambda: data_of(floats(), classes={"cat": 1, "dog": 2}), "mine.make gives classes=a dict;"),
    "other names": (lambda: data_of(floats(), classes=("a", "b")), "gives 2 names of classes for 10 logits; give a"),
    "other columns": (lambda: data_of(floats(), columns=torch.tensor([1, 2])), "one of the model's 10 logits for"),
    "columns beyond": (lambda: data_of(floats(), columns=torch.arange(10) + 1), "one of the model's 10 logits for"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "sentence"), REFUSED.values(), ids=REFUSED)
def test_anything_else_is_refused_in_one_sentence(make: Any, sentence: str) -> None:
    assert sentence in refused(lambda: accepted(make()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("index", "part"), [(0, "evaluation"), (18, "evaluation"), (27, "train")])
def test_values_that_are_not_finite_are_named(value: float, index: int, part: str) -> None:
    place = index - 25 if part == "train" else index
    text = refused(lambda: images_of(getattr(accepted(data_of(spoilt(value, index))), part)))
    assert text == f"{part} image {place} has values that are not finite; leave it out or mend it."


def test_a_part_keeps_its_own_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPARED, "evaluation", 1)  # or loading finds the image
    data = accepted(data_of(spoilt(float("nan"), 18)))
    assert "evaluation image 18 has" in refused(lambda: images_of(data.evaluation))
    images_of(data.evaluation.subset([0, 1, 17, 19]))


def test_images_of_several_sizes_are_named() -> None:
    assert "evaluation image 3 is (1, 9, 9) and another beside it (1, 8, 8)" in refused(
        lambda: images_of(accepted(data_of(one_larger())).evaluation)
    )


class Relabelled(Pairs):
    """Gives other labels than its `targets`, as a data set with coarse classes does."""

    def __init__(self) -> None:
        super().__init__(floats(), LABELS)
        self.targets = LABELS.tolist()

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image, int(label) // 2


class Turned(Dataset[Any]):
    """Another order of a data set, whose attributes it passes on."""

    def __init__(self) -> None:
        self.inner = Relabelled()

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)

    def __getitem__(self, index: int) -> Any:
        return self.inner[29 - index]


def test_labels_are_those_that_a_data_set_gives() -> None:
    assert Split.of_dataset(Relabelled()).labels.tolist() == (LABELS // 2).tolist()
    assert Split.of_dataset(Turned()).labels.tolist() == (LABELS // 2).flip(0).tolist()


class Means(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


class Noisy(Pairs):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + torch.rand(1), label


PAIRS = [(image, int(label)) for image, label in zip(floats(), LABELS, strict=True)]
TAKEN: dict[str, tuple[Any, str]] = {
    "dictionaries": ([{"image": x, "label": y} for x, y in PAIRS], "dictionaries, of which image and label were taken"),
    "pixel_values": (
        [{"pixel_values": x, "labels": y, "id": 7} for x, y in PAIRS],
        "dictionaries, of which pixel_values and labels were taken",
    ),
    "more entries": ([(x, y, "a.png") for x, y in PAIRS], "3 entries and were taken with entry 0 as image and entry 1"),
    "a path first": ([("a.png", x, y) for x, y in PAIRS], "3 entries and were taken with entry 1 as image and entry 2"),
    "a path between": ([(x, "a.png", y) for x, y in PAIRS], "taken with entry 0 as image and entry 2 as label"),
    "a number at the end": ([(x, y, n) for n, (x, y) in enumerate(PAIRS)], "entry 0 as image and entry 1 as label"),
    "label first": ([(y, x) for x, y in PAIRS], "2 entries and were taken with entry 1 as image and entry 0 as label"),
    "one-hot": ([(x, torch.eye(10)[y], "a.png") for x, y in PAIRS], "entry 0 as image and entry 1 as label"),
    "a DataLoader": (DataLoader(PAIRS, 4, shuffle=True), "in a DataLoader, whose data set was taken"),
    "a DataLoader of dictionaries": (
        DataLoader([{"img": x, "label": y} for x, y in PAIRS]), "dictionaries, of which img and label were taken"
    ),
    "a pair": ((floats(), LABELS), "as all images and all labels"),
    "arrays": ([floats().numpy(), LABELS.numpy()], "as all images and all labels"),
    "columns": ({"image": floats(), "label": LABELS.tolist()}, "as all images and all labels"),
    "a tensor data set": (TensorDataset(floats(), LABELS), ""),
    "pairs": (PAIRS, ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", TAKEN)
def test_samples_whose_meaning_is_plain_are_taken_and_said(kind: str) -> None:
    """Wrapped by the user, given as they are, and as a part of them."""
    samples, how = TAKEN[kind]
    for given in (Split.of_dataset(samples), samples, Split.of_dataset(samples).take(30)):
        found = accepted(Data(given, None, None, TEN))
        assert torch.equal(images_of(found.evaluation), floats())
        assert found.evaluation.labels.tolist() == LABELS.tolist()
        assert bool(how) == bool(found.notes)
        assert how in " ".join(found.notes)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(PAIRS)


class Endless(Dataset[Any]):
    def __getitem__(self, index: int) -> Any:
        return PAIRS[index % 30]


UNCLEAR: dict[str, tuple[Callable[[], Any], str]] = {
    "a generator": (lambda: (pair for pair in PAIRS), "come as a generator, from which none can be taken by number; g"),
    "a stream": (Stream, "a Stream, from which none can be taken by number; give Split.of_dataset(list(samples)) if t"),
    "a DataLoader of a stream": (lambda: DataLoader(Stream()), "a Stream, from which none can be taken by number"),
    "no length": (Endless, "or a data set with __len__ and __getitem__"),
    "several data sets": (lambda: {"train": PAIRS}, "a dict, from which none can be taken by number; give Split.of_da"),
    "a collate_fn": (lambda: DataLoader(PAIRS, collate_fn=list), "a collate_fn of its own; give Split.of_dataset(load"),
    "a sampler": (lambda: DataLoader(PAIRS, sampler=SubsetRandomSampler([1])), "a sampler of its own; give Split.of_d"),
    "two labels": (
        lambda: [{"img": x, "fine_label": y, "coarse_label": 0} for x, y in PAIRS],
        "dictionaries of img, fine_label, coarse_label, and nothing says which is the image and which the label; give",
    ),
    "two images": (lambda: [(x, x, y) for x, y in PAIRS], "tuples of Tensor, Tensor, int, and nothing says which is"),
    "images alone": (floats, "a Tensor each, and nothing says which is the image and which the label; give (image, la"),
    "one entry": (lambda: TensorDataset(floats()), "a tuple each, and nothing says which"),
    "fewer labels": (lambda: {"image": floats(), "label": [1, 2]}, "there are 30 images and 2 labels"),
    "boxes": (lambda: [(x, {"boxes": y}) for x, y in PAIRS], "labels have to be the numbers of classes, and these are"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNCLEAR)
def test_samples_of_which_nothing_says_what_they_are_are_refused_with_advice(kind: str) -> None:
    make, sentence = UNCLEAR[kind]
    assert sentence in refused(lambda: Split.of_dataset(make()))
    assert sentence in refused(lambda: accepted(Data(make(), None, None, TEN)))


def test_classes_without_an_image_to_evaluate_are_named() -> None:
    few = Data(Split.of_tensors(floats(), LABELS % 8), None, None, TEN)
    note = "classes without an image to evaluate: 2 of 10 (8, 9)."
    assert accepted(few).notes == (note,)
    assert accepted_data(few, model_of(), "pq_sweep.inputs.datasets.fake").notes == ()


def test_images_that_change_each_time_are_for_training_only() -> None:
    sound, noisy = (Split.of_dataset(kind(floats(), LABELS)) for kind in (Pairs, Noisy))
    text = refused(lambda: accepted(Data(noisy, sound, None, TEN)))
    assert text.startswith("the evaluation images are others each time that they are fetched")
    assert "the calibration images are others" in refused(lambda: accepted(Data(sound, noisy, None, TEN)))
    assert accepted(Data(sound, None, noisy, TEN)).train is not None


def test_lists_in_memory_are_taken_as_tensors_are() -> None:
    pictures = [Image.fromarray(picture) for picture in grey_bytes()]
    for images, labels in ((list(floats()), LABELS.tolist()), (floats(), LABELS.tolist()), (list(floats()), LABELS)):
        found = accepted(Data(Split.of_tensors(images, labels), None, None, TEN))
        assert torch.equal(images_of(found.evaluation), floats())
        assert found.evaluation.labels.tolist() == LABELS.tolist()
    assert len(accepted(Data(Split.of_tensors(pictures, LABELS), None, None, TEN)).evaluation) == 30


def test_each_image_has_a_label() -> None:
    assert refused(lambda: Split.of_tensors(floats(), LABELS[:20])).startswith("there are 30 images and 20 labels")


@pytest.mark.parametrize(
    "names",
    [list(TEN), np.array(TEN), tuple(range(10)), {name: number for number, name in enumerate(TEN)},
     dict(enumerate(TEN)), {str(number): f"{number}" for number in range(10)}],
    ids=["list", "array", "numbers", "class_to_idx", "id2label", "id2label of JSON"],
)  # fmt: skip
def test_names_of_classes_in_another_form_are_taken(names: Any) -> None:
    assert accepted(data_of(floats(), classes=names)).classes == TEN
    assert accepted_model(replace(model_of(), module=Means(), classes=names), "mine.make").classes == TEN


def test_what_may_be_left_out_is_filled_in() -> None:
    found = accepted(Data(Split.of_tensors(floats(), LABELS), None, None, None))
    assert len(found.calibration) == 0
    assert found.classes == TEN
    part = accepted(Data(Split.of_tensors(floats(), LABELS // 5), None, None, ("a", "b"), [3, 4]))
    assert part.columns.tolist() == [3, 4]
