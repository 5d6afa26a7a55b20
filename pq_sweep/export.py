"""From a torch network to an ONNX file that is proven to compute the same."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pq_sweep.types import Model

TOLERANCE = 1e-4


class ExportError(RuntimeError):
    """The exported graph does not compute what the network computes."""


def export_onnx(model: Model, path: Path) -> None:
    """Write the FP32 network with a dynamic batch, input `input` and output `logits`, in one file."""
    module = model.module.cpu().eval()
    with _quiet():
        torch.onnx.export(
            module,
            (model.sample(2),),
            path,
            dynamo=True,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
        )
    _strip_traces(path)


def _strip_traces(path: Path) -> None:
    """Take out where in the source each node comes from: paths of this machine, and bytes that nobody deploys."""
    import onnx

    graph = onnx.load(path)
    for part in (graph.graph, *graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(graph, path)


def check_export(model: Model, path: Path) -> float:
    """Return the largest relative difference between graph and network at another batch size; raise above 1e-4."""
    import onnxruntime

    images = model.sample(3)
    with torch.inference_mode():
        expected = model.module(images).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    error = float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not error <= TOLERANCE:
        raise ExportError(
            f"the exported graph differs from the network by {error:.1e} relative; at most {TOLERANCE:.0e} is accepted."
        )
    return error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress out of the terminal; its errors are raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
