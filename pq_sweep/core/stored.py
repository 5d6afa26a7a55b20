"""The weights of matrix operators as a graph holds them: floats, or integers or floats of 8 bits with a scale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx

CONVOLUTIONS = ("Conv", "ConvInteger")
PRODUCTS = ("Gemm", "MatMul", "MatMulInteger")
TRANSPOSED = ("ConvTranspose",)
OPERATORS = (*CONVOLUTIONS, *PRODUCTS, *TRANSPOSED)

# In a graph's metadata: its activations have so few bits that a bias rounded to their steps would be another one.
KEEPS_BIASES = "pq_sweep.keeps_biases"


@dataclass(frozen=True)
class Stored:
    """A weight of a graph: its name in the network, its initializer, and the operator that multiplies with it.

    `outputs` is the axis of its output channels. Integers stand for (q - zero) * scale, where both are shaped for that
    product, and floats of 8 bits for q * scale; other floats have neither.
    """

    name: str
    item: onnx.TensorProto
    operator: str
    outputs: int
    scale: np.ndarray | None = None
    zero: np.ndarray | None = None

    def codes(self) -> np.ndarray:
        """Return what is stored, integers as int32 and floats as float32."""
        from onnx import TensorProto
        from onnx.numpy_helper import to_array

        floats = self.scale is None or self.item.data_type == TensorProto.FLOAT8E4M3FN
        return to_array(self.item).astype("float32" if floats else "int32")

    def values(self) -> np.ndarray:
        """Return the float32 values that the weight stands for."""
        codes = self.codes().astype("float32")
        return codes if self.scale is None else (codes - (0 if self.zero is None else self.zero)) * self.scale

    def clear(self, where: np.ndarray) -> None:
        """Store the code of zero at the places where an array of this shape is true, and change nothing else."""
        import numpy as np
        from onnx.numpy_helper import to_array

        if not where.any():
            return
        stored = to_array(self.item)
        zero = np.zeros((), "int32") if self.zero is None else self.zero
        cleared = np.where(where, np.broadcast_to(zero, stored.shape).astype(stored.dtype), stored)
        kept = self.item.name
        self.item.CopyFrom(tensor(cleared, kept, self.item.data_type))


def tensor(values: np.ndarray, name: str, kind: int) -> onnx.TensorProto:
    """Return an initializer of an element type of onnx's; integers of four or two bits are packed."""
    import numpy as np
    import onnx

    bits = {onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4, getattr(onnx.TensorProto, "INT2", -1): 2}.get(kind)
    raw = np.ascontiguousarray(values)
    if bits:
        raw = packed(raw, bits)
    return onnx.TensorProto(name=name, data_type=kind, dims=values.shape, raw_data=raw.tobytes())


def floats(values: np.ndarray, name: str) -> onnx.TensorProto:
    """Return an FP32 initializer."""
    import onnx

    return tensor(values.astype("float32"), name, onnx.TensorProto.FLOAT)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack integers of four or two bits into bytes, the first one into the lowest bits."""
    import numpy as np

    each, flat = 8 // bits, codes.astype(np.int8).view(np.uint8).ravel() & (2**bits - 1)
    flat = np.concatenate([flat, np.zeros(-len(flat) % each, np.uint8)]).reshape(-1, each)
    return np.bitwise_or.reduce(flat << (bits * np.arange(each, dtype=np.uint8)), axis=1).astype(np.uint8)


def stored_weights(graph: onnx.GraphProto) -> list[Stored]:
    """List the weights of all matrix operators, in the order of the graph and each once."""
    initializers = {item.name: item for item in graph.initializer}
    made_by = {node.output[0]: node for node in graph.node}
    found: dict[str, Stored] = {}
    for node in graph.node:
        for place, name in _factors(node):
            if weight := _follow(node, place, name, initializers, made_by):
                found.setdefault(weight.item.name, weight)
    return list(found.values())


def _factors(node: onnx.NodeProto) -> Iterator[tuple[int, str]]:
    """Yield the inputs of a matrix operator that may be its weight; a convolution's first input is the image."""
    if node.op_type in OPERATORS:
        yield from list(enumerate(node.input))[0 if node.op_type in PRODUCTS else 1 : 2]


def _follow(
    user: onnx.NodeProto, place: int, name: str, initializers: dict[str, Any], made_by: dict[str, Any]
) -> Stored | None:
    """Return the weight that an input of a node is, or None if it is an activation."""
    while (node := made_by.get(name)) is not None and node.op_type == "Cast":
        name = node.input[0]
    if name in initializers:
        zero = {"ConvInteger": 3, "MatMulInteger": 2 + place}.get(user.op_type)
        if zero is None:
            item = initializers[name]
            return (
                Stored(name, item, user.op_type, output_axis(user, place, len(item.dims)))
                if len(item.dims) > 1
                else None
            )
        return _integers(user, place, name, _named(name, "scale", initializers), user.input[zero], initializers, 0)
    if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in initializers:
        return None
    names = [*node.input, ""]
    return _integers(user, place, names[0], names[1], names[2], initializers, attribute(node, "axis", 1), node)


def _integers(
    user: onnx.NodeProto,
    place: int,
    name: str,
    scale: str,
    zero: str,
    initializers: dict[str, Any],
    axis: int,
    dequantize: onnx.NodeProto | None = None,
) -> Stored | None:
    """Return a weight of integers, with its scale and zero point in shapes that multiply."""
    item, block = initializers[name], attribute(dequantize, "block_size", 0)
    if len(item.dims) < 2:
        return None
    parts = (_shaped(initializers.get(part), axis, block, tuple(item.dims)) for part in (scale, zero))
    outputs = output_axis(user, place, len(item.dims))
    return Stored(name.removesuffix("_quantized"), item, user.op_type, outputs, *parts)


def _shaped(item: onnx.TensorProto | None, axis: int, block: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return a scale or zero point in a shape that multiplies: one number, one per channel, or one per block."""
    import numpy as np
    from onnx.numpy_helper import to_array

    if item is None:
        return None
    values = to_array(item).astype("float32")
    if block:
        return np.repeat(values, block, axis).take(range(shape[axis]), axis)
    if values.size == 1:
        return values.reshape(())
    return values.reshape([-1 if axis % len(shape) == place else 1 for place in range(len(shape))])


def _named(name: str, part: str, initializers: dict[str, Any]) -> str:
    """Return the name of the scale that onnxruntime's dynamic quantizer gives an integer weight."""
    found = f"{name.removesuffix('_quantized')}_{part}"
    return found if found in initializers else ""


def output_axis(node: onnx.NodeProto, place: int, dimensions: int) -> int:
    """Return the axis of the output channels of a node's weight."""
    if node.op_type in CONVOLUTIONS:
        return 0
    if node.op_type in TRANSPOSED:
        return 1
    transposed = bool(attribute(node, "transA" if place == 0 else "transB", 0))
    return dimensions - 2 if (place == 0) != transposed else dimensions - 1


def attribute(node: onnx.NodeProto | None, name: str, otherwise: int = 0) -> int:
    """Return a whole number that is an attribute of a node, or another one where it has none."""
    return next((int(each.i) for each in node.attribute if each.name == name), otherwise) if node else otherwise
