"""The names that modules had while the package was flat: configs, exports and scripts of that time still use them.

`import pq_sweep.models` gives the module `pq_sweep.inputs.models` itself, not a copy of it, and imports it no earlier
than that. Nothing in this package uses these names.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# By room, the modules that stood in `pq_sweep` itself and could be named from outside.
ROOMS = {
    "core": "environment fingerprint hardware imports",
    "inputs": "classes datasets digits_cnn download image_cache images models networks",
    "compress": "blocks mixed pruners qdq quantizers recovery removal",
    "measure": "layers monitor significance sizes timing",
    "runtimes": "export",
    "results": "comparison decision rows",
    "sweep": "cli search",
}
MODULES = {f"pq_sweep.{name}": f"pq_sweep.{room}.{name}" for room, names in ROOMS.items() for name in names.split()}
# What could be named in modules whose own name now belongs to a room.
VALUES = {
    "pq_sweep.results.Sweep": "pq_sweep.results.sweeps.Sweep",
    "pq_sweep.results.find_sweeps": "pq_sweep.results.sweeps.find_sweeps",
    "pq_sweep.results.merge": "pq_sweep.results.sweeps.merge",
    "pq_sweep.results.read_job": "pq_sweep.results.sweeps.read_job",
    "pq_sweep.results.read_sweep": "pq_sweep.results.sweeps.read_sweep",
    "pq_sweep.results.write_csv": "pq_sweep.results.spreadsheet.write_csv",
    "pq_sweep.sweep.Sweep": "pq_sweep.sweep.callback.SweepCallback",
    "pq_sweep.sweep.run_job": "pq_sweep.sweep.worker.run_job",
}


class FormerModule(Loader):
    """Imports a module under its present name for an import statement that uses a former one."""

    def __init__(self, present: str) -> None:
        self.present = present

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(self.present)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec  # the import system has just replaced it by that of the former name


class FormerNames(MetaPathFinder):
    """Finds former modules and what was in them, such as `pq_sweep.monitor.cpu`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("pq_sweep."):
            return None
        former = ".".join(fullname.split(".")[:2])
        if former not in MODULES:
            return None
        return ModuleSpec(fullname, FormerModule(MODULES[former] + fullname.removeprefix(former)))


def install() -> None:
    """Let import statements find former names, before Python's own finder imports a former package's modules again."""
    sys.meta_path.insert(0, FormerNames())


def former_values(module: str) -> Callable[[str], Any]:
    """Return the `__getattr__` of a room that has the name of a former module."""

    def find(name: str) -> Any:
        if f"{module}.{name}" not in VALUES:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        present, _, value = VALUES[f"{module}.{name}"].rpartition(".")
        return getattr(import_module(present), value)

    return find
