"""What a job found as typed parts: written and read again without loss, also where a version wrote less."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest
from sweep_folders import real_result

from pq_sweep.core.result import Latency, Memory, Paired, Part, Result, Speed, Timed

SPREAD: dict[str, Any] = {
    "iterations": 3, "p50_ms": 1.0, "p50_ci95_ms": None, "p90_ms": None, "p99_ms": None, "mean_ms": 1.1,
    "std_ms": 0.2, "throughput": 8.0, "outliers": 0, "unstable": ["drift"],
}  # fmt: skip
TIMED = SPREAD | {"clock": "cuda_event", "warmup": {"iterations": 1}, "duration_s": 0.1}
ON_CPU = TIMED | {"energy_per_image_j": None, "device_state": {"device": "cpu"}, "load_of_others": 0.5, "loads": [0.5]}
ON_GPU = TIMED | {
    "energy_per_image_j": 0.3,
    "device_state": {"device": "cuda:0"},
    "cpu_time_per_iteration_ms": 0.1,
    "load_of_others": 0.0,
    "host_to_host": TIMED,
    "enqueue_ms": 0.01,
    "host_bound": False,
    "pipelined_throughput": 9.0,
    "repeats": {"p50_ms": [1.0], "middle": 1, "spread": 0.0},
}
PAIR = {"pairs": 2, "speedup": 2.0, "speedup_ci95": [1.9, 2.1], "dense_p50_ms": 2.0, "p50_ms": 1.0, "unstable": []}
MEMORY = {"allocator_mb": 1.0, "allocator_reserved_mb": 2.0, "nvml_process_mb": None, "nvml_device_mb": None,
          "taken_mb": 3.0}  # fmt: skip


def written(part: Part) -> Any:
    """Return what is in the file of a part."""
    return json.loads(json.dumps(part.plain()))


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        (Latency, ON_CPU),
        (Latency, ON_GPU),
        (Paired, PAIR),
        (Memory, MEMORY),
        (
            Speed,
            {"latency": {"1": ON_GPU, "8": ON_GPU}, "peak_memory_mb": None, "memory": MEMORY, "paired": {"1": PAIR}},
        ),
        (Speed, {"latency": {"1": ON_CPU}, "peak_memory_mb": 70.0}),
    ],
)
def test_a_part_is_read_as_it_was_written(kind: type[Part], plain: dict[str, Any]) -> None:
    assert written(kind.of(plain)) == plain


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    plain = real_result()
    (tmp_path / "result.json").write_text(json.dumps(plain))
    found = Result.read(tmp_path / "result.json")
    assert found is not None
    assert written(found) == plain
    assert found.session.details["nodes_per_provider" if found.session.runtime == "onnxruntime" else "dtype"]


def test_what_an_earlier_version_did_not_write_is_none_or_the_default() -> None:
    found = Latency.of({"p50_ms": 2.0})
    assert (found.p50_ms, found.p90_ms, found.load_of_others, found.host_to_host) == (2.0, None, 0.0, None)
    plain = real_result()
    del plain["hardware"], plain["baseline"]["macs"], plain["bits"]
    assert Result.of(plain).hardware == []
    assert Result.of(plain).bits is None
    assert Result.of(plain).baseline.macs is None


def test_what_a_later_version_wrote_beside_is_left_out() -> None:
    assert Timed.of(TIMED | {"humidity": 0.4}) == Timed.of(TIMED)


@pytest.mark.parametrize("text", ["", "{", '{"status": '])
def test_a_damaged_file_is_no_result(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    assert Result.read(tmp_path / "result.json") is None
    assert Result.read(tmp_path / "missing.json") is None


def test_results_are_frozen() -> None:
    latency = Latency.of(ON_CPU)
    with pytest.raises(FrozenInstanceError):
        latency.p50_ms = 3.0  # type: ignore[misc]
    assert replace(latency, p50_ms=3.0).p50_ms == 3.0
    assert latency.p50_ms == 1.0
