"""What samples of a GPU say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pq_sweep.measure.monitor import samples
from pq_sweep.measure.monitor.nvml import SAMPLED
from pq_sweep.measure.monitor.samples import Samples

PARENT, OWN, CHILD, OTHER = 90, 100, 110, 200


def row(t_s: float, **values: Any) -> dict[str, Any]:
    usual = {"sm_mhz": 1400, "memory_mhz": 1215, "temperature_c": 60, "power_w": 250.0, "energy_j": t_s * 250}
    more = {"throttle_reasons": 0, "utilization_percent": 90, "memory_device_mb": 3000, "processes": [[OWN, 2000.0]]}
    return {"t_s": t_s, "look_s": 0.002} | usual | more | values


def seen(*inside: dict[str, Any], before: dict[str, Any] | None = None, **options: Any) -> Samples:
    """Return samples in the middle of a window of 10 s, each row changed as `inside` says."""
    rows = [row(0, **(before or {})), *(row(n + 1, **values) for n, values in enumerate(inside)), row(10)]
    usual = {"constants": {"sm_max_mhz": 1410}, "missing": {}, "seconds": 9.9}
    process = {"pid": OWN, "family": [OWN], "isolated": False}
    return Samples(rows=rows, **usual | process | options)


def without(name: str, *inside: dict[str, Any]) -> Samples:
    """Return samples in which NVML does not know `name`, besides those of `inside`."""
    found = seen({}, {}, *inside, missing={name: "Not Supported"})
    for lacking in (*found.rows[:3], found.rows[-1]):
        del lacking[name]
    return found


def test_figures_are_those_inside_of_the_window() -> None:
    inside = [
        {"sm_mhz": 1300, "temperature_c": 70, "power_w": 200.0, "memory_device_mb": 4000, "utilization_percent": 50},
        {"sm_mhz": 1200, "processes": [[OWN, 2500.0]]},
        {"sm_mhz": 1400},
    ]
    found = seen(*inside, before={"sm_mhz": 210, "temperature_c": 99, "throttle_reasons": 0x40}).summary()
    assert found["samples"] == 3
    assert found["look_ms"] == {"min": 2.0, "median": 2.0, "max": 2.0}
    assert found["sm_mhz"] == {"min": 1200, "median": 1300, "max": 1400}
    assert found["memory_mhz"] == {"min": 1215, "median": 1215, "max": 1215}
    assert (found["temperature_c"], found["memory_device_mb"], found["memory_process_mb"]) == (70, 4000, 2500)
    assert found["power_w"] == pytest.approx(700 / 3)
    assert found["utilization_percent"] == pytest.approx(230 / 3)
    assert (found["energy_j"], found["sampled_s"]) == (2500, 10)
    assert (found["throttle_reasons"], found["verdicts"], found["other_pids"]) == ([], [], [])
    assert found["unavailable"] == {}
    assert json.loads(json.dumps(found)) == found


def test_a_window_shorter_than_a_period_has_its_two_edges() -> None:
    found = seen(before={"sm_mhz": 1300}, seconds=0.05).summary()
    assert found["samples"] == 2
    assert found["sm_mhz"] == {"min": 1300, "median": 1350, "max": 1400}


@pytest.mark.parametrize(
    ("bits", "names", "verdicts"),
    [
        ([0, 0x20], ["sw_thermal"], ["throttled"]),
        ([0x40, 0], ["hw_thermal"], ["throttled"]),
        ([0x8], ["hw_slowdown"], ["throttled"]),
        ([0x80], ["power_brake"], ["throttled"]),
        ([0x4, 0], ["sw_power_cap"], ["power_capped"]),
        ([0x4, 0x24], ["sw_power_cap", "sw_thermal"], ["throttled", "power_capped"]),
        ([0x1, 0x2, 0x10], ["gpu_idle", "application_clocks", "sync_boost"], []),
        ([0x100, 0x200, 0x400], ["display_clocks", "board_limit", "reliability"], []),
        ([0x800 | 0x1], ["gpu_idle", "0x800"], []),
    ],
)
def test_reasons_are_named_and_judged(bits: list[int], names: list[str], verdicts: list[str]) -> None:
    found = seen(*({"throttle_reasons": value} for value in bits)).summary()
    assert (found["throttle_reasons"], found["verdicts"]) == (names, verdicts)


@pytest.mark.parametrize(
    ("inside", "verdicts"),
    [
        ([{"sm_mhz": 1057}] * 3, ["throttled"]),  # the limit is 0.75 * 1410 = 1057.5
        ([{"sm_mhz": 1058}] * 3, []),
        ([{"sm_mhz": 600}, {}, {}], []),  # the median counts
        ([{"sm_mhz": 210, "throttle_reasons": 1}] * 3, []),  # idle
        ([{"sm_mhz": 210, "throttle_reasons": 1}] * 3 + [{"sm_mhz": 900}], ["throttled"]),
        ([{"sm_mhz": 705, "throttle_reasons": 0x4}] * 3, ["power_capped"]),  # a T4 at its 70 W
        ([{"sm_mhz": 585, "throttle_reasons": 0x2}] * 3, []),  # a T4 at the clock that it comes with
        ([{"sm_mhz": 705, "throttle_reasons": 0x10}] * 3, []),  # as slow as the slowest of its group
        ([{"sm_mhz": 705, "throttle_reasons": 0x4}] + [{"sm_mhz": 705}] * 2, ["throttled", "power_capped"]),
        ([{"sm_mhz": 705, "throttle_reasons": 0x44}] * 3, ["throttled", "power_capped"]),
        ([{"sm_mhz": 705, "throttle_reasons": 0x400}] * 3, ["throttled"]),  # no reason to be slow
    ],
)
def test_a_low_clock_counts_while_the_gpu_is_busy(inside: list[dict[str, Any]], verdicts: list[str]) -> None:
    assert seen(*inside).verdicts() == verdicts


def test_utilisation_says_what_is_idle_where_no_reasons_are_known() -> None:
    idle, busy = ({"sm_mhz": 300, "utilization_percent": percent} for percent in (0, 10))
    for values, verdicts in ((idle, []), (busy, ["throttled"])):
        found = seen(values)
        del found.rows[1]["throttle_reasons"]
        assert found.verdicts() == verdicts


def test_without_a_maximum_no_clock_is_low() -> None:
    assert seen({"sm_mhz": 200}, constants={}).verdicts() == []


def test_energy_of_a_short_window_is_not_told() -> None:
    found = seen(seconds=0.5).summary()
    assert "energy_j" not in found
    assert found["unavailable"]["energy_j"] == "the counter is too coarse for 0.5 s; it needs 1 s"


def test_an_energy_counter_that_began_anew_is_not_told() -> None:
    assert "began anew" in seen({}, before={"energy_j": 1e6}).summary()["unavailable"]["energy_j"]


def test_energy_needs_both_ends() -> None:
    found = seen({}, missing={"energy_j": "GPU is lost"})
    del found.rows[-1]["energy_j"]
    assert found.summary()["unavailable"] == {"energy_j": "GPU is lost"}


@pytest.mark.parametrize("name", [name for name in SAMPLED if name != "processes"])
def test_what_nvml_does_not_know_is_absent_with_its_reason(name: str) -> None:
    found = without(name).summary()
    assert name not in found
    assert found["unavailable"] == {name: "Not Supported"}
    assert name not in found["rows"]
    assert found["verdicts"] == []


def test_what_nvml_did_not_always_know_is_told_of_the_rest() -> None:
    found = without("power_w", {"power_w": 100.0}, {"power_w": 200.0}).summary()
    assert found["power_w"] == 150
    assert found["unavailable"] == {"power_w": "Not Supported (in 2 of 4 samples)"}
    assert found["rows"]["power_w"] == [None, None, None, 100, 200, None]


def test_other_processes_make_a_device_shared() -> None:
    found = seen({}, {"processes": [[OTHER, None], [OWN, 2000.0]]}).summary()
    assert (found["other_pids"], found["verdicts"]) == ([OTHER], ["shared"])
    found = seen({"processes": []}, {"processes": [[OTHER, 5.0]]}).summary()
    assert (found["other_pids"], found["verdicts"]) == ([OTHER], ["shared"])
    assert found["unavailable"] == {"memory_process_mb": f"NVML gives no memory for pid {OWN}"}


@pytest.mark.parametrize("isolated", [False, True])
def test_a_parent_and_a_child_are_no_others(isolated: bool) -> None:
    rows = [[[PARENT, 500.0], [OWN, 2000.0]], [[PARENT, 500.0], [OWN, 1900.0], [CHILD, 300.0]]]
    options = {"family": [PARENT, OWN, CHILD], "isolated": isolated}
    found = seen(*({"processes": row} for row in rows), **options).summary()
    assert (found["other_pids"], found["verdicts"]) == ([], [])
    assert found["memory_process_mb"] == 2000
    found = seen(*({"processes": [*row, [OTHER, 9000.0]]} for row in rows), **options).summary()
    assert (found["other_pids"], found["verdicts"]) == ([OTHER], ["shared"])
    assert found["memory_process_mb"] == 2000


def test_the_memory_of_a_parent_alone_is_not_that_of_the_measured_process() -> None:
    found = seen({"processes": [[PARENT, 500.0]]}, {"processes": [[PARENT, 500.0], [OWN, None]]}, family=[PARENT, OWN])
    assert "memory_process_mb" not in found.summary()
    assert found.summary()["unavailable"] == {"memory_process_mb": f"NVML gives no memory for pid {OWN}"}


def test_without_a_list_of_processes_nothing_is_said_of_them() -> None:
    found = without("processes").summary()
    assert not {"other_pids", "memory_process_mb"} & found.keys()
    assert found["unavailable"] == dict.fromkeys(("other_pids", "memory_process_mb"), "Not Supported")
    assert found["verdicts"] == []


def test_a_container_may_hide_processes() -> None:
    found = seen({"processes": [[OWN, 2000.0]]}, isolated=True).summary()
    assert found["other_pids"] == []
    assert "unseen" in found["unavailable"]["processes_outside"]
    found = seen({"processes": [[OWN, 2000.0], [OTHER, 1.0]]}, isolated=True).summary()
    assert (found["other_pids"], found["verdicts"]) == ([OTHER], ["shared"])


@pytest.mark.parametrize(("pids", "verdicts"), [([], []), ([7001], []), ([7001, 7002], ["shared"])])
def test_pids_of_the_host_name_nobody_in_a_container(pids: list[int], verdicts: list[str]) -> None:
    """The one process is this one under another number; of two, one is somebody else's."""
    found = seen({"processes": [[pid, 1.0] for pid in pids]}, isolated=True).summary()
    assert "other_pids" not in found
    assert "by the pid that it has here" in found["unavailable"]["other_pids"]
    assert found["verdicts"] == verdicts


def test_rows_are_thinned_out() -> None:
    found = seen(*[{}] * 999).summary()
    assert found["samples"] == 999
    times = found["rows"]["t_s"]
    assert len(times) == 251
    assert times[:3] == [0, 4, 8]
    assert set(found["rows"]) == {"t_s", *SAMPLED} - {"processes"}
    assert {len(values) for values in found["rows"].values()} == {251}
    assert len(samples.thin([row(n) for n in range(300)])["t_s"]) == 300
