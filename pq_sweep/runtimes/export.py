"""From a torch network to an ONNX file that is proven to compute the same."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pq_sweep.core.sentences import reason
from pq_sweep.core.weights import shared_names
from pq_sweep.runtimes.names import inside, keywords_as_names, name_first, set_apart, take_out
from pq_sweep.runtimes.session import BATCH
from pq_sweep.types import Model, UserError

if TYPE_CHECKING:
    import onnx

TOLERANCE = 1e-4
# Under this key a traced graph keeps the names in the network of the weights that had to be renamed.
RENAMED = "pq_sweep.renamed"


class ExportError(RuntimeError):
    """The exported graph does not compute what the network computes."""


def export_onnx(model: Model, path: Path) -> None:
    """Write the FP32 network with a dynamic batch, input `input` and output `logits`, in one file."""
    traced = path.with_name(f"{path.stem}.traced.onnx")
    trace(model, traced)
    fill(model, traced, path)
    traced.unlink()


def trace(model: Model, path: Path) -> None:
    """Write the graph of all operations without the values of the weights.

    Tracing takes seconds and depends on the network's structure alone, so networks that differ in weights share it.
    """
    import onnx

    module = model.module.cpu()
    module.eval()  # a line of its own: a user's `train` may forget to return the network
    traced = inside(module)
    read_operators_once()
    with _quiet(), _explained(), keywords_as_names():
        program = torch.onnx.export(
            traced,
            (model.sample(2),),
            dynamo=True,
            optimize=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim(BATCH)},),
        )
    assert program is not None  # only the former exporter returns nothing
    if traced is not module:
        take_out(program.model.graph)
    name_first(program.model.graph, shared_names(module.state_dict()))
    if renamed := set_apart(program.model.graph):
        program.model.metadata_props[RENAMED] = json.dumps(renamed)
    graph, weights = program.model_proto, module.state_dict()
    for item in graph.graph.initializer:
        if renamed.get(item.name, item.name) in weights:
            item.ClearField("raw_data")
    onnx.save(graph, path)


def read_operators_once() -> None:
    """Let torch's exporter read the source of its 500 operators once per process, not once per network: .3 s.

    An exporter that asks for them in another way reads them each time.
    """
    with contextlib.suppress(ImportError, AttributeError, KeyError):
        from torch.onnx._internal import _lazy_import

        apis: Any = vars(_lazy_import)["onnxscript_apis"]
        if not hasattr(apis.get_torchlib_ops, "cache_info"):
            apis.get_torchlib_ops = cache(apis.get_torchlib_ops)


def fill(model: Model, traced: Path, path: Path) -> None:
    """Give a traced graph the values of the network's weights, fold what then is constant, and write it."""
    import onnx
    from onnxscript import ir

    program = torch.onnx.ONNXProgram(ir.load(traced), None)
    weights = model.module.cpu().state_dict()
    renamed = json.loads(program.model.metadata_props.pop(RENAMED, "{}"))
    names = {name: renamed.get(name, name) for name in program.model.graph.initializers}
    with _quiet():
        program.apply_weights({name: weights[own] for name, own in names.items() if own in weights})
        program.optimize()
    onnx.save(_tidy(program.model_proto), path)


def _tidy(model: onnx.ModelProto) -> onnx.ModelProto:
    """Name folded weights after their module, then drop the traces that say where in the source a node comes from.

    A linear layer over tokens is exported as a product with its transposed weight, a nameless constant, but a user who
    keeps a layer in FP32 knows it by the name of its module. The traces are dropped because they hold paths of this
    machine.
    """
    _name_weights(model.graph)
    weights = {item.name for item in model.graph.initializer}
    shapes = [item for item in model.graph.value_info if item.name not in weights]
    del model.graph.value_info[:]  # quantizers that transpose a weight would contradict its entry
    model.graph.value_info.extend(shapes)
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    return model


def _name_weights(graph: onnx.GraphProto) -> None:
    """Rename matrices without a name of their own to `<module>.weight`, numbered if a module has several."""
    nameless = {item.name: item for item in graph.initializer if len(item.dims) > 1 and "." not in item.name}
    taken = {item.name for item in graph.initializer}
    for node in graph.node:
        scopes = next((item.value for item in node.metadata_props if item.key == "pkg.torch.onnx.name_scopes"), "[]")
        module = (["", *ast.literal_eval(scopes)])[-2:][0]
        for name in [name for name in node.input if name in nameless and module]:
            weight = nameless.pop(name)
            options = (f"{module}.weight{number}" for number in ("", *range(2, len(taken) + 3)))
            weight.name = next(option for option in options if option not in taken)
            taken.add(weight.name)
            for user in graph.node:
                user.input[:] = [weight.name if given == name else given for given in user.input]


def check_export(model: Model, path: Path) -> float:
    """Return the largest relative difference between graph and network at another batch size; raise above 1e-4."""
    import onnxruntime

    images = model.sample(3)
    with torch.inference_mode():
        expected = model.module(images).numpy()
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        actual = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime cannot run the exported graph ({reason(error)}); use runtime=torch."
        ) from error
    apart = float(np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-12))
    if not apart <= TOLERANCE:
        raise ExportError(
            f"the exported graph differs from the network by {apart:.1e} relative; at most {TOLERANCE:.0e} is accepted."
        )
    return apart


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn an error of the exporter into one sentence."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # the exporter's own message is a page of advice
            cause = cause.__cause__
        raise UserError(
            f"the network cannot be exported to ONNX ({type(cause).__name__}: {reason(cause)}); use runtime=torch, or"
            " write that step of its forward in another way."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress of the exporter, and what torch logs before it raises, out of the terminal."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", *names)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
