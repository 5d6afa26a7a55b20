"""What is found of the weight tensors of a network: by how much each loses, and what to do with it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mean, median
from typing import Literal

import numpy as np
from torch import nn
from tqdm import tqdm

from pq_sweep.core.weights import memory, prunable, prunable_by_name
from pq_sweep.study.weights.errors import pruning_db
from pq_sweep.study.weights.tensors import Sample, best_step_of
from pq_sweep.types import UserError

Choice = Literal["quantize", "prune", "either"]


@dataclass(frozen=True)
class Width:
    """A tensor quantized to a bit width, and pruned to the same size; ratios of signal to noise in dB.

    `step` is in the unit of the weights. Where all weights are zero there is neither a step nor a ratio.
    """

    bits: int
    step: float | None
    quantization_db: float | None
    natural_sparsity: float
    pruning_db: float | None

    @property
    def better(self) -> Choice:
        """Return what keeps more of the signal."""
        if self.quantization_db == self.pruning_db or self.quantization_db is None or self.pruning_db is None:
            return "either"
        return "quantize" if self.quantization_db > self.pruning_db else "prune"


@dataclass(frozen=True)
class Tensor:
    """A weight tensor: its name, the kind of its layer, its shape, its kurtosis if it has one, and each bit width."""

    name: str
    layer: str
    shape: tuple[int, ...]
    weights: int
    zeros: float
    kurtosis: float | None
    widths: tuple[Width, ...]

    def where(self, choice: Choice) -> list[int]:
        """Return the bit widths at which a choice is the better one."""
        return [width.bits for width in self.widths if width.better == choice]


@dataclass(frozen=True)
class Network:
    """The weight tensors of a network, what was noted when it was loaded, and how many seconds the study of it took."""

    name: str
    tensors: tuple[Tensor, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def bits(self) -> list[int]:
        """Return the bit widths that were looked at."""
        return [width.bits for width in self.tensors[0].widths]

    def at(self, bits: int) -> list[tuple[Tensor, Width]]:
        """Return each tensor with what it is at a bit width."""
        return [(tensor, width) for tensor in self.tensors for width in tensor.widths if width.bits == bits]

    def pruned(self, bits: int) -> list[Tensor]:
        """Return the tensors that are better pruned than quantized to a bit width."""
        return [tensor for tensor, width in self.at(bits) if width.better == "prune"]

    def weights(self) -> int:
        """Return the number of weights."""
        return sum(tensor.weights for tensor in self.tensors)

    def middle(self, field: Literal["quantization_db", "pruning_db"], bits: int) -> float | None:
        """Return the median over tensors of a ratio of signal to noise, in dB."""
        found = [value for _, width in self.at(bits) if (value := getattr(width, field)) is not None]
        return median(found) if found else None

    def natural_sparsity(self, bits: int) -> float:
        """Return the share of weights that quantization makes zero, the mean over tensors."""
        return mean(width.natural_sparsity for _, width in self.at(bits))


def look_at(name: str, module: nn.Module, bits: list[int], notes: tuple[str, ...] = ()) -> Network:
    """Look at all weight tensors that pruners prune: those of convolutions, linear layers and attention's inputs."""
    start = time.perf_counter()
    found = [(tensor, layer, values) for tensor, layer, values in _tensors(module) if values.size]
    if not found:
        raise UserError(f"{name} has no weights of convolutions or linear layers; give a network that has some.")
    bar = tqdm(found, desc=name, unit="tensor", disable=None, leave=False)
    tensors = tuple(_tensor(tensor, layer, values, bits) for tensor, layer, values in bar)
    return Network(name, tensors, notes, time.perf_counter() - start)


def _tensors(module: nn.Module) -> Iterator[tuple[str, str, np.ndarray]]:
    layers = {memory(getattr(part, name)): type(part).__name__ for part, name in prunable(module)}
    for name, parameter in prunable_by_name(module).items():
        yield name, layers[memory(parameter)], parameter.detach().cpu().numpy()


def _tensor(name: str, layer: str, values: np.ndarray, bits: list[int]) -> Tensor:
    zeros = float(np.mean(values == 0))
    if zeros == 1:
        empty = tuple(Width(each, None, None, 1.0, None) for each in bits)
        return Tensor(name, layer, values.shape, values.size, zeros, None, empty)
    sample = Sample(values)
    widths = tuple(_width(sample, each) for each in bits)
    return Tensor(name, layer, values.shape, values.size, zeros, sample.kurtosis(), widths)


def _width(sample: Sample, bits: int) -> Width:
    step = best_step_of(sample, bits)
    kept, sparsity = sample.quantized(step, bits)
    return Width(bits, step * sample.unit, kept, sparsity, pruning_db(sample, bits))
