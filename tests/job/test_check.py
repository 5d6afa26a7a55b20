"""What is refused before anything is loaded or run: targets that are not there, and paths of components."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pq_sweep.core.fingerprint import resolved
from pq_sweep.core.options import spelled
from pq_sweep.core.threads import use_threads
from pq_sweep.job.check import problems


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package and a module on the Python path that raise if they are run."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_package" / "inner").mkdir(parents=True)
    for name in ("my_package/__init__.py", "my_package/nets.py", "my_package/inner/deep.py", "my_module.py"):
        (tmp_path / name).write_text("raise SystemExit('this was run')\n")
    return tmp_path


def told(*overrides: str) -> list[str]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return problems(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(
    "target",
    [
        "my_module.make",
        "my_module.Net.make",
        "my_package.make",
        "my_package.Net.make",
        "my_package.nets.make",
        "my_package.nets.Net.make",
        "my_package.inner.deep.make",
    ],
)
def test_a_component_that_is_there_is_not_run_to_be_found(target: str) -> None:
    assert told(f"model._target_={target}") == []


@pytest.mark.parametrize(
    "target", ["nowhere.make", "make", "my_package.other.make", "my_modul.make", "pq_sweep.inputs.modles.digits_cnn"]
)
def test_a_component_that_is_not_there_is_named(target: str) -> None:
    (sentence,) = told(f"model._target_={target}")
    assert sentence == f"model._target_={target} cannot be found; give module.function of a module on the Python path."


@pytest.mark.parametrize(
    ("group", "option"),
    [("model", "weights=timm/resnet18.a1_in1k"), ("model", "weights=[a.pth,b.pth]"), ("model", "weights=5"),
     ("dataset", "+dataset.root=net.npz"), ("dataset", "+dataset.root=[a,b]")],
)  # fmt: skip
def test_options_of_others_may_be_anything(group: str, option: str) -> None:
    """A function of one's own may take the name of a model on a hub, or a file as its root."""
    assert told(f"{group}._target_=my_module.make", option if option[0] == "+" else f"{group}.{option}") == []


def test_a_word_that_yaml_takes_for_a_number_reaches_a_component_of_others_as_it_was_typed() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["dataset._target_=my_module.make", "+dataset.kind=nan", "+dataset.other=${seed}"])
    assert spelled(cfg).dataset.kind == "nan"
    assert resolved(cfg)["dataset"]["kind"] == "nan"
    assert cfg.dataset.kind != cfg.dataset.kind, "the config itself stays as it is"


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("+dataset.kind=inf", "dataset.kind=inf is no number that a result can hold"),
        ("pruner.amount=nan", "pruner.amount=nan is out of range"),
        ("measure.min_s=inf", "measure.min_s=inf is no number that a result can hold"),
    ],
)
def test_numbers_that_are_none_are_refused(override: str, sentence: str) -> None:
    found = told("pruner=l1", "dataset._target_=my_module.make", override)
    assert any(one.startswith(sentence) for one in found), found


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("measure=quick", "measure.min_s=3"), "measure.min_s=3 is more than measure.max_s=0.85, at which sampling ends"
         " in any case; lower measure.min_s or raise measure.max_s."),
        (("measure=rigorous", "measure.warmup_s=20"), "measure.warmup_s=20 is more than measure.warmup_max_s=15.0, at"
         " which warm-up ends in any case; lower measure.warmup_s or raise measure.warmup_max_s."),
    ],
)  # fmt: skip
def test_what_ends_before_it_may_is_refused(overrides: tuple[str, ...], sentence: str) -> None:
    assert told(*overrides) == [sentence]


@pytest.mark.parametrize(
    "overrides",
    [("measure=mlperf",), ("measure.min_s=3", "measure.max_s=null"), ("measure=standard", "measure.min_s=20"),
     ("measure.warmup_s=5",), ("measure._target_=my_module.make", "measure.min_s=9")],
)  # fmt: skip
def test_times_that_fit_are_taken(overrides: tuple[str, ...]) -> None:
    assert told(*overrides) == []


def test_more_threads_than_cores_are_refused() -> None:
    cores = len(os.sched_getaffinity(0))
    assert refused(lambda: use_threads(cores + 1)).startswith(
        f"measure.threads={cores + 1} is more than the number of cores that this process may use; give 1"
    )
    before = torch.get_num_threads()
    try:
        assert (use_threads(cores), use_threads(None)) == (cores, cores)
    finally:
        torch.set_num_threads(before)


MISTAKEN = {
    "empty.pth": (b"", "the file is empty"),
    "page.pth": (b"<!DOCTYPE html>", "a web page, as a failed download leaves it"),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1", "a pointer of git-lfs to the file"),
    "cut.pth": (b"PK\x03\x04archive", "it is cut short or damaged"),
    "noise.safetensors": (b"noise", "a safetensors file that is damaged or none at all"),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_file_that_is_plainly_no_checkpoint_is_refused_before_any_job(mine: Path, name: str) -> None:
    content, what = MISTAKEN[name]
    (mine / name).write_bytes(content)
    (sentence,) = told(f"model.weights={mine / name}")
    assert sentence.startswith(f"model.weights={mine / name} is no readable state_dict ({what}); ")
    assert told("model._target_=my_module.make", f"model.weights={mine / name}") == []


def test_a_file_that_chooses_nothing_is_told() -> None:
    """An experiment without its package line sets its own name alone, and a word is no component."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", ["+experiment.hydra.sweeper.x=1"])
        OmegaConf.update(cfg, "pruner", "l1", merge=False)
    word, effect = problems(cfg)
    assert (
        word
        == "pruner=l1 is set as a value; to choose it in a file, write `- override /pruner: l1` under its defaults."
    )
    assert effect.startswith(
        "the file of this experiment has no effect, as what it sets (hydra) lies under experiment;"
    )
    assert effect.endswith("begin it with the line `# @package _global_`.")
