"""The graph that ONNX Runtime and TensorRT run, and the precision that a quantizer stands for."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

from pq_sweep.core.folder import JobFolder
from pq_sweep.types import Data, Model, Quantizer, UserError, Workspace

# The precisions that a runtime realises, by kind of device.
Precisions = dict[str, tuple[str, ...]]


class RuntimeMismatch(RuntimeError):
    """A session does not run on what was asked for."""


def precision_of(quantizer: Quantizer) -> str:
    """Return the precision of a quantizer function or of a partial of one."""
    function = getattr(quantizer, "func", quantizer)
    if not hasattr(function, "precision"):
        raise UserError(
            f"{function.__module__}.{function.__qualname__} is no quantizer; mark it with @quantizer('int8') or such."
        )
    precision = function.precision
    return str(precision(getattr(quantizer, "keywords", {})) if callable(precision) else precision)


def make_graph(
    model: Model, quantizer: Quantizer, data: Data, work: Workspace, *, form: str
) -> tuple[Path, dict[str, Any]]:
    """Export the network, prove the export, and let the quantizer write `model.onnx`, once for all jobs."""
    from pq_sweep.core.weights import network_state, network_structure
    from pq_sweep.runtimes.export import check_export, fill, trace

    files = JobFolder(work.folder)
    traced, source, target = files.traced, files.exported, files.model
    network = cache(partial(network_state, model))

    def trace_once() -> None:
        with work.stage("trace"):
            trace(model, traced)

    def export() -> dict[str, Any]:
        work.stage.keep_in_cache("traced", partial(network_structure, model), trace_once, traced)
        with work.stage("export"):
            fill(model, traced, source)
        traced.unlink()
        with work.stage("check_export"):
            error = check_export(model, source)
        return {"export_error": error, "exported_bytes": source.stat().st_size}

    def quantize() -> dict[str, Any]:
        exported = work.stage.keep_in_both("exported", network, export, source)
        record = quantizer(source, target, data, form=form, stage=work.stage)
        source.unlink()
        return exported | {"quantizer": record or {}}

    def about() -> dict[str, Any]:
        return network() | graph_options(quantizer, data, form)

    return target, work.stage.keep_in_both("quantized", about, quantize, target, files.precisions)


def graph_options(quantizer: Quantizer, data: Data, form: str) -> dict[str, Any]:
    """Return what a graph depends on beside its network; calibration runs on a CPU, whose threads change its sums."""
    import torch

    from pq_sweep.core.environment import device_name

    function: Any = getattr(quantizer, "func", quantizer)
    about = {
        "quantizer": f"{function.__module__}.{function.__qualname__}",
        "options": getattr(quantizer, "keywords", {}),
        "form": form,
    }
    looks = function.calibrated
    if not (looks(about["options"]) if callable(looks) else looks):
        return about
    where = {"cpu": device_name("cpu"), "threads": torch.get_num_threads()}
    return about | where | {"calibration": data.identity(data.calibration)}
