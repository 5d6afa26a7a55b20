"""A graph as one image goes through it: the shape and type of each tensor, and the weights that tensors are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pq_sweep.core.stored import attribute

if TYPE_CHECKING:
    import onnx

# In a graph's metadata: the bits of each tensor of integers whose type in the file has more of them, as JSON.
EXACT = "pq_sweep.bits"
# Operators that only move values. Runtimes take Q/DQ across these, so that a product behind them is still of integers.
MOVES = ("Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
# Between a weight as it is stored and as it is multiplied with.
UNPACKS = (*MOVES, "Cast", "DequantizeLinear", "QuantizeLinear")
# Where operators that take integers have a weight, its scale, if they know it, and the number that stands for zero.
ENCODED = {
    "DequantizeLinear": (0, 1, 2),
    "ConvInteger": (1, None, 3),
    "MatMulInteger": (1, None, 3),
    "QLinearConv": (3, 4, 5),
    "QLinearMatMul": (3, 4, 5),
}
# The axis of the channels that have scales of their own, unless a node tells.
AXES = {"DequantizeLinear": 1, "ConvInteger": 0, "QLinearConv": 0}
# Shapes are worked out from constants of no more elements than this; the values of larger ones are not looked at.
FEW = 1024
# Of the names of element types, only these have not their bits in them.
NAMED = {"FLOAT": 32, "DOUBLE": 64, "BOOL": 8}


def width(kind: int) -> int:
    """Return the bits of one of ONNX's element types, such as 8 for FLOAT8E4M3FN."""
    import onnx

    name = onnx.TensorProto.DataType.Name(kind)
    return NAMED.get(name) or int(re.findall(r"\d+", name)[0])


class Graph:
    """A graph in a file: its nodes, its constants by name, and the `kinds` and `shapes` of tensors for one image."""

    def __init__(self, path: Path) -> None:
        import onnx

        model = onnx.load(path)
        self.nodes = list(model.graph.node)
        self.constants = {item.name: item for item in model.graph.initializer} | dict(_constants(self.nodes))
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.decoders = {node.input[ENCODED[node.op_type][0]]: node for node in self.nodes if node.op_type in ENCODED}
        self.exact: dict[str, int] = json.loads(
            next((entry.value for entry in model.metadata_props if entry.key == EXACT), "{}")
        )
        self.kinds, self.shapes = _for_one_image(model)

    def stored_bits(self, name: str) -> int:
        """Return the bits of each element of a constant; those that the metadata tell win over those of its type."""
        return self.exact.get(name) or width(self.constants[name].data_type)

    def bits(self, *factors: str) -> list[int]:
        """Return the bits in which tensors are multiplied with each other: if all come out of Q/DQ, those in between.

        If only some do, they are multiplied as the floats that they are turned into.
        """
        encoded = [name for name in map(self._encoded, factors) if name is not None]
        names = encoded if len(encoded) == len(factors) else factors
        return [self.exact.get(name) or width(self.kinds[name]) for name in names]

    def _encoded(self, name: str) -> str | None:
        """Return the tensor that a DequantizeLinear turned into this one, or None."""
        while (node := self.makers.get(name)) is not None and node.op_type in MOVES:
            name = node.input[0]
        return node.input[0] if node is not None and node.op_type == "DequantizeLinear" else None

    def weight(self, name: str) -> str | None:
        """Return the name of the constant that a tensor is made of, or None if it is an activation."""
        while (node := self.makers.get(name)) is not None and node.op_type in UNPACKS:
            name = node.input[0]
        return name if name in self.constants else None

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Return a constant as float32 numbers, integers as they are, and the number or numbers that stand for zero."""
        codes = _numbers(self.constants[name])
        node = self.decoders.get(name)
        zero = _input(node, ENCODED[node.op_type][2]) if node is not None else ""
        return codes, self._along(node, zero, codes.shape, torch.zeros(()))

    def values(self, name: str) -> Tensor:
        """Return the float32 values that a constant stands for.

        Products of integers are multiplied with the weight's scale later: there its name tells which that is.
        """
        (codes, zero), node = self.codes(name), self.decoders.get(name)
        place = ENCODED[node.op_type][1] if node is not None else None
        scale = f"{name.removesuffix('_quantized')}_scale" if place is None else _input(node, place)
        return (codes - zero) * self._along(node, scale, codes.shape, torch.ones(()))

    def _along(self, node: onnx.NodeProto | None, name: str, shape: torch.Size, otherwise: Tensor) -> Tensor:
        """Return the scale or zero point of a weight of this shape as one number, or in a shape that multiplies."""
        if node is None or name not in self.constants:
            return otherwise
        values = _numbers(self.constants[name])
        if values.numel() == 1:
            return values.reshape(())
        axis = attribute(node, "axis", AXES.get(node.op_type, -1))
        if block := attribute(node, "block_size", 0):
            return values.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])
        return values.reshape([-1 if axis % len(shape) == place else 1 for place in range(len(shape))])


def _constants(nodes: list[onnx.NodeProto]) -> Iterator[tuple[str, onnx.TensorProto]]:
    for node in nodes:
        if node.op_type == "Constant":
            yield from ((node.output[0], each.t) for each in node.attribute if each.name == "value")


def _numbers(item: onnx.TensorProto) -> Tensor:
    from onnx.numpy_helper import to_array

    return torch.from_numpy(to_array(item).astype("float32"))


def _input(node: onnx.NodeProto | None, place: int) -> str:
    """Return the name of a node's input, or "" where it has none."""
    return [*node.input, "", ""][place] if node is not None else ""


def _for_one_image(model: onnx.ModelProto) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Return the element type of each tensor, and the shape of those whose shape does not depend on values."""
    from onnx.shape_inference import infer_shapes

    graph = infer_shapes(_with_one_image(model), data_prop=True).graph
    kinds, shapes = {}, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        form = value.type.tensor_type
        if form.elem_type:
            kinds[value.name] = form.elem_type
        if form.HasField("shape") and all(dim.HasField("dim_value") for dim in form.shape.dim):
            shapes[value.name] = tuple(dim.dim_value for dim in form.shape.dim)
    for name, item in ({each.name: each for each in model.graph.initializer} | dict(_constants(graph.node))).items():
        kinds[name], shapes[name] = item.data_type, tuple(item.dims)
    return kinds, shapes


def _with_one_image(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without the values of its weights, and with 1 for the dimension that counts images.

    Further dimensions without a number are worked out anew: what they are called may be a formula.
    """
    import onnx

    small = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    small.graph.name = model.graph.name
    small.graph.node.extend(_in_order(list(model.graph.node)))
    for part in ("input", "output", "value_info"):
        getattr(small.graph, part).extend(getattr(model.graph, part))
    for item in model.graph.initializer:
        few = prod(item.dims) <= FEW
        small.graph.initializer.append(
            item if few else onnx.TensorProto(name=item.name, data_type=item.data_type, dims=item.dims)
        )
    batch = {value.type.tensor_type.shape.dim[0].dim_param for value in small.graph.input[:1]} - {""}
    for value in (*small.graph.input, *small.graph.output, *small.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in batch:
                dim.dim_value = 1
            elif dim.dim_param:
                dim.ClearField("dim_param")
    return small


def _in_order(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """Return nodes so that each comes after those that its inputs come from; quantizers append theirs at the end."""
    makers = {name: index for index, node in enumerate(nodes) for name in node.output}
    before = {index: {makers[name] for name in node.input if name in makers} for index, node in enumerate(nodes)}
    return [nodes[index] for index in TopologicalSorter(before).static_order()]
