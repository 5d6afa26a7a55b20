"""Slices of networks and what is found for them; each result is a file, so that a study goes on where it was."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from pq_sweep.compress.moments import Moments, layer_moments
from pq_sweep.compress.weight_only import Grid, fitted
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.options import spelled
from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import Target, prunable
from pq_sweep.job.run import load
from pq_sweep.job.stages import sentence
from pq_sweep.study import Case
from pq_sweep.study.layers.options import Options
from pq_sweep.study.layers.slices import Found, Slice, measured
from pq_sweep.types import Model, UserError

SMALL_KERNEL = 16  # of which a slice takes whole channels


@dataclass(frozen=True)
class Network:
    """A network, what was found for its layers, and sentences on what was left out."""

    name: str
    found: list[Found]
    notes: tuple[str, ...]


def looked_at(cases: dict[str, Case], options: Options, folder: Path) -> tuple[list[Network], dict[str, str]]:
    """Look at each network by name, and return them with a sentence for each that could not be looked at."""
    found, failed = list[Network](), dict[str, str]()
    for name, case in cases.items():
        try:
            found.append(_looked_at(name, case, options, folder))
        except Exception as error:
            failed[name] = sentence(error, "load")
    if not found:
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    return found, failed


def _looked_at(name: str, case: Case, options: Options, folder: Path) -> Network:
    torch.manual_seed(0)  # for weights that are random
    model, data = load(spelled(case.cfg), "cpu")
    if options.images > len(data.calibration):
        raise UserError(
            f"images={options.images} does not fit the {len(data.calibration)} calibration images; lower it or raise"
            " dataset.calibration."
        )
    targets = chosen(model, options.layers)
    moments = layer_moments(model, [*targets.values()], data.calibrating().take(options.images))
    blind = [layer for layer, target in targets.items() if target not in moments]
    notes = [f"the inputs of {listed(blind)} cannot be seen, so nothing is said of these."] if blind else []
    slices = [each for layer, target in targets.items() if target in moments
              for each in slices_of(layer, target, moments[target], options)]  # fmt: skip
    return Network(name, list(_results(name, slices, options, folder / "slices")), (*notes, *model.notes))


def chosen(model: Model, patterns: tuple[str, ...]) -> dict[str, Target]:
    """Return the weights that layers' names or patterns name, by the names of their layers; all without a pattern."""
    names = {part: name for name, part in model.module.named_modules()}
    known = {_named(names[part], weight): (part, weight) for part, weight in prunable(model.module)}
    found: dict[str, Target] = {}
    for pattern in patterns:
        matches = {name: target for name, target in known.items() if _fits(name, pattern)}
        if not matches:
            raise UserError(f"layers={pattern} matches no layer; layers are {', '.join(known)}.")
        found |= matches
    return found or known


def _named(layer: str, weight: str) -> str:
    return layer if weight == "weight" else f"{layer}.{weight}".lstrip(".")


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}.")


def slices_of(layer: str, target: Target, moments: Moments, options: Options) -> Iterator[Slice]:
    """Yield the slices of a layer, spread over its groups and inputs."""
    part, name = target
    weight = getattr(part, name).detach().cpu().double().numpy()
    rows = moments.window.rows(weight)
    steps = {bits: float(fitted(weight.reshape(1, -1), Grid(bits))[1][0]) for bits in options.bits}
    kernel = int(np.prod(moments.window.kernel, dtype=int))
    width = kernel * -(-options.inputs // kernel) if kernel <= SMALL_KERNEL else options.inputs
    places = list(_places(moments, width))
    for block, group, first, start in [places[place] for place in _spread(len(places), options.slices)]:
        own = moments.sums[block][group].cpu().double().numpy()
        stop = min(start + width, len(own))
        taken = _spread(rows.shape[1], options.rows)
        values = rows[group][taken, first + start : first + stop]
        yield Slice(layer, group, first + start, values, own[start:stop, start:stop], steps)


def _places(moments: Moments, width: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the block, group, first input of the block and first input within it of each slice; none has two blocks."""
    first = 0
    for block, sums in enumerate(moments.sums):
        groups, inputs, _ = sums.shape
        whole = range(0, max(1, inputs - width + 1), width)
        yield from ((block, group, first, start) for group in range(groups) for start in whole)
        first += inputs


def _spread(available: int, wanted: int) -> list[int]:
    """Return as many of the available numbers as are wanted, evenly spread."""
    return np.unique(np.linspace(0, available - 1, min(wanted, available)).astype(int)).tolist()


def _results(name: str, slices: list[Slice], options: Options, folder: Path) -> Iterator[Found]:
    """Yield what is found for each slice and bit width: read where it was found before, or computed and kept."""
    folder.mkdir(exist_ok=True)
    work = [(each, bits) for each in slices for bits in options.bits]
    for each, bits in tqdm(work, desc=name, unit="slice", disable=None, leave=False):
        path = folder / f"{each.key(bits, options.samples, options.limit_s)}.json"
        yield _kept(path) or _keep(path, measured(each, bits, options.samples, options.limit_s))


def _kept(path: Path) -> Found | None:
    """Return what an earlier run found, or None if there is nothing or only a part of it."""
    try:
        record: dict[str, Any] = read_json(path)
        return Found(**record)
    except (OSError, ValueError, TypeError):
        return None


def _keep(path: Path, found: Found) -> Found:
    write_json(path, asdict(found))
    return found
