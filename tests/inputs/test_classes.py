"""Classes: labels meet the right logits, unknown names are refused, and every part of an order shows every class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from image_folders import IMAGENETTE, fill, load, model_of

from pq_sweep.inputs.classes import imagenet_wnids, match_classes, stratified_order
from pq_sweep.inputs.datasets import image_folder
from pq_sweep.types import Model


class TestStratifiedOrder:
    @pytest.mark.parametrize("end", ["first", "last"])
    @pytest.mark.parametrize("counts", [(5, 5), (30, 10, 20), (1, 50), (7,)])
    def test_every_part_has_the_classes_in_proportion(self, counts: tuple[int, ...], end: str) -> None:
        labels = np.repeat(np.arange(len(counts)), counts)
        order = stratified_order(labels.tolist(), seed=3)
        order = order if end == "first" else order[::-1]
        assert sorted(order.tolist()) == list(range(len(labels)))
        for size in range(1, len(labels) + 1):
            found = np.bincount(labels[order[:size]], minlength=len(counts))
            assert np.abs(found - size * np.asarray(counts) / len(labels)).max() <= 2

    def test_seed_decides(self) -> None:
        labels = [0, 1] * 20
        first, again, other = (stratified_order(labels, seed=seed).tolist() for seed in (0, 0, 1))
        assert first == again != other


def test_imagenet_has_1000_different_ids() -> None:
    assert len(set(imagenet_wnids())) == 1000
    assert list(imagenet_wnids()) == sorted(imagenet_wnids())


def test_ids_are_in_the_order_of_the_published_list(shared_data: Path) -> None:
    assert list(imagenet_wnids()) == (shared_data / "imagenet_wnids.txt").read_text().split()


class TestColumns:
    def columns(self, folder: Path, names: tuple[str, ...], model: Model) -> list[int] | None:
        """Return the logits that compete for a folder with these classes."""
        root = str(fill(folder, dict.fromkeys(names, 2)))
        data = image_folder(model, root=root, calibration=1, evaluation=None, seed=0)
        picked = data.logits(torch.arange(model.num_classes).repeat(2, 1))
        assert picked.shape == (2, len(names))
        return None if data.columns is None else picked[0].tolist()

    @pytest.mark.parametrize("named", [True, False], ids=["named model", "model without names"])
    def test_wordnet_ids_pick_their_logits_among_imagenets(self, tmp_path: Path, named: bool) -> None:
        names = tuple(map(str, range(1000))) if named else None
        assert self.columns(tmp_path, tuple(IMAGENETTE), model_of(1000, names)) == list(IMAGENETTE.values())

    def test_all_wordnet_ids_need_no_columns(self) -> None:
        assert match_classes(model_of(1000), imagenet_wnids()) is None

    @pytest.mark.parametrize(
        ("known", "names", "columns"),
        [
            (("cat", "dog", "owl"), ("dog", "owl"), [1, 2]),
            (("owl", "dog", "cat"), ("cat", "dog", "owl"), [2, 1, 0]),
            (("cat", "dog"), ("cat", "dog"), None),
            (None, ("cat", "dog"), None),
            (("n01440764", "n02102040", "n1"), ("n02102040", "n1"), [1, 2]),
        ],
        ids=["subset", "other order", "same", "model without names", "ids as a model's own names"],
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
            (model_of(1000), ("cat", "n01440764"), "cat"),
            (model_of(2, ("cat", "dog")), ("dog", "wolf"), "wolf"),
            (model_of(2, ("0", "1")), ("one", "zero"), "one"),
        ],
        ids=["subset", "model without names", "WordNet id", "name before ids", "as many", "as many, other words"],
    )
    def test_unknown_names_are_refused(
        self, tmp_path: Path, model: Model, names: tuple[str, ...], unknown: str
    ) -> None:
        fill(tmp_path, dict.fromkeys(names, 2))
        call = lambda: image_folder(model, root=str(tmp_path), calibration=1, evaluation=None, seed=0)  # noqa: E731
        assert repr(unknown) in refused(call)

    def test_different_classes_in_train_and_val_are_named(self, tmp_path: Path) -> None:
        fill(tmp_path / "train", {"cat": 2, "dog": 2})
        fill(tmp_path / "val", {"cat": 2, "owl": 2})
        text = refused(lambda: load(tmp_path))
        assert "class folders" in text
        assert "dog" in text
        assert "owl" in text
        assert "cat" not in text.replace(str(tmp_path), "")
