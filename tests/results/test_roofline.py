"""Shares of a GPU's peak and bandwidth are those worked out by hand, and empty where nothing right can be said."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
from sweep_folders import announced, real_result, write_manifest, write_result

from pq_sweep.core.result import Result
from pq_sweep.results.report.frame import comparison
from pq_sweep.results.rows import metrics
from pq_sweep.results.sweeps import read_sweep

SHARES = {"compute_share/b8", "bandwidth_share/b8"}
FIGURES = SHARES | {"achieved_tflops/b8"}
MACS, WEIGHTS = 4_000_000_000, 25_000_000
IMAGE_BYTES = (3 * 224 * 224 + 1000) * 4


def on_gpu(name: str, precision: str = "fp32", runtime: str = "torch", **details: Any) -> dict[str, Any]:
    """Return the result of a network whose batch of 8 takes 10 ms on a GPU."""
    result = real_result()
    result["network"] |= {"macs": MACS, "weights": WEIGHTS, "input": [3, 224, 224], "classes": 1000}
    result["latency"] = {"8": result["latency"]["1"] | {"p50_ms": 10.0, "device_state": {"mig": False}}}
    result["environment"]["gpu"] = {"name": name, "uuid": "aa11", "nvml": {"mig": False}}
    result["session"] |= {"runtime": runtime, "precision": precision, "tf32": False} | details
    return result


def figures(result: dict[str, Any]) -> dict[str, float]:
    return metrics(Result.of(result))


@pytest.mark.parametrize(
    ("name", "precision", "details", "peak", "weight_bytes", "gb_per_s"),
    [
        ("NVIDIA A100-SXM4-40GB", "fp32", {}, 19.5, 4, 1555),
        ("NVIDIA A100-SXM4-80GB", "fp32", {"tf32": True}, 156, 4, 2039),
        ("Tesla V100-SXM2-16GB", "fp32", {"tf32": True}, 15.7, 4, 900),
        ("Tesla V100-PCIE-16GB", "fp16", {}, 112, 2, 900),
        ("NVIDIA H100 PCIe", "bf16", {}, 756.5, 2, 2000),
        ("NVIDIA A100-PCIE-40GB", "int8", {"runtime": "tensorrt", "quantizer": {"excluded_nodes": []}}, 624, 1, 1555),
    ],
)
def test_shares_are_those_of_the_precision_that_ran(
    name: str, precision: str, details: dict[str, Any], peak: float, weight_bytes: int, gb_per_s: float
) -> None:
    found = figures(on_gpu(name, precision, **details))
    moved = WEIGHTS * weight_bytes + 8 * IMAGE_BYTES

    assert found["achieved_tflops/b8"] == pytest.approx(2 * MACS * 8 / 0.01 / 1e12)
    assert found["compute_share/b8"] == pytest.approx(6.4 / peak)
    assert found["bandwidth_share/b8"] == pytest.approx(moved / 0.01 / (gb_per_s * 1e9))


@pytest.mark.parametrize(
    ("precision", "runtime", "details"),
    [
        ("mixed", "tensorrt_native", {"quantizer": {"kept_layers": 2}}),
        ("fp16", "tensorrt_native", {"quantizer": {"excluded_nodes": ["conv1"]}}),
        ("int8", "tensorrt", {"quantizer": {"excluded_nodes": ["conv1"]}}),
        ("bf16", "tensorrt_native", {}),
    ],
)
def test_layers_of_several_precisions_have_no_peak(precision: str, runtime: str, details: dict[str, Any]) -> None:
    found = figures(on_gpu("NVIDIA A100-SXM4-40GB", precision, runtime, **details))
    assert SHARES & found.keys() == {"bandwidth_share/b8"}


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_precision_of_which_nvidia_states_nothing_has_no_peak(precision: str) -> None:
    assert SHARES & figures(on_gpu("Tesla V100-SXM2-16GB", precision)).keys() == {"bandwidth_share/b8"}


def test_what_is_no_whole_and_known_gpu_has_no_shares() -> None:
    divided, divided_now, sparse = (on_gpu("NVIDIA A100-SXM4-40GB") for _ in range(3))
    divided["environment"]["gpu"]["nvml"] = {"mig": True}
    divided_now["latency"]["8"]["device_state"] = {"mig": True}
    sparse["session"]["sparsity"] = True
    by_name = [on_gpu(name) for name in ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "GRID A100-40C", "NVIDIA GH200 480GB")]
    for result in (divided, divided_now, sparse, *by_name):
        found = figures(result)
        assert found["throughput/b8"] == result["latency"]["8"]["throughput"]
        assert not FIGURES & found.keys()


def test_a_cpu_has_no_shares() -> None:
    found = figures(on_gpu("") | {"environment": real_result()["environment"] | {"gpu": None}})
    assert not [name for name in found if "share" in name or "tflops" in name]


def test_lowered_clocks_are_said_beside_the_shares() -> None:
    result = on_gpu("NVIDIA A100-SXM4-40GB")
    result["latency"]["8"]["device_state"] |= {
        "sm_mhz": {"min": 700, "median": 705, "max": 720},
        "sm_max_mhz": 1410,
        "memory_mhz": {"min": 1215, "median": 1215, "max": 1215},
        "memory_max_mhz": 1215,
    }
    found = figures(result)

    assert (found["clock_share/b8"], found["memory_clock_share/b8"]) == (0.5, 1.0)
    assert found.keys() >= SHARES


def test_the_report_has_the_share_of_the_largest_batch_where_it_is_known(tmp_path: Any) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    write_result(sweep, "0", on_gpu("NVIDIA A100-SXM4-40GB"))
    write_result(sweep, "1")
    shown = comparison(read_sweep(sweep), ["error", "latency"])["compute share"]

    assert shown[0] == pytest.approx(6.4 / 19.5)
    assert pd.isna(shown[1])
