"""What one layer's noise does to a network's accuracy: counted as by other code, and nothing stays changed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf
from torch import nn

from pq_sweep.compress.moments import Moments, window_of
from pq_sweep.study.__main__ import cases
from pq_sweep.study.layers import run
from pq_sweep.study.layers.charts import effects
from pq_sweep.study.layers.effects import METHODS, ORIGINAL, Altered, Effect, altered, correlation, loaded, noise_of
from pq_sweep.study.layers.gather import Network
from pq_sweep.study.layers.verdict import effect

IMAGES = 150
WORDS = ("layers=[stem.0.0,fc2]", "bits=[3,2]", "rows=1", "images=8", "inputs=9", "samples=0", f"evaluation={IMAGES}")


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), nn.Linear(7, 5), nn.ConvTranspose2d(4, 6, 2, stride=2)]
)
@pytest.mark.parametrize("method", METHODS)
def test_noise_is_that_of_the_layers_output(layer: nn.Conv2d, method: str) -> None:
    images = torch.randn(9, layer.weight.shape[1], 1, 1)[..., 0, 0] if isinstance(layer, nn.Linear) else torch.randn(
        3, layer.in_channels, 8, 8)  # fmt: skip
    seen = Moments(window_of(layer))
    seen.add(images)
    with torch.no_grad():
        layer.bias.zero_()  # type: ignore[union-attr]
        before = layer(images)
        found = noise_of(layer.weight, seen, 3, method)
        layer.weight.copy_(altered(layer.weight, 3, method))
        after = layer(images)
    assert found == pytest.approx(float((after - before).square().sum() / before.square().sum()), rel=1e-4)


def test_both_methods_leave_the_same_size() -> None:
    weight = torch.randn(8, 32)

    assert len(altered(weight, 2, "quantized").unique()) == 4
    kept = altered(weight, 4, "pruned")
    assert int((kept != 0).sum()) == weight.numel() * 4 // 16
    assert set(kept[kept != 0].tolist()) <= set(weight.flatten().tolist())
    assert kept[kept != 0].abs().min() >= weight[kept == 0].abs().max()


@pytest.mark.slow
class TestRun:
    """One run with accuracy, and what it leaves."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("study")
        assert run(cases("layers", [*WORDS, f"output={path}"]))
        return path

    @pytest.fixture(scope="class")
    def rows(self, folder: Path) -> list[dict[str, str]]:
        return list(csv.DictReader((folder / "accuracy.csv").open()))

    def test_accuracy_is_that_of_the_altered_network(self, rows: list[dict[str, str]]) -> None:
        (case,) = cases("layers", [*WORDS])
        model, data = loaded(OmegaConf.to_yaml(case.cfg, resolve=True))
        (images, labels), *_ = data.evaluation.batches(IMAGES)
        with torch.inference_mode():
            original = int((model.module(images).argmax(1) == labels).sum())
        assert [(row["layer"], row["bits"], row["method"]) for row in rows] == [
            (layer, bits, method) for layer in ("stem.0.0", "fc2") for bits in "23" for method in METHODS]  # fmt: skip
        for row in rows:
            part = model.module.get_submodule(row["layer"])
            before = part.weight.detach().clone()  # type: ignore[union-attr,operator]
            with torch.no_grad():
                part.weight.copy_(altered(before, int(row["bits"]), row["method"]))  # type: ignore[union-attr,operator]
                right = int((model.module(images).argmax(1) == labels).sum())
                part.weight.copy_(before)  # type: ignore[union-attr,operator]
            assert float(row["accuracy"]) == pytest.approx(right / IMAGES)
            assert float(row["drop_points"]) == pytest.approx(100 * (original - right) / IMAGES)
        assert len({row["accuracy"] for row in rows}) > 2

    def test_it_is_drawn_and_told(self, folder: Path) -> None:
        told = (folder / "verdict.txt").read_text()

        assert (folder / "figure6.svg").read_text().startswith("<svg")
        assert "with one layer pruned at a time, the rank correlation of its output's noise and" in told
        assert f"(4 cases, {IMAGES} images, at most " in told
        assert 'data-figure="figure6"' in (folder / "layers.html").read_text()

    def test_columns_are_those_of_the_page(self, rows: list[dict[str, str]]) -> None:
        page = (ROOT / "docs" / "studies.md").read_text().partition("column of `accuracy.csv`")[2]

        assert all(f"`{column}`" in page for column in rows[0])

    def test_answers_are_kept(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        computed, compute = list[str](), Altered.compute

        def noted(unit: Altered) -> Effect:
            computed.append(unit.layer)
            return compute(unit)

        monkeypatch.setattr(Altered, "compute", noted)
        before = (folder / "accuracy.csv").read_text()
        records = {path: json.loads(path.read_text()) for path in (folder / "slices").iterdir()}
        next(path for path, each in records.items() if each.get("method") == ORIGINAL).unlink()
        assert run(cases("layers", [*WORDS, f"output={folder}"]))
        assert computed == [ORIGINAL]
        assert (folder / "accuracy.csv").read_text() == before


def test_the_network_is_as_it_was() -> None:
    (case,) = cases("layers", [*WORDS])
    network = OmegaConf.to_yaml(case.cfg, resolve=True)
    model, _ = loaded(network)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    found = Altered(network, "", "stem.0.0", 2, "pruned", 0.5, 20).compute()

    assert found == replace(found, layer="stem.0.0", bits=2, method="pruned", noise=0.5, images=20)
    assert all((value == before[name]).all() for name, value in model.module.state_dict().items())


# Sentences


def one(noise: float, right: int, method: str = "pruned") -> Effect:
    return Effect("conv", 4, method, noise, right, 200)


def test_correlation_is_that_of_ranks() -> None:
    assert correlation([0.1, 0.2, 5.0], [0.0, 1.0, 50.0]) == pytest.approx(1)
    assert correlation([0.1, 0.2, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)
    assert correlation([0.1, 0.2], [0.0, 0.0]) is None


def test_sentences_say_how_much_was_seen() -> None:
    network = Network("net", [], (), (one(0.0, 190, ORIGINAL), one(0.1, 190), one(0.5, 100)))

    assert list(effect(network)) == [
        "with one layer pruned at a time, the rank correlation of its output's noise and the accuracy lost is 1.00"
        " (2 cases, 200 images, at most 45.0 points lost)."
    ]
    constant = replace(network, effects=(*network.effects[:2], one(0.5, 190)))
    assert "is not defined, as one of both never changes" in next(effect(constant))


def test_without_the_originals_answers_nothing_is_said() -> None:
    network = Network("net", [], (), (one(0.1, 190),))

    assert not list(effect(network))
    assert effects([network]) is None
    assert np.isinf(one(0.0, 1).db)
