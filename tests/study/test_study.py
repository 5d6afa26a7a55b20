"""The door of the studies: help without a framework, and everything wrong with a command line in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import HEAVY, imported, said
from conftest import ROOT, python, refused

from pq_sweep.study.__main__ import STUDIES, cases, help_text, split

STUDY = ["-m", "pq_sweep.study"]


def test_every_study_has_a_module_and_a_line_in_help() -> None:
    assert "weights" in STUDIES
    for name in STUDIES:
        assert (ROOT / "pq_sweep" / "study" / f"{name}.py").exists() or (ROOT / "pq_sweep" / "study" / name).is_dir()
        assert f"  {name} " in help_text("")
        assert "# " in help_text(name)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["weights", "--help"], ["weights", "model=resnet1"]], ids=" ".join)
def test_no_framework_is_imported_for_help_and_typos(
    tmp_path: Path, environment: dict[str, str], words: list[str]
) -> None:
    done = python(["-X", "importtime", *STUDY, *words], tmp_path, environment | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == (0 if "--help" in words else 1)
    assert len(said(done.stderr)) == done.returncode
    assert not HEAVY & imported(done.stderr)


def test_commas_make_a_case_each_and_choices_are_known() -> None:
    found = cases("weights", ["model=resnet18,vgg7", "model.weights=null", "bits=[2,4]"])
    assert [case.choices["model"] for case in found] == ["resnet18", "vgg7"]
    assert [case.words for case in found] == [
        ("model=resnet18", "model.weights=null", "bits=[2,4]"),
        ("model=vgg7", "model.weights=null", "bits=[2,4]"),
    ]
    assert "hydra" not in found[0].cfg


def test_networks_of_a_folder_of_ones_own_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# My own\n_target_: my_nets.make\nwidth: 8\n")
    (case,) = cases("weights", ["--config-dir", str(tmp_path), "model=mine", "model.width=9"])
    assert case.cfg.model == {"_target_": "my_nets.make", "width": 9}


@pytest.mark.parametrize("words", [["--model", "x"], ["-cd", "nowhere"]], ids=" ".join)
def test_what_is_no_option_is_refused(words: list[str]) -> None:
    assert f"{words[-1] if words[0] == '-cd' else words[0]} is no" in refused(lambda: split(words))
