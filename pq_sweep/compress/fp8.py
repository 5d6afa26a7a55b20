"""FP8 graphs: matrix products of E4M3 weights, stored in a byte each, and of activations rounded to E4M3 (Q/DQ).

A number in E4M3 has 4 bits of exponent and 3 of mantissa, and lies between -448 and 448. Each output channel of a
weight has a scale, and each activation one, which makes the largest absolute value 448: that of the weights themselves,
and that of the range that calibration found. Scales, biases and whatever runs between the layers are FP32.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING

from pq_sweep.compress.qdq import MATRIX_OPERATORS, Calibrated, sharing
from pq_sweep.compress.weight_only import with_opset
from pq_sweep.core.stored import attribute, floats, tensor
from pq_sweep.types import Record

if TYPE_CHECKING:
    import numpy as np
    import onnx

LARGEST = 448.0
OPSET = 19  # the first whose Q and DQ know FP8
ZERO = "fp8_zero_point"  # its type says what Q rounds to
# TensorRT has no FP8 kernels for convolutions of more pixels than this (its release notes, known limitations), nor any
# that are fast for grouped ones. NVIDIA's Model Optimizer leaves out those of few channels too, as of the first layer,
# for which TensorRT found no kernel at all (github.com/NVIDIA/TensorRT, issue 3987).
MOST_PIXELS = 32
LEAST_CHANNELS = 16


def without_kernels(model: onnx.ModelProto) -> list[str]:
    """Name the convolutions for which TensorRT has no FP8 kernels: grouped, of few channels, or of a large kernel."""
    shapes = {item.name: tuple(item.dims) for item in model.graph.initializer}
    found = []
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in shapes:
            outputs, inputs, *kernel = shapes[node.input[1]]
            if attribute(node, "group", 1) > 1 or min(outputs, inputs) < LEAST_CHANNELS or prod(kernel) > MOST_PIXELS:
                found.append(node.name)
    return found


def in_fp8(graph: Calibrated, exclude: list[str]) -> onnx.ModelProto:
    """Return a calibrated graph with its matrix products in FP8, except for the nodes in `exclude`.

    Nodes that share a weight are in FP8 together: the graph holds the weight once.
    """
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(with_opset(graph.model, OPSET))
    chosen = _chosen(model, graph, exclude)
    dequantized = _store_weights(model, chosen)
    nodes = list(_with_rounded_inputs(model, graph, chosen))
    del model.graph.node[:]
    model.graph.node.extend([*dequantized, *nodes])
    return model


def _chosen(model: onnx.ModelProto, graph: Calibrated, exclude: list[str]) -> list[onnx.NodeProto]:
    """Return the matrix products whose two factors can be rounded: weights, and activations with a range."""
    import onnx

    known = {item.name for item in model.graph.initializer if item.data_type == onnx.TensorProto.FLOAT}
    known |= set(graph.ranges.keys())
    left_out = set(sharing(model, exclude))
    return [
        node
        for node in model.graph.node
        if node.op_type in MATRIX_OPERATORS and node.name not in left_out and known.issuperset(node.input[:2])
    ]


def _store_weights(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Store the weights of nodes in FP8, and return the nodes that dequantize them to tensors of the former names.

    A weight whose output channels are along one axis here and along another one there has one scale.
    """
    import onnx

    weights = {item.name: item for item in model.graph.initializer}
    axes: dict[str, set[int | None]] = {}
    for node in nodes:
        for place, name in enumerate(node.input[:2]):
            if name in weights:
                axes.setdefault(name, set()).add(_channels(node, place, len(weights[name].dims)))
    dequantized = []
    for name, found in axes.items():
        axis = found.pop() if len(found) == 1 else None
        values, scales = rounded_to_fp8(onnx.numpy_helper.to_array(weights[name]), axis)
        model.graph.initializer.remove(weights[name])
        model.graph.initializer.extend([_fp8(values, f"{name}_quantized"), floats(scales, f"{name}_scale")])
        inputs, options = [f"{name}_quantized", f"{name}_scale"], _options(axis)
        node = onnx.helper.make_node("DequantizeLinear", inputs, [name], f"{name}_DequantizeLinear", **options)
        dequantized.append(node)
    return dequantized


def _options(axis: int | None) -> Record:
    return {} if axis is None else {"axis": axis}


def _channels(node: onnx.NodeProto, place: int, dimensions: int) -> int | None:
    """Return the axis of the output channels of a node's constant factor; None if one scale has to do for all."""
    if node.op_type == "Conv":
        return 0
    if place == 0 or dimensions != 2:
        return None
    return 0 if attribute(node, "transB") else 1


def rounded_to_fp8(weights: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return weights in E4M3 and their FP32 scales: one for each index along `axis`, or a single one for None.

    They are rounded to the nearest, ties to even. Where all are zero, the scale is 1.
    """
    import ml_dtypes
    import numpy as np

    others = tuple(place for place in range(weights.ndim) if place != axis)
    largest = np.abs(weights).max(axis=others, keepdims=True, initial=0)
    scales = np.where(largest > 0, np.maximum(largest / LARGEST, np.finfo(np.float32).tiny), 1).astype(np.float32)
    rounded = np.clip(weights / scales, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn)
    return rounded, scales.reshape(() if axis is None else -1)


def _with_rounded_inputs(
    model: onnx.ModelProto, graph: Calibrated, chosen: list[onnx.NodeProto]
) -> Iterator[onnx.NodeProto]:
    """Yield all nodes, and before the first of the chosen ones that reads an activation what rounds it to FP8."""
    import ml_dtypes
    import numpy as np

    names, rounded = {node.name for node in chosen}, set[str]()
    model.graph.initializer.append(_fp8(np.zeros((), ml_dtypes.float8_e4m3fn), ZERO))
    for node in model.graph.node:
        for place, name in enumerate(node.input[:2] if node.name in names else ()):
            if name in graph.ranges:
                yield from () if name in rounded else _rounding(model, name, graph)
                rounded.add(name)
                node.input[place] = f"{name}_DequantizeLinear_Output"
        yield node


def _rounding(model: onnx.ModelProto, name: str, graph: Calibrated) -> Iterator[onnx.NodeProto]:
    """Yield the nodes that round an activation to FP8 by the range that calibration found."""
    import numpy as np
    from onnx import helper

    largest = max(float(np.abs(end).max()) for end in graph.ranges[name].range_value)
    scale, middle = f"{name}_scale", f"{name}_QuantizeLinear_Output"
    model.graph.initializer.append(floats(np.array(largest / LARGEST if largest else 1), scale))
    yield helper.make_node("QuantizeLinear", [name, scale, ZERO], [middle], f"{name}_QuantizeLinear")
    outputs = [f"{name}_DequantizeLinear_Output"]
    yield helper.make_node("DequantizeLinear", [middle, scale, ZERO], outputs, f"{name}_DequantizeLinear")


def _fp8(values: np.ndarray, name: str) -> onnx.TensorProto:
    import onnx

    return tensor(values, name, onnx.TensorProto.FLOAT8E4M3FN)
