"""The files that components of other people's making open while they run, which no option and no source may name.

Python tells who asks of each file that it opens and of each folder that it lists; libraries that read files from C or
C++ by themselves, other than safetensors, go unseen.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from glob import glob
from importlib.util import source_from_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.core.environment import cache_home
from pq_sweep.core.options import is_ours
from pq_sweep.core.places import LEFT_BEHIND, SWEEP, forget_folders, state_of
from pq_sweep.core.sources import INSTALLED, PACKAGE, STANDARD

if TYPE_CHECKING:
    from omegaconf import DictConfig

# What was opened, by kind of look and path, each with the state that it had then.
Opened = dict[str, dict[str, Any]]
SMALL = 100_000  # bytes up to which a file counts by its content, so that writing the same again is no change
MOST = 1000  # files that are told one by one; of more, whole folders are told
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NO_FILES = ("/proc", "/sys", "/dev")

# A component's code may read a file once and remember it for later jobs of this process, so all of them count.
FOUND: dict[str, dict[tuple[str, str], Any]] = defaultdict(dict)
WRITTEN: set[str] = set()
ACTIVE: list[str] = []


@contextmanager
def noting(*components: DictConfig) -> Iterator[None]:
    """Note the files that are opened inside as those of the components, unless these are this package's."""
    names = _packages(components)
    if not names:
        yield
        return
    _listen()
    with ExitStack() as stack:
        for name in ("safetensors", "safetensors.torch", "safetensors.numpy"):
            module: Any = sys.modules.get(name)
            if found := getattr(module, "safe_open", None):
                stack.callback(setattr, module, "safe_open", found)
                module.safe_open = partial(_open_safely, found)
        ACTIVE.extend(names)
        try:
            yield
        finally:
            del ACTIVE[-len(names) :]


def opened(components: Iterable[DictConfig], own: Path) -> Opened:
    """Return what components have opened in this process, files below the folder `own` excepted.

    What they wrote themselves, or what was changed meanwhile, is left out.
    """
    found: dict[str, set[str]] = {kind: set() for kind in LOOKS}
    for name in set(_packages(components)):
        for (kind, path), before in list(FOUND[name].items()):
            if path not in WRITTEN and not Path(path).is_relative_to(own) and before == _mark(kind, path):
                found[kind].add(path)
    found["files"], found["trees"] = _gathered(found["files"])
    return {kind: {path: look(path) for path in sorted(found[kind])} for kind, look in LOOKS.items()}


def merged(first: Opened, second: Opened) -> Opened:
    """Return all that either holds; the second knows better."""
    return {kind: first.get(kind, {}) | second.get(kind, {}) for kind in LOOKS}


def unchanged(found: Any) -> bool:
    """Say whether all that was opened is as it was then; true of results from before this was noted."""
    known = found if isinstance(found, dict) else {}
    return all(LOOKS[kind](path) == state for kind in LOOKS for path, state in known.get(kind, {}).items())


def look_again() -> None:
    """Forget how files looked."""
    for look in (_content, _names, _matching):
        look.cache_clear()
    forget_folders()


def _packages(components: Iterable[DictConfig]) -> list[str]:
    """Return the package or module at the top of each component that is none of this package's."""
    targets = [str(each._target_) for each in components if "_target_" in each and not is_ours(each)]
    return [target.partition(".")[0] for target in targets]


@cache
def _listen() -> None:
    """Have Python tell of each file; this cannot be taken back, so it is asked for once."""
    sys.addaudithook(_heard)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what an event of Python's is about; whatever is odd about it is left to whoever opens the file."""
    if not ACTIVE or event not in EVENTS:
        return
    with suppress(Exception):
        EVENTS[event](*arguments)


def _heard_open(path: Any, mode: str | None, flags: int) -> None:
    if isinstance(path, str | bytes | os.PathLike):
        writes = set(mode) & set("wax+") if mode else flags & WRITING
        place = _place(path)
        if writes:
            WRITTEN.add(place)
        else:
            _note("files", place)


def _heard_list(path: Any = None) -> None:
    if not isinstance(path, int) and not _is_search():
        _note("listed", _place(path or "."))


def _heard_glob(pattern: Any, *_: Any) -> None:
    _note("matching", _place(pattern))


def _heard_path_glob(folder: Path, pattern: Any) -> None:
    _note("matching", str(folder.absolute() / pattern))


def _heard_path_rglob(folder: Path, pattern: Any) -> None:
    _note("matching", str(folder.absolute() / "**" / pattern))


def _heard_load(path: Any) -> None:
    if path and os.sep in os.fsdecode(path):  # else a name, looked for where the system has its libraries
        _note("files", _place(path))


def _place(path: Any) -> str:
    return str(Path(os.fsdecode(path)).absolute())


EVENTS: dict[str, Callable[..., None]] = {
    "open": _heard_open,
    "os.listdir": _heard_list,
    "os.scandir": _heard_list,
    "glob.glob": _heard_glob,
    "pathlib.Path.glob": _heard_path_glob,
    "pathlib.Path.rglob": _heard_path_rglob,
    "ctypes.dlopen": _heard_load,
    "sqlite3.connect": _heard_load,
}


def _is_search() -> bool:
    """Say whether Python lists a folder in search of a module, or of names that match a pattern, which is noted."""
    frame: Any = sys._getframe(1)
    while frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
    file, function = frame.f_code.co_filename, frame.f_code.co_name
    return file.startswith("<frozen importlib") or file.endswith("glob.py") or _is_glob(file, function)


def _is_glob(file: str, function: str) -> bool:
    return file.startswith(f"{STANDARD[0]}{os.sep}pathlib") and function != "iterdir"


def _open_safely(original: Callable[..., Any], filename: Any, *arguments: Any, **options: Any) -> Any:
    """Open a file of safetensors, which is done in Rust, as the library does, and note it."""
    _heard_open(filename, "r", 0)
    return original(filename, *arguments, **options)


def _note(kind: str, path: str) -> None:
    """Note the state of a file or folder before it is first opened."""
    if "__pycache__" in path:
        path = source_from_cache(path)
    elsewhere = (PACKAGE, *STANDARD, cache_home(), *NO_FILES)  # files that count in another way, or not at all
    if not path.startswith(tuple(f"{folder}{os.sep}" for folder in elsewhere)) and not INSTALLED & {*Path(path).parts}:
        for name in ACTIVE:
            FOUND[name].setdefault((kind, path), _mark(kind, path))


def _mark(kind: str, path: str) -> Any:
    """Return at little cost what tells whether a file is changed while a job runs."""
    if kind != "files":
        return None  # what is in a folder is looked at when all is over
    with suppress(OSError):
        found = Path(path).stat()
        return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else False
    return None


@cache
def _content(path: str) -> Any:
    """Return what a change of a file would change: a hash of a small one, size and time of a large one."""
    with suppress(OSError):
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):
            return None
        if found.st_size > SMALL:
            return [found.st_size, found.st_mtime_ns]
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return None


@cache
def _names(path: str) -> Any:
    """Return a hash of the names in a folder, but for what jobs themselves leave behind, or None if there is none."""
    with suppress(OSError):
        return _hash(map(str, Path(path).iterdir()))
    return None


@cache
def _matching(pattern: str) -> Any:
    """Return a hash of the paths that match a pattern, but for what jobs themselves leave behind."""
    return _hash(glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob wants to know where the pattern begins)


def _hash(paths: Iterable[str]) -> str:
    left = sorted(path for path in paths if not _is_left_behind(path))
    return hashlib.sha256("\n".join(left).encode(errors="surrogateescape")).hexdigest()


def _is_left_behind(path: str) -> bool:
    return Path(path).name in LEFT_BEHIND or Path(path, SWEEP).exists()


# What is looked at: single files, the names in a folder, those that match a pattern, and whole folders.
LOOKS: dict[str, Any] = {"files": _content, "listed": _names, "matching": _matching, "trees": state_of}


def _gathered(files: set[str]) -> tuple[set[str], set[str]]:
    """Return files and, instead of too many, folders that hold them, none of which holds the working folder."""
    if len(files) <= MOST:
        return files, set()
    folders = {Path(path).parent for path in files}
    while len(folders) > MOST:
        deepest = max(len(folder.parts) for folder in folders)
        folders = {folder.parent if len(folder.parts) == deepest else folder for folder in folders}
    folders -= {Path.cwd(), *Path.cwd().parents}
    single = {path for path in files if folders.isdisjoint(Path(path).parents)}
    return single, {str(folder) for folder in folders}
