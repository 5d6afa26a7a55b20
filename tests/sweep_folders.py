"""Sweep folders as a sweep leaves them, written by hand from one real result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from commands import SHORT
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pq_sweep.core.groups import GROUPS
from pq_sweep.job.run import run

Result = dict[str, Any]

DEFAULTS = dict(zip(GROUPS, ("digits_cnn", "digits", "l1_global", "none", "none", "auto"), strict=True))


@cache
def _real_job() -> tuple[Result, str]:
    """Run one small job; return its result and its config."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["pruner=l1_global", *SHORT])
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "0"
        job.mkdir()
        run(config, job)
        return json.loads((job / "result.json").read_text()), OmegaConf.to_yaml(config)


def real_result() -> Result:
    return deepcopy(_real_job()[0])


def announced(folder: str, **choices: Any) -> dict[str, Any]:
    """Return a job's entry in sweep.json."""
    chosen = DEFAULTS | {"amount": 0.5, "device": "auto", "seed": 0} | choices
    return {"folder": folder, "name": f"announced {folder}", "choices": chosen, "overrides": []}


def write_manifest(sweep: Path, *jobs: dict[str, Any]) -> Path:
    sweep.mkdir(parents=True, exist_ok=True)
    manifest = {"id": f"id of {sweep.name}", "created": 1.7e9, "command": "python launch.py", "git": None}
    (sweep / "sweep.json").write_text(json.dumps(manifest | {"jobs": list(jobs)}))
    return sweep


def write_result(sweep: Path, job: str, result: Result | None = None) -> Result:
    """Write a finished job and return its result."""
    result = real_result() if result is None else result
    folder = sweep / job
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(_real_job()[1])
    (folder / "result.json").write_text(json.dumps(result))
    return result


def write_error(sweep: Path, job: str, message: str = "it broke.") -> None:
    error = {"type": "ValueError", "message": message, "stage": "prune", "started": 1.7e9, "traceback": "Traceback"}
    (sweep / job).mkdir(parents=True, exist_ok=True)
    (sweep / job / "error.json").write_text(json.dumps(error))


def write_status(sweep: Path, job: str, pid: int) -> None:
    status = {"stage": "accuracy", "since": 1.7e9, "pid": pid, "host": os.uname().nodename}
    (sweep / job).mkdir(parents=True, exist_ok=True)
    (sweep / job / "status.json").write_text(json.dumps(status))


def dead_pid() -> int:
    """Return the id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
