"""What a single layer's noise does to the accuracy of the whole network: figure 6 and appendix D of the paper.

One layer is quantized or pruned at a time, at the same size, and all others stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from scipy.stats import spearmanr
from torch import Tensor, nn

from pq_sweep.compress.moments import Moments
from pq_sweep.compress.rounding import error
from pq_sweep.compress.weight_only import Grid, fitted
from pq_sweep.core.fingerprint import digest
from pq_sweep.core.weights import Target, prunable
from pq_sweep.job.run import load
from pq_sweep.measure.accuracy import rank
from pq_sweep.study.layers.slices import FULL_BITS
from pq_sweep.types import Data, Model

Array = NDArray[np.float64]

METHODS = ("quantized", "pruned")
ORIGINAL = "original"
AT_ONCE = 32  # images in a batch
VERSION = 1  # of what an effect's file holds and how it is computed


@dataclass(frozen=True)
class Effect:
    """How many of the `images` a network still answers right with one layer changed.

    `noise` is the squared error of the layer's output on the calibration images over its sum of squares.
    """

    layer: str
    bits: int
    method: str
    noise: float
    right: int
    images: int

    @property
    def db(self) -> float:
        """Return the ratio of signal to noise of the layer's output; infinite without noise."""
        return -10 * math.log10(self.noise) if self.noise > 0 else math.inf


@dataclass(frozen=True)
class Altered:
    """A network, of which one layer is quantized or pruned, that is to answer evaluation images.

    `network` is the YAML of its model and data, `state` what it depends on beside the options here.
    """

    network: str
    state: str
    layer: str
    bits: int
    method: str
    noise: float
    images: int

    kind: ClassVar[type[Effect]] = Effect

    @property
    def key(self) -> str:
        """Return a hash of all that the answers depend on."""
        about = {"state": self.state, "layer": self.layer, "bits": self.bits, "method": self.method, "as": VERSION}
        return digest(about)

    def compute(self) -> Effect:
        """Change the layer, let the network answer, and change the layer back."""
        model, data = loaded(self.network)
        if self.method == ORIGINAL:
            return self._with(model, data)
        part, name = by_name(model.module)[self.layer]
        with holding(part, name, altered(getattr(part, name), self.bits, self.method)):
            return self._with(model, data)

    def _with(self, model: Model, data: Data) -> Effect:
        return Effect(self.layer, self.bits, self.method, self.noise, right(model, data, self.images), self.images)


@lru_cache(maxsize=1)
def loaded(network: str) -> tuple[Model, Data]:
    """Return a network and its data by the YAML of both; the last one that was asked for is at hand."""
    torch.manual_seed(0)  # for weights that are random
    cfg = OmegaConf.create(network)
    assert isinstance(cfg, DictConfig)
    return load(cfg, "cpu")


def by_name(module: nn.Module) -> dict[str, Target]:
    """Return the weights that are quantized and pruned, by the names of their layers."""
    names = {part: name for name, part in module.named_modules()}
    return {_named(names[part], weight): (part, weight) for part, weight in prunable(module)}


def _named(layer: str, weight: str) -> str:
    return layer if weight == "weight" else f"{layer}.{weight}".lstrip(".")


def altered(weight: Tensor, bits: int, method: str) -> Tensor:
    """Return a weight quantized to the nearest of a grid with one step, or with its bits/16 largest magnitudes."""
    flat = weight.detach().cpu().double().numpy().reshape(1, -1)
    if method == "quantized":
        codes, scale = fitted(flat, Grid(bits))
        found = codes * scale[:, None]
    else:
        found = flat.copy()
        gone = np.argsort(np.abs(flat[0]), kind="stable")[: flat.size - flat.size * bits // FULL_BITS]
        found[0, gone] = 0
    return torch.from_numpy(found.reshape(tuple(weight.shape))).to(weight.dtype)


@contextmanager
def holding(part: nn.Module, name: str, values: Tensor) -> Iterator[None]:
    """Let a layer have other values for a while."""
    weight: Tensor = getattr(part, name)
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(values)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def right(model: Model, data: Data, images: int) -> int:
    """Count how many of the first evaluation images a network answers right."""
    model.module.eval()
    with torch.inference_mode():
        return sum(
            int((rank(data.logits(model.module(batch)), labels) < 1).sum())
            for batch, labels in data.evaluation.take(images).batches(AT_ONCE)
        )


def noise_of(weight: Tensor, moments: Moments, bits: int, method: str) -> float:
    """Return the squared error of a layer's output over its sum of squares, on the images of the moments.

    Of layers so wide that their inputs are looked at in blocks, the blocks are added up.
    """
    before = weight.detach().cpu().double().numpy()
    change = before - altered(weight, bits, method).double().numpy()
    signal, noise = (_squares(moments.window.rows(each), moments) for each in (before, change))
    return noise / signal if signal > 0 else math.nan


def _squares(rows: Array, moments: Moments) -> float:
    total, start = 0.0, 0
    for block in moments.sums:
        width = block.shape[1]
        for group, sums in enumerate(block.cpu().double().numpy()):
            total += float(error(rows[group][:, start : start + width], sums).sum())
        start += width
    return total


def correlation(noise: Sequence[float], drop: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation of noise and loss of accuracy, or None where either is constant."""
    if len({*noise}) < 2 or len({*drop}) < 2:
        return None
    return float(spearmanr(noise, drop).statistic)
