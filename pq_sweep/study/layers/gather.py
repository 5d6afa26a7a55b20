"""Networks and what is found for their layers: their slices, and what one layer's noise does to the accuracy."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf

from pq_sweep.compress.moments import Moments, layer_moments
from pq_sweep.compress.weight_only import Grid, fitted
from pq_sweep.core.fingerprint import digest
from pq_sweep.core.options import spelled
from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import Target, network_state
from pq_sweep.job.stages import sentence
from pq_sweep.study import Case
from pq_sweep.study.layers.effects import METHODS, ORIGINAL, Altered, Effect, by_name, loaded, noise_of
from pq_sweep.study.layers.options import Options
from pq_sweep.study.layers.slices import FULL_BITS, Compared, Found, Slice
from pq_sweep.study.layers.work import Layer, Unit, Worker, done, launcher_of
from pq_sweep.types import Data, Model, UserError

SMALL_KERNEL = 16  # of which a slice takes whole channels


@dataclass(frozen=True)
class Network:
    """A network, what was found for its layers, and sentences on what was left out.

    `effects` has the original too, if accuracy was asked for.
    """

    name: str
    found: list[Found]
    notes: tuple[str, ...]
    effects: tuple[Effect, ...] = ()

    def drops(self) -> Iterator[tuple[Effect, float]]:
        """Yield what each altered layer costs in points of accuracy; nothing if the original's answers are unknown."""
        original = [each.right for each in self.effects if each.method == ORIGINAL]
        for each in self.effects:
            if original and each.method != ORIGINAL:
                yield each, 100 * (original[0] - each.right) / each.images


def looked_at(cases: dict[str, Case], options: Options, folder: Path) -> tuple[list[Network], dict[str, str]]:
    """Look at each network by name, and return them with a sentence for each, and each layer, that failed."""
    layers, notes, failed = dict[str, list[Layer]](), dict[str, tuple[str, ...]](), dict[str, str]()
    for name, case in cases.items():
        try:
            layers[name], notes[name] = _layers_of(name, case, options)
        except Exception as error:
            failed[name] = sentence(error, "load")
    worker = Worker(folder.resolve() / "slices")
    worker.folder.mkdir(exist_ok=True)
    failed |= done(worker, [each for own in layers.values() for each in own], launcher_of([*cases.values()]))
    networks = [_network(name, worker, own, notes[name]) for name, own in layers.items()]
    if not any(network.found for network in networks):
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    return [network for network in networks if network.found], failed


def _network(name: str, worker: Worker, layers: list[Layer], notes: tuple[str, ...]) -> Network:
    found = [each for layer in layers for each in worker.found(layer)]
    effects = tuple(each for each in found if isinstance(each, Effect))
    return Network(name, [each for each in found if isinstance(each, Found)], notes, effects)


def _layers_of(name: str, case: Case, options: Options) -> tuple[list[Layer], tuple[str, ...]]:
    """Return the layers of a network with all that is asked of them, and sentences on what was left out."""
    network = OmegaConf.to_yaml(spelled(case.cfg), resolve=True)
    model, data = loaded(network)
    _require_images(data, options)
    targets = chosen(model, options.layers)
    moments = layer_moments(model, [*targets.values()], data.calibrating().take(options.images))
    seen = {layer: target for layer, target in targets.items() if target in moments}
    blind = [layer for layer in targets if layer not in seen]
    notes = [f"the inputs of {listed(blind)} cannot be seen, so nothing is said of these."] if blind else []
    answers = _answers(network, model, data, options) if options.evaluation else None
    layers = [Layer(name, layer, tuple(_units(layer, target, moments[target], options, answers)))
              for layer, target in seen.items()]  # fmt: skip
    whole = [Layer(name, ORIGINAL, (answers,))] if answers else []
    return [*whole, *layers], (*notes, *model.notes)


def _require_images(data: Data, options: Options) -> None:
    """Refuse more images than there are."""
    if options.images > len(data.calibration):
        raise UserError(
            f"images={options.images} does not fit the {len(data.calibration)} calibration images; lower it or raise"
            " dataset.calibration."
        )
    if options.evaluation > len(data.evaluation):
        raise UserError(
            f"evaluation={options.evaluation} does not fit the {len(data.evaluation)} evaluation images; lower it."
        )


def _answers(network: str, model: Model, data: Data, options: Options) -> Altered:
    """Return the original, which is to answer as many images as its altered forms."""
    identity = data.identity(data.evaluation.take(options.evaluation))
    state = digest(network_state(model) | {"images": identity})
    return Altered(network, state, ORIGINAL, FULL_BITS, ORIGINAL, 0.0, options.evaluation)


def _units(layer: str, target: Target, moments: Moments, options: Options, answers: Altered | None) -> Iterator[Unit]:
    """Yield what is to be found out about a layer."""
    for here in slices_of(layer, target, moments, options):
        yield from (Compared(here, bits, options.samples, options.limit_s) for bits in options.bits)
    for bits in options.bits if answers else ():
        for method in METHODS:
            noise = noise_of(getattr(*target), moments, bits, method)
            if answers and not math.isnan(noise):
                yield replace(answers, layer=layer, bits=bits, method=method, noise=noise)


def chosen(model: Model, patterns: tuple[str, ...]) -> dict[str, Target]:
    """Return the weights that layers' names or patterns name, by the names of their layers; all without a pattern."""
    known = by_name(model.module)
    found: dict[str, Target] = {}
    for pattern in patterns:
        matches = {name: target for name, target in known.items() if _fits(name, pattern)}
        if not matches:
            raise UserError(f"layers={pattern} matches no layer; layers are {', '.join(known)}.")
        found |= matches
    return found or known


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
