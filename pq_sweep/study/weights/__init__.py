"""`python -m pq_sweep.study weights`: which weight tensors to quantize and which to prune, and from which width on.

Section 3 and appendices A, B, C and E of Kuzmin et al., *Pruning vs Quantization: Which is Better?*, 2023, for any
network: the exact errors of a tensor (`errors`, `tensors`), those of distributions in closed form (`distributions`),
sentences on what to do (`advice`), figures (`charts`), and what is written and shown (`files`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import ListConfig, OmegaConf

from pq_sweep.core.groups import option_of
from pq_sweep.core.imports import quick_imports
from pq_sweep.job.check import component_problems, refuse
from pq_sweep.study import Case
from pq_sweep.types import UserError

WIDTHS = range(2, 9)


def run(cases: list[Case]) -> bool:
    """Look at the weights of every network that was asked for, write what was found and show it in short.

    Return False if one of several networks could not be looked at.
    """
    names, bits, output = names_of(cases), bits_of(cases), only(cases, "output")
    for case in cases:
        refuse(" ".join(component_problems(case.cfg, ["model"])))
        if (launcher := case.choices.get("hydra/launcher", "basic")) != "basic":
            raise UserError(f"hydra/launcher={launcher} starts jobs, and this study takes seconds here; leave it out.")
    folder = writable(output)
    with quick_imports("torch"):
        from pq_sweep.study.weights.files import show, write
        from pq_sweep.study.weights.loading import looked_at
    networks, failed = looked_at(dict(zip(names, cases, strict=True)), bits)
    show(networks, failed, write(networks, failed, folder))
    return not failed


def only(cases: list[Case], key: str) -> Any:
    """Return the value of an option that a study takes once."""
    values = [OmegaConf.select(case.cfg, key) for case in cases]
    if other := next((value for value in values if value != values[0]), None):
        right = f"[{values[0]},{other}]" if key == "bits" else values[0]
        raise UserError(f"{key}={values[0]},{other} is a sweep, and a study takes {key} once; give {key}={right}.")
    return values[0]


def bits_of(cases: list[Case]) -> list[int]:
    """Return the bit widths in their order."""
    given = only(cases, "bits")
    found = list(given) if isinstance(given, ListConfig) else [given]
    if not found or any(type(each) is not int or each not in WIDTHS for each in found):
        raise UserError(
            f"bits={given} is not valid; give whole numbers from {WIDTHS[0]} to {WIDTHS[-1]}, such as bits=[2,4,8]."
        )
    return sorted({*found})


def names_of(cases: list[Case]) -> list[str]:
    """Return a name for each network: its own or that of its choice, and where these are alike what tells them apart.

    Raises:
        UserError: If two are the same.
    """
    names = [_name(case) for case in cases]
    told = [
        f"{name} {' '.join(_own(case, cases))}" if names.count(name) > 1 else name
        for name, case in zip(names, cases, strict=True)
    ]
    if twice := next((name for name in told if told.count(name) > 1), None):
        raise UserError(f"{twice.strip()} is given twice; leave one out.")
    return told


def _name(case: Case) -> str:
    """Return the name of a network: that of its function if the command line gives one."""
    model = case.cfg.model
    if any(option_of(word) == "model._target_" for word in case.words):
        return str(model._target_).rpartition(".")[2]
    name = None if OmegaConf.is_missing(model, "name") else model.get("name")
    return str(name or case.choices.get("model"))


def _own(case: Case, cases: list[Case]) -> list[str]:
    """Return the words that not all cases have, apart from the choice of the model."""
    return [
        word
        for word in case.words
        if option_of(word) not in ("model", "model.name") and any(word not in other.words for other in cases)
    ]


def writable(output: Any) -> Path:
    """Return the folder of what the study writes, which has to be one that can be written."""
    folder = Path(str(output or "")).expanduser()
    try:
        if not output:
            raise UserError(f"output={output} names no folder; give one.")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be written ({error.strerror}); set output to one that can."
        ) from error
    return folder
