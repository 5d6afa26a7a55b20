"""Slices of networks and what is found for them, here or by jobs; each result is a file, from which a study goes on."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from submitit.helpers import DelayedSubmission
from tqdm import tqdm

from pq_sweep.compress.moments import Moments, layer_moments
from pq_sweep.compress.weight_only import Grid, fitted
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.fingerprint import digest
from pq_sweep.core.options import spelled
from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import Target, prunable
from pq_sweep.job.run import load
from pq_sweep.job.stages import sentence
from pq_sweep.study import Case
from pq_sweep.study.layers.options import Options
from pq_sweep.study.layers.slices import Found, Slice, measured
from pq_sweep.sweep.calls import launched
from pq_sweep.types import Model, UserError

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # which has everything done in this process
SMALL_KERNEL = 16  # of which a slice takes whole channels


@dataclass(frozen=True)
class Network:
    """A network, what was found for its layers, and sentences on what was left out."""

    name: str
    found: list[Found]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """The slices of a network's layer."""

    network: str
    name: str
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Worker:
    """Computes what is not known yet of a layer; each result is a file of a folder, so that a second start goes on."""

    options: Options
    folder: Path

    def __call__(self, layer: Layer, tell: Callable[[], object] = lambda: None) -> str | None:
        """Compute what is missing, tell of each result, and return why that failed, if it did."""
        try:
            for each, bits in self.missing(layer):
                found = measured(each, bits, self.options.samples, self.options.limit_s)
                write_json(self._path(each, bits), asdict(found))
                tell()
        except Exception as error:
            return sentence(error, "layers")
        return None

    def missing(self, layer: Layer) -> Iterator[tuple[Slice, int]]:
        """Yield slices and bit widths of which nothing, or only a part, is kept."""
        for each in layer.slices:
            yield from ((each, bits) for bits in self.options.bits if self._kept(each, bits) is None)

    def found(self, layer: Layer) -> Iterator[Found]:
        """Yield what is kept, by slices and bit widths."""
        for each in layer.slices:
            yield from filter(None, (self._kept(each, bits) for bits in self.options.bits))

    def checkpoint(self, layer: Layer) -> DelayedSubmission:
        """Let submitit queue a job again that SLURM stopped."""
        return DelayedSubmission(self, layer)

    def _path(self, here: Slice, bits: int) -> Path:
        return self.folder / f"{here.key(bits, self.options.samples, self.options.limit_s)}.json"

    def _kept(self, here: Slice, bits: int) -> Found | None:
        try:
            record: dict[str, Any] = read_json(self._path(here, bits))
            return Found(**record)
        except (OSError, ValueError, TypeError):
            return None


def looked_at(cases: dict[str, Case], options: Options, folder: Path) -> tuple[list[Network], dict[str, str]]:
    """Look at each network by name, and return them with a sentence for each, and each layer, that failed."""
    layers, notes, failed = dict[str, list[Layer]](), dict[str, tuple[str, ...]](), dict[str, str]()
    for name, case in cases.items():
        try:
            layers[name], notes[name] = _layers_of(name, case, options)
        except Exception as error:
            failed[name] = sentence(error, "load")
    worker = Worker(options, folder.resolve() / "slices")
    worker.folder.mkdir(exist_ok=True)
    failed |= computed(worker, [each for own in layers.values() for each in own], launcher_of([*cases.values()]))
    networks = [Network(name, [found for layer in own for found in worker.found(layer)], notes[name])
                for name, own in layers.items()]  # fmt: skip
    if not any(network.found for network in networks):
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    return [network for network in networks if network.found], failed


def _layers_of(name: str, case: Case, options: Options) -> tuple[list[Layer], tuple[str, ...]]:
    """Return the layers of a network with their slices, and sentences on what was left out."""
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
    layers = [Layer(name, layer, tuple(slices_of(layer, target, moments[target], options)))
              for layer, target in targets.items() if target in moments]  # fmt: skip
    return layers, (*notes, *model.notes)


def launcher_of(cases: list[Case]) -> DictConfig:
    """Return where all that a command line asks for is computed."""
    first, *others = [case.launcher for case in cases]
    if any(other != first for other in others):
        raise UserError("a study takes hydra/launcher and its options once; give one value of each.")
    return first


def computed(worker: Worker, layers: list[Layer], launcher: DictConfig) -> dict[str, str]:
    """Compute what is missing, here or as a job for each layer, and return why, for each layer that failed."""
    items = {f"{layer.network} {layer.name}": layer for layer in layers if any(worker.missing(layer))}

    def left() -> int:
        return sum(len([*worker.missing(layer)]) for layer in items.values())

    total = left()
    with tqdm(total=total, desc="layers", unit="slice", disable=None, leave=False) as bar:
        if launcher._target_ == BASIC or not items:
            return {name: why for name, layer in items.items() if (why := worker(layer, bar.update))}
        record = worker.folder.parent / ".submitit" / f"{digest(asdict(worker.options))}.json"
        record.parent.mkdir(exist_ok=True)
        failed = launched(launcher, worker, items, lambda: bar.update(total - bar.n - left()), record)
    lost = [name for name, layer in items.items() if name not in failed and any(worker.missing(layer))]
    return failed | dict.fromkeys(lost, "not all of its slices were found; start again with the same output=.")


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
