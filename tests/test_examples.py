"""The example of components from outside the package, run as its first lines say."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, only_sweep, python, results

SCRIPT = str(ROOT / "examples" / "custom_run.py")


@pytest.mark.slow
def test_own_components_in_one_sweep(tmp_path: Path, environment: dict[str, str]) -> None:
    done = python([SCRIPT], tmp_path, environment)

    assert done.returncode == 0, done.stderr
    dense, small, pruned, both = results(only_sweep(tmp_path))
    assert dense["accuracy"]["top1"] > 0.95
    assert small["session"]["precision"] == both["session"]["precision"] == "int8"
    assert small["size_bytes"]["compressed"] < 0.6 * dense["size_bytes"]["compressed"]
    assert small["accuracy"]["top1"] > dense["accuracy"]["top1"] - 0.05
    assert dense["network"]["sparsity"] == 0
    assert pruned["network"]["sparsity"] == both["network"]["sparsity"] > 0.15
    assert 1 / 3 < pruned["accuracy"]["top1"] < dense["accuracy"]["top1"]


@pytest.mark.slow
def test_own_components_take_overrides(tmp_path: Path, environment: dict[str, str]) -> None:
    done = python(
        [SCRIPT, "model=shapes_cnn", "model.width=4", "dataset=digits", "--cfg", "job"], tmp_path, environment
    )

    assert done.returncode == 0, done.stderr
    assert "custom_run.shapes_cnn" in done.stdout
    assert "width: 4" in done.stdout


@pytest.mark.slow
def test_wrong_override_of_an_own_component_is_one_sentence(tmp_path: Path, environment: dict[str, str]) -> None:
    done = python([SCRIPT, "model=shapes_cnn", "model.widht=4"], tmp_path, environment)

    assert done.returncode == 1
    assert done.stderr.strip() == "model.widht is not known; valid are: width, seed. Did you mean width?"
