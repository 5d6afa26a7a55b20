"""The table of what works on which model: the command that makes it, and that the one in docs/ is whole."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, python

from benchmarks.timm_models import FAMILIES

CELL = re.compile(r"ok \d+\.\d s, \d\.\d\d, -?\d+ dB")
BUILT = re.compile(r"6 engines \d+\.\d s, \d+\.\d MB")
BELOW = re.compile(r"(1 engine|2 engines) \d+\.\d s, \d+\.\d MB")  # FP8, and INT4 where there is a layer for it
NO_LAYER = re.compile(r"refused: quantizer=int4 finds no linear layer to quantize .+\.")
SENTENCE = re.compile(r"refused: pruner=remove cannot follow the channels .+ \(.+\); use .+\.")
MODELS = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if "name: ???" not in path.read_text()}


def rows(table: Path) -> dict[str, list[str]]:
    """Return the cells of each model's row."""
    lines = [line for line in table.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row for name, *row in cells if name not in ("model", "---")}


@pytest.mark.slow
def test_every_cell_of_a_model_is_run(tmp_path: Path, environment: dict[str, str]) -> None:
    table = tmp_path / "support.md"
    command = ["-m", "benchmarks.support", str(table), "--only", "digits_cnn"]
    done = python(command, ROOT, environment, timeout=600)

    assert done.returncode == 0, done.stderr
    weights, *cells = rows(table)["digits_cnn"]
    assert weights == "packaged"
    *cells, built, fp8, int4, below, four = cells
    assert BUILT.fullmatch(built), built
    assert BELOW.fullmatch(below), below
    assert len(cells) == 6
    assert all(CELL.fullmatch(cell) for cell in [*cells, fp8, int4, four]), cells
    sizes = [float(cell.split(", ")[1]) for cell in cells]
    zero_fill, removed, exported, fp16, int8, both = sizes
    assert zero_fill > 0.95 > removed > both
    assert exported > fp16 > int8 > both
    assert float(fp8.split(", ")[1]) < int8
    assert float(four.split(", ")[1]) < int8


def test_the_documented_table_has_every_model_and_no_gap() -> None:
    found = rows(ROOT / "docs" / "support.md")

    theirs = {f"timm.{name}" for name in FAMILIES}
    assert found.keys() == MODELS | theirs
    assert len(theirs) == 12
    for name, (_, *cells, built, fp8, int4, below, four) in found.items():
        assert len(cells) == 6, name
        assert CELL.fullmatch(fp8), (name, fp8)
        assert CELL.fullmatch(four), (name, four)
        assert CELL.fullmatch(int4) or NO_LAYER.fullmatch(int4), (name, int4)
        assert BELOW.fullmatch(below), (name, below)
        assert below.startswith("2") == bool(CELL.fullmatch(int4)), (name, int4, below)
        assert BUILT.fullmatch(built), (name, built)
        whole = (CELL, SENTENCE) if name in theirs else (CELL,)
        assert all(any(form.fullmatch(cell) for form in whole) for cell in cells), (name, cells)
