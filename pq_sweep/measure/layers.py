"""The weights of each layer before and after compression: how many are left, and how their values spread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pq_sweep.core.weights import prunable_by_name
from pq_sweep.types import Model

if TYPE_CHECKING:
    import onnx

BINS = 61  # odd, so that zero lies in the middle of a bin

Layers = dict[str, dict[str, Any]]


def dense_layers(model: Model) -> Layers:
    """Describe every prunable weight of an uncompressed network, by name."""
    found = prunable_by_name(model.module)
    return {name: _describe(weight, float(weight.detach().abs().max())) for name, weight in found.items()}


def compressed_layers(artifact: Path, dense: Layers) -> Layers:
    """Describe the dense network's layers as an artifact, or the graph that it was built from, holds them.

    Histograms have the bins of the dense layer; values beyond them count in the outermost bins. A weight that the
    exporter renamed or folded away is left out.
    """
    return {name: _describe(weight, dense[name]["limit"]) for name, weight in _stored(artifact) if name in dense}


def _describe(weight: Tensor, limit: float) -> dict[str, Any]:
    values = weight.detach().to("cpu", torch.float32)
    bins = torch.histc(values.clamp(-limit, limit), BINS, -limit, limit) if limit else torch.zeros(BINS)
    return {
        "weights": values.numel(),
        "nonzero": int(values.count_nonzero()),
        "limit": limit,
        "counts": [int(count) for count in bins],
    }


def _stored(artifact: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in a file by the names of the network's parameters."""
    if artifact.suffix == ".pt":
        yield from torch.load(artifact, map_location="cpu", weights_only=True).items()
        return
    graph = artifact if artifact.suffix == ".onnx" else artifact.with_name("model.onnx")
    if graph.exists():
        import onnx

        yield from _initializers(onnx.load(graph).graph)


def _initializers(graph: onnx.GraphProto) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a graph, 8-bit weights as the numbers that they stand for."""
    from onnx.numpy_helper import to_array

    stored = {item.name: item for item in graph.initializer}
    axes = {node.input[0]: _axis(node) for node in graph.node if node.op_type == "DequantizeLinear"}
    for name, item in stored.items():
        values = torch.from_numpy(to_array(item).astype("float32"))
        base = name.removesuffix("_quantized")
        if base != name and f"{base}_scale" in stored:
            parts = (to_array(stored[f"{base}{end}"]).astype("float32") for end in ("_scale", "_zero_point"))
            scale, zero = (_along(torch.from_numpy(part), axes.get(name, 0), values.dim()) for part in parts)
            values = (values - zero) * scale
        yield base, values


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)


def _along(values: Tensor, axis: int, dimensions: int) -> Tensor:
    """Return a single number as a scalar, and one number per channel in a shape that multiplies along `axis`."""
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if axis % dimensions == place else 1 for place in range(dimensions)])
