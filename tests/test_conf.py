"""The contract of every component: a short YAML, found by listing its folder, that fits what it names."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from pq_sweep.core.options import LISTS, SWITCHES
from pq_sweep.job.probing import without_probe

CONF = ROOT / "conf"

# What a job hands to the components of each group; all other arguments come from the YAML.
GIVEN_BY_JOB: dict[str, tuple[str, ...]] = {
    "model": (),
    "dataset": ("model",),
    "pruner": ("model", "data"),
    "recovery": ("model", "data"),
    "quantizer": ("source", "target", "data", "form", "stage"),
    "runtime": (),
    "measure": (),
    "search": (),
    "tracking": (),
}
FILES = sorted(path for group in GIVEN_BY_JOB for path in (CONF / group).glob("*.yaml"))

component = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}={path.stem}")


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def signature_and_options(path: Path) -> tuple[inspect.Signature, dict[Any, Any]]:
    """Return the signature that a YAML's target has, and the options it gets, Hydra having resolved its defaults."""
    node = OmegaConf.load(path)
    if "defaults" in node:
        node = composed(f"{path.parent.name}={path.stem}")[path.parent.name]
    options = OmegaConf.to_container(without_probe(node), throw_on_missing=False)
    assert isinstance(options, dict)
    return inspect.signature(get_object(options.pop("_target_"))), options


def test_every_group_is_under_contract() -> None:
    groups = {folder.name for folder in CONF.iterdir() if folder.is_dir()}
    assert groups - {"experiment", "hydra"} == set(GIVEN_BY_JOB)


def test_every_group_has_a_default_in_config() -> None:
    assert set(GIVEN_BY_JOB) - {"search"} <= {str(key) for key in composed()}  # no search by default


@component
def test_yaml_gives_exactly_what_its_target_needs(path: Path) -> None:
    signature, options = signature_and_options(path)
    given = GIVEN_BY_JOB[path.parent.name]
    assert not set(given) & set(options)
    signature.bind(**dict.fromkeys((*given, *options)))


@component
def test_yaml_agrees_with_defaults_in_code(path: Path) -> None:
    """One of the two is what a reader believes; None in the code leaves the value to the YAML."""
    signature, options = signature_and_options(path)
    defaults = {name: parameter.default for name, parameter in signature.parameters.items()}
    both = {name for name in options if defaults[name] not in (None, inspect.Parameter.empty)}
    assert {name: options[name] for name in both} == {name: defaults[name] for name in both}


@component
def test_yaml_starts_with_a_comment_and_is_short(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert len(lines[0]) > len("# ")
    content = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    assert path.parent.name == "measure" or len([line for line in content if not line.startswith("key:")]) <= 6


@component
def test_the_kinds_of_all_values_are_checked(path: Path) -> None:
    """A word given for a switch would count as true, and one given for a list as its letters."""
    _, options = signature_and_options(path)
    kinds: dict[type, tuple[str, ...]] = {bool: SWITCHES, list: LISTS, dict: ("options",)}
    values = {name: value for name, value in options.items() if not isinstance(value, dict) or "_target_" not in value}
    assert [name for name, value in values.items() if name not in kinds.get(type(value), (name,))] == []
