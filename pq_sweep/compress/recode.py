"""Integers of a graph's weights chosen anew, so that the outputs of its layers change least; scales stay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pq_sweep.compress.moments import Moments, graph_moments
from pq_sweep.compress.rounding import rounded
from pq_sweep.core.stored import Stored, stored_weights, tensor
from pq_sweep.types import Split

if TYPE_CHECKING:
    import numpy as np
    import onnx


def round_for_outputs(written: onnx.ModelProto, plain: onnx.ModelProto, split: Split, limits: tuple[int, int]) -> None:
    """Choose the integers of a quantized graph by what the layers of the `plain` one are given for these images.

    Weights that are zero stay zero. The others are chosen by `pq_sweep.compress.rounding`, whatever was there before.
    """
    from tqdm import tqdm

    integers = {each.name: each for each in stored_weights(written.graph) if each.scale is not None}
    moments = graph_moments(plain, split, set(integers))
    for name, (weight, seen) in tqdm(moments.items(), desc="rounding", unit="layer", disable=None, leave=False):
        stored = integers[name]
        codes = _codes(weight, seen, stored, limits)
        stored.item.CopyFrom(tensor(codes, stored.item.name, stored.item.data_type))


def _codes(weight: Stored, seen: Moments, stored: Stored, limits: tuple[int, int]) -> np.ndarray:
    """Return the integers of a weight, in its shape."""
    import numpy as np

    values = weight.values().astype(float)
    scales = np.broadcast_to(np.asarray(stored.scale, float), values.shape)
    rows, steps = (seen.window.rows(_outputs_first(weight, each)) for each in (values, scales))
    codes = np.empty(rows.shape)
    for group, part, hessian in seen.problems(weight.name):
        codes[group][:, part] = rounded(rows[group][:, part], hessian, steps[group][:, part], *limits)
    first = _outputs_first(weight, values)
    found = _outputs_first(weight, seen.window.weight(codes, first.shape))
    return np.ascontiguousarray(found).astype(np.int8)


def _outputs_first(weight: Stored, values: Any) -> Any:
    """Turn a matrix whose outputs lie along its last axis, and back; convolutions stay as they are."""
    return values.T if values.ndim == 2 and weight.outputs == 1 else values
