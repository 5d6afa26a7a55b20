"""Sessions of other runtimes than torch on the GPU, and of all GPUs in turn, in this process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_networks import fresh

from gpu.cuda import DEVICE, need, opened
from pq_sweep.measure.timing import CudaClock
from pq_sweep.types import Model, Preprocess

pytestmark = pytest.mark.gpu


def vit() -> Model:
    """Return a small vision transformer of torchvision's with random weights."""
    need("torchvision")
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
    torch.nn.init.normal_(network.heads.head.weight)  # zeros otherwise
    return Model(network.eval(), 10, Preprocess(size=32, resize=32, channels=3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "tensorrt", "tensorrt_native"])
def test_transformers_run_on_the_gpu_alone(tmp_path: Path, runtime: str) -> None:
    model = vit()
    images = model.sample(11)
    with torch.inference_mode():
        expected = model.module(images)
    with opened(tmp_path, model, runtime, sizes=(1, 4)) as session:
        logits = session(images.to(DEVICE)).cpu()
        nodes = session.details.get("nodes_per_provider", {})

    assert not [name for name in nodes if name.startswith("CPU")]
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-3


def test_each_gpu_is_timed_by_its_own_work(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("this machine has a single GPU")
    for number, device in enumerate(("cuda:0", "cuda:1", "cuda:0")):
        with opened(tmp_path / str(number), fresh(), "torch", sizes=(64,), device=device) as session:
            images, clock = torch.randn(64, 1, 8, 8, device=device), CudaClock(device)

            def call() -> torch.Tensor:
                return session(images)  # noqa: B023

            assert min(clock(call) for _ in range(20)) > 5_000  # an idle stream takes nothing
