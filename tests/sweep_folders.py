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


def finished(number: int, amount: float, quantizer: str, device: str = "AMD EPYC") -> Result:
    """Return a result whose figures follow from what the job is."""
    found = real_result()
    speed = 8.0 * (1 - amount / 2) * (0.5 if quantizer == "int8" else 1)
    found["environment"]["device"] = device
    once = found["latency"]["1"] | {"unstable": []}
    found["latency"] = {
        str(size): once | {"p50_ms": speed * size, "p50_ci95_ms": [speed * size * 0.99, speed * size * 1.01]}
        for size in (1, 8)
    }
    lost = 20 * amount**4 + number * 1e-4
    found["accuracy"] |= {"top1": 0.95 - lost / 100, "top1_ci95": [0.94 - lost / 100, 0.96 - lost / 100]}
    found["accuracy"] |= {"drop_points": lost, "drop_ci95_points": [lost - 1, lost + 1]}
    found["size_bytes"] |= {"compressed": int(1e6 * (1 - amount) * (0.25 if quantizer == "int8" else 1)) + 1}
    found["prep_s"] = {"prune": 0.1, "export": 1.5}
    return found


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
