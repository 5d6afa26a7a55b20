"""What a job says of its GPU: who it is, clocks, power, energy, memory, and three latencies that fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from commands import launch_in
from conftest import only_sweep, results

from gpu.cuda import need

pytestmark = pytest.mark.gpu

Record = Callable[[str, object], None]

BATCH = 32
PARAMETERS_MB = 25_557_032 * 4 / 1e6
# NVML's energy counter needs a window of at least a second.
LONG = ("measure.batch_sizes=[32]", "measure.min_s=2", "measure.max_s=3")
RESNET50 = ("model=resnet50", "model.weights=null", "dataset=fake", "dataset.images=64", "dataset.calibration=0")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A job with ResNet-50 in FP32."""
    need("torchvision")
    folder = tmp_path_factory.mktemp("job")
    done = launch_in(folder, "device=cuda", "runtime=torch", "tracking=none", *RESNET50, *LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = results(only_sweep(folder))
    return found


@pytest.fixture(scope="module")
def latency(result: dict[str, Any]) -> dict[str, Any]:
    return result["latency"][str(BATCH)]


def seen(latency: dict[str, Any], name: str) -> Any:
    """Return what NVML said, or skip the test with the reason why it did not."""
    state = latency["device_state"]
    if name not in state:
        need("nvidia-ml-py")
        pytest.skip(f"NVML gives no {name} here: {state['unavailable'].get(name) or state['unavailable']}")
    return state[name]


def test_the_gpu_is_named_by_nvml_as_by_torch(result: dict[str, Any]) -> None:
    gpu = result["environment"]["gpu"]
    if "name" not in gpu["nvml"]:
        need("nvidia-ml-py")
        pytest.skip(f"NVML does not say who the GPU is: {gpu['nvml']['unavailable']}")

    assert gpu["nvml"]["name"] == gpu["name"]
    assert gpu["uuid"] in gpu["nvml"]["uuid"]
    assert gpu["nvml"]["memory_mb"] == pytest.approx(gpu["memory_mb"], rel=0.1)


@pytest.mark.parametrize("name", ["sm_mhz", "memory_mhz"])
def test_clocks_are_between_nothing_and_their_maximum(latency: dict[str, Any], name: str) -> None:
    clock, most = seen(latency, name), seen(latency, name.replace("_mhz", "_max_mhz"))

    assert 0 < clock["min"] <= clock["median"] <= clock["max"] <= most * 1.01


def test_temperature_and_power_are_those_of_a_gpu_at_work(latency: dict[str, Any], record_property: Record) -> None:
    temperature, power, limit = (seen(latency, name) for name in ("temperature_c", "power_w", "power_limit_w"))
    record_property("power_w", f"{power:.0f}")

    assert 10 < temperature < 110
    assert 5 < power < 1.5 * limit


def test_energy_is_that_of_its_power(latency: dict[str, Any], record_property: Record) -> None:
    seen(latency, "energy_j")
    energy = latency["energy_per_image_j"]
    record_property("energy_per_image_j", f"{energy:.3g}")

    assert energy > 0
    assert energy * latency["pipelined_throughput"] == pytest.approx(seen(latency, "power_w"), rel=0.5)


def test_peak_memory_holds_the_network_and_fits_the_device(result: dict[str, Any], record_property: Record) -> None:
    memory, whole = result["memory"], result["environment"]["gpu"]["memory_mb"]
    for name in ("allocator_mb", "taken_mb", "nvml_process_mb"):
        record_property(name, "unknown" if memory[name] is None else f"{memory[name]:.0f}")

    assert PARAMETERS_MB < memory["allocator_mb"] <= memory["allocator_reserved_mb"] < whole
    assert memory["allocator_reserved_mb"] <= memory["taken_mb"] < whole
    assert result["peak_memory_mb"] == (memory["nvml_process_mb"] or memory["taken_mb"])
    for name in ("nvml_process_mb", "nvml_device_mb"):
        assert memory[name] is None or memory["allocator_mb"] < memory[name] < whole


def test_a_caller_waits_longer_than_the_device_works(latency: dict[str, Any], record_property: Record) -> None:
    host = latency["host_to_host"]["p50_ms"]
    record_property("host_over_device", f"{host / latency['p50_ms']:.3f}")

    assert host > latency["p50_ms"]


def test_calls_that_do_not_wait_for_each_other_are_no_slower(latency: dict[str, Any], record_property: Record) -> None:
    pipelined = latency["pipelined_throughput"]
    record_property("pipelined_over_single", f"{pipelined / latency['throughput']:.3f}")

    assert pipelined > BATCH / latency["host_to_host"]["p50_ms"] * 1e3
    assert pipelined > 0.95 * latency["throughput"]  # the device's time alone, which a single call may come close to
