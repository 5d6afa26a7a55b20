"""Quantize first, then prune: the weights of a graph lose those that stand for the smallest values.

This is the order of paper 002 (quantized-then-pruned ResNet-18). Pruners see the weights of the graph as layers of a
network, with the values that their integers stand for, so that any pruner that only sets zeros works on both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.types import Data, Model, Quantizer, Record, Stage, UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pq_sweep.core.stored import Stored


@dataclass(frozen=True)
class ThenPruned:
    """A quantizer whose graph is pruned once it is written; `seed` is that of random pruners."""

    quantizer: Quantizer
    pruner: partial[Any]
    seed: int

    @property
    def func(self) -> Any:
        """Return the function of the quantizer, which says the precision."""
        return getattr(self.quantizer, "func", self.quantizer)

    @property
    def keywords(self) -> Record:
        """Return all options on which the graph depends."""
        pruner = f"{self.pruner.func.__module__}.{self.pruner.func.__qualname__}"
        then = {"pruner": pruner, "options": self.pruner.keywords, "seed": self.seed}
        return {**getattr(self.quantizer, "keywords", {}), "then": then}

    def __call__(self, source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> Record:
        """Write the quantized graph, prune it, and return what both report."""
        record = self.quantizer(source, target, data, form=form, stage=stage) or {}
        with stage("prune"):
            return {**record, "pruning": prune_graph(target, partial(self.pruner, data=data), self.seed)}


def prune_graph(path: Path, pruner: partial[Any], seed: int) -> Record:
    """Set those weights of a graph to zero that a pruner chooses by the values that they stand for.

    Nothing else in the file changes: scales, ranges and biases stay, and a file that loses nothing stays as it is.
    Returns the pruner's record with the number of `weights` in the graph and of `zeros` among them.
    """
    import onnx
    import torch

    from pq_sweep.core.stored import stored_weights

    graph = onnx.load(path)
    weights = stored_weights(graph.graph)
    layers = [_layer(weight) for weight in weights]
    before = [_values_of(layer).clone() for layer in layers]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        record = pruner(_as_model(weights, layers)) or {}
    changed = [_clear(*each) for each in zip(weights, layers, before, strict=True)]
    if any(changed):
        onnx.save(graph, path)
    zeros = sum(int((weight.values() == 0).sum()) for weight in weights)
    return {**record, "weights": sum(_values_of(layer).numel() for layer in layers), "zeros": zeros}


def _clear(weight: Stored, layer: nn.Module, before: Tensor) -> bool:
    """Take over the zeros of a layer into the graph, and say whether there were new ones."""
    after = _values_of(layer)
    if after.shape != before.shape:
        raise UserError(
            "order=quantize_first needs a pruner that sets weights to zero, and this one changes their shapes; give"
            " order=prune_first, or a pruner such as pruner=l1_global."
        )
    new = (after == 0) & (before != 0)
    weight.clear(_turned(weight, new).numpy())
    return bool(new.any())


def _values_of(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    values: Tensor = weight.detach()
    return values


def _layer(weight: Stored) -> nn.Module:
    """Return a layer of torch's with the values of a weight, in the order in which torch stores them."""
    import torch
    from torch import nn
    from torch.nn.utils import skip_init

    values = _turned(weight, torch.from_numpy(weight.values())).contiguous()
    outputs, inputs, *kernel = values.shape
    kinds: dict[tuple[str, int], Any] = {("Conv", 1): nn.Conv1d, ("Conv", 2): nn.Conv2d, ("Conv", 3): nn.Conv3d}
    operator = weight.operator.removesuffix("Integer")
    if operator == "ConvTranspose":
        layer = skip_init(nn.ConvTranspose2d, outputs, inputs, (1, 1))
    elif (operator, len(kernel)) in kinds:
        layer = skip_init(kinds[operator, len(kernel)], inputs, outputs, tuple(kernel))
    else:
        layer = skip_init(nn.Linear, inputs, outputs)
    layer.weight = nn.Parameter(values)
    return layer


def _turned(weight: Stored, values: Tensor) -> Tensor:
    """Swap the last two axes of a matrix whose outputs come last, as torch stores them first, and back."""
    matrix = weight.operator.removesuffix("Integer") in ("Gemm", "MatMul")
    return values.transpose(-1, -2) if matrix and weight.outputs == values.dim() - 1 else values


def _as_model(weights: list[Stored], layers: list[nn.Module]) -> Model:
    """Return the layers as a model, by the names of the weights, whose answer is that of the last one."""
    import torch
    from torch import nn

    class Layers(nn.Module):
        def forward(self, images: Tensor) -> Any:
            """Run the last layer, by which a pruner recognises the classifier."""
            last: Any = layers[-1]
            return last(torch.zeros(1, *last.weight.shape[1:]))

    if not weights:
        raise UserError(
            "order=quantize_first finds no weights of matrix operators in the graph; give order=prune_first."
        )
    network = Layers()
    for weight, layer in zip(weights, layers, strict=True):
        network._modules[weight.name.removesuffix(".weight")] = layer  # add_module refuses dots
    return Model(network, len(_values_of(layers[-1])))
