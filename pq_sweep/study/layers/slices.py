"""A slice of a layer: some of its inputs and rows, and the error of its output by each method."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pq_sweep.compress.obs import greedy, least_squares
from pq_sweep.compress.rounding import error, nearest
from pq_sweep.compress.weight_only import Grid
from pq_sweep.core.fingerprint import digest
from pq_sweep.study.layers.limits import bounded, sampled
from pq_sweep.study.layers.subset import best_subset

Array = NDArray[np.float64]

FULL_BITS = 16
DEFINITE = 1e-7  # share of the mean moment that is added where an inverse is needed
VERSION = 1  # of what a slice's file holds and how it is computed


@dataclass(frozen=True)
class Slice:
    """Rows (N, K) of a layer's weights at some of its inputs, and the moments (K, K) of these on the images.

    `steps` are the scales of the whole layer's best quantization by its weights, for each bit width.
    """

    layer: str
    group: int
    first: int
    rows: Array
    moments: Array
    steps: dict[int, float]

    def key(self, bits: int, samples: int, limit_s: float) -> str:
        """Return a hash of all that the result for a bit width depends on."""
        values = [
            hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for part in (self.rows, self.moments)
        ]
        about = {"layer": self.layer, "group": self.group, "first": self.first, "step": self.steps[bits]}
        return digest(about | {"values": values, "bits": bits, "samples": samples, "limit": limit_s, "as": VERSION})


@dataclass(frozen=True)
class Found:
    """What a slice's output keeps at one bit width: squared errors, summed over its rows, beside the `signal`.

    `kept` of the `inputs` weights of each row stay when it is pruned. `proven` of `rows` rows have the best set.
    """

    layer: str
    group: int
    first: int
    inputs: int
    rows: int
    bits: int
    signal: float
    nearest: float
    heuristic: float
    bound: float
    kept: int
    magnitude: float
    obs: float
    exact: float
    proven: int
    heuristic_s: float
    bound_s: float
    obs_s: float
    exact_s: float

    def db(self, name: str) -> float | None:
        """Return a ratio of signal to noise: infinite without noise, None without signal."""
        noise = float(getattr(self, name))
        if self.signal <= 0:
            return None
        return 10 * math.log10(self.signal / noise) if noise > 0 else math.inf

    @property
    def is_proven(self) -> bool:
        """Say whether no other choice of weights keeps more of any row."""
        return self.proven == self.rows


@dataclass(frozen=True)
class Compared:
    """A slice that is to be quantized and pruned in each way, at a bit width and within limits."""

    here: Slice
    bits: int
    samples: int
    limit_s: float

    kind: ClassVar[type[Found]] = Found

    @property
    def key(self) -> str:
        """Return a hash of all that the result depends on."""
        return self.here.key(self.bits, self.samples, self.limit_s)

    def compute(self) -> Found:
        """Quantize and prune."""
        return measured(self.here, self.bits, self.samples, self.limit_s)


def measured(here: Slice, bits: int, samples: int, limit_s: float) -> Found:
    """Quantize and prune the rows of a slice in each way."""
    rows, inputs = here.rows.shape
    mean = float(np.trace(here.moments)) / inputs
    definite = here.moments + (DEFINITE * mean or 1.0) * np.eye(inputs)
    kept = inputs * bits // FULL_BITS
    return Found(
        here.layer, here.group, here.first, inputs, rows, bits, _total(here, here.rows), kept=kept,
        **_quantized(here, definite, bits, samples), **_pruned(here, definite, kept, limit_s),
    )  # fmt: skip


def _total(here: Slice, difference: Array) -> float:
    return float(error(difference, here.moments).sum())


def _quantized(here: Slice, definite: Array, bits: int, samples: int) -> dict[str, Any]:
    scale, limits = np.full((len(here.rows), 1), here.steps[bits]), Grid(bits).limits
    plain = nearest(here.rows, scale, *limits)
    start = time.perf_counter()
    bound = bounded(here.rows, here.moments, scale, *limits)
    between = time.perf_counter()
    codes = sampled(here.rows, definite, scale, *limits, bound, samples=samples)
    found = np.minimum(*(error(here.rows - each * scale, here.moments) for each in (codes, plain)))
    return {
        "nearest": _total(here, here.rows - plain * scale),
        "heuristic": float(found.sum()),
        "bound": float(bound.error.sum()),
        "bound_s": between - start,
        "heuristic_s": time.perf_counter() - between,
    }


def _pruned(here: Slice, definite: Array, kept: int, limit_s: float) -> dict[str, Any]:
    rows, inputs = here.rows, here.rows.shape[1]
    largest = np.zeros(rows.shape, bool)
    np.put_along_axis(largest, np.argsort(-np.abs(rows), 1, kind="stable")[:, :kept], True, 1)
    start = time.perf_counter()
    places, _ = greedy(rows, definite, inputs - kept)
    stays = np.ones(rows.shape, bool)
    np.put_along_axis(stays, places, False, 1)
    obs = _total(here, least_squares(rows, definite, stays) - rows)
    between = time.perf_counter()
    best = [best_subset(row, definite, kept, limit_s) for row in rows]
    exact = least_squares(rows, definite, np.stack([each.kept for each in best])) - rows
    return {
        "magnitude": _total(here, least_squares(rows, definite, largest) - rows),
        "obs": obs,
        "exact": min(obs, _total(here, exact)),
        "proven": sum(each.proven for each in best),
        "obs_s": between - start,
        "exact_s": time.perf_counter() - between,
    }
