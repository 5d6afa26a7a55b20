"""Jobs on the GPU give the answers of the CPU, on the device and by the library that was asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SHORT
from conftest import Launch, only_sweep, results

from gpu.cuda import able, need

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]

PROVIDERS = {"onnxruntime": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
SUFFIXES = {"torch": ".pt", "onnxruntime": ".onnx", "tensorrt": ".engine", "tensorrt_native": ".engine"}
BY_PRECISION = [
    *((quantizer, "torch") for quantizer in ("none", "fp16", "bf16")),
    *((quantizer, "onnxruntime") for quantizer in ("none", "fp16")),
    *((quantizer, runtime) for runtime in ("tensorrt", "tensorrt_native") for quantizer in ("fp16", "int8")),
]
BY_OPTION = [
    ("torch", "channels_last=true"),
    ("torch", "tf32=true"),
    ("torch", "cuda_graph=true"),
    ("torch", "compile=default"),
    ("torch", "compile=reduce-overhead"),
    ("onnxruntime", "tf32=true"),
    ("tensorrt_native", "profile=range"),
    ("tensorrt_native", "cuda_graph=true"),
]


def job(folder: Path, launch: Launch, *overrides: str) -> dict[str, Any]:
    """Run a job on the digits as a user does and return its result; it ran on the GPU, and knows the digits."""
    done = launch("device=cuda", "tracking=none", *SHORT, *overrides)

    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = results(only_sweep(folder))
    assert result["session"]["device"].startswith("cuda")
    assert result["environment"]["gpu"]["name"] == result["environment"]["device"]
    assert result["latency"]["1"]["clock"] == "cuda_event"
    assert result["accuracy"]["top1"] >= 0.97
    return result


@pytest.mark.parametrize(("quantizer", "runtime"), BY_PRECISION)
def test_cuda_gives_the_answers_of_the_cpu(
    tmp_path: Path, launch: Launch, record_property: Record, quantizer: str, runtime: str
) -> None:
    able(runtime)
    result = job(tmp_path, launch, f"quantizer={quantizer}", f"runtime={runtime}")
    session = result["session"]
    record_property("agreement", result["accuracy"]["agreement"])

    assert session["runtime"] == runtime
    assert session["artifact"].endswith(SUFFIXES[runtime])
    if runtime in PROVIDERS:
        assert list(session["nodes_per_provider"]) == [PROVIDERS[runtime]]
    assert result["accuracy"]["agreement"] > (0.98 if quantizer == "int8" else 0.99)


@pytest.mark.parametrize(("runtime", "option"), BY_OPTION)
def test_an_option_leaves_the_answers(
    tmp_path: Path, launch: Launch, record_property: Record, runtime: str, option: str
) -> None:
    able(runtime)
    if option.startswith("compile"):
        need("triton")
        if not (shutil.which("cc") or shutil.which("gcc")):
            pytest.skip("torch.compile needs a C compiler: apt-get install gcc")
    result = job(tmp_path, launch, "quantizer=none", f"runtime={runtime}", f"runtime.{option}")
    name, value = option.split("=")
    record_property("p50_ms", f"{result['latency']['1']['p50_ms']:.3f}")

    assert str(result["session"][name]).lower() == value
    assert result["accuracy"]["agreement"] > 0.99


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt_native"])
def test_sparse_kernels_give_the_answers_of_the_pruned_network(tmp_path: Path, launch: Launch, runtime: str) -> None:
    able(runtime, sparsity=True)
    pruned = ("device=cuda", "tracking=none", *SHORT, "pruner=nm_sparsity", "quantizer=fp16")
    folders = {name: f"hydra.sweep.dir={tmp_path / name}" for name in ("torch", runtime)}
    expected = launch(*pruned, folders["torch"], "runtime=torch")
    actual = launch(*pruned, folders[runtime], f"runtime={runtime}", "runtime.sparsity=true")

    assert expected.returncode == actual.returncode == 0, expected.stderr + actual.stderr
    answers = [np.load(tmp_path / name / "0" / "predictions.npy") for name in folders]
    (result,) = results(tmp_path / runtime)
    assert result["session"]["sparsity"] is True
    assert result["network"]["sparsity"] > 0.45
    assert (answers[0] == answers[1]).mean() > 0.99
