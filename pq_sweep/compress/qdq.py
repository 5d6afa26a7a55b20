"""Static 8-bit graphs: ranges are measured once, then graphs with any choice of layers are written from them."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.compress.choices import CALIBRATIONS
from pq_sweep.core.environment import device_name
from pq_sweep.core.fingerprint import file_hash
from pq_sweep.core.hardware import cpu_flags, multiplies_bytes
from pq_sweep.types import Data, Record, Split, Stage, UserError, choose

if TYPE_CHECKING:
    import numpy as np
    import onnx


# Quantizing only these costs an attention network least: ViT has 23 dB of output SNR, against 4.5 with all operators.
MATRIX_OPERATORS = ["Conv", "Gemm", "MatMul"]
TENSORRT_OPERATORS = [*MATRIX_OPERATORS, "Add"]
# The calibrators for entropy and percentile hold the activations of this many images at a time, not of all.
IMAGES_AT_ONCE = 8


@dataclass(frozen=True)
class Calibrated:
    """An FP32 graph and the range of each of its activations."""

    model: onnx.ModelProto
    ranges: Any
    options: Record
    images: int

    def quantized(self, *, exclude: list[str] | None = None, only: list[str] | None = None) -> onnx.ModelProto:
        """Return the graph in 8 bit (Q/DQ): all nodes except those in `exclude`, or just those in `only`.

        Nodes that share a weight are in 8 bit together: the graph holds the weight once.
        """
        import onnx
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        model = onnx.ModelProto()
        model.CopyFrom(self.model)  # the quantizer changes what it is given
        left_out = [*sharing(self.model, exclude or []), *_shared_tables(self.model)]
        if self.options["op_types_to_quantize"] == TENSORRT_OPERATORS:
            left_out += _sums_with_constants(self.model)
        chosen = {"nodes_to_quantize": sharing(self.model, only or []), "nodes_to_exclude": left_out}
        writer = QDQQuantizer(model, tensors_range=self.ranges, per_channel=True, **chosen, **self.options)
        with _quiet_about_vectors():
            writer.quantize_model()
        return writer.model.model

    def write(self, target: Path, *, exclude: list[str]) -> None:
        """Write the graph in 8 bit, except for the nodes in `exclude`."""
        import onnx

        onnx.save(self.quantized(exclude=exclude), target)

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest integer of a weight."""
        most = 64 if self.options["reduce_range"] else 127
        return -most, most

    @property
    def record(self) -> Record:
        """Return what the result records about the calibration."""
        return {"calibration_images": self.images, "reduce_range": self.options["reduce_range"]}


@contextlib.contextmanager
def _quiet_about_vectors() -> Iterator[None]:
    """Keep a warning of onnxruntime's quantizer out of the terminal: "Axis 1 is out-of-range for weight".

    It looks for a second axis in every weight, also in those of one: the scale of a normalisation that follows no
    convolution, as in RepVGG and DenseNet, and a vector in a product. These get one scale, as what they are multiplied
    with has. With these normalisations left in FP32, logits had the same SNR within 0.4 dB and took as long.
    """
    logger = logging.getLogger()

    def allowed(record: logging.LogRecord) -> bool:
        return not re.match(r"Axis .* is out-of-range for weight .* with rank 1$", record.getMessage())

    logger.addFilter(allowed)
    try:
        yield
    finally:
        logger.removeFilter(allowed)


def calibrate(
    source: Path, data: Data, *, form: str, stage: Stage, method: str, images: int, percentile: float
) -> Calibrated:
    """Measure the ranges of all activations of an FP32 graph on the first `images` calibration images."""
    import torch

    choose("quantizer.calibration", method, CALIBRATIONS)
    split = calibration_images(data, images)
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        prepared = Path(folder) / "prepared.onnx"
        with stage("quantize"):
            model = prepare(source, prepared)
        options = _form_options(form, model)
        operators, kept = options["op_types_to_quantize"], Path(folder) / "ranges.npz"

        def take_ranges() -> None:
            with stage("calibrate"), contextlib.redirect_stdout(io.StringIO()):  # entropy calibration prints
                _save_ranges(_ranges(prepared, split, operators, method, percentile), kept)

        def about() -> Record:
            where = {"cpu": device_name("cpu"), "threads": torch.get_num_threads()}
            how = {"operators": operators, "method": method, "percentile": percentile}
            return {"graph": file_hash(source), "images": split.identity()} | how | where

        stage.keep_in_cache("ranges", about, take_ranges, kept)
        ranges = _load_ranges(kept, method)
    return Calibrated(model, ranges, options, len(split))


def prepare(source: Path, target: Path) -> onnx.ModelProto:
    """Infer shapes and simplify a graph as quantization needs it, write it to `target` and return it."""
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source, target, skip_symbolic_shape=True)  # the exporter already wrote the shapes
    return load_model_with_shape_infer(target)


def layer_weights(graph: onnx.ModelProto) -> dict[str, list[str]]:
    """Return the names of the weights (two dimensions or more) of each node that has any, in the network's order."""
    weights = {item.name for item in graph.graph.initializer if len(item.dims) > 1}
    layers = {node.name: [name for name in node.input if name in weights] for node in graph.graph.node}
    return {node: names for node, names in layers.items() if names}


def sharing(graph: onnx.ModelProto, nodes: list[str]) -> list[str]:
    """Return nodes, and after them those that share a weight with one of them."""
    layers = layer_weights(graph)
    weights = {name for node in nodes for name in layers.get(node, ())}
    return list(dict.fromkeys([*nodes, *(node for node, names in layers.items() if weights & set(names))]))


def _shared_tables(graph: onnx.ModelProto) -> list[str]:
    """Name the look-ups in a table that is a layer's weight too, whose scales per channel do not fit what is found."""
    layers, operators = layer_weights(graph), {node.name: node.op_type for node in graph.graph.node}
    matrices = {name for node, names in layers.items() if operators[node] in MATRIX_OPERATORS for name in names}
    return [node for node, names in layers.items() if operators[node] == "Gather" and matrices & set(names)]


def _sums_with_constants(graph: onnx.ModelProto) -> list[str]:
    """Name the sums of an activation and a constant: only residual sums are in 8 bit, and TensorRT takes no others."""
    constants = {item.name for item in graph.graph.initializer}
    return [node.name for node in graph.graph.node if node.op_type == "Add" and constants & set(node.input)]


def give_each_its_own(graph: onnx.ModelProto) -> bool:
    """Copy weights that several nodes share, and say whether there were any.

    The dynamic quantizer transposes weights in place, a shared one once for each of its nodes.
    """
    before, users = len(graph.graph.initializer), dict[str, list[Any]]()
    for node in graph.graph.node:
        for name in dict.fromkeys(node.input):
            users.setdefault(name, []).append(node)
    for item in [item for item in graph.graph.initializer if len(item.dims) > 1]:
        for number, node in enumerate(users.get(item.name, [])[1:], 2):
            copy = graph.graph.initializer.add()
            copy.CopyFrom(item)
            copy.name = f"{item.name}.{number}"
            node.input[:] = [copy.name if name == item.name else name for name in node.input]
    return len(graph.graph.initializer) > before


def _form_options(form: str, graph: onnx.ModelProto) -> Record:
    """Return the quantizer's options for the graph that the runtime executes fastest."""
    from onnxruntime.quantization import QuantType

    attention = any(node.op_type in ("Softmax", "LayerNormalization") for node in graph.graph.node)
    if form == "tensorrt":
        operators = MATRIX_OPERATORS if attention else TENSORRT_OPERATORS
        symmetric = {
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": operators,
        }
        return {
            "activation_qType": QuantType.QInt8,
            "weight_qType": QuantType.QInt8,
            "op_types_to_quantize": operators,
            "reduce_range": False,
            "extra_options": symmetric,
        }
    return {
        "activation_qType": QuantType.QUInt8,
        "weight_qType": QuantType.QInt8,
        "op_types_to_quantize": MATRIX_OPERATORS if attention else _all_operators(),
        # Seven-bit weights: without VNNI the sum of two byte products saturates at 16 bit.
        "reduce_range": not multiplies_bytes(cpu_flags()),
        "extra_options": {},
    }


def _all_operators() -> list[str]:
    """Return every kind of operator that can be quantized."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QLinearOpsRegistry, *QDQRegistry})


def calibration_images(data: Data, images: int) -> Split:
    """Return the first calibration images, or refuse a number that is more than there are."""
    if not 1 <= images <= len(data.calibration):
        raise UserError(
            f"quantizer.images={images} does not fit the {len(data.calibration)} calibration images;"
            " lower it or raise dataset.calibration."
        )
    return data.calibration.take(images)


def _ranges(graph: Path, split: Split, operators: list[str], method: str, percentile: float) -> Any:
    """Run the calibration images through onnxruntime's calibrator, a few at a time."""
    from onnxruntime.quantization.calibrate import create_calibrator
    from tqdm import tqdm

    from pq_sweep.core.threads import one_thread

    calibrator = create_calibrator(
        graph,
        operators,
        str(graph.with_name("augmented.onnx")),
        calibrate_method=_methods()[method],
        extra_options={"percentile": percentile},
    )
    with one_thread(), tqdm(total=len(split), desc="calibration", disable=None, leave=False) as bar:
        for start in range(0, len(split), IMAGES_AT_ONCE):
            part = split.take(IMAGES_AT_ONCE, offset=start)
            calibrator.collect_data(_Reader(part))
            bar.update(len(part))
    return calibrator.compute_data()


def _save_ranges(ranges: Any, path: Path) -> None:
    """Write what a calibrator found for each tensor as plain arrays."""
    import numpy as np

    found = {f"{tensor}|{name}": value for tensor, data in ranges.items() for name, value in _figures(data).items()}
    np.savez(path, **found)


def _figures(data: Any) -> dict[str, Any]:
    return {name: value for name, value in data.to_dict().items() if name != "CLS"}


def _load_ranges(path: Path, method: str) -> Any:
    """Return what `_save_ranges` wrote, in the form that onnxruntime's quantizer takes."""
    import numpy as np
    from onnxruntime.quantization.calibrate import TensorData, TensorsData

    found: dict[str, dict[str, Any]] = {}
    with np.load(path) as arrays:
        for key in arrays.files:
            tensor, _, name = key.rpartition("|")
            found.setdefault(tensor, {})[name] = arrays[key]
    return TensorsData(_methods()[method], {tensor: TensorData(**figures) for tensor, figures in found.items()})


def _methods() -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationMethod

    return {
        "minmax": CalibrationMethod.MinMax,
        "entropy": CalibrationMethod.Entropy,
        "percentile": CalibrationMethod.Percentile,
    }


class _Reader:
    """Images behind onnxruntime's interface for calibration data, one at a time."""

    def __init__(self, split: Split) -> None:
        self.feed: Iterator[dict[str, np.ndarray]] = ({"input": images.numpy()} for images, _ in split.batches(1))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, or None."""
        return next(self.feed, None)


def halved(model: onnx.ModelProto, excluded: list[str]) -> onnx.ModelProto:
    """Return a graph in half precision but for the nodes in `excluded`; its input and logits stay FP32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True, node_block_list=excluded)
    _drop_repeated_casts(converted)
    return converted


def _drop_repeated_casts(model: onnx.ModelProto) -> None:
    """Keep one of the equal casts that the conversion to half precision makes where a tensor has several users."""
    first = {node.output[0]: index for index, node in reversed(list(enumerate(model.graph.node)))}
    kept = [node for index, node in enumerate(model.graph.node) if first[node.output[0]] == index]
    del model.graph.node[:]
    model.graph.node.extend(kept)
