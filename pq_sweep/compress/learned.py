"""Graphs with the integers and scales that a network was trained with, and no others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pq_sweep.compress.weight_only import Encoded, Grid, chosen_weights, note_exact, store, with_types
from pq_sweep.core.hardware import cpu_flags, multiplies_bytes
from pq_sweep.core.stored import KEEPS_BIASES, Stored, floats, tensor
from pq_sweep.types import Record, UserError

if TYPE_CHECKING:
    import numpy as np
    import onnx

# How far from an integer a weight may be, counted in steps: float32 puts it less than this away.
NEAR = 0.01
# Scales this close, as a share of each other, are one scale after multiplications in float32.
EQUAL = 1e-5
BYTE = 8


def write_learned(model: onnx.ModelProto, learned: dict[str, Any], form: str) -> tuple[onnx.ModelProto, Record]:
    """Return a graph with learned integers, and what the result records about them.

    `learned` holds by the name of a weight its `bits`, its `scale` (one, or one for each output channel), the `largest`
    integer of each output channel and perhaps an `activation` with bits, scale and whether it is `signed`: what the
    weight is multiplied with. Weights are packed in as few bits as the format has or, where any activation is rounded,
    in bytes, as processors multiply them.
    """
    rounded = {name: entry["activation"] for name, entry in learned.items() if "activation" in entry}
    if rounded:
        _require_bytes(learned, form)
    widest = BYTE if rounded else max(entry["bits"] for entry in learned.values())
    smallest = BYTE if rounded else min(entry["bits"] for entry in learned.values())
    model = with_types(with_types(model, Grid(widest)), Grid(smallest))
    found = _by_weight(model, learned)
    for weight, name in found:
        if name in rounded:
            _round_inputs(model, weight, rounded[name], form)
    if any(each["bits"] < BYTE for each in rounded.values()):
        entry = model.metadata_props.add()
        entry.key, entry.value = KEEPS_BIASES, "true"
    entries = {weight.name: learned[name] for weight, name in found}
    in_bytes = bool(rounded)
    store(model, [weight for weight, _ in found], lambda weight: encoded(weight, entries[weight.name], in_bytes))
    return model, {"learned_weights": len(found), "learned_activations": len(rounded)}


def _by_weight(model: onnx.ModelProto, learned: dict[str, Any]) -> list[tuple[Stored, str]]:
    """Return the weights of a graph that were learned, each with its name in the network.

    What is exported of attention may be other products, whose weights have other names: these are told by their values.
    """
    left = {weight.name: weight for weight in [*_whole(model), *chosen_weights(model, [])]}
    found = [(left.pop(name), name) for name in learned if name in left]
    named = {name for _, name in found}
    for name in [name for name in learned if name not in named]:
        alike = next((key for key, weight in left.items() if _made_of(weight, learned[name])), None)
        if alike is None:
            raise UserError(
                f"quantizer=learned does not find the weight {name} in the exported graph, so the file would not be the"
                " network that was trained; leave the training with rounding out (recovery=finetune quantizer=int8)."
            )
        found.append((left.pop(alike), name))
    return found


def _whole(model: onnx.ModelProto) -> list[Stored]:
    """Return all matrices of floats as the network holds them, those too that are split before they are multiplied."""
    import onnx

    kind = onnx.TensorProto.FLOAT
    items = [item for item in model.graph.initializer if len(item.dims) > 1 and item.data_type == kind]
    return [Stored(item.name, item, "", 0) for item in items]


def _made_of(weight: Stored, entry: Record) -> bool:
    """Say whether a weight has as many outputs as one that was learned, and is made of its integers."""
    rows = _rows(weight)
    return len(rows) == len(entry["largest"]) and _apart(*_integers(rows, entry)[::2]) <= NEAR


def encoded(weight: Stored, entry: Record, in_bytes: bool) -> Encoded:
    """Return the integers of a learned weight and their scale, or refuse a weight that is not made of them.

    Bytes hold fewer bits times a power of two: what adds their products up rounds biases to multiples of the scale,
    which is as fine as it can be then.
    """
    import numpy as np

    rows = _rows(weight)
    codes, steps, exact = _integers(rows, entry)
    if _apart(codes, exact) > NEAR:
        raise UserError(
            f"the weight {weight.name} of the exported graph is not made of the integers that were learned, so the file"
            " would not be the network that was trained; leave the training with rounding out (recovery=finetune"
            " quantizer=int8)."
        )
    grid = Grid(BYTE if in_bytes else entry["bits"])
    spread = 2 ** max(0, BYTE - 1 - entry["bits"]) if in_bytes else 1
    # A negative factor may turn the lowest integer, for which there is none of the other sign.
    signs = np.where(codes.max(1) * spread > 2 ** (grid.container - 1) - 1, -1, 1).astype(np.float32)
    codes, steps = codes * signs[:, None] * spread, steps * signs / np.float32(spread)
    learned = np.asarray(entry["scale"], np.float32) / np.float32(spread)
    if np.allclose(steps, learned, rtol=EQUAL, atol=0):
        steps = learned.squeeze()
    shape = np.moveaxis(np.empty(weight.item.dims, np.int8), weight.outputs, 0).shape
    shaped = np.moveaxis(codes.reshape(shape), 0, weight.outputs).astype(np.int8)
    return Encoded(weight, shaped, steps, entry["bits"], grid.container)


def _rows(weight: Stored) -> np.ndarray:
    """Return the values of each output channel (N, K)."""
    import numpy as np

    values = np.moveaxis(weight.values(), weight.outputs, 0)
    return values.reshape(len(values), -1)


def _integers(rows: np.ndarray, entry: Record) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the integers of a weight (N, K), the step (N,) of each output channel, and the weight in steps.

    The exporter multiplies the channels of a convolution by the factors of the BatchNorm behind it. Those of a channel
    are still multiples of one number, which its largest integer tells.
    """
    import numpy as np

    scale = np.broadcast_to(np.asarray(entry["scale"], np.float32), len(rows))
    largest, found = np.asarray(entry["largest"], np.float32), np.abs(rows).max(1)
    steps = np.where((largest > 0) & (found > 0), found / np.maximum(largest, 1), scale).astype(np.float32)
    exact = rows / steps[:, None]
    return np.rint(exact), steps, exact


def _apart(codes: np.ndarray, exact: np.ndarray) -> float:
    """Return how far a weight is from integers, in steps."""
    return float(abs(exact - codes).max())


def _require_bytes(learned: dict[str, Any], form: str) -> None:
    """Refuse bytes that what runs the graph would add up wrongly, or has no type for."""
    unsigned = [each for entry in learned.values() if (each := entry.get("activation")) and not each["signed"]]
    if form == "tensorrt" and any(each["bits"] == BYTE for each in unsigned):
        raise UserError(
            "TensorRT has no bytes without a sign, as inputs of layers behind a ReLU have with recovery.activations=8;"
            " give recovery.activations=7, or runtime=onnxruntime."
        )
    if form == "cpu" and any(entry["bits"] == BYTE for entry in learned.values()) and not multiplies_bytes(cpu_flags()):
        raise UserError(
            "this CPU adds products of bytes up in 16 bits, which may not hold those of recovery.bits=8 with"
            " recovery.activations; give recovery.bits=7, or recovery.activations=null."
        )


def _round_inputs(model: onnx.ModelProto, weight: Stored, activation: Record, form: str) -> None:
    """Put QuantizeLinear and DequantizeLinear before what a weight is multiplied with."""
    for node in [node for node in model.graph.node if weight.item.name in node.input]:
        place = next(place for place, name in enumerate(node.input) if name != weight.item.name)
        nodes, constants, output = _rounding(node.input[place], f"{weight.name}_input", activation, form)
        known = {name for each in model.graph.node for name in each.output}
        if output not in known:
            at = list(model.graph.node).index(node)
            model.graph.initializer.extend(constants)
            for number, each in enumerate(nodes):
                model.graph.node.insert(at + number, each)
            if activation["bits"] < BYTE:
                note_exact(model, {nodes[-1].input[0]: activation["bits"]})
        node.input[place] = output


def _rounding(
    source: str, name: str, activation: Record, form: str
) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """Return the nodes that round a tensor to few bits, their constants, and what they give.

    A byte holds more than fewer bits do, so what these do not hold is cut off first.
    """
    import numpy as np
    import onnx

    prefix, signed = f"{source}_{name}", bool(activation["signed"])
    low, high = Grid(activation["bits"], signed=signed).limits
    scale = np.float32(activation["scale"])
    kind, dtype = (
        (onnx.TensorProto.INT8, np.int8) if signed or form == "tensorrt" else (onnx.TensorProto.UINT8, np.uint8)
    )
    constants = [
        floats(np.asarray(scale), f"{prefix}_scale"),
        tensor(np.zeros((), dtype), f"{prefix}_zero_point", kind),
    ]
    nodes: list[Any] = []
    if activation["bits"] < BYTE:
        ends = [f"{prefix}_least", f"{prefix}_most"]
        constants += [
            floats(np.asarray(scale * end), end_name) for end, end_name in zip((low, high), ends, strict=True)
        ]
        nodes.append(onnx.helper.make_node("Clip", [source, *ends], [f"{prefix}_cut"], f"{prefix}_Clip"))
        source = f"{prefix}_cut"
    parameters = [f"{prefix}_scale", f"{prefix}_zero_point"]
    quantized, output = f"{prefix}_quantized", f"{prefix}_dequantized"
    nodes += [
        onnx.helper.make_node("QuantizeLinear", [source, *parameters], [quantized], f"{prefix}_QuantizeLinear"),
        onnx.helper.make_node("DequantizeLinear", [quantized, *parameters], [output], f"{prefix}_DequantizeLinear"),
    ]
    return nodes, constants, output
