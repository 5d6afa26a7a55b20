"""What measured figures depend on: versions, code, machine, device."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pq_sweep.core.hardware import cpu_name
from pq_sweep.core.sentences import without_password
from pq_sweep.types import UserError

PACKAGES = (
    "pq-sweep", "torch", "torchvision", "torch-pruning", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu",
    "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "numpy", "scikit-learn", "pillow", "hydra-core", "omegaconf", "mlflow",
)  # fmt: skip


SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURMD_NODENAME", "SLURM_JOB_PARTITION",
         "SLURM_JOB_GPUS", "SLURM_RESTART_COUNT", "SLURM_CLUSTER_NAME")  # fmt: skip


def slurm() -> dict[str, str]:
    """Return what SLURM says of the job that this process belongs to; nothing outside of SLURM."""
    return {key.lower(): os.environ[key] for key in SLURM if key in os.environ}


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that numbers depend on."""
    return {name: found for name in PACKAGES if (found := _version(name))}


def command_line() -> str:
    """Return the command that started this process."""
    return without_password(shlex.join(sys.orig_argv))


@cache
def git_state() -> dict[str, Any] | None:
    """Return the commit of this package's checkout and whether it has changes, or None outside one; asked once."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(here, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.SubprocessError):
        return None


def cache_home() -> Path:
    """Return the folder of downloads and decoded images: PQ_SWEEP_CACHE, else pq_sweep in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PQ_SWEEP_CACHE") or user / "pq_sweep").expanduser()


def resolve_device(device: str, option: str = "device") -> str:
    """Turn auto, cpu, cuda or cuda:N into "cpu" or "cuda:N"; refuse CUDA where torch has none."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        if device == "auto":
            return "cpu"
        raise UserError(
            f"{option}={device} was asked for and torch {torch.__version__} finds no CUDA device here;"
            f" use {option}=cpu."
        )
    index = int(device.partition(":")[2] or 0)  # an earlier job of the process may have made another the current one
    if index >= torch.cuda.device_count():
        raise UserError(
            f"{option}={device} does not exist; this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}."
        )
    return f"cuda:{index}"


def device_name(device: str) -> str:
    """Return the product name of the CPU or GPU."""
    if device == "cpu":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(device)


def gpu_uuid(device: str) -> str | None:
    """Return the UUID of a CUDA device as torch knows it, or None for the CPU."""
    if device == "cpu":
        return None
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
