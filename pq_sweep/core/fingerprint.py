"""What a result depends on, as one hash: a job whose result has the same fingerprint need not run again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from pq_sweep.core.environment import versions

# Groups that decide where results go and whether earlier ones count, but not what the results are.
WITHOUT_EFFECT = ("tracking", "resume", "search", "cache")
# The rooms around jobs, which start and watch jobs and show what they found, and the doors to these rooms.
AROUND_JOBS = ("sweep", "tracking", "results", "doctor", "cache.py", "gpu_check.py", "recommend.py", "report.py")


def fingerprint(cfg: DictConfig) -> str:
    """Return a hash of a job's options, of the code and versions that it runs with, and of the files it names.

    A file in `model.weights` counts by its size and time, a `dataset.root` by its folders with their times, which
    change when images come or go, but not when an image is overwritten in place.
    """
    options = resolved(cfg)
    return digest([options, code(options), versions(), *_files(options)])


def code(options: dict[str, Any]) -> str:
    """Return a hash of the source that a job with these options runs, components from elsewhere included."""
    return _code(tuple(sorted(_own_modules(options))))


def digest(content: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """Return what a job's results depend on as plain values."""
    values: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"]), resolve=True
    )
    return {str(key): value for key, value in values.items() if key not in WITHOUT_EFFECT}


def files_state(options: dict[str, Any]) -> list[Any]:
    """Return values by which one can tell whether the files that a model or dataset names are still the same."""
    return list(_files(options))


def _own_modules(options: dict[str, Any]) -> Iterator[str]:
    """Name the modules outside this package that components come from."""
    for group in options.values():
        target = str(group.get("_target_", "")) if isinstance(group, dict) else ""
        if target and not target.startswith("pq_sweep."):
            yield target.rpartition(".")[0]


@cache
def _code(modules: tuple[str, ...]) -> str:
    """Return a hash of the source of this package and of further modules."""
    package = Path(__file__).parents[1]
    sources = sorted(path for path in package.rglob("*.py") if path.relative_to(package).parts[0] not in AROUND_JOBS)
    specs = (find_spec(module) for module in modules)
    sources += [Path(spec.origin) for spec in specs if spec and spec.origin and Path(spec.origin).is_file()]
    whole = hashlib.sha256()
    for source in sources:
        whole.update(source.read_bytes())
    return whole.hexdigest()


def _files(options: dict[str, Any]) -> Iterator[Any]:
    weights, root = (options.get(group, {}).get(key) for group, key in (("model", "weights"), ("dataset", "root")))
    if weights and Path(str(weights)).expanduser().is_file():
        stat = Path(str(weights)).expanduser().stat()
        yield [stat.st_size, stat.st_mtime_ns]
    if root and Path(str(root)).expanduser().is_dir():
        yield _folders(Path(str(root)).expanduser())


@cache
def _folders(root: Path) -> list[tuple[str, int]]:
    """Return the folders down to two levels below `root` and when something was last added to or taken from each."""
    below = [path for pattern in ("*", "*/*") for path in root.glob(pattern) if path.is_dir()]
    return [(str(path.relative_to(root)), path.stat().st_mtime_ns) for path in sorted([root, *below])]
