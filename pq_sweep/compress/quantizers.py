"""Quantizers: each says its precision and writes the ONNX graph in that precision.

A quantizer is a function `(source, target, data, *, form, stage, ...options)` marked by `@quantizer(precision)`: it
reads the FP32 graph at `source`, writes `target` and may return a record for the result. `form` is the form of graph
that the runtime executes fastest: "cpu" (U8 activations, S8 weights) or "tensorrt" (both S8, symmetric). The torch
runtime realises a precision without a graph. Frameworks are imported when a quantizer runs, so that composing stays
fast.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pq_sweep.compress.choices import INT4_BLOCKS, KEPT_PRECISIONS, ROUNDINGS
from pq_sweep.compress.fp8 import in_fp8, without_kernels
from pq_sweep.compress.int4 import in_int4
from pq_sweep.compress.learned import write_learned
from pq_sweep.compress.mixed import plan_precisions
from pq_sweep.compress.qdq import (
    calibrate,
    calibration_images,
    give_each_its_own,
    halved,
    layer_weights,
    prepare,
    sharing,
)
from pq_sweep.compress.weight_only import Grid, chosen_weights, quantize_weights, with_types
from pq_sweep.types import Data, Record, Stage, UserError, choose

if TYPE_CHECKING:
    import onnx

NOTHING_LEARNED = (
    "quantizer=learned writes the integers that a recovery has learned, and this one learns none; give recovery=lsq, or"
    " another quantizer, such as quantizer=weights."
)

F = TypeVar("F", bound=Callable[..., Any])


def quantizer(
    precision: str | Callable[[Record], str], *, calibrated: bool | Callable[[Record], bool] = True
) -> Callable[[F], F]:
    """Mark a function as a quantizer to `precision`; with calibrated=False it looks at no images.

    Where options decide on the precision, or on whether it looks at images, that is a function of them.
    """

    def mark(function: F) -> F:
        function.precision = precision  # type: ignore[attr-defined]
        function.calibrated = calibrated  # type: ignore[attr-defined]
        return function

    return mark


@quantizer("fp32", calibrated=False)
def none(source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> Record:
    """Keep the FP32 graph."""
    shutil.copyfile(source, target)
    return {}


@quantizer("fp16", calibrated=False)
def fp16(source: Path, target: Path, data: Data, *, form: str, stage: Stage, exclude: list[str]) -> Record:
    """Convert weights and activations to half precision; inputs and logits stay FP32."""
    import onnx

    with stage("quantize"):
        graph = onnx.load(source)
        excluded = match_layers(graph, exclude)
        onnx.save(halved(graph, excluded), target)
    return {"excluded_nodes": excluded}


@quantizer("bf16", calibrated=False)
def bf16(source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> Record:
    """Keep the FP32 graph, for which TensorRT may choose bfloat16; the torch runtime converts the network."""
    if form != "tensorrt":
        raise UserError("quantizer=bf16 has no graph for ONNX Runtime; use runtime=torch, or TensorRT on a GPU.")
    return none(source, target, data, form=form, stage=stage)


@quantizer("int8")
def int8(
    source: Path,
    target: Path,
    data: Data,
    *,
    form: str,
    stage: Stage,
    calibration: str,
    images: int,
    exclude: list[str],
    percentile: float,
    rounding: str = "nearest",
) -> Record:
    """Quantize statically to 8 bit (Q/DQ), with activation ranges by `calibration` on `images` calibration images.

    Weights are symmetric per output channel. `exclude` names layers to leave in FP32: patterns of parameter names
    such as `layer4.*`, or `first` and `last`. `percentile` is used by calibration=percentile. With rounding=optimal,
    the integers of weights change a layer's output on these images less than the nearest ones do.
    """
    import onnx

    choose("quantizer.rounding", rounding, ROUNDINGS)
    graph = calibrate(source, data, form=form, stage=stage, method=calibration, images=images, percentile=percentile)
    with stage("quantize"):
        excluded = match_layers(graph.model, exclude)
        written = graph.quantized(exclude=excluded)
        if rounding == "optimal":
            from pq_sweep.compress.recode import round_for_outputs

            round_for_outputs(written, graph.model, calibration_images(data, images), graph.limits)
        onnx.save(written, target)
    return {"excluded_nodes": excluded, "rounding": rounding, **graph.record}


@quantizer("fp8")
def fp8(
    source: Path,
    target: Path,
    data: Data,
    *,
    form: str,
    stage: Stage,
    calibration: str,
    images: int,
    exclude: list[str],
    percentile: float,
) -> Record:
    """Quantize weights and the activations that they are multiplied with to 8-bit floating point (E4M3).

    Options are those of `int8`. Convolutions for which TensorRT has no FP8 kernels stay in FP32, and are named.
    """
    import onnx

    graph = calibrate(source, data, form=form, stage=stage, method=calibration, images=images, percentile=percentile)
    with stage("quantize"):
        without = without_kernels(graph.model)
        excluded = sharing(graph.model, [*match_layers(graph.model, exclude), *without])
        onnx.save(in_fp8(graph, excluded), target)
    record = {"excluded_nodes": excluded, "without_fp8_kernels": without}
    return record | {"calibration_images": graph.images}


@quantizer("mixed")
def mixed(
    source: Path,
    target: Path,
    data: Data,
    *,
    form: str,
    stage: Stage,
    calibration: str,
    images: int,
    percentile: float,
    max_drop: float,
    keep: str,
) -> Record:
    """Quantize to 8 bit, but keep the layers that would lose most in `keep` (fp32 or fp16).

    Layers are ranked by the noise that each alone adds to the logits. As few as possible are kept for a drop of top-1
    by at most `max_drop` points on the calibration images. The evaluation images are never looked at.
    """
    graph = calibrate(source, data, form=form, stage=stage, method=calibration, images=images, percentile=percentile)
    with stage("sensitivity"):
        plan = plan_precisions(graph, data, max_drop=max_drop, keep=choose("quantizer.keep", keep, KEPT_PRECISIONS))
    with stage("quantize"):
        plan.write(target)
        plan.draw(target.with_name("precisions.svg"))
    return plan.record | graph.record


@quantizer(lambda options: f"w{options['bits']}", calibrated=lambda options: options.get("rounding") == "optimal")
def weights(
    source: Path,
    target: Path,
    data: Data,
    *,
    form: str,
    stage: Stage,
    bits: int,
    block: int | None,
    exclude: list[str],
    rounding: str = "nearest",
    images: int = 64,
) -> Record:
    """Store weights as integers of `bits` that are dequantized to FP32 as the model runs; activations stay FP32.

    Scales have the least squared error, one for each output channel or, in linear layers, one for `block` inputs. The
    file holds 8, 4 or 2 bits a weight; 3, 5, 6 and 7 bits are stored in the next larger of these, and 2 bits in 4 where
    ONNX Runtime would take them for other numbers. With rounding=optimal, the integers change a layer's output on
    `images` calibration images less than the nearest ones do.
    """
    import onnx

    choose("quantizer.rounding", rounding, ROUNDINGS)
    grid = Grid(bits, block)
    with stage("quantize"):
        graph = with_types(onnx.load(source), grid)
        excluded = match_layers(graph, exclude)
        chosen = chosen_weights(graph, excluded)
        quantize_weights(graph, chosen, grid)
        if rounding == "optimal":
            from pq_sweep.compress.recode import round_for_outputs

            round_for_outputs(graph, onnx.load(source), calibration_images(data, images), grid.limits)
        onnx.save(graph, target)
    record = {"excluded_nodes": excluded, "quantized_weights": len(chosen), "stored_bits": grid.container}
    return record | {"rounding": rounding} | ({"calibration_images": images} if rounding == "optimal" else {})


@quantizer(lambda options: "int8" if options["activations"] else f"w{options['bits']}", calibrated=False)
def learned(
    source: Path,
    target: Path,
    data: Data,
    *,
    form: str,
    stage: Stage,
    bits: int,
    activations: int | None,
    learned: Record | None = None,
) -> Record:
    """Store weights as the integers and scales that a recovery has learned, which a job hands over as `learned`.

    Where that rounded activations, they are quantized at the same places (Q/DQ), and weights are stored as bytes.
    `bits` and `activations` are those of the recovery.
    """
    import onnx

    if not learned:
        raise UserError(NOTHING_LEARNED)
    with stage("quantize"):
        graph, record = write_learned(onnx.load(source), learned, form)
        onnx.save(graph, target)
    return record


def _in_blocks(options: Record) -> str:
    """Return INT4's name, or refuse blocks that TensorRT does not take before anything is loaded."""
    if (block := options.get("block")) not in INT4_BLOCKS:
        raise UserError(f"quantizer.block={block} is not known; valid are: {', '.join(map(str, INT4_BLOCKS))}.")
    return "int4"


@quantizer(_in_blocks, calibrated=False)
def int4(source: Path, target: Path, data: Data, *, form: str, stage: Stage, block: int, exclude: list[str]) -> Record:
    """Store the weights of linear layers as 4-bit integers, with a scale for each `block` of inputs (64 or 128).

    Activations are not quantized: they are FP16 for TensorRT, as is all else, and FP32 for a CPU. Convolutions, and
    layers whose inputs are no whole number of blocks, are not in INT4.
    """
    import onnx

    with stage("quantize"):
        graph = onnx.load(source)
        excluded = match_layers(graph, exclude)
        graph, quantized = in_int4(graph, block, excluded)
        onnx.save(halved(graph, []) if form == "tensorrt" else graph, target)
    return {"excluded_nodes": excluded, "int4_nodes": quantized}


@quantizer("int8_dynamic")
def int8_dynamic(source: Path, target: Path, data: Data, *, form: str, stage: Stage, exclude: list[str]) -> Record:
    """Quantize weights to 8 bit; activations get their range while the model runs, so nothing is calibrated."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    prepared = target.with_suffix(".prepared.onnx")
    with stage("quantize"):
        graph = prepare(source, prepared)
        excluded = match_layers(graph, exclude)
        if give_each_its_own(graph):
            onnx.save(graph, prepared)
        # A Gemm becomes a MatMul of this name before it is quantized.
        names = [*excluded, *(f"{node}_MatMul" for node in excluded)]
        # The CPU kernel of ConvInteger takes unsigned weights only.
        quantize_dynamic(prepared, target, weight_type=QuantType.QUInt8, nodes_to_exclude=names)
    prepared.unlink()
    return {"excluded_nodes": excluded}


def match_layers(graph: onnx.ModelProto, patterns: list[str]) -> list[str]:
    """Return the names of the matching nodes with weights, and of those that share these.

    `first` and `last` stand for the ends of the network.
    """
    layers = layer_weights(graph)
    order = list(layers)
    found: list[str] = []
    for pattern in patterns:
        if pattern in ("first", "last"):
            found.append(order[0 if pattern == "first" else -1])
            continue
        matches = [
            node
            for node, names in layers.items()
            if any(fnmatch.fnmatch(name, pattern) or name.startswith(f"{pattern}.") for name in [node, *names])
        ]
        if not matches:
            known = ", ".join(names[0] for names in layers.values())
            raise UserError(f"quantizer.exclude={pattern} matches no layer; layers are first, last, {known}.")
        found += matches
    return sharing(graph, found)
