"""The weights of each layer before and after compression: how many are left, and how their values spread."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from pq_sweep.core.weights import prunable_by_name
from pq_sweep.measure.graph import Graph
from pq_sweep.types import Model

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
    weights = _named(stored, dense) if isinstance(stored, Graph) else stored.items()
    return {name: _describe(weight, dense[name]["limit"]) for name, weight in weights if name in dense}


def _named(graph: Graph, names: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a graph that have these names, those of few bits as the numbers that they stand for."""
    for name in graph.constants:
        if (base := name.removesuffix("_quantized")) in names:
            yield base, graph.values(name)


def _describe(weight: Tensor, limit: float) -> dict[str, Any]:
    values = weight.detach().to("cpu", torch.float32)
    bins = torch.histc(values.clamp(-limit, limit), BINS, -limit, limit) if limit else torch.zeros(BINS)
    return {
        "weights": values.numel(),
        "nonzero": int(values.count_nonzero()),
        "limit": limit,
        "counts": [int(count) for count in bins],
    }
