"""The embedded network: its packaged weights are good, and the documented command makes them again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT, python

from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Model


def top1(model: Model) -> float:
    """Count right answers image by image, without the package's own measurement."""
    split = digits(model).evaluation
    hits = 0
    with torch.no_grad():
        for index in range(len(split)):
            logits = model.module(split.fetch([index]))[0]
            hits += int(logits.argmax()) == int(split.labels[index])
    return hits / len(split)


def test_packaged_weights_are_accurate() -> None:
    assert top1(digits_cnn()) >= 0.98


def test_random_weights_are_not_accurate() -> None:
    torch.manual_seed(0)
    assert top1(digits_cnn(weights=None)) < 0.3


def test_network_is_small_and_in_eval_mode() -> None:
    module = digits_cnn().module
    assert sum(parameter.numel() for parameter in module.parameters()) == pytest.approx(59_000, abs=1_000)
    assert not any(part.training for part in module.modules())


@pytest.mark.slow
def test_documented_command_repeats_the_weights(tmp_path: Path, environment: dict[str, str]) -> None:
    """Two runs at once write the same bytes, as accurate as the packaged ones."""
    outputs = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]

    def retrain(output: Path) -> None:
        done = python(["-m", "benchmarks.train_digits", str(output)], ROOT, environment)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(len(outputs)) as pool:
        list(pool.map(retrain, outputs))
    first, second = (output.read_bytes() for output in outputs)
    assert first == second
    assert abs(top1(digits_cnn(weights=str(outputs[0]))) - top1(digits_cnn())) <= 0.01
