"""INT4 graphs: matrix products whose weights are integers of 4 bits with a scale for each block of inputs.

Products with an integer weight exist for just one form, in TensorRT as in ONNX Runtime: a DequantizeLinear of a weight
(inputs, outputs) before a MatMul. So a Gemm becomes a MatMul and an Add. Activations are not rounded, and convolutions
stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pq_sweep.compress.weight_only import Grid, quantize_weights, with_types
from pq_sweep.core.stored import attribute, stored_weights
from pq_sweep.types import UserError

if TYPE_CHECKING:
    import onnx

BITS = 4


def in_int4(model: onnx.ModelProto, block: int, excluded: list[str]) -> tuple[onnx.ModelProto, list[str]]:
    """Return a graph with its matrix products in INT4 but for nodes in `excluded`, and the nodes that are in INT4.

    A product whose inputs are no whole number of blocks stays as it is.
    """
    grid = Grid(BITS, block)
    model = with_types(model, grid)
    chosen = products(model, block, excluded)
    if not chosen:
        raise UserError(
            f"quantizer=int4 finds no linear layer to quantize whose inputs are whole blocks of {block}"
            " (quantizer.block); use quantizer=int8 for convolutions, or another block."
        )
    names = [node.name for node in chosen]
    weights = _as_products(model, set(names))
    quantize_weights(model, [each for each in stored_weights(model.graph) if each.item.name in weights], grid)
    return model, names


def products(model: onnx.ModelProto, block: int, excluded: list[str]) -> list[onnx.NodeProto]:
    """Return the plain products with a weight of whole blocks of inputs, which nothing else reads."""
    weights = {item.name: item for item in model.graph.initializer}
    readers = [name for node in model.graph.node for name in dict.fromkeys(node.input)]
    return [
        node
        for node in model.graph.node
        if node.name not in excluded
        and _is_plain(node)
        and readers.count(node.input[1]) == 1
        and (item := weights.get(node.input[1])) is not None
        and len(item.dims) == 2
        and item.dims[attribute(node, "transB")] % block == 0
    ]


def _is_plain(node: onnx.NodeProto) -> bool:
    """Say whether a node is a product without further factors, and a sum with a bias at most."""
    factors = {each.name: each.f for each in node.attribute if each.name in ("alpha", "beta")}
    return node.op_type == "MatMul" or (
        node.op_type == "Gemm" and not attribute(node, "transA") and set(factors.values()) <= {1.0}
    )


def _as_products(model: onnx.ModelProto, names: set[str]) -> set[str]:
    """Write each of these nodes as a MatMul with a weight (inputs, outputs), and an Add; return the weights' names."""
    items = {item.name: item for item in model.graph.initializer}
    nodes, weights = list(model.graph.node), set[str]()
    del model.graph.node[:]
    for node in nodes:
        if node.name in names:
            weights.add(node.input[1])
            _transpose(items[node.input[1]], bool(attribute(node, "transB")))
        model.graph.node.extend(_as_product(node) if node.name in names and node.op_type == "Gemm" else [node])
    return weights


def _transpose(item: onnx.TensorProto, wanted: bool) -> None:
    import numpy as np
    from onnx import numpy_helper

    if wanted:
        values = np.ascontiguousarray(numpy_helper.to_array(item).T)
        item.CopyFrom(numpy_helper.from_array(values, item.name))


def _as_product(gemm: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Return a MatMul and, if the Gemm has a bias, an Add."""
    from onnx import helper

    if len(gemm.input) < 3 or not gemm.input[2]:
        return [helper.make_node("MatMul", gemm.input[:2], gemm.output, gemm.name)]
    between = f"{gemm.output[0]}_product"
    return [
        helper.make_node("MatMul", gemm.input[:2], [between], f"{gemm.name}_MatMul"),
        helper.make_node("Add", [between, gemm.input[2]], gemm.output, f"{gemm.name}_Add"),
    ]
