"""Runtimes with the defaults of conf/, opened on the GPU, and skipped with the reason where the machine lacks one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from pq_sweep.doctor.gpu_check.jobs import why_not
from pq_sweep.doctor.gpu_check.packages import RUNTIMES, lacks
from pq_sweep.inputs.datasets import fake
from pq_sweep.inputs.models import torchvision_model
from pq_sweep.job.run import component
from pq_sweep.job.stages import Stages
from pq_sweep.types import Model, Session, Workspace

DEVICE = "cuda:0"


def choice(group: str, name: str, **options: Any) -> Any:
    """Return a component with the options of its YAML, some of them changed."""
    return component(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml"), **options)


def need(*packages: str) -> None:
    """Skip the test unless packages are here, and say which are to be brought."""
    if reason := lacks(packages, torch.version.cuda or ""):
        pytest.skip(reason)


def able(name: str, **options: Any) -> Any:
    """Return a runtime, or skip the test if it cannot run here."""
    need(*RUNTIMES[name])
    runtime = choice("runtime", name, **options)()
    if reason := why_not(runtime, DEVICE):
        pytest.skip(reason)
    return runtime


def resnet50() -> Model:
    """Return ResNet-50 with random weights."""
    need("torchvision")
    return torchvision_model(name="resnet50", weights=None)


@contextmanager
def opened(
    folder: Path,
    model: Model,
    runtime: str,
    quantizer: str = "none",
    *,
    sizes: tuple[int, ...],
    device: str = DEVICE,
    **options: Any,
) -> Iterator[Session]:
    """Open a session that times `sizes`, and close it afterwards."""
    folder.mkdir(exist_ok=True)
    work = Workspace(folder, device, 1, Stages(folder, ""), batch_sizes=sizes)
    data = fake(model, images=1, calibration=0, seed=0)
    session = able(runtime, **options).open(model, choice("quantizer", quantizer), data, work)
    try:
        yield session
    finally:
        session.close()
