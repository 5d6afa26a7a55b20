"""Figures worked out without pq_sweep, to compare its own with, and the plain objects that its parts need to run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from onnx import numpy_helper
from torch import Tensor, nn

from pq_sweep.inputs.datasets import digits
from pq_sweep.job.stages import Stages
from pq_sweep.types import Data, Model, Session, Workspace


def workspace(folder: Path, threads: int = 1) -> Workspace:
    """Return what a job on the CPU hands to a runtime, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return Workspace(folder, "cpu", threads, Stages(folder, ""))


def runtime(name: str, **options: Any) -> Any:
    """Return a runtime as a job makes it, with options that differ from its defaults."""
    return instantiate(_config(name), _convert_="all", **options)


@cache
def _config(runtime: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=[f"runtime={runtime}"]).runtime


Opened = tuple[Session, onnx.ModelProto, Model, Data]


def opened_on_cpu(model: Model, folder: Path, quantizer: Any) -> Opened:
    """Open a network for digits under ONNX Runtime; return the session, its graph, the network and its images."""
    data = digits(model)
    session = runtime("onnxruntime").open(model, quantizer, data, workspace(folder))
    return session, onnx.load(folder / "model.onnx"), model, data


def onnx_logits(path: Path, images: Tensor, batch: int = 50) -> np.ndarray:
    """Run a graph by onnxruntime alone."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: part.numpy()})[0] for part in images.split(batch)])


def torch_logits(module: nn.Module, images: Tensor) -> np.ndarray:
    """Run a network on the CPU."""
    with torch.no_grad():
        return module.eval()(images).numpy()


def snr_db(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return how many decibels the signal is above the error."""
    noise = np.square(actual.astype(np.float64) - expected).sum()
    return float(10 * np.log10(np.square(expected.astype(np.float64)).sum() / noise))


def relative_error(expected: np.ndarray, actual: np.ndarray) -> float:
    """Return the largest difference as a share of the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def tensors(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Return the constants of a graph by name."""
    return {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}


def matrices(graph: onnx.ModelProto, dtype: type[np.generic] = np.float32) -> set[str]:
    """Return the names of the weights (two dimensions or more) of a type."""
    return {name for name, array in tensors(graph).items() if array.ndim > 1 and array.dtype == dtype}


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use `count` threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
