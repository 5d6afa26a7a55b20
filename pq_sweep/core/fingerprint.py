"""What a result depends on, as one hash: a job whose result has the same fingerprint need not run again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pq_sweep.core import opened, sources
from pq_sweep.core.environment import SLURM, versions
from pq_sweep.core.options import spelled
from pq_sweep.core.places import named_in_code, state_of
from pq_sweep.core.sources import Sources, follow, module_of

# Groups that decide where results go and whether earlier ones count, but not what the results are.
WITHOUT_EFFECT = ("tracking", "resume", "search", "cache")
# The options of this package's components that are paths.
PATHS = {"model": ("weights",), "dataset": ("root",)}
# Variables of the environment in which each process of a sweep, or each node, may differ.
OF_A_PROCESS = {"CUDA_VISIBLE_DEVICES", "HOSTNAME", "LOCAL_RANK", "PWD", "RANK", "TMPDIR", *SLURM, "SLURM_LOCALID",
                "SLURM_PROCID", "SLURM_TMPDIR", "SLURM_CPUS_PER_TASK"}  # fmt: skip
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
# The rooms around jobs, which start and watch jobs and show what they found, and the doors to these rooms.
AROUND_JOBS = ("sweep", "tracking", "results", "doctor", "study", "cache.py", "gpu_check.py", "recommend.py",
               "report.py")  # fmt: skip


def fingerprint(cfg: DictConfig) -> str:
    """Return a hash of a job's options, of the code and versions that it runs with, and of the files it names."""
    return fingerprint_of(resolved(cfg))


def fingerprint_of(options: dict[str, Any]) -> str:
    """Return the fingerprint of a job whose options are resolved."""
    return digest([options, code(options), versions(), *files_state(options)])


def code(options: dict[str, Any]) -> str:
    """Return a hash of the source that a job with these options runs, components from elsewhere included.

    Of these count their modules and all that they import, directly or not; installed packages count by version.
    """
    return _code(_own_modules(options))


def unfollowed(options: dict[str, Any]) -> list[str]:
    """Say in a sentence each which code of a job's components may change without being noticed."""
    return _sources(_own_modules(options)).blind


def digest(content: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return what a job's results depend on as plain values."""
    jobs = OmegaConf.masked_copy(spelled(cfg), [str(key) for key in cfg if key != "hydra"])
    values: Any = OmegaConf.to_container(jobs, resolve=True)
    return {str(key): value for key, value in values.items() if key not in WITHOUT_EFFECT}


# What files of components from elsewhere looked like at first: a job may write some of them itself, as it goes.
SEEN: dict[str, list[Any]] = {}


def files_state(options: dict[str, Any]) -> list[Any]:
    """Return values by which one can tell whether the files that a job names are still the same.

    These are the files and folders in options, and those whose paths the code of components spells out. The variables
    of the environment that such code reads count too.
    """
    named, modules = sorted(set(_paths(options, ours=False))), _own_modules(options)
    if (key := digest([named, modules])) not in SEEN:
        found = _sources(modules)
        states = _states([*named, *chain.from_iterable(named_in_code(*text) for text in sorted(found.paths))])
        SEEN[key] = states + [[name, os.environ.get(name)] for name in sorted(found.variables - OF_A_PROCESS)]
    return _states(_paths(options, ours=True)) + SEEN[key]


def _states(names: Iterable[str]) -> list[Any]:
    return [[name, state] for name in sorted(set(names)) if (state := state_of(name))]


def look_again() -> None:
    """Forget what files and folders looked like, but for the code that this process runs already."""
    SEEN.clear()
    sources.look_again()
    opened.look_again()
    _module_of.cache_clear()
    _sources.cache_clear()
    _code.cache_clear()


def _own_modules(options: Any) -> tuple[str, ...]:
    """Name the modules outside this package that components come from, or that options name for them."""
    names = {text for text in _texts(options) if DOTTED.fullmatch(text) and not text.startswith("pq_sweep.")}
    return tuple(sorted({module for name in names if (module := _module_of(name))}))


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts in plain values, however deep."""
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        yield from _texts(part)


def _paths(options: dict[str, Any], *, ours: bool) -> Iterator[str]:
    """Yield texts in options that may be paths: those that are paths to this package's components, or all others."""
    for group, values in options.items():
        if not isinstance(values, dict) or not str(values.get("_target_", "")).startswith("pq_sweep."):
            yield from () if ours else _texts(values)
            continue
        paths = {name: str(values[name]) for name in PATHS.get(group, ()) if values.get(name)}
        rest = _texts({name: value for name, value in values.items() if name not in paths})
        # Words without either sign are names.
        yield from paths.values() if ours else (text for text in rest if set(text) & set("/."))


@cache
def _module_of(name: str) -> str | None:
    return module_of(name)


@cache
def _sources(modules: tuple[str, ...]) -> Sources:
    return follow(modules)


@cache
def _code(modules: tuple[str, ...]) -> str:
    """Return a hash of the source of this package and of what further modules run."""
    package = Path(__file__).parents[1]
    own = sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in AROUND_JOBS)
    found, whole = _sources(modules), hashlib.sha256()
    for path in own:
        whole.update(path.read_bytes())
    for name, content in sorted(found.files.items()):
        whole.update(name.encode() + content)
    whole.update(json.dumps(found.versions, sort_keys=True).encode())
    return whole.hexdigest()
