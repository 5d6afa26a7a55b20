"""The study of layers as a command: what it finds is in order, is kept, and is told as it is."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from random_networks import fresh

from pq_sweep.study import Case
from pq_sweep.study.__main__ import cases
from pq_sweep.study.layers import run, slices
from pq_sweep.study.layers.charts import boxes
from pq_sweep.study.layers.gather import Network, chosen, slices_of
from pq_sweep.study.layers.options import options_of
from pq_sweep.study.layers.slices import Found, Slice, measured
from pq_sweep.study.layers.verdict import advice, better, summary
from pq_sweep.types import UserError

SMALL = ("layers=[stem.*,fc2]", "bits=[4,2]", "rows=3", "images=8", "inputs=12", "samples=2", "limit_s=20")


def asked(*words: str) -> list[Case]:
    return cases("layers", [*words])


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "layers.csv").open()))


@pytest.mark.slow
class TestRun:
    """One run, and what it leaves."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        path = tmp_path_factory.mktemp("study")
        assert run(asked(*SMALL, f"output={path}"))
        return path

    def test_ratios_are_in_order(self, folder: Path) -> None:
        rows = rows_of(folder)

        assert [(row["layer"], row["bits"]) for row in rows] == [
            (layer, bits) for layer in ("stem.0.0", "stem.1.0", "fc2") for bits in "24"]  # fmt: skip
        for row in rows:
            nearest, heuristic, bound, magnitude, obs, exact = (
                float(row[f"{name}_db"]) for name in ("nearest", "heuristic", "bound", "magnitude", "obs", "exact")
            )
            assert nearest <= heuristic <= bound
            assert magnitude <= exact + 1e-6
            assert obs <= exact
            assert row["proven"] == row["rows"]

    def test_everything_is_written(self, folder: Path) -> None:
        page, told = (folder / "layers.html").read_text(), (folder / "verdict.txt").read_text().splitlines()

        assert (folder / "figure4.svg").read_text().startswith("<svg")
        assert told[0].startswith("digits_cnn: at 2 bits ")
        assert [line.partition(":")[0].strip() for line in told[1:]] == ["stem.0.0", "stem.1.0", "fc2"]
        assert all(line.partition(": ")[2] in page for line in told)

    def test_columns_are_those_of_the_page(self, folder: Path) -> None:
        page = (ROOT / "docs" / "studies.md").read_text().partition("column of `layers.csv`")[2]

        assert all(f"`{column}`" in page for column in rows_of(folder)[0])

    def test_a_second_run_computes_only_what_is_missing(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before, computed = rows_of(folder), list[tuple[str, int]]()

        def noted(here: Slice, bits: int, *others: Any) -> Found:
            computed.append((here.layer, bits))
            return measured(here, bits, *others)

        monkeypatch.setattr(slices, "measured", noted)
        kept = {path: json.loads(path.read_text()) for path in (folder / "slices").iterdir()}
        compared = {path: (each["layer"], each["bits"]) for path, each in kept.items() if "signal" in each}
        lost = next(path for path, what in compared.items() if what == ("fc2", 4))
        lost.write_text("{")
        run(asked(*SMALL, f"output={folder}"))
        assert computed == [("fc2", 4)]
        run(asked(*SMALL, f"output={folder}"))
        assert computed == [("fc2", 4)]
        times = {name for name in before[0] if name.endswith("_s")}
        without = [
            [{k: v for k, v in row.items() if k not in times} for row in rows] for rows in (before, rows_of(folder))
        ]
        assert without[0] == without[1]
        others = [word.replace("images=8", "images=9") for word in SMALL]  # other inputs, other results
        run(asked(*others, f"output={folder}"))
        assert len(computed) == 1 + len(before)


# Slices


def a_slice(seed: int = 0, inputs: int = 10) -> Slice:
    random = np.random.default_rng(seed)
    given = random.standard_normal((30, inputs)) @ (np.eye(inputs) + random.standard_normal((inputs, inputs)) / 3)
    return Slice("layer", 0, 0, random.standard_normal((4, inputs)), given.T @ given, {2: 1.05, 4: 0.34, 8: 0.031})


@pytest.mark.parametrize("change", ["dead input", "zero row", "few samples", "nothing", "one input"])
def test_peculiar_slices_have_ratios_in_order(change: str) -> None:
    here = a_slice(inputs=1 if change == "one input" else 10)
    rows, moments = here.rows.copy(), here.moments.copy()
    if change == "dead input":
        moments[3], moments[:, 3] = 0, 0
    elif change == "zero row":
        rows[1] = 0
    elif change == "few samples":
        moments = moments[:, :2] @ moments[:2]
    elif change == "nothing":
        moments[:] = 0
    for bits in (2, 8):
        found = measured(replace(here, rows=rows, moments=moments), bits, 2, 20)
        if change == "nothing":
            assert found.db("nearest") is None
            continue
        ratios = [found.db(name) for name in ("nearest", "heuristic", "bound", "obs", "exact")]
        assert all(ratio is not None for ratio in ratios)
        assert ratios[0] <= ratios[1] + 1e-3  # type: ignore[operator]
        assert ratios[1] <= ratios[2] + 1e-3  # type: ignore[operator]
        assert ratios[3] <= ratios[4]  # type: ignore[operator]
        assert found.is_proven


def test_what_is_not_in_time_is_not_proven() -> None:
    found = measured(a_slice(inputs=60), 8, 1, 1e-6)

    assert found.proven == 0
    assert found.exact <= found.obs
    assert better(found) != "quantize"


def test_the_key_is_of_all_that_counts() -> None:
    here = a_slice()
    others = [replace(here, moments=here.moments + 1e-9), replace(here, rows=-here.rows), replace(here, steps={2: 1.0}),
              replace(here, layer="other")]  # fmt: skip

    assert len({each.key(2, 5, 1.0) for each in (here, *others)}) == 5
    assert len({here.key(2, 5, 1.0), here.key(4, 5, 1.0), here.key(2, 6, 1.0), here.key(2, 5, 2.0)}) == 4
    assert here.key(2, 5, 1.0) == a_slice().key(2, 5, 1.0)


def test_slices_are_whole_channels_spread_over_a_layer() -> None:
    from torch import nn, randn

    from pq_sweep.compress.moments import Moments, window_of

    layer = nn.Conv2d(32, 20, 3)
    seen = Moments(window_of(layer))
    seen.add(randn(2, 32, 6, 6))
    options = options_of(asked("slices=3", "rows=5", "bits=[4]"))
    found = list(slices_of("layer", (layer, "weight"), seen, options))
    weight = layer.weight.detach().double().numpy().reshape(20, -1)

    assert [each.first for each in found] == [0, 108, 252]
    assert all(each.rows.shape == (5, 36) for each in found)
    assert (found[1].rows == weight[[0, 4, 9, 14, 19], 108:144]).all()
    assert found[2].moments == pytest.approx(seen.sums[0][0, 252:, 252:].numpy())


def test_layers_are_chosen_by_name_and_pattern() -> None:
    model = fresh()

    assert list(chosen(model, ("residual.*", "fc2"))) == ["residual.conv1", "residual.conv2", "fc2"]
    assert len(chosen(model, ())) == 7
    with pytest.raises(UserError, match=r"layers=nonsense matches no layer; layers are stem\.0\.0, "):
        chosen(model, ("nonsense",))


# Sentences


def found_with(heuristic: float, bound: float, exact: float, proven: int = 4, **others: Any) -> Found:
    record = {"layer": "conv", "group": 0, "first": 0, "inputs": 32, "rows": 4, "bits": 2, "signal": 1000.0,
              "nearest": 90.0, "kept": 4, "magnitude": 95.0, "obs": exact, "heuristic_s": 0.0, "bound_s": 0.0,
              "obs_s": 0.0, "exact_s": 0.0}  # fmt: skip
    return Found(**{**record, "heuristic": heuristic, "bound": bound, "exact": exact, "proven": proven, **others})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (found_with(10, 5, 20), "quantize"),
        (found_with(10, 5, 20, proven=3), "open"),  # another set may keep more
        (found_with(10, 5, 4), "prune"),
        (found_with(10, 5, 4, proven=0), "prune"),  # whatever else could be found is better still
        (found_with(10, 5, 7), "open"),
    ],
)
def test_a_method_is_better_only_if_no_algorithm_could_change_that(found: Found, expected: str) -> None:
    assert better(found) == expected


def test_sentences_count_slices() -> None:
    found = [found_with(10, 5, 20, bits=4), found_with(10, 5, 4), found_with(10, 5, 7, layer="other")]

    assert summary(found) == (
        "at 2 bits pruning keeps more of 1 of 2 slices and 1 of 2 slices stay undecided, whatever the algorithm; at 4"
        " bits quantization keeps more of 1 of 1 slices, whatever the algorithm."
    )
    assert advice(found[:2]) == "quantize at 4 bits, prune at 2 bits."
    assert advice(found[2:]) == "undecided at 2 bits."


def test_the_figure_has_a_box_for_each_slice_with_finite_ratios() -> None:
    drawn = boxes([Network("net", [found_with(10, 5, 20), found_with(0, 0, 20)], ())])

    assert "1 of 2 have no finite place" in drawn.caption
    (value,) = [each for values in drawn.spec["datasets"].values() for each in values if "layer" in each]
    assert value | {"heuristic": 20.0, "bound": 23.01, "obs": 16.99, "better": "quantize"} == value


# Options


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["rows=0"], "rows=0 is out of range; give a whole number from 1 on."),
        (["samples=-1"], "samples=-1 is out of range; give a whole number from 0 on."),
        (["limit_s=0"], "limit_s=0 is out of range; give seconds, more than 0."),
        (["bits=[1]"], "bits=[1] is not valid"),
        (["hydra/launcher=slurm", "hydra.launcher.mem_gb=16GB"], "hydra.launcher.mem_gb='16GB' is no number"),
        (["hydra/launcher=slurm,local_parallel"], "a study takes hydra/launcher and its options once"),
        (["hydra.sweep.dir=here"], "hydra.sweep.dir is an option of sweeps; a study writes into output=FOLDER."),
        (["layers=5"], "layers=5 is not valid"),
        (["images=1000"], "images=1000 does not fit the"),
        (["layers=[nothing]"], "layers=nothing matches no layer"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        run(asked(*words, f"output={tmp_path}"))
    assert told in str(caught.value)
