"""The source files behind a component: its own module and all that this imports, found without running any of it."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import invalidate_caches
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from itertools import chain
from pathlib import Path
from pkgutil import iter_modules

from pq_sweep.core.reading import Reading, read, shown

PACKAGE = Path(__file__).parents[1]
INSTALLED = {"site-packages", "dist-packages"}
STANDARD = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))


@dataclass(frozen=True)
class Module:
    """A module by its file; a package that has no `__init__.py` has none. `folders` is where its submodules are."""

    name: str
    file: Path | None
    folders: tuple[str, ...] | None
    spec: ModuleSpec

    @property
    def is_ours(self) -> bool:
        """Say whether it belongs to pq_sweep, all of which counts anyway."""
        return self.name.partition(".")[0] == "pq_sweep"

    @property
    def is_standard(self) -> bool:
        """Say whether it is part of Python."""
        if self.file is None:
            return self.folders is None
        return not self.is_installed and any(self.file.is_relative_to(root) for root in STANDARD)

    @property
    def is_installed(self) -> bool:
        """Say whether it belongs to an installed package, which counts by its version."""
        places = [self.file] if self.file else [Path(folder) for folder in self.folders or ()]
        return bool(places) and all(INSTALLED & set(place.parts) for place in places)


@dataclass
class Sources:
    """The files of code behind components, by hash, and versions of the installed packages that they use.

    `paths` are texts that may be paths, each with the file that has it; `variables` those of the environment that it
    reads; `blind` says what could not be followed, a sentence each.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    paths: set[tuple[str, Path]] = field(default_factory=set)
    variables: set[str] = field(default_factory=set)
    blind: list[str] = field(default_factory=list)


# Where this process found modules before any component could change sys.path, once that is settled.
FIXED: list[str] = []


def fix_search_path() -> None:
    """Let modules be looked for where they are now, so that all processes of a job find the same ones."""
    if not FIXED:
        FIXED.extend(sys.path)


def search_path() -> list[str]:
    """Return where modules are looked for."""
    return list(FIXED or sys.path)


def find_module(name: str, search: Iterable[str] = ()) -> Module | None:
    """Return a module or None, without running the packages that it lies in."""
    spec, folders = None, None
    for number, _ in enumerate(parts := name.split("."), 1):
        if number > 1 and folders is None:
            return None
        spec = _spec(".".join(parts[:number]), folders if number > 1 else None, tuple(search))
        if spec is None:
            return None
        found = spec.submodule_search_locations
        folders = None if found is None else tuple(found)
    if spec is None:
        return None
    return Module(name, _file(spec), folders, spec)


def _spec(name: str, folders: tuple[str, ...] | None, search: tuple[str, ...]) -> ModuleSpec | None:
    """Return what Python's finders say of a module in the folders of its package, or at the top."""
    for finder in sys.meta_path:
        spec = None
        with suppress(Exception):  # finders of other packages
            if finder is PathFinder:
                # By its last part: for a package without __init__.py, Python would look up the one around it, which
                # was not imported.
                last = name.rpartition(".")[2]
                spec = PathFinder.find_spec(last, [*search_path(), *search] if folders is None else list(folders))
            else:
                spec = finder.find_spec(name, folders)
        if spec is not None:
            return spec
    return None


def _file(spec: ModuleSpec) -> Path | None:
    archive = getattr(spec.loader, "archive", None)
    if archive:
        return Path(archive)
    return Path(spec.origin) if spec.has_location and spec.origin else None


def module_of(target: str) -> str | None:
    """Return the module in a name such as "module.function" or "module.Class.method", or None if there is none."""
    name = target
    while name and find_module(name) is None:
        name = name.rpartition(".")[0]
    return name or None


def follow(modules: Iterable[str]) -> Sources:
    """Return all sources that modules run, with the modules themselves, wherever these lie."""
    roots, search = sorted(set(modules)), list[str]()
    while True:
        trail = Trail(roots, search)
        trail.walk()
        if set(trail.search) <= set(search):
            return trail.found
        search = trail.search  # a module may need a folder that another one adds


@dataclass
class Trail:
    """A walk from modules to all that they import."""

    roots: list[str]
    search: list[str]
    found: Sources = field(default_factory=Sources)

    def __post_init__(self) -> None:
        self.search = list(self.search)
        self.waiting = deque(self.roots)
        self.seen = set[str]()

    def walk(self) -> None:
        """Take up one module after another."""
        while self.waiting:
            name = self.waiting.popleft()
            parts = name.split(".")
            for number in range(1, len(parts) + 1):
                if not self._take(".".join(parts[:number])):
                    break

    def _take(self, name: str) -> bool:
        """Take up a module; say whether there may be more of it within."""
        if name in self.seen:
            return True
        module = find_module(name, self.search)
        if module is None or module.is_ours:
            return False
        self.seen.add(name)
        foreign = module.is_standard or module.is_installed
        if module.is_installed:
            self.found.versions |= _version(name.partition(".")[0])
        if module.file is not None and (not foreign or name in self.roots):
            self._read(module.file, name, foreign, module)
        return not foreign or any(root.startswith(f"{name}.") for root in self.roots)

    def _read(self, file: Path, name: str, foreign: bool = False, module: Module | None = None) -> None:
        """Note a file of code and, unless it is of an installed package, go on to what it needs."""
        content, reading = source_of(file, name, module)
        self.found.files[name] = content
        if foreign:
            return
        self.found.blind += shown(file, reading.blind)
        self.found.paths |= {(path, file) for path in reading.paths}
        self.found.variables |= set(reading.variables)
        self.waiting += [*reading.names, *reading.packages, *chain.from_iterable(map(self._below, reading.packages))]
        self.search += [folder for folder in map(_absolute, reading.search) if folder not in self.search]
        for script in map(Path, map(_absolute, reading.scripts)):
            if str(script) not in self.seen and script.is_file():
                self.seen.add(str(script))
                self._read(script, str(script))

    def _below(self, package: str) -> Iterator[str]:
        """Name all modules of a package and of the packages in it."""
        module = find_module(package, self.search)
        for found in iter_modules(module.folders if module else ()):
            name = f"{package}.{found.name}"
            yield name
            if found.ispkg:
                yield from self._below(name)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _version(name: str) -> dict[str, str]:
    """Return the version of the installed package that a module belongs to, under the module's name."""
    with suppress(PackageNotFoundError):
        return {name: version(name)}
    owners = _distributions().get(name, [])
    return {name: " ".join(version(owner) for owner in sorted(set(owners)))}


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


# What files said when they were first looked at: a process goes on running the modules that it has imported.
READ: dict[tuple[Path, str], tuple[bytes, Reading]] = {}


def source_of(file: Path, name: str, module: Module | None) -> tuple[bytes, Reading]:
    """Return the bytes of a file of code, and what it needs."""
    if (file, name) not in READ:
        try:
            content = file.read_bytes()
            reading = _reading(content, file, name, module)
        except OSError:
            content, reading = b"", Reading(blind=[(1, "cannot be read")])
        READ[file, name] = hashlib.sha256(content).digest(), reading
    return READ[file, name]


def _reading(content: bytes, file: Path, name: str, module: Module | None) -> Reading:
    """Return what a file of code needs; one that is compiled does not say."""
    package = "" if module is None else name if module.folders is not None else name.rpartition(".")[0]
    if file.suffix == ".py" or module is None:
        return read(content, file, package)
    source = None
    with suppress(Exception):  # an archive, a file that is compiled, or a loader of another package
        source = getattr(module.spec.loader, "get_source", lambda name: None)(module.spec.name)
    return Reading(blind=[(1, "is compiled")]) if source is None else read(source.encode(), file, package)


def look_again() -> None:
    """Forget what files said whose modules are not imported yet."""
    invalidate_caches()
    for key in [key for key in READ if key[1] not in sys.modules]:
        del READ[key]
