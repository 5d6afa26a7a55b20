"""Tensors of real numbers: the best step is the best of all, and peculiar tensors give sensible figures."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from pq_sweep.study.weights import tensors
from pq_sweep.study.weights.advice import advice
from pq_sweep.study.weights.errors import codes, pruning_db
from pq_sweep.study.weights.networks import Tensor, look_at
from pq_sweep.study.weights.tensors import Sample, best_step_of

DRAWS = {
    "normal": lambda rng, count: rng.standard_normal(count),
    "heavy": lambda rng, count: rng.standard_t(2, count),
    "positive": lambda rng, count: rng.exponential(1, count),
    "negative": lambda rng, count: -rng.exponential(1, count),
    "sparse": lambda rng, count: rng.standard_normal(count) * (rng.uniform(size=count) < 0.2) + (np.arange(count) == 0),
    "outliers": lambda rng, count: np.where(
        np.arange(count) < 3, 100 * rng.uniform(1, 2, count), rng.normal(size=count)
    ),
}


def direct(values: np.ndarray, steps: np.ndarray, bits: int) -> np.ndarray:
    """Return the mean squared error of each step by rounding every value."""
    integers = codes(bits)
    scaled = np.clip(np.rint(values / steps[:, None]), integers[0], integers[-1])
    return np.mean((values - steps[:, None] * scaled) ** 2, axis=1)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("kind", DRAWS)
def test_no_step_of_a_dense_grid_is_better(kind: str, bits: int) -> None:
    rng = np.random.default_rng(bits)
    for count in (1, 2, 7, 50, 300):
        values = DRAWS[kind](rng, count)
        sample = Sample(values)
        step = best_step_of(sample, bits) * sample.unit
        largest = np.abs(values).max()
        near = step * np.linspace(0.9, 1.1, 1001)
        grid = np.concatenate([np.geomspace(largest / 2**bits / 50, 1.01 * largest, 2000), near])
        best = direct(values, np.array([step]), bits)[0]
        assert best <= direct(values, grid, bits).min() * (1 + 1e-9) + 1e-24 * largest**2


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers"])
def test_of_a_large_tensor_hardly_anything_is_lost(kind: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large tensor is looked through around the best of a scan; a small limit makes 2,000 weights many."""
    for seed in range(4):
        sample = Sample(DRAWS[kind](np.random.default_rng(seed), 2000))
        monkeypatch.setattr(tensors, "CROSSINGS", 10**9)
        exact, _ = sample.quantized(best_step_of(sample, bits), bits)
        monkeypatch.setattr(tensors, "CROSSINGS", 2**12)
        near, _ = sample.quantized(best_step_of(sample, bits), bits)
        assert exact - 0.01 <= near <= exact + 1e-9


def test_pruning_keeps_no_more_than_fits() -> None:
    values = np.arange(1.0, 11.0)
    sample = Sample(values)
    for bits, kept in ((2, 1), (3, 1), (4, 2), (8, 5)):  # 1.25, 1.875, 2.5 and 5 of 10 weights
        lost = np.sort(values)[: 10 - kept]
        assert pruning_db(sample, bits) == pytest.approx(10 * math.log10(np.sum(values**2) / np.sum(lost**2)))


def test_kurtosis_and_sparsity_are_those_of_the_values() -> None:
    values = np.random.default_rng(0).standard_t(5, 5000)
    sample = Sample(values)
    centred = values - values.mean()
    assert sample.kurtosis() == pytest.approx(np.mean(centred**4) / np.mean(centred**2) ** 2)
    step = best_step_of(sample, 3)
    _, sparsity = sample.quantized(step, 3)
    assert sparsity == np.mean(np.abs(values / sample.unit) <= step / 2)


def looked(values: list[float] | torch.Tensor, bits: tuple[int, ...] = (2, 4, 8)) -> Tensor:
    """Look at a network whose only weight tensor has these values."""
    weight = torch.as_tensor(values).reshape(1, -1)
    layer = nn.Linear(weight.shape[1], 1, bias=False)
    layer.weight = nn.Parameter(weight)
    (tensor,) = look_at("net", nn.Sequential(layer), list(bits)).tensors
    for width in tensor.widths:
        figures = (width.step, width.quantization_db, width.natural_sparsity, width.pruning_db, tensor.kurtosis)
        assert not any(figure is not None and math.isnan(figure) for figure in figures)
        assert 0 <= width.natural_sparsity <= 1
    return tensor


def test_all_zeros() -> None:
    tensor = looked([0.0] * 40)
    assert (tensor.zeros, tensor.kurtosis) == (1, None)
    assert {(it.step, it.quantization_db, it.pruning_db, it.better) for it in tensor.widths} == {
        (None, None, None, "either")
    }
    assert advice(tensor) == "all weights are zero, so nothing is lost either way."


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-45, 3e38])
def test_a_constant_is_kept_by_quantization(value: float) -> None:
    tensor = looked([value] * 32)
    assert tensor.kurtosis is None
    assert {it.quantization_db for it in tensor.widths} == {math.inf}
    assert [it.pruning_db for it in tensor.widths] == pytest.approx(
        [10 * math.log10(1 / (1 - bits / 16)) for bits in (2, 4, 8)]
    )
    assert advice(tensor) == "quantize at 2, 4 and 8 bits."


def test_a_single_weight() -> None:
    tensor = looked([-2.5])
    assert tensor.weights == 1
    assert [(it.quantization_db, it.pruning_db) for it in tensor.widths] == [(math.inf, 0)] * 3


def test_one_weight_other_than_zero() -> None:
    tensor = looked([0.0] * 31 + [1.5])
    assert {(it.quantization_db, it.pruning_db, it.better) for it in tensor.widths} == {(math.inf, math.inf, "either")}
    assert {it.natural_sparsity for it in tensor.widths} == {31 / 32}
    assert advice(tensor) == "take either at 2, 4 and 8 bits, as both lose the same."


def test_what_is_sparse_already_loses_nothing_by_pruning() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * (torch.arange(1000) % 10 == 0)
    tensor = looked(values)
    assert [it.better for it in tensor.widths] == ["prune"] * 3
    assert {it.pruning_db for it in tensor.widths} == {math.inf}


@pytest.mark.parametrize("scale", [1e-38, 1e30])
def test_the_unit_of_weights_makes_no_difference(scale: float) -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(1))
    plain, scaled = looked(values), looked(values * scale)
    for one, other in zip(plain.widths, scaled.widths, strict=True):
        assert other.quantization_db == pytest.approx(one.quantization_db, abs=1e-3)
        assert other.step == pytest.approx(one.step * scale, rel=1e-5)


def test_half_precision_weights_are_looked_at_as_they_are() -> None:
    values = torch.randn(500, generator=torch.Generator().manual_seed(2)).half()
    half, full = looked(values), looked(values.float())
    assert [it.quantization_db for it in half.widths] == pytest.approx([it.quantization_db for it in full.widths])
