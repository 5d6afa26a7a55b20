"""Values that came as texts and plainly mean a list, a number or a switch, and sweeps that look like lists."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT, refused
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from pq_sweep.core.fingerprint import fingerprint
from pq_sweep.core.options import spelled
from pq_sweep.job.check import problems
from pq_sweep.sweep.grid import compose_grid, several_chosen
from pq_sweep.sweep.launcher_options import launcher_problems

BASE = ("pruner=l1", "quantizer=int8", "runtime=onnxruntime")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[*BASE, *overrides])


MEANT: dict[str, tuple[str, Any]] = {
    "measure.batch_sizes='[1,8]'": ("measure.batch_sizes", [1, 8]),
    "measure.batch_sizes='1, 8'": ("measure.batch_sizes", [1, 8]),
    "measure.batch_sizes=8": ("measure.batch_sizes", [8]),
    "measure.batch_sizes=['1',8]": ("measure.batch_sizes", [1, 8]),
    "measure.batch_sizes='${quantizer.images},8'": ("measure.batch_sizes", [64, 8]),
    "quantizer.exclude=first": ("quantizer.exclude", ["first"]),
    "quantizer.exclude='first,last'": ("quantizer.exclude", ["first", "last"]),
    "quantizer.exclude='[first, \"fc2\"]'": ("quantizer.exclude", ["first", "fc2"]),
    "quantizer.exclude='layer[1,2].*,fc'": ("quantizer.exclude", ["layer[1,2].*", "fc"]),
    "quantizer.exclude='[ab]c[de]'": ("quantizer.exclude", ["[ab]c[de]"]),
    "quantizer.exclude='[0,1]'": ("quantizer.exclude", ["0", "1"]),
    "quantizer.exclude=null": ("quantizer.exclude", []),
    "quantizer.exclude='[]'": ("quantizer.exclude", []),
    "pruner.amount='0.25'": ("pruner.amount", 0.25),
    "quantizer.images='32'": ("quantizer.images", 32),
    "pruner.every_weight='True'": ("pruner.every_weight", True),
    "seed='3'": ("seed", 3),
    "seed=${oc.env:A_SEED}": ("seed", 5),
    "resume='false'": ("resume", False),
}


@pytest.mark.parametrize("override", MEANT)
def test_a_text_is_taken_for_what_it_plainly_means(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SEED", "5")
    key, meant = MEANT[override]
    config = composed(override)
    assert problems(config) == []
    found = OmegaConf.to_container(OmegaConf.create({"value": OmegaConf.select(spelled(config), key)}))
    assert found == {"value": meant}
    assert type(found["value"]) is type(meant)


def test_a_job_is_the_same_however_its_list_was_written() -> None:
    plain, text = (fingerprint(composed(f"measure.batch_sizes={sizes}")) for sizes in ("[1,8]", "'[1,8]'"))
    assert plain == text
    assert fingerprint(composed("measure.batch_sizes=[8]")) != plain


def test_options_of_others_stay_as_they_are() -> None:
    config = composed("dataset._target_=json.loads", "+dataset.exclude='[a,b]'", "+dataset.amount='0.5'")
    assert spelled(config).dataset.exclude == "[a,b]"
    assert spelled(config).dataset.amount == "0.5"


def jobs(swept: str) -> list[Any]:
    """Return what the jobs of a sweep have."""
    key = swept.partition("=")[0]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = [*BASE, "dataset._target_=json.loads", "+dataset.exclude=x"]
        config = compose("config", overrides=words, return_hydra_config=True)
        config.hydra.overrides.task = [*words, swept]
        return [OmegaConf.select(spelled(job), key) for job in compose_grid(config)]


@pytest.mark.parametrize(
    ("key", "values"),
    [("quantizer.exclude", "first,last"), ("quantizer.exclude", "'first','last'"), ("measure.batch_sizes", "1,8")],
)
def test_entries_given_as_a_sweep_are_refused_with_both_forms(key: str, values: str) -> None:
    first, last = values.replace("'", "").split(",")
    assert refused(lambda: jobs(f"{key}={values}")) == (
        f"{key}={first},{last} would be a sweep with one value in each job, and {key} takes a list; give"
        f" {key}=[{first},{last}] for one job with all, or {key}=[{first}],[{last}] for a job for each."
    )


@pytest.mark.parametrize(
    ("swept", "found"),
    [
        ("quantizer.exclude=[first],[last]", [["first"], ["last"]]),
        ("quantizer.exclude=[],first", [[], ["first"]]),
        ("quantizer.exclude='[first]','first,last'", [["first"], ["first", "last"]]),
        ("measure.batch_sizes=choice(1,8)", [[1], [8]]),
        ("measure.batch_sizes=range(1,3)", [[1], [2]]),
        ("dataset.exclude=a,b", ["a", "b"]),
    ],
)
def test_a_sweep_that_is_written_as_one_is_taken(swept: str, found: list[Any]) -> None:
    assert jobs(swept) == found


@pytest.mark.parametrize("word", ["pruner=[none,l1]", "runtime=[torch]", "measure=[quick,standard]"])
def test_a_list_of_choices_is_refused_as_hydra_would_mix_them(word: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[word, "quantizer=none"], return_hydra_config=True)
        (found,) = several_chosen(config)
    group, _, names = word.partition("=")
    assert found == f"{word} would mix choices into one; give {group}={names.strip('[]')}, with a job for each choice."


KINDS = {
    "setup='module load cuda'": "setup=module load cuda is not valid, as it is no list; give 'hydra.launcher.setup=[\"",
    "srun_args=5": "srun_args=5 is not valid, as it is no list",
    "exclude=[a,b]": "exclude=['a', 'b'] is not valid; give one value, in quotes if it has commas",
    "timeout_min=4h": "timeout_min='4h' is no number; give a whole one without unit or quotes",
    "signal_delay_s=2m": "signal_delay_s='2m' is no number",
    "mem_gb=16GB": "mem_gb='16GB' is no number",
    "prefetch=no": "prefetch=no is neither true nor false",
    "node_types=v100": "node_types=v100 is no group of values; give +hydra.launcher.node_types.NAME=VALUE.",
    "node_types.v100.partition=[a]": "node_types.v100.partition=['a'] is not valid",
}


@pytest.mark.parametrize("option", KINDS)
def test_options_of_a_launcher_have_their_kind(option: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["hydra/launcher=slurm", f"hydra.launcher.{option}"]
        (found,) = launcher_problems(compose("config", overrides=words, return_hydra_config=True).hydra.launcher)
    assert found.startswith(f"hydra.launcher.{KINDS[option]}")


def test_options_of_a_launcher_as_they_are_or_as_slurm_takes_them() -> None:
    for words in (["exclusive=user", "mem_gb=1.5", "setup=null", "gpus_per_node=null"], [], ["exclude='a,b'"]):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            options = ["hydra/launcher=slurm", *(f"hydra.launcher.{word}" for word in words)]
            config = compose("config", overrides=options, return_hydra_config=True)
            assert list(launcher_problems(config.hydra.launcher)) == []
