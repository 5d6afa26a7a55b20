"""The units of a study's work, in this process or as a job for each layer; each result is a file, so none is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig
from submitit.helpers import DelayedSubmission
from tqdm import tqdm

from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.fingerprint import digest
from pq_sweep.job.stages import sentence
from pq_sweep.study import Case
from pq_sweep.sweep.calls import launched
from pq_sweep.types import UserError

BASIC = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"  # which has everything done in this process


class Unit(Protocol):
    """Something to find out: `kind` is the dataclass of what is found, `key` a hash of all that it depends on."""

    @property
    def kind(self) -> type[Any]: ...

    @property
    def key(self) -> str: ...

    def compute(self) -> Any: ...


@dataclass(frozen=True)
class Layer:
    """What is to be found out about a layer of a network."""

    network: str
    name: str
    units: tuple[Unit, ...]


@dataclass(frozen=True)
class Worker:
    """Finds out what is not known yet of a layer, and keeps each result in a file of `folder`."""

    folder: Path

    def __call__(self, layer: Layer, tell: Callable[[], object] = lambda: None) -> str | None:
        """Find out what is missing, tell of each result, and return why that failed, if it did."""
        try:
            for unit in self.missing(layer):
                write_json(self._path(unit), asdict(unit.compute()))
                tell()
        except Exception as error:
            return sentence(error, "layers")
        return None

    def missing(self, layer: Layer) -> Iterator[Unit]:
        """Yield what is not known, or of which a file holds only a part."""
        yield from (unit for unit in layer.units if self._kept(unit) is None)

    def found(self, layer: Layer) -> Iterator[Any]:
        """Yield what is known, in the order of the units."""
        yield from filter(None, map(self._kept, layer.units))

    def checkpoint(self, layer: Layer) -> DelayedSubmission:
        """Let submitit queue a job again that SLURM stopped."""
        return DelayedSubmission(self, layer)

    def _path(self, unit: Unit) -> Path:
        return self.folder / f"{unit.key}.json"

    def _kept(self, unit: Unit) -> Any:
        try:
            record: dict[str, Any] = read_json(self._path(unit))
            return unit.kind(**record)
        except (OSError, ValueError, TypeError):
            return None


def launcher_of(cases: list[Case]) -> DictConfig:
    """Return where all that a command line asks for is done."""
    first, *others = [case.launcher for case in cases]
    if any(other != first for other in others):
        raise UserError("a study takes hydra/launcher and its options once; give one value of each.")
    return first


def done(worker: Worker, layers: list[Layer], launcher: DictConfig) -> dict[str, str]:
    """Find out what is missing, here or in a job for each layer, and return why, for each layer that failed."""
    items = {f"{layer.network} {layer.name}": layer for layer in layers if any(worker.missing(layer))}

    def left() -> int:
        return sum(len([*worker.missing(layer)]) for layer in items.values())

    total = left()
    with tqdm(total=total, desc="layers", unit="result", disable=None, leave=False) as bar:
        if launcher._target_ == BASIC or not items:
            return {name: why for name, layer in items.items() if (why := worker(layer, bar.update))}
        # An earlier process that asked for the same may have jobs in the queue.
        asked = digest({name: [unit.key for unit in layer.units] for name, layer in items.items()})
        record = worker.folder.parent / ".submitit" / f"{asked}.json"
        record.parent.mkdir(exist_ok=True)
        failed = launched(launcher, worker, items, lambda: bar.update(total - bar.n - left()), record)
    lost = [name for name, layer in items.items() if name not in failed and any(worker.missing(layer))]
    return failed | dict.fromkeys(lost, "not all of its results were found; start again with the same output=.")
