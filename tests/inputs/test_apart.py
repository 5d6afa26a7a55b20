"""No image calibrates or trains a network and then evaluates it, in data of users' own."""

from __future__ import annotations

import pytest
import torch
from conftest import refused
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from pq_sweep.inputs.own_data import accepted_data
from pq_sweep.types import Data, Model, Preprocess, Split

MODEL = Model(
    nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), 2, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
)
IMAGES = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 2


def split(chosen: slice, images: Tensor = IMAGES) -> Split:
    return Split.of_tensors(images[chosen], LABELS[chosen])


def accepted(evaluation: Split, calibration: Split | None, train: Split | None = None) -> Data:
    return accepted_data(Data(evaluation, calibration, train, ("a", "b")), MODEL, "my_data.make")  # type: ignore[arg-type]


def test_images_that_calibrate_are_no_evaluation_images() -> None:
    text = refused(lambda: accepted(split(slice(0, 20)), split(slice(10, 30))))
    assert text.startswith("my_data.make gives images for calibration that are evaluation images too (10 of 20 that")
    assert accepted(split(slice(0, 20)), split(slice(20, 40))).notes == ()


def test_nor_are_those_that_train() -> None:
    text = refused(lambda: accepted(split(slice(0, 20)), None, split(slice(0, 20))))
    assert text.startswith("my_data.make gives images for train that are evaluation images too (20 of 20")


def test_other_labels_or_another_order_do_not_make_other_images() -> None:
    turned = Split.of_tensors(IMAGES[:20].flip(0), 1 - LABELS[:20])
    refused(lambda: accepted(split(slice(0, 20)), turned))


def test_parts_of_one_data_set_are_compared_too() -> None:
    whole = TensorDataset(IMAGES, LABELS)
    first, second = (Split.of_dataset(Subset(whole, [*part])) for part in (range(20), range(20, 40)))
    assert accepted(first, second).notes == ()
    refused(lambda: accepted(first, Split.of_dataset(whole)))


def test_images_that_are_there_twice_are_told() -> None:
    images = IMAGES.clone()
    images[25] = images[3]
    (note,) = accepted(split(slice(0, 20), images), split(slice(20, 40), images)).notes
    assert note == "Of 20 calibration images that were compared, 1 are evaluation images too."


@pytest.mark.parametrize("count", [5000, 5001])
def test_of_many_images_some_are_compared(count: int) -> None:
    images = torch.rand(count, 1, 8, 8)
    whole = Split.of_tensors(images, torch.arange(count) % 2)
    assert "(300 of 300" in refused(lambda: accepted(whole, whole))
    assert "(300 of 300" in refused(lambda: accepted(whole, None, whole))
