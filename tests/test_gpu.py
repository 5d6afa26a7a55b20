"""What needs a CUDA device: the same answers as on the CPU, on the device asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Launch, only_sweep, results

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("quantizer", "runtime"),
    [("none", "torch"), ("fp16", "torch"), ("bf16", "torch"), ("none", "onnxruntime"), ("fp16", "onnxruntime")],
)
def test_cuda_gives_the_answers_of_the_cpu(tmp_path: Path, launch: Launch, quantizer: str, runtime: str) -> None:
    done = launch("device=cuda", f"quantizer={quantizer}", f"runtime={runtime}", "tracking=none")

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = results(only_sweep(tmp_path))
    assert result["session"]["device"].startswith("cuda")
    assert result["session"]["runtime"] == runtime
    assert result["environment"]["gpu"]["name"] == result["environment"]["device"]
    assert result["latency"]["1"]["clock"] == "cuda_event"
    assert result["accuracy"]["agreement"] > 0.99
    assert result["accuracy"]["top1"] >= 0.98


@pytest.mark.parametrize("quantizer", ["none", "fp16", "int8"])
def test_tensorrt_builds_one_engine(tmp_path: Path, launch: Launch, quantizer: str) -> None:
    pytest.importorskip("tensorrt", reason="needs TensorRT")
    done = launch("device=cuda", f"quantizer={quantizer}", "runtime=tensorrt", "tracking=none")

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = results(only_sweep(tmp_path))
    assert result["session"]["artifact"].endswith(".engine")
    # onnxruntime before 1.24 does not say where nodes are
    assert set(result["session"].get("nodes_per_provider", ())) <= {"TensorrtExecutionProvider"}
    assert result["accuracy"]["top1"] >= 0.97
