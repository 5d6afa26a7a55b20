"""A folder to ship: a job's model with its card, its options, its figures, and a script that runs it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pq_sweep import __version__
from pq_sweep.core.environment import git_state
from pq_sweep.core.files import read_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.result import Result
from pq_sweep.types import Record, UserError

TEMPLATES = Path(__file__).parent / "templates"


def ship(job: JobFolder, target: Path, told: Record, figures: list[tuple[str, str]], doubts: list[str]) -> None:
    """Copy the model of a job folder into a new one with all that is needed to run it.

    `told` has the job's figures by name, `figures` those to show, and `doubts` what speaks against the model.
    """
    if target.exists() and any(target.iterdir()):
        raise UserError(f"--export {target} is not empty; give a folder that is not there yet.")
    result = Result.of(read_json(job.result))
    about = describe(result, told) | {"figures": figures, "doubts": doubts}
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(job.path / result.session.artifact, target / about["artifact"])
    for path in (job.result, job.pruning):
        if path.exists():
            shutil.copyfile(path, target / path.name)
    _write_options(result.config, target)
    (target / "labels.txt").write_text("".join(f"{label}\n" for label in about["labels"]))
    (target / "README.md").write_text(render("README.md.j2", about))
    (target / "run.py").write_text(render("run.py.j2", about))


def describe(result: Result, told: Record) -> Record:
    """Return what the card and the script say about a result."""
    session, network = result.session, result.network
    assert result.accuracy, "a job that was not run is never recommended"
    labels = network.labels or [str(number) for number in range(network.classes)]
    return {
        "name": told["name"],
        "command": told["command"],
        "batch": told["batch"],
        "artifact": Path(session.artifact).name,
        "removed": "history" in (told.get("pruning") or {}),
        "labels": [" ".join(str(label).split()) for label in labels],
        "preprocess": network.preprocess,
        "licence": network.licence,
        "provider": session.engine.rpartition(" ")[2],
        "dtype": session.details.get("dtype"),
        "device": result.environment["device"],
        "version": result.environment["versions"].get("pq-sweep"),
        "written_by": written_by(),
        "samples": result.accuracy.samples,
        "hardware": result.hardware,
        "disabled_optimizers": session.details.get("disabled_optimizers") or [],
        "session_options": session.details.get("session_options", {}),
        "notes": result.notes or [],
        "config": result.config,
        **{name: getattr(session, name) for name in ("runtime", "precision", "engine", "sha256")},
    }


def written_by() -> str:
    """Return the version of this package, and its commit if it is known, which run.py names as needed to run."""
    commit = (git_state() or {}).get("commit")
    return f"{__version__} (commit {commit[:12]})" if commit else __version__


def render(template: str, about: dict[str, Any]) -> str:
    """Fill a template."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(template).render(about)


def _write_options(config: dict[str, Any], target: Path) -> None:
    """Write all options, and those of the model alone, without its weights: the artifact has them."""
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.create(config), target / "config.yaml")
    OmegaConf.save(OmegaConf.create(_unloaded(config["model"])), target / "model.yaml")


def _unloaded(network: dict[str, Any]) -> dict[str, Any]:
    """Return a model's options so that it loads no file; `key` chooses in a file only in models of this package."""
    names = ("weights", "key") if str(network.get("_target_")).startswith("pq_sweep.") else ("weights",)
    return network | dict.fromkeys(set(names) & network.keys())
