"""Graphs whose weights are integers of few bits, which are dequantized to FP32 as the model runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pq_sweep.core.stored import PRODUCTS, Stored, floats, stored_weights, tensor
from pq_sweep.types import UserError

if TYPE_CHECKING:
    import numpy as np
    import onnx

# The versions of operators and of the format from which on a graph may hold integers of so many bits.
OPSETS, FORMATS = {8: 13, 4: 21, 2: 25}, {8: 7, 4: 10, 2: 13}
BLOCKS_FROM = 21
# Ranges that are tried first, as shares of the largest magnitude, and then around the best of them.
SHARES = tuple(number / 24 for number in range(2, 27))
NEARBY = tuple(number / 24 / 9 for number in range(-8, 9) if number)
REFINEMENTS = 4
AT_ONCE = 1 << 18  # weights whose codes are looked for at a time, few enough for a processor's cache


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` around zero or, not `signed`, from zero on; if `narrow`, as many below zero as above.

    The scale of weights is one per output channel or, with `block`, one per so many inputs.
    """

    bits: int
    block: int | None = None
    signed: bool = True
    narrow: bool = False

    @property
    def limits(self) -> tuple[int, int]:
        """Return the smallest and the largest integer."""
        if not self.signed:
            return 0, 2**self.bits - 1
        return self.narrow - 2 ** (self.bits - 1), 2 ** (self.bits - 1) - 1

    @property
    def container(self) -> int:
        """Return the bits that each integer takes in the file."""
        return next(bits for bits in sorted(OPSETS) if bits >= self.bits)

    def require(self) -> None:
        """Refuse bits that the installed packages have no type for."""
        import onnx

        if not hasattr(onnx.TensorProto, f"INT{self.container}"):
            raise UserError(
                f"quantizer.bits={self.bits} needs integers of {self.container} bits, which onnx {onnx.__version__} has"
                " not; install onnx>=1.20 and onnxruntime>=1.24, or give quantizer.bits from 3 to 8."
            )


@dataclass(frozen=True)
class Encoded:
    """A weight as integers of `bits`, stored in `container` bits each, in its shape.

    The scale is one number, one for each output channel or, with `block`, in the shape of the weight with its inputs
    counted in blocks.
    """

    weight: Stored
    codes: np.ndarray
    scale: np.ndarray
    bits: int
    container: int
    block: int | None = None

    @property
    def axis(self) -> dict[str, int]:
        """Return the attributes that say along which axis the scales lie."""
        if self.block:
            return {"axis": 1 - self.weight.outputs, "block_size": self.block}
        return {"axis": self.weight.outputs} if self.scale.ndim else {}


def quantize_weights(model: onnx.ModelProto, weights: list[Stored], grid: Grid) -> None:
    """Replace float weights of a graph by integers and a DequantizeLinear each.

    Blocks lie along the inputs of matrix products; convolutions have a scale for each output channel in any case.
    """

    def encoded(weight: Stored) -> Encoded:
        block = grid.block if weight.operator in PRODUCTS else None
        return Encoded(weight, *encode(weight, Grid(grid.bits, block)), grid.bits, grid.container, block)

    store(model, weights, encoded)


def store(model: onnx.ModelProto, weights: list[Stored], encoded: Callable[[Stored], Encoded]) -> None:
    """Replace float weights of a graph by what they are encoded as, and a DequantizeLinear each."""
    import onnx
    from tqdm import tqdm

    nodes, exact = [], dict[str, int]()
    for weight in tqdm(weights, desc="weights", unit="layer", disable=None, leave=False):
        each, name = encoded(weight), weight.name
        held = _bits_in_file(each)
        kind = getattr(onnx.TensorProto, f"INT{held}")
        model.graph.initializer.remove(weight.item)
        model.graph.initializer.extend(
            [tensor(each.codes, f"{name}_quantized", kind), floats(each.scale, f"{name}_scale")]
        )
        exact |= {f"{name}_quantized": each.bits} if each.bits != held else {}
        inputs = [f"{name}_quantized", f"{name}_scale"]
        node: Any = partial(onnx.helper.make_node, "DequantizeLinear", inputs, [name], f"{name}_DequantizeLinear")
        nodes.append(node(**each.axis))
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes, *others])
    note_exact(model, exact)


def _bits_in_file(each: Encoded) -> int:
    """Return the bits that each integer of a weight takes in the file.

    ONNX Runtime 1.31 multiplies by other numbers than a matrix holds if these have two bits, outputs come last, and are
    no multiple of four: four bits are right.
    """
    weight = each.weight
    last = weight.operator in PRODUCTS and weight.outputs == len(weight.item.dims) - 1
    return 4 if each.container < 4 and last and weight.item.dims[-1] % 4 else each.container


def note_exact(model: onnx.ModelProto, bits: dict[str, int]) -> None:
    """Write the exact bits of tensors into a graph whose types have more, beside those that are there."""
    from onnx.helper import set_model_props

    from pq_sweep.measure.graph import EXACT

    before = {entry.key: entry.value for entry in model.metadata_props}
    if bits:
        after = json.loads(before.get(EXACT, "{}")) | bits
        set_model_props(model, before | {EXACT: json.dumps(after)})


def encode(weight: Stored, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return the integers of a weight, in its shape, and their scales.

    Scales have the least sum of squared errors. They are (outputs,), or, with blocks, in the weight's shape with its
    inputs counted in blocks.
    """
    import numpy as np

    values = np.moveaxis(weight.values(), weight.outputs, 0)  # outputs first
    if not grid.block:
        rows = values.reshape(len(values), -1)
        codes, scale = fitted(rows, grid)
        return np.moveaxis(codes.reshape(values.shape), 0, weight.outputs), scale
    outputs, inputs = values.reshape(len(values), -1).shape
    blocks = -(-inputs // grid.block)
    padded = np.pad(values.reshape(outputs, inputs), ((0, 0), (0, blocks * grid.block - inputs)))
    codes, scale = fitted(padded.reshape(-1, grid.block), grid)
    codes = codes.reshape(outputs, -1)[:, :inputs].reshape(values.shape)
    return np.moveaxis(codes, 0, weight.outputs), np.moveaxis(scale.reshape(outputs, blocks), 0, weight.outputs)


def fitted(rows: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row (N, K) its integers, int8 (N, K), and the scale (N,) that brings them closest to it.

    The sum of squared errors has many minima, of which this finds one that is nearly the least: the best of many scales
    is refined by giving each set of integers its best scale in turn, which never makes the error larger.
    """
    import numpy as np

    parts = [_fitted(part.astype(np.float32), grid) for part in _parts(rows)]
    return np.concatenate([codes for codes, _ in parts]), np.concatenate([scale for _, scale in parts])


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    count = max(1, AT_ONCE // max(1, rows.shape[1]))
    yield from (rows[start : start + count] for start in range(0, len(rows), count))


def _fitted(rows: np.ndarray, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    low, high = grid.limits
    largest = np.abs(rows).max(1, keepdims=True)
    largest = np.where(largest > 0, largest, 1).astype(np.float32)
    best, error = largest / high, np.full_like(largest, np.inf)

    def attempt(scale: np.ndarray) -> np.ndarray:
        """Keep the scales that are better than the best so far, and return the best ones for the integers found."""
        nonlocal best, error
        codes = np.clip(np.rint(rows / scale), low, high)
        found = np.square(codes * scale - rows).sum(1, keepdims=True, dtype=np.float64)
        best, error = np.where(found < error, scale, best), np.minimum(found, error)
        products, squares = (rows * codes).sum(1, keepdims=True), np.square(codes).sum(1, keepdims=True)
        return np.where(products > 0, products / np.maximum(squares, 1), scale).astype(np.float32)

    for share in SHARES:
        attempt(largest * np.float32(share / high))
    middle = best
    for share in NEARBY:
        attempt(np.maximum(middle + largest * np.float32(share / high), middle / 8))
    scale = best
    for _ in range(REFINEMENTS):
        scale = attempt(scale)
    attempt(scale)
    kind = np.int8 if grid.signed else np.uint8
    return np.clip(np.rint(rows / best), low, high).astype(kind), best[:, 0].astype(np.float32)


def with_types(model: onnx.ModelProto, grid: Grid) -> onnx.ModelProto:
    """Return a graph in the versions of operators and format that hold such integers, or refuse them."""
    grid.require()
    model = with_opset(model, max(OPSETS[grid.container], BLOCKS_FROM if grid.block else 0))
    model.ir_version = max(model.ir_version, FORMATS[grid.container], FORMATS[4] if grid.block else 0)
    return model


def with_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """Return a graph in this version of ONNX's operators or, if it is in a later one, as it is."""
    import onnx
    from onnx import version_converter

    known = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    converted = model if known >= least else version_converter.convert_version(model, least)
    assert isinstance(converted, onnx.ModelProto)
    return converted


def chosen_weights(model: onnx.ModelProto, excluded: list[str]) -> list[Stored]:
    """Return the float weights of a graph's matrix operators, without those of the nodes in `excluded`."""
    left: set[Any] = {name for node in model.graph.node if node.name in set(excluded) for name in node.input}
    return [each for each in stored_weights(model.graph) if each.scale is None and each.item.name not in left]
