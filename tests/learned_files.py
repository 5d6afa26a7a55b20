"""Files of networks that were trained with rounding, written and run as jobs do, and beside them the networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from commands import SHORT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from independent import runtime, torch_logits, workspace
from test_conf import CONF, composed
from torch import Tensor, nn

from pq_sweep.job import run as job
from pq_sweep.job.learned import taught
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes.export import fill, trace
from pq_sweep.types import Model, Record

TRACED: dict[str, bytes] = {}  # networks that differ in their weights alone share what takes seconds


def written(
    model: Model, record: Record, folder: Path, *, bits: int, activations: int | None = None, form: str = "cpu"
) -> Path:
    """Export a network and have the quantizer write what was learned, as a job does."""
    source, target, traced, structure = (
        *(folder / f"{name}.onnx" for name in ("export", "model", "traced")),
        repr(model),
    )
    if structure not in TRACED:
        trace(model, traced)
        TRACED[structure] = traced.read_bytes()
    traced.write_bytes(TRACED[structure])
    fill(model, traced, source)
    nothing: Any = None
    writer = taught(composed_quantizer(bits, activations), record)
    writer(source, target, nothing, form=form, stage=Stages(folder, ""))
    return target


def composed_quantizer(bits: int, activations: int | None) -> Any:
    overrides = ["recovery=lsq", "quantizer=learned", f"recovery.bits={bits}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, f"recovery.activations={activations or 'null'}"])
        return instantiate(cfg.quantizer, _partial_=True, _convert_="all")


@contextmanager
def rounding(module: nn.Module, record: Record) -> Iterator[None]:
    """Round what layers take by torch's own function, as the record says."""

    def enter(entry: Record) -> Any:
        low, high = (-(2 ** (entry["bits"] - 1)), 2 ** (entry["bits"] - 1) - 1)
        if not entry["signed"]:
            low, high = 0, 2 ** entry["bits"] - 1
        return lambda layer, inputs: torch.fake_quantize_per_tensor_affine(inputs[0], entry["scale"], 0, low, high)

    with ExitStack() as hooks:
        for name, entry in record["learned"].items():
            if "activation" in entry:
                layer = module.get_submodule(name.rpartition(".")[0])
                hooks.callback(layer.register_forward_pre_hook(enter(entry["activation"])).remove)
        yield


def assert_equal_answers(
    model: Model, record: Record, path: Path, images: Tensor, bits: int = 4, rest: float = 1e-4
) -> None:
    """Logits are equal to rounding in FP32, and predictions are the same on every image."""
    expected, actual = torch_logits(model.module, images), logits_of(path, images, bits=bits)
    assert np.abs(actual - expected).max() <= rest * np.abs(expected).max()
    assert (actual.argmax(1) == expected.argmax(1)).all()


def logits_of(path: Path, images: Tensor, *, bits: int = 4, activations: int | None = None) -> np.ndarray:
    """Run a graph as a job does."""
    work = workspace(path.parent / "work")
    session = runtime("onnxruntime").load(path, composed_quantizer(bits, activations), work, {})
    return torch.cat([session(part) for part in images.split(50)]).numpy()


def logits_node_by_node(path: Path, images: Tensor) -> np.ndarray:
    """Run a graph as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {"input": part.numpy()})[0] for part in images.split(50)])


def assert_few_ties(actual: np.ndarray, expected: np.ndarray, rest: float) -> None:
    """Most answers are equal, and predictions the same unless the two best logits are closer than a step may move them.

    An activation on the boundary of two integers may become either: sums are rounded in another order.
    """
    apart = np.abs(actual - expected).max(1) / np.abs(expected).max()
    best = np.sort(expected, 1)[:, -2:]
    close = best[:, 1] - best[:, 0] < 2 * rest * np.abs(expected).max()
    assert np.quantile(apart, 0.9) <= rest
    assert ((actual.argmax(1) == expected.argmax(1)) | close).all()
    assert close.mean() < 0.5


def job_in(folder: Path, *words: str) -> Record:
    """Run a job in this process, without tracking and with hardly a measurement, and return its result."""
    folder.mkdir(parents=True, exist_ok=True)
    job.run(composed(*words, "tracking=none", *SHORT), folder)
    result: Record = json.loads((folder / "result.json").read_text())
    return result
