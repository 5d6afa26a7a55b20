"""The weights of each layer before and after compression: how many are left, and how their values spread."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pq_sweep.core.stored import Stored, stored_weights
from pq_sweep.core.weights import prunable_by_name
from pq_sweep.types import Model, Record

if TYPE_CHECKING:
    import onnx

BINS = 61  # odd, so that zero lies in the middle of a bin
MOST_CODES = 256

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
    return {
        name: _describe(weight, dense[name]["limit"]) | codes
        for name, weight, codes in _stored(artifact)
        if name in dense
    }


def _describe(weight: Tensor, limit: float) -> dict[str, Any]:
    values = weight.detach().to("cpu", torch.float32)
    bins = torch.histc(values.clamp(-limit, limit), BINS, -limit, limit) if limit else torch.zeros(BINS)
    return {
        "weights": values.numel(),
        "nonzero": int(values.count_nonzero()),
        "limit": limit,
        "counts": [int(count) for count in bins],
    }


def _stored(artifact: Path) -> Iterator[tuple[str, Tensor, Record]]:
    """Yield the weights in a file by the names of the network's parameters, and what integers they are stored as."""
    if artifact.suffix == ".pt":
        for name, values in torch.load(artifact, map_location="cpu", weights_only=True).items():
            yield name, values, {}
        return
    graph = artifact if artifact.suffix == ".onnx" else artifact.with_name("model.onnx")
    if graph.exists():
        import onnx

        yield from _initializers(onnx.load(graph).graph)


def _initializers(graph: onnx.GraphProto) -> Iterator[tuple[str, Tensor, Record]]:
    """Yield the weights of a graph, integers as what they stand for, and how often each integer is there."""
    from onnx.numpy_helper import to_array

    weights = {weight.item.name: weight for weight in stored_weights(graph)}
    for item in graph.initializer:
        weight = weights.get(item.name)
        if weight and weight.scale is not None:
            yield weight.name, torch.from_numpy(weight.values()), _codes(weight)
        else:
            yield item.name, torch.from_numpy(to_array(item).astype("float32")), {}


def _codes(weight: Stored) -> Record:
    """Return how often each integer of a weight is there, from the smallest that is."""
    import numpy as np

    found = weight.codes()
    if found.max() - found.min() > MOST_CODES:
        return {}
    counts = np.bincount((found - found.min()).ravel())
    return {"codes": {"lowest": int(found.min()), "counts": counts.tolist()}}
