"""The weights of each layer before and after compression: how many are left, and how their values spread."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pq_sweep.core.weights import prunable_by_name
from pq_sweep.measure.graph import Graph
from pq_sweep.types import Model, Record

BINS = 61  # odd, so that zero lies in the middle of a bin

Layers = dict[str, dict[str, Any]]


def dense_layers(model: Model) -> Layers:
    """Describe every prunable weight of an uncompressed network, by name."""
    found = prunable_by_name(model.module)
    return {name: _describe(weight, float(weight.detach().abs().max())) for name, weight in found.items()}


def compressed_layers(stored: Graph | Mapping[str, Tensor], dense: Layers) -> Layers:
    """Describe the dense network's layers as a graph or a state_dict holds them.

    Histograms have the bins of the dense layer; values beyond them count in the outermost bins. A weight that the
    exporter renamed or folded away is left out.
    """
    if isinstance(stored, Graph):
        return {base: _describe(stored.values(name), dense[base]["limit"]) | _codes(stored, name)
                for base, name in _named(stored, dense)}  # fmt: skip
    return {name: _describe(weight, dense[name]["limit"]) for name, weight in stored.items() if name in dense}


def _named(graph: Graph, names: Container[str]) -> Iterator[tuple[str, str]]:
    """Yield which weights of a graph have these names, and how the graph calls them."""
    for name in graph.constants:
        if (base := name.removesuffix("_quantized")) in names:
            yield base, name


def _codes(graph: Graph, name: str) -> Record:
    """Return how often each integer of a weight is there, from the smallest that is; nothing of floats."""
    import onnx

    if "INT" not in onnx.TensorProto.DataType.Name(graph.kinds[name]):
        return {}
    codes = graph.codes(name)[0].int()
    lowest = int(codes.min())
    return {"codes": {"lowest": lowest, "counts": torch.bincount((codes - lowest).flatten()).tolist()}}


def _describe(weight: Tensor, limit: float) -> dict[str, Any]:
    values = weight.detach().to("cpu", torch.float32)
    bins = torch.histc(values.clamp(-limit, limit), BINS, -limit, limit) if limit else torch.zeros(BINS)
    return {
        "weights": values.numel(),
        "nonzero": int(values.count_nonzero()),
        "limit": limit,
        "counts": [int(count) for count in bins],
    }
