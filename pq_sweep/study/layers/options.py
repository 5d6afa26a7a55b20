"""What is asked of all networks of a study of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import ListConfig, OmegaConf

from pq_sweep.core.options import entries_of
from pq_sweep.study import Case
from pq_sweep.study.weights import bits_of, only
from pq_sweep.types import UserError

WHOLE = {"images": 1, "inputs": 1, "slices": 1, "rows": 1, "samples": 0, "evaluation": 0}  # and the least of each


@dataclass(frozen=True)
class Options:
    """What is looked at of each network, and how long; see conf/study_layers.yaml."""

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    images: int
    inputs: int
    slices: int
    rows: int
    samples: int
    evaluation: int
    limit_s: float


def options_of(cases: list[Case]) -> Options:
    """Return what all networks are asked, or refuse what is out of range."""
    numbers = {name: only(cases, name) for name in WHOLE}
    for name, value in numbers.items():
        if type(value) is not int or value < WHOLE[name]:
            raise UserError(f"{name}={value} is out of range; give a whole number from {WHOLE[name]} on.")
    limit = only(cases, "limit_s")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
        raise UserError(f"limit_s={limit} is out of range; give seconds, more than 0.")
    return Options(_layers(only(cases, "layers")), tuple(bits_of(cases)), limit_s=float(limit), **numbers)


def _layers(given: Any) -> tuple[str, ...]:
    """Return the names and patterns of layers."""
    found = entries_of("exclude", OmegaConf.to_container(given) if isinstance(given, ListConfig) else given)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise UserError(f"layers={given} is not valid; give names of layers, such as layers=[layer1.*,fc].")
    return tuple(found)
