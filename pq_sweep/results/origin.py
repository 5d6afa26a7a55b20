"""What a job folder was asked for: as its sweep announced it or, if it came from another sweep, as it says itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pq_sweep.core.files import read_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.groups import GROUPS, job_name, options_that_tell
from pq_sweep.core.sentences import without_password
from pq_sweep.results.rows import Row

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is ten times as fast


def known(folder: JobFolder, announced: Row | None) -> Row:
    """Return choices, overrides and name of a job.

    A folder that was copied into a sweep, perhaps in place of one of its own, holds what another sweep asked for.
    """
    if announced is not None and _is_of_sweep(folder, announced):
        return announced
    choices, overrides = _chosen(folder), _read(folder.path / ".hydra" / "overrides.yaml")
    if not choices:
        return announced or {}
    words = [without_password(str(word)) for word in overrides] if isinstance(overrides, list) else []
    return {"folder": folder.name, "name": job_name(choices), "choices": choices, "overrides": words}


def _is_of_sweep(folder: JobFolder, announced: Row) -> bool:
    """Say whether a job's result, if there is one, has the options that its sweep announced or may have."""
    found = _inside(read_json(folder.result), "fingerprint")
    if not folder.result.exists() or (found and found == announced.get("fingerprint")):
        return True
    overrides = _read(folder.path / ".hydra" / "overrides.yaml")  # the same ones after a change of code
    return overrides is None or [without_password(str(word)) for word in overrides] == announced.get("overrides")


def _inside(values: Any, *keys: str) -> Any:
    """Return what lies below the keys, or None if it does not: a file that was cut short may end anywhere."""
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def _chosen(folder: JobFolder) -> dict[str, Any]:
    """Return the choices of a job as `sweep.json` would: by Hydra's record, else by what its result was made with."""
    config = _inside(read_json(folder.result), "config") or _read(folder.config)
    if not isinstance(config, dict):
        return {}
    recorded = _inside(_read(folder.path / ".hydra" / "hydra.yaml"), "hydra", "runtime", "choices")
    choices: dict[str, Any] = {group: str(_inside(recorded, group) or _name(config.get(group))) for group in GROUPS}
    groups: dict[str, Any] = {
        group: config.get(group) if isinstance(config.get(group), dict) else {} for group in GROUPS
    }
    return choices | options_that_tell({**config, **groups})


def _name(options: Any) -> str | None:
    """Return the name of a component by its options: that of what it names, or of its function."""
    if not isinstance(options, dict):
        return None
    return str(options.get("name") or str(options.get("_target_")).rpartition(".")[2])


def _read(path: Path) -> Any:
    """Return the content of a YAML file, or None if there is none or it is damaged."""
    try:
        return yaml.load(path.read_text(), LOADER)
    except (OSError, ValueError, yaml.YAMLError):
        return None
