"""Sessions of torch on the GPU, in this process: what they answer, where, and that their options act."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_networks import fresh
from torch import Tensor

from gpu.cuda import DEVICE, opened, resnet50
from pq_sweep.types import Model

pytestmark = pytest.mark.gpu

TF32_SINCE = (8, 0)


def batch(size: int, seed: int) -> Tensor:
    """Return images for the network of the digits, on the GPU."""
    return torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def on_cpu(model: Model, images: Tensor) -> Tensor:
    """Return what the network answers on the CPU."""
    with torch.inference_mode():
        return model.module(images.cpu())


def error(expected: Tensor, actual: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    return float((actual.cpu() - expected).abs().max() / expected.abs().max())


def test_logits_are_single_precision_and_stay_on_the_gpu(tmp_path: Path) -> None:
    with opened(tmp_path, fresh(), "torch", "fp16", sizes=(4,)) as session:
        logits = session(batch(4, seed=0))

    assert (logits.dtype, str(logits.device), tuple(logits.shape)) == (torch.float32, DEVICE, (4, 10))


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_cuda_graph_answers_every_new_image(tmp_path: Path, channels_last: bool) -> None:
    given = [batch(8, seed=1), batch(8, seed=2), batch(3, seed=3), batch(20, seed=4), batch(8, seed=1)]
    expected = [on_cpu(fresh(), images) for images in given]
    options = {"cuda_graph": True, "channels_last": channels_last}
    with opened(tmp_path, fresh(), "torch", sizes=(8,), **options) as session:
        logits = [session(images) for images in given]

    # Compared only now: a later call must not overwrite the answer of an earlier one.
    assert [error(one, other) < 1e-4 for one, other in zip(expected, logits, strict=True)] == [True] * len(given)
    assert error(expected[0], expected[1]) > 0.1


def test_tf32_is_used_when_asked_for_and_only_then(tmp_path: Path) -> None:
    if torch.cuda.get_device_capability() < TF32_SINCE:
        pytest.skip(f"{torch.cuda.get_device_name()} has no TF32")
    errors = {}
    for tf32 in (True, False):
        torch.manual_seed(0)
        model = resnet50()
        images = model.sample(16)
        expected = on_cpu(model, images)
        with opened(tmp_path / str(tf32), model, "torch", sizes=(16,), tf32=tf32) as session:
            errors[tf32] = error(expected, session(images.to(DEVICE)))

    assert errors[False] < 1e-4
    assert errors[True] > 4 * errors[False]
