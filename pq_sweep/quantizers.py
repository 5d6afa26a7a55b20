"""Quantizers: each says its precision and writes the ONNX graph in that precision.

A quantizer is a function `(source, target, data, *, form, stage, ...options)` marked by `@quantizer(precision)`: it
reads the FP32 graph at `source`, writes `target` and may return a record for the result. `form` is what the runtime
executes fastest: "cpu" (U8 activations, S8 weights) or "tensorrt" (S8 both, symmetric). The torch runtime realises a
precision without a graph. Frameworks are imported when a quantizer runs, so that composing stays fast.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pq_sweep.check import CALIBRATIONS
from pq_sweep.types import Data, Split, Stage, UserError, choose

if TYPE_CHECKING:
    import numpy as np
    import onnx

F = TypeVar("F", bound=Callable[..., Any])
Record = dict[str, Any]

# What an attention network loses least by: 23 dB of output SNR for ViT instead of 4.5 with every operator.
MATRIX_OPERATORS = ["Conv", "Gemm", "MatMul"]
TENSORRT_OPERATORS = [*MATRIX_OPERATORS, "Add"]


def quantizer(precision: str) -> Callable[[F], F]:
    """Mark a function as a quantizer to `precision`."""

    def mark(function: F) -> F:
        function.precision = precision  # type: ignore[attr-defined]
        return function

    return mark


@quantizer("fp32")
def none(source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> Record:
    """Keep the FP32 graph."""
    shutil.copyfile(source, target)
    return {}


@quantizer("fp16")
def fp16(source: Path, target: Path, data: Data, *, form: str, stage: Stage, exclude: list[str]) -> Record:
    """Convert weights and activations to half precision; inputs and logits stay FP32."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with stage("quantize"):
        graph = onnx.load(source)
        excluded = match_layers(graph, exclude)
        onnx.save(convert_float_to_float16(graph, keep_io_types=True, node_block_list=excluded), target)
    return {"excluded_nodes": excluded}


@quantizer("bf16")
def bf16(source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> Record:
    """Convert to bfloat16, which only the torch runtime realises."""
    raise UserError("quantizer=bf16 has no ONNX graph; use runtime=torch.")


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
) -> Record:
    """Quantize statically to 8 bit (Q/DQ), activations by `calibration` on `images` calibration images.

    Weights are symmetric per output channel. `exclude` names layers to leave in FP32: patterns of parameter names
    such as `layer4.*`, or `first` and `last`. `percentile` is used by calibration=percentile.
    """
    import onnx
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    choose("quantizer.calibration", calibration, CALIBRATIONS)
    prepared = target.with_suffix(".prepared.onnx")
    with stage("quantize"):
        quant_pre_process(source, prepared)
        graph = onnx.load(prepared)
        excluded = match_layers(graph, exclude)
        reader = _calibration_reader(graph, _calibration_images(data, images), stage)
        options = _form_options(form, graph)
        options["extra_options"] |= {"CalibStridedMinMax": reader.stride, "CalibPercentile": percentile}
        options |= {"calibrate_method": _calibration_method(calibration), "nodes_to_exclude": excluded}
        with contextlib.redirect_stdout(io.StringIO()):  # entropy calibration prints
            quantize_static(prepared, target, reader, **options)
        stage.move(reader.seconds, source="quantize", target="calibrate")
    prepared.unlink()
    return {
        "excluded_nodes": excluded,
        "calibration_images": len(reader),
        "reduce_range": options.get("reduce_range", False),
    }


@quantizer("int8_dynamic")
def int8_dynamic(source: Path, target: Path, data: Data, *, form: str, stage: Stage, exclude: list[str]) -> Record:
    """Quantize weights to 8 bit; activations get their range while the model runs, so nothing is calibrated."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = target.with_suffix(".prepared.onnx")
    with stage("quantize"):
        quant_pre_process(source, prepared)
        excluded = match_layers(onnx.load(prepared), exclude)
        # A Gemm becomes a MatMul of this name before it is quantized.
        names = [*excluded, *(f"{node}_MatMul" for node in excluded)]
        # The CPU kernel of ConvInteger takes unsigned weights only.
        quantize_dynamic(prepared, target, weight_type=QuantType.QUInt8, nodes_to_exclude=names)
    prepared.unlink()
    return {"excluded_nodes": excluded}


def match_layers(graph: onnx.ModelProto, patterns: list[str]) -> list[str]:
    """Return the names of the nodes with weights that match; `first` and `last` stand for the ends of the network."""
    weights = {item.name for item in graph.graph.initializer if len(item.dims) > 1}
    layers = {node.name: [name for name in node.input if name in weights] for node in graph.graph.node}
    layers = {node: names for node, names in layers.items() if names}
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
    return list(dict.fromkeys(found))


def has_vnni() -> bool:
    """Say whether the CPU multiplies bytes without saturating (AVX-512 VNNI, AVX-VNNI or AMX), or is not x86."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text() if cpu.exists() else ""
    return "flags\t" not in flags or any(name in flags for name in ("avx512_vnni", "avx_vnni", "amx_int8"))


def _form_options(form: str, graph: onnx.ModelProto) -> Record:
    """Return quantize_static's options for the graph that the runtime executes fastest."""
    from onnxruntime.quantization import QuantFormat, QuantType

    explicit = {"quant_format": QuantFormat.QDQ, "per_channel": True}
    attention = any(node.op_type in ("Softmax", "LayerNormalization") for node in graph.graph.node)
    if form == "tensorrt":
        operators = MATRIX_OPERATORS if attention else TENSORRT_OPERATORS
        symmetric = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": operators,
        }
        types = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
        return explicit | types | {"op_types_to_quantize": operators, "extra_options": symmetric}
    return explicit | {
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "op_types_to_quantize": MATRIX_OPERATORS if attention else None,
        # Seven-bit weights: without VNNI the sum of two byte products saturates at 16 bit.
        "reduce_range": not has_vnni(),
        "extra_options": {},
    }


def _calibration_method(name: str) -> Any:
    from onnxruntime.quantization import CalibrationMethod

    return {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }[name]


def _calibration_images(data: Data, images: int) -> Split:
    if not 1 <= images <= len(data.calibration):
        raise UserError(
            f"quantizer.images={images} does not fit the {len(data.calibration)} calibration images;"
            " lower it or raise dataset.calibration."
        )
    return data.calibration.take(images)


def _calibration_reader(graph: onnx.ModelProto, split: Split, stage: Stage) -> Any:
    """Return onnxruntime's reader over `split`, one image at a time; it notes the seconds until it is used up."""
    from onnxruntime.quantization import CalibrationDataReader
    from tqdm import tqdm

    name = graph.graph.input[0].name

    class Reader(CalibrationDataReader):
        # Activations are kept for one stride only; it has to divide the number of images.
        stride = next(size for size in range(min(8, len(split)), 0, -1) if len(split) % size == 0)

        def __init__(self) -> None:
            self.started: float | None = None
            self.seconds = 0.0
            self.bar = tqdm(total=len(split), desc="calibration", disable=None, leave=False)
            self.set_range(0, len(split))

        def __len__(self) -> int:
            return len(split)

        def set_range(self, start_index: int, end_index: int) -> None:
            part = split.subset(list(range(start_index, end_index)))
            self.feed: Iterator[dict[str, np.ndarray]] = ({name: x.numpy()} for x, _ in part.batches(1))

        def get_next(self) -> dict[str, np.ndarray] | None:
            self.started = self.started or time.perf_counter()
            self.seconds = time.perf_counter() - self.started
            item = next(self.feed, None)
            self.bar.update(item is not None)
            return item

    return Reader()
