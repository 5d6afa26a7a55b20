"""The bits of a compressed network, by what its graph or its state_dict holds: of each weight, and of each product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pq_sweep.core.result import Bits, Counts
from pq_sweep.core.weights import each_once
from pq_sweep.measure.arithmetic import arithmetic_by_weight
from pq_sweep.measure.graph import Graph
from pq_sweep.types import Model

if TYPE_CHECKING:
    import onnx

FULL = 32  # bits of FP32
# What the network computes and no operator of the graph is known to: counted in FP32, so that nobody gains by it.
REST = "other"


@dataclass(frozen=True)
class Product:
    """A layer's product of matrices: the multiply-accumulates of one image, and the bits of both of its factors.

    `name` is that of the weight. A product of two activations is called after its operator, has no `weights`, and the
    bits of its second factor in `weight_bits`. `zeros` are weights whose code stands for 0.
    """

    name: str
    macs: int
    weight_bits: int
    activation_bits: int
    weights: int = 0
    zeros: int = 0

    @property
    def bops(self) -> int:
        """Return the multiply-accumulates, each times the bits of both factors."""
        return self.macs * self.weight_bits * self.activation_bits


@dataclass(frozen=True)
class Holdings:
    """What an artifact holds: the products of its layers, and the bytes of all tensors if each took just its bits."""

    products: list[Product]
    packed_bytes: int

    def summed(self, network: Counts, dense: Counts) -> Bits:
        """Sum up; `dense` are the figures of the uncompressed network."""
        products = with_rest(self.products, network)
        macs, bops = sum(each.macs for each in products), sum(each.bops for each in products)
        stored = list({each.name: each for each in products if each.weights}.values())  # what layers share is one
        weights = sum(each.weights for each in stored)
        return Bits(
            packed_bytes=self.packed_bytes,
            bops=bops,
            rel_bops=bops / (dense.macs * FULL * FULL) if dense.macs else None,
            weight_bits=sum(each.weights * each.weight_bits for each in stored) / weights if weights else None,
            activation_bits=sum(each.macs * each.activation_bits for each in products) / macs if macs else None,
            sparsity=sum(each.zeros for each in stored) / weights if weights else None,
        )


def with_rest(products: list[Product], network: Counts) -> list[Product]:
    """Add what is missing to the network's multiply-accumulates as a product in FP32."""
    rest = (network.macs or 0) - sum(each.macs for each in products)
    return [*products, Product(REST, rest, FULL, FULL)] if rest > 0 else products


def by_layer(products: Iterable[Product]) -> dict[str, dict[str, Any]]:
    """Describe products as plain values by name, those with the same weight as one."""
    found: dict[str, list[Product]] = {}
    for each in products:
        found.setdefault(each.name, []).append(each)
    return {name: _described(same) for name, same in found.items()}


def _described(same: list[Product]) -> dict[str, Any]:
    macs, first = sum(each.macs for each in same), same[0]
    activations = {each.activation_bits for each in same}
    mean = sum(each.macs * each.activation_bits for each in same) / macs if macs else first.activation_bits
    told = {
        "macs": macs,
        "weight_bits": first.weight_bits,
        "activation_bits": first.activation_bits if len(activations) == 1 else mean,
    }
    return told | ({"sparsity": first.zeros / first.weights} if first.weights else {})


# --- PyTorch ---------------------------------------------------------------------------------------------------------


def of_network(model: Model, stored: Mapping[str, Tensor]) -> Holdings:
    """Look at a network that PyTorch runs in one precision, and at its state_dict as it is stored."""
    bits = 8 * next(model.module.parameters()).element_size()
    products = [
        Product(name or REST, macs, bits, bits, *((weight.numel(), _zeros(weight)) if weight is not None else ()))
        for name, macs in arithmetic_by_weight(model).items()
        for weight in [stored.get(name)]
    ]
    return Holdings(products, sum(tensor.nbytes for _, tensor in each_once(stored.items())))


def _zeros(weight: Tensor) -> int:
    return weight.numel() - int(weight.count_nonzero())


# --- ONNX ------------------------------------------------------------------------------------------------------------


def of_graph(graph: Graph) -> Holdings | None:
    """Look at a graph; None if the shapes of its tensors depend on the values of images."""
    try:
        products = [product for node in graph.nodes for product in _products(graph, node)]
    except KeyError:  # a shape that could not be worked out
        return None
    packed = sum((prod(item.dims) * graph.stored_bits(name) + 7) // 8 for name, item in graph.constants.items())
    return Holdings(products, packed)


def _products(graph: Graph, node: onnx.NodeProto) -> Iterator[Product]:
    """Yield the products that a node computes: none, one, or those with a recurrent layer's two weights."""
    if node.op_type not in OPERATORS:
        return
    factors, count = OPERATORS[node.op_type]
    for first, second in factors:
        if second < len(node.input):  # an Einsum of one tensor multiplies nothing
            names = node.input[first], node.input[second]
            yield _product(graph, node, names, count(graph, node, *names))


def _product(graph: Graph, node: onnx.NodeProto, names: tuple[str, str], macs: int) -> Product:
    """Describe a product; its weight may be either factor, and is a constant or made of one."""
    left, right = names
    if graph.weight(right) is None and graph.weight(left) is not None:
        left, right = right, left
    weight, (activation_bits, bits) = graph.weight(right), graph.bits(left, right)
    activation_bits = INSIDE.get(node.op_type, activation_bits)
    if weight is None:
        return Product(node.name or node.output[0], macs, bits, activation_bits)
    # A weight may be stored in few bits and multiplied in more, or be stored as floats and quantized by the graph.
    bits = graph.exact.get(weight) or min(graph.stored_bits(weight), bits)
    codes, zero = graph.codes(weight)
    zeros = int((codes == zero).sum())
    return Product(weight.removesuffix("_quantized"), macs, bits, activation_bits, codes.numel(), zeros)


def _convolution(graph: Graph, node: onnx.NodeProto, _: str, weight: str) -> int:
    """Each output element takes all weights of its channel."""
    return prod(graph.shapes[node.output[0]]) * prod(graph.shapes[weight][1:])


def _transposed(graph: Graph, node: onnx.NodeProto, images: str, weight: str) -> int:
    """Each input element goes through all weights of its channel."""
    return prod(graph.shapes[images]) * prod(graph.shapes[weight][1:])


def _matrices(graph: Graph, node: onnx.NodeProto, left: str, _: str) -> int:
    """Each output element is a sum over the inner dimension."""
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return prod(graph.shapes[node.output[0]]) * graph.shapes[left][-2 if transposed else -1]


def _recurrent(graph: Graph, node: onnx.NodeProto, inputs: str, weight: str) -> int:
    """Each step of each sequence goes through the whole weight, those of both directions."""
    return prod(graph.shapes[node.input[0]][:2]) * prod(graph.shapes[weight])


def _einsum(graph: Graph, node: onnx.NodeProto, _: str, __: str) -> int:
    """Each output element is a sum over all indices that it does not have."""
    equation = next(each.s.decode() for each in node.attribute if each.name == "equation")
    terms, _, output = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for term, name in zip(terms.split(","), node.input, strict=True):
        before, _, after = term.partition("...")
        shape = graph.shapes[name]
        sizes |= dict(zip(before, shape, strict=False)) | dict(zip(after[::-1], shape[::-1], strict=False))
    return prod(graph.shapes[node.output[0]]) * prod(size for index, size in sizes.items() if index not in output)


Factors = tuple[tuple[int, int], ...]
Count = Callable[[Graph, "onnx.NodeProto", str, str], int]
ONE: Factors = ((0, 1),)
RECURRENT: Factors = ((0, 1), (0, 2))  # the states that the second one takes have the type of the inputs
# Which inputs of an operator are multiplied with each other, and how many times.
OPERATORS: dict[str, tuple[Factors, Count]] = {
    "Conv": (ONE, _convolution),
    "ConvInteger": (ONE, _convolution),
    "ConvTranspose": (ONE, _transposed),
    "DeformConv": (ONE, _convolution),
    "Einsum": (ONE, _einsum),
    "Gemm": (ONE, _matrices),
    "MatMul": (ONE, _matrices),
    "MatMulInteger": (ONE, _matrices),
    "QLinearConv": (((0, 3),), _convolution),
    "QLinearMatMul": (((0, 3),), _matrices),
    "LSTM": (RECURRENT, _recurrent),
    "GRU": (RECURRENT, _recurrent),
    "RNN": (RECURRENT, _recurrent),
    "DynamicQuantizeLSTM": (RECURRENT, _recurrent),
}
# The bits to which an operator rounds its activations itself.
INSIDE = {"DynamicQuantizeLSTM": 8}
