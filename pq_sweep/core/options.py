"""Options of this package's components by their kind, and configs in which each value has the kind that is meant."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

# Options that are numbers: the least and largest value, and whether it is a whole number.
WHOLE_FROM_ONE = ("evaluation", "images", "batch_size", "eval_batch_size", "threads", "iterations", "min_iterations",
                  "epochs", "projections", "prunings", "round_to", "num_classes", "window", "p", "repeats")  # fmt: skip
FROM_ZERO = (
    "warmup_s",
    "warmup_max_s",
    "min_s",
    "max_s",
    "agreement",
    "interval",
    "lr",
    "lr_scale",
    "lr_quant",
    "weight_decay",
    "n",
    "max_drop",
)
RANGES: dict[str, tuple[float, float, bool]] = {
    **dict.fromkeys(WHOLE_FROM_ONE, (1, math.inf, True)),
    **dict.fromkeys(FROM_ZERO, (0, math.inf, False)),
    "calibration": (0, math.inf, True),
    "warmup_iterations": (0, math.inf, True),
    "retries": (0, math.inf, True),
    "dim": (0, 1, True),
    "percentile": (50, 100, False),
    "bits": (2, 8, True),
    "least_bits": (2, 8, True),
    "probe_images": (2, 1000, True),
    "activations": (2, 8, True),
    "block": (2, math.inf, True),
}
# Numbers of a protocol that may be null: what is best, what the machine has, or none.
MAY_BE_NULL = ("eval_batch_size", "threads", "window", "max_s")
NUMBERS = frozenset(
    {*RANGES, "amount", "amount_last", "m", "low", "high", "step", "optimization_level", "seed", "repeat"}
)
SWITCHES = ("every_weight", "global_ranking", "paired", "channels_last", "cuda_graph", "tf32", "sparsity", "log_model",
            "build_only", "resume", "per_channel", "probe",
            "projection", "joint")  # fmt: skip
LISTS = ("exclude", "batch_sizes", "augment", "probe_layers")
LISTS_OF_LAYERS = ("exclude", "probe_layers")
LISTS_OF_NUMBERS = ("batch_sizes",)
TEXTS = ("uri", "experiment", "name")
# Options that stand beside those of every recovery: the job reads them, and no recovery gets them.
PROBE = ("probe", "probe_layers", "probe_images")
# Brackets around a whole text, in which those of patterns such as layer[12] may be; and commas outside of such.
BRACKETED = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]")
COMMA = re.compile(r",(?![^\[]*\])")


def is_ours(options: Any) -> bool:
    """Say whether a component is this package's; options of the same names may mean anything in others."""
    return str(options.get("_target_")).startswith("pq_sweep.")


def plain_items(options: DictConfig) -> list[tuple[str, Any]]:
    """Return options and their values, references to other options unresolved."""
    plain: Any = OmegaConf.to_container(options, resolve=False)
    return list(plain.items())


def spelled(cfg: DictConfig) -> DictConfig:
    """Return a config in which values have the kind that is meant, where that is plain.

    Lists, numbers and switches of this package's components may be given as texts: "[1,8]", "0.5", "true". A component
    from elsewhere gets the word nan, which YAML reads as a number, as text.
    """
    found = list(_of_component(cfg, ours=True))
    cfg = copy.deepcopy(cfg) if found else cfg
    with flag_override(cfg, ["struct", "readonly"], False):
        for (*above, name), value in found:
            node: Any = cfg
            for part in above:
                node = node[part]
            node[name] = value
    return cfg


def _of_component(options: DictConfig, *, ours: bool) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the place and the meaning of each option of a component, and of those in it, that means another value."""
    for name, value in _values(options):
        if isinstance(value, DictConfig):
            inside = _of_component(value, ours=is_ours(value))
            yield from (((name, *place), meaning) for place, meaning in inside)
        elif ours:
            meaning = _meaning(name, value)
            if type(meaning) is not type(value) or meaning != value:
                yield (name,), meaning
        elif "_target_" in options and value != value:
            yield (name,), "nan"


def _values(options: DictConfig) -> Iterator[tuple[Any, Any]]:
    """Yield options and their values, without those that are missing or refer to what is not there."""
    for name in options:
        with suppress(OmegaConfBaseException):
            value = options[name] if name != "hydra" else None
            yield name, OmegaConf.to_container(value) if isinstance(value, ListConfig) else value


def _meaning(name: Any, value: Any) -> Any:
    """Return what a value of an option is meant to be: the value itself, unless it plainly is of another kind."""
    if name in LISTS:
        return entries_of(name, value)
    if isinstance(value, str) and name in SWITCHES:
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    return _number(value) if name in NUMBERS else value


def entries_of(name: str, value: Any) -> Any:
    """Return the list that a value of an option stands for, such as the texts "[1,8]" and "first,last".

    What is no list in any plain way is returned as it is.
    """
    parts = [] if value is None else _parts(value) if isinstance(value, str) else value
    parts = parts if isinstance(parts, list) else [parts]
    if name in LISTS_OF_NUMBERS:
        parts = [_number(part) for part in parts]
    whole = not isinstance(value, str) or all(part and not re.search(r"\s", str(part)) for part in parts)
    return value if not whole or (name in LISTS_OF_NUMBERS and any(isinstance(part, str) for part in parts)) else parts


def _parts(text: str) -> list[str]:
    """Return the entries of a list that is written as a text, with or without brackets; "" is one that is missing."""
    whole = BRACKETED.fullmatch(text.strip())
    parts = [part.strip().strip("'\"") for part in COMMA.split(whole[1] if whole else text)]
    return [] if whole and parts == [""] else parts


def _number(value: Any) -> Any:
    """Return the number that a text spells, or what is given."""
    for kind in (int, float) if isinstance(value, str) else ():
        with suppress(ValueError):
            return kind(value)
    return value
