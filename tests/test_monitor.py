"""Watching a device: the driver is played by a small module in the place of pynvml, all else is real."""

from __future__ import annotations

import ast
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from commands import HEAVY, imported

from pq_sweep import monitor
from pq_sweep.monitor import Absent, Device, Monitor, Sampler, Samples, identify

# A driver that answers by the script in STAND_IN: what it is to answer, or what goes wrong and from which call on.
STAND_IN = """
import json, os, time

NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
SCRIPT = json.loads(os.environ.get("STAND_IN", "{}"))
CALLS = {}


class NVMLError(Exception):
    pass


class NVMLError_FunctionNotFound(NVMLError):
    pass


class Fields:
    def __init__(self, **fields):
        self.__dict__.update(fields)


def answer(name, usual):
    CALLS[name] = CALLS.get(name, 0) + 1
    does = SCRIPT.get(name, usual)
    if not isinstance(does, dict):
        return does
    if CALLS[name] >= does.get("at", 1):
        if "raises" in does:
            raise NVMLError(does["raises"])
        if "hangs" in does:
            time.sleep(does["hangs"])
        if "breaks" in does:
            raise RuntimeError(does["breaks"])
    return usual


def gpus():
    return SCRIPT.get("gpus", [{"uuid": "GPU-aa11", "name": "A100"}])


def nvmlInit():
    answer("init", None)

def nvmlShutdown():
    pass

def nvmlDeviceGetCount():
    return len(gpus())

def nvmlDeviceGetHandleByIndex(index):
    if gpus()[index].get("forbidden"):
        raise NVMLError("Insufficient Permissions")
    return gpus()[index]["uuid"]

def nvmlDeviceGetHandleByUUID(uuid):
    for gpu in gpus():
        if uuid == gpu["uuid"] or uuid in gpu.get("instances", ()):
            return uuid
    raise NVMLError("Not Found")

def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(migDevice):
    return next(gpu["uuid"] for gpu in gpus() if migDevice in gpu.get("instances", ()))

def gpu_of(handle):
    return next(gpu for gpu in gpus() if gpu["uuid"] == handle)

def nvmlDeviceGetMigMode(device):
    if "instances" not in gpu_of(device):
        raise NVMLError("Not Supported")
    return [1, 1]

def nvmlDeviceGetMaxMigDeviceCount(device):
    return 7

def nvmlDeviceGetMigDeviceHandleByIndex(device, index):
    if index >= len(gpu_of(device)["instances"]):
        raise NVMLError("Not Found")
    return gpu_of(device)["instances"][index]

def nvmlDeviceGetUUID(handle):
    return handle

def nvmlDeviceGetName(handle):
    return gpu_of(handle)["name"]

def nvmlDeviceGetClockInfo(handle, type):
    return answer("sm", 1300) if type == NVML_CLOCK_SM else 1215

def nvmlDeviceGetMaxClockInfo(handle, type):
    return 1410 if type == NVML_CLOCK_SM else 1593

def nvmlDeviceGetTemperature(handle, sensor):
    return answer("temperature", 61)

def nvmlDeviceGetPowerUsage(handle):
    return answer("power", 250_000)

def nvmlDeviceGetEnforcedPowerLimit(handle):
    return 400_000

def nvmlDeviceGetTotalEnergyConsumption(handle):
    return answer("energy", int(time.monotonic() / 0.05) * 5_000)

def nvmlDeviceGetCurrentClocksEventReasons(handle):
    if "reasons_before_535" in SCRIPT:
        raise NVMLError_FunctionNotFound("Function Not Found")
    return answer("reasons", 0)

def nvmlDeviceGetCurrentClocksThrottleReasons(handle):
    return SCRIPT["reasons_before_535"]

def nvmlDeviceGetUtilizationRates(handle):
    return Fields(gpu=answer("utilization", 80), memory=20)

def nvmlDeviceGetMemoryInfo(handle):
    return Fields(total=40_000_000_000, used=3_000_000_000, free=37_000_000_000)

def nvmlDeviceGetComputeRunningProcesses(handle):
    pids = [os.getppid(), *answer("others", [])]
    return [Fields(pid=pid, usedGpuMemory=2_000_000_000) for pid in pids]

def nvmlDeviceGetVbiosVersion(handle):
    return "92.00"

def nvmlSystemGetDriverVersion():
    return "580.1"

def nvmlSystemGetCudaDriverVersion():
    return 13020

def nvmlDeviceGetPciInfo(handle):
    return Fields(busId="00000000:07:00.0")

def nvmlDeviceGetEccMode(handle):
    return [1, 0]

def nvmlDeviceGetPersistenceMode(handle):
    return 0

def nvmlDeviceGetApplicationsClock(handle, type):
    raise NVMLError("Not Supported")

def nvmlDeviceGetCurrPcieLinkGeneration(handle):
    return 3

def nvmlDeviceGetMaxPcieLinkGeneration(handle):
    return 4

def nvmlDeviceGetCurrPcieLinkWidth(handle):
    return 8

def nvmlDeviceGetMaxPcieLinkWidth(handle):
    return 16
"""
OWN, OTHER = 100, 200

Driver = Callable[..., ModuleType]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put the stand-in where this process and its children import pynvml from; what it answers can be given."""
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "pynvml.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)

    def scripted(**answers: Any) -> ModuleType:
        monkeypatch.setenv("STAND_IN", json.dumps(answers))
        module = loaded(folder / "pynvml.py")
        monkeypatch.setitem(sys.modules, "pynvml", module)
        return module

    return scripted


def loaded(path: Path) -> ModuleType:
    spec = spec_from_file_location("pynvml", path)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(t_s: float, **values: Any) -> dict[str, Any]:
    usual = {"sm_mhz": 1400, "memory_mhz": 1215, "temperature_c": 60, "power_w": 250.0, "energy_j": t_s * 250}
    more = {"throttle_reasons": 0, "utilization_percent": 90, "memory_device_mb": 3000, "processes": [[OWN, 2000.0]]}
    return {"t_s": t_s} | usual | more | values


def seen(*inside: dict[str, Any], before: dict[str, Any] | None = None, **options: Any) -> Samples:
    """Return samples in the middle of a window of 10 s, each row changed as `inside` says."""
    rows = [row(0, **(before or {})), *(row(n + 1, **values) for n, values in enumerate(inside)), row(10)]
    usual = {"constants": {"sm_max_mhz": 1410}, "missing": {}, "seconds": 9.9, "pid": OWN, "isolated": False}
    return Samples(rows=rows, **usual | options)


def without(name: str, *inside: dict[str, Any]) -> Samples:
    """Return samples in which NVML does not know `name`, besides those of `inside`."""
    found = seen({}, {}, *inside, missing={name: "Not Supported"})
    for lacking in (*found.rows[:3], found.rows[-1]):
        del lacking[name]
    return found


# --- what the samples say ---------------------------------------------------------------------------------------------


def test_figures_are_those_inside_of_the_window() -> None:
    inside = [
        {"sm_mhz": 1300, "temperature_c": 70, "power_w": 200.0, "memory_device_mb": 4000, "utilization_percent": 50},
        {"sm_mhz": 1200, "processes": [[OWN, 2500.0]]},
        {"sm_mhz": 1400},
    ]
    found = seen(*inside, before={"sm_mhz": 210, "temperature_c": 99, "throttle_reasons": 0x40}).summary()
    assert found["samples"] == 3
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


@pytest.mark.parametrize("name", [name for name in monitor.SAMPLED if name != "processes"])
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
    assert set(found["rows"]) == {"t_s", *monitor.SAMPLED} - {"processes"}
    assert {len(values) for values in found["rows"].values()} == {251}
    assert len(monitor.thin([row(n) for n in range(300)])["t_s"]) == 300


def test_a_container_is_recognised() -> None:
    """It is a new pid namespace, in which the new process is number 1."""
    look = "import os, pq_sweep.monitor as m; print(os.getpid(), m._is_isolated())"
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", look]
    try:
        inside = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a kernel that lets users make namespaces, and unshare")
    assert inside == ["1", "True"]


# --- which device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "uuid", "visible", "wanted"),
    [
        (0, None, None, 0),
        (3, None, None, 3),
        (0, "aa", None, "aa"),
        (0, None, "2,0", 2),
        (1, None, " 2 , 0 ", 0),
        (1, None, "GPU-bb,GPU-aa", "GPU-aa"),
        (0, "bb", "2,0", "bb"),
        (0, "bb", "", "bb"),
        (0, "bb", "MIG-1", "MIG-1"),
        (0, None, "MIG-GPU-aa/1/0", "MIG-GPU-aa/1/0"),
        (1, "bb", "MIG-1,GPU-bb", "bb"),
    ],
)
def test_cuda_visible_devices_says_which(index: int, uuid: str | None, visible: str | None, wanted: int | str) -> None:
    assert monitor.wanted_device(index, uuid, visible) == wanted


@pytest.mark.parametrize(("index", "visible"), [(0, ""), (2, "2,0"), (1, "0,-1,1"), (0, "none"), (1, "0,x,1")])
def test_a_device_that_cuda_does_not_see_is_absent(index: int, visible: str) -> None:
    with pytest.raises(Absent, match=f"CUDA_VISIBLE_DEVICES={visible} has no device {index}"):
        monitor.wanted_device(index, None, visible)


EQUAL = [("GPU-aa11", "V100"), ("GPU-aa22", "V100"), ("GPU-bb11", "V100")]
UNEQUAL = [("GPU-aa11", "T4"), ("GPU-aa22", "V100")]


@pytest.mark.parametrize(
    ("wanted", "known", "order", "place"),
    [
        (1, EQUAL, None, 1),
        (1, EQUAL, "FASTEST_FIRST", 1),
        (1, UNEQUAL, "PCI_BUS_ID", 1),
        ("GPU-aa22", UNEQUAL, None, 1),
        ("GPU-bb", EQUAL, None, 2),
        ("bb11", EQUAL, None, 2),
        ("cc11", EQUAL, None, "MIG-cc11"),
        ("MIG-cc11", EQUAL, None, "MIG-cc11"),
    ],
)
def test_a_gpu_is_found(wanted: int | str, known: list[tuple[str, str]], order: str | None, place: int | str) -> None:
    assert monitor.choose_gpu(wanted, known, order) == place


@pytest.mark.parametrize(
    ("wanted", "known", "reason"),
    [
        (0, UNEQUAL, "set CUDA_DEVICE_ORDER=PCI_BUS_ID"),
        (3, EQUAL, "NVML sees 3 GPUs, and CUDA's number 3"),
        ("GPU-aa", EQUAL, "2 of the 3 GPUs"),
        ("GPU-cc", EQUAL, "0 of the 3 GPUs"),
    ],
)
def test_a_gpu_that_is_not_clear_is_absent(wanted: int | str, known: list[tuple[str, str]], reason: str) -> None:
    with pytest.raises(Absent, match=reason):
        monitor.choose_gpu(wanted, known, None)


MACHINE = [
    {"uuid": "GPU-aa11", "name": "A100", "forbidden": True},
    {"uuid": "GPU-bb11", "name": "A100"},
    {"uuid": "GPU-cc11", "name": "A100", "instances": ["MIG-1", "MIG-2"]},
    {"uuid": "GPU-dd11", "name": "A100", "instances": ["MIG-3"]},
]


@pytest.mark.parametrize(
    ("index", "uuid", "visible", "found"),
    [
        (0, None, None, Device("GPU-bb11", "GPU-bb11")),  # CUDA does not count what is forbidden either
        (0, "bb11", "0", Device("GPU-bb11", "GPU-bb11")),
        (0, None, "MIG-2", Device("GPU-cc11", "MIG-2", mig=True)),
        (0, "2", None, Device("GPU-cc11", "MIG-2", mig=True)),
        (0, "GPU-cc11", "MIG-1", Device("GPU-cc11", "MIG-1", mig=True)),
        (1, None, None, Device("GPU-cc11", None, mig=True)),
        (2, None, None, Device("GPU-dd11", "MIG-3", mig=True)),
    ],
)
def test_a_device_is_found_among_gpus_and_instances(
    driver: Driver, index: int, uuid: str | None, visible: str | None, found: Device
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert monitor.locate(driver(gpus=MACHINE), index, uuid, environ) == found


def test_an_instance_has_no_power_of_its_own(driver: Driver) -> None:
    missing: dict[str, str] = {}
    found = monitor.read(driver(gpus=MACHINE), monitor.SAMPLED, Device("GPU-cc11", "MIG-2", mig=True), missing)
    assert set(missing) == {"power_w", "energy_j", "utilization_percent"}
    assert {*missing.values()} == {"NVML knows it of whole GPUs only, and this is a MIG instance"}
    assert set(found) == set(monitor.SAMPLED) - set(missing)


def test_memory_and_processes_need_to_know_the_instance(driver: Driver) -> None:
    missing: dict[str, str] = {}
    monitor.read(driver(gpus=MACHINE), monitor.SAMPLED, Device("GPU-cc11", None, mig=True), missing)
    assert {name for name, reason in missing.items() if "does not name the instance" in reason} == {
        "memory_device_mb",
        "processes",
    }


# --- identity ---------------------------------------------------------------------------------------------------------


def test_a_gpu_is_identified(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(gpus=[{"uuid": "GPU-aa11", "name": "V100"}, {"uuid": "GPU-bb11", "name": "V100"}])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert identify(None) == {
        "uuid": "GPU-bb11",
        "name": "V100",
        "pci": "00000000:07:00.0",
        "vbios": "92.00",
        "driver": "580.1",
        "cuda_driver": "13.2",
        "memory_mb": 40_000,
        "ecc": True,
        "persistence": False,
        "power_limit_w": 400,
        "sm_max_mhz": 1410,
        "memory_max_mhz": 1593,
        "pcie_generation": 3,
        "pcie_max_generation": 4,
        "pcie_width": 8,
        "pcie_max_width": 16,
        "unavailable": dict.fromkeys(("mig", "sm_application_mhz", "memory_application_mhz"), "Not Supported"),
    }
    assert identify("aa11")["uuid"] == "GPU-aa11"


def test_a_gpu_that_is_not_there_is_not_identified(driver: Driver) -> None:
    driver()
    assert identify("GPU-zz") == {"unavailable": {"nvml": "0 of the 1 GPUs that NVML sees have the UUID GPU-zz"}}


def test_the_stand_in_has_the_functions_of_the_real_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that the monitor uses exists in both with the same parameters, besides those with defaults."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    real = pytest.importorskip("pynvml", reason="needs nvidia-ml-py to compare with")
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    stand_in = loaded(tmp_path / "pynvml.py")
    tree = ast.parse(Path(monitor.__file__).read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nvml"
    }
    assert len(used) > 30
    for name in sorted(used):
        ours, theirs = getattr(stand_in, name), getattr(real, name)
        if name.startswith("nvml"):
            assert parameters(ours) == parameters(theirs), name
        elif name.startswith("NVML_"):
            assert ours == theirs, name
    assert issubclass(real.NVMLError_FunctionNotFound, real.NVMLError)


def parameters(function: Any) -> list[str]:
    found = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in found if parameter.default is parameter.empty]


# --- the sampling process ---------------------------------------------------------------------------------------------


def pid_of(watched: Monitor) -> int:
    assert isinstance(watched.watcher, Sampler)
    assert watched.watcher.process
    return watched.watcher.process.pid


def is_alive(pid: int) -> bool:
    """Say whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(done: Callable[[], bool], seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.02)
    return done()


def test_a_gpu_is_sampled_by_another_process(driver: Driver) -> None:
    driver(others=[1], reasons=0x4)
    with Monitor("cuda:0") as watched:
        assert is_alive(pid_of(watched))
        time.sleep(1.3)
    assert not is_alive(pid_of(watched))
    found = watched.result
    assert found["device"] == "cuda:0"
    assert (found["uuid"], found["mig"], found["sm_max_mhz"], found["power_limit_w"]) == ("GPU-aa11", False, 1410, 400)
    assert found["seconds"] >= 1.3
    assert found["sampled_s"] >= found["seconds"]  # the first sample comes before the window, the last one after it
    # The stand-in counts 5 J every 50 ms.
    assert found["energy_j"] == pytest.approx(100 * found["sampled_s"], abs=10)
    assert 2 <= found["samples"] <= found["seconds"] / monitor.PERIOD_S + 1
    assert found["rows"]["t_s"] == sorted(set(found["rows"]["t_s"]))
    assert found["sm_mhz"] == {"min": 1300, "median": 1300, "max": 1300}
    assert (found["temperature_c"], found["power_w"], found["utilization_percent"]) == (61, 250, 80)
    assert (found["memory_device_mb"], found["memory_process_mb"]) == (3000, 2000)
    assert (found["other_pids"], found["verdicts"]) == ([1], ["power_capped", "shared"])
    assert found["throttle_reasons"] == ["sw_power_cap"]
    assert not found["unavailable"].keys() - {"processes_outside"}
    json.dumps(found, allow_nan=False)


def test_older_drivers_give_their_reasons_too(driver: Driver) -> None:
    driver(reasons_before_535=0x40)
    with Monitor("cuda:0") as watched:
        pass
    assert watched.result["throttle_reasons"] == ["hw_thermal"]


def test_the_device_is_found_in_the_process_too(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(gpus=MACHINE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    for uuid, found in ((None, "MIG-3"), ("bb11", "GPU-bb11"), ("MIG-2", "MIG-2")):
        with Monitor("cuda:0", uuid) as watched:
            pass
        assert watched.result["uuid"] == found


def test_a_figure_that_fails_on_the_way_is_told(driver: Driver) -> None:
    driver(power={"raises": "GPU is lost", "at": 3}, temperature={"raises": "Not Supported"})
    with Monitor("cuda:0") as watched:
        time.sleep(0.8)
    unavailable = watched.result["unavailable"]
    assert watched.result["power_w"] == 250
    assert unavailable["power_w"].startswith("GPU is lost (in ")
    assert unavailable["temperature_c"] == "Not Supported"
    assert "temperature_c" not in watched.result


def test_the_sampling_process_imports_nothing_heavy(driver: Driver) -> None:
    """Nor does it need what site-packages import at the start of Python."""
    driver()
    command = [sys.executable, "-S", "-X", "importtime", *Sampler(0, None).command[1:]]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True)
    assert [*json.loads(done.stdout.splitlines()[1])] == ["rows", "missing"]
    assert not imported(done.stderr) & (HEAVY | {"numpy", "pq_sweep"})


def test_signals_to_the_job_do_not_end_the_sampling(driver: Driver) -> None:
    driver()
    with Monitor("cuda:0") as watched:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(pid_of(watched), number)
    assert watched.result["samples"]
    assert "samples" not in watched.result["unavailable"]


MEASURING = """
import os, sys, time
from pq_sweep.monitor import Monitor
with Monitor("cuda:0") as watched:
    if sys.argv[1] == "forks" and not os.fork():
        time.sleep(60)
    print(watched.watcher.process.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("and_", ["ends", "forks"])
def test_the_sampling_process_ends_with_the_one_that_it_samples_for(driver: Driver, and_: str) -> None:
    """A forked process keeps the pipe open that would have told it."""
    driver()
    command = [sys.executable, "-c", MEASURING, and_]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as measuring:
        try:
            assert measuring.stdout
            sampling = int(measuring.stdout.readline())
            assert is_alive(sampling)
            measuring.kill()
            assert wait_for(lambda: not is_alive(sampling))
        finally:
            os.killpg(measuring.pid, signal.SIGKILL)


def test_a_sampling_process_that_died_is_told(driver: Driver) -> None:
    driver()
    with Monitor("cuda:0") as watched:
        os.kill(pid_of(watched), signal.SIGKILL)
    found = watched.result
    assert found["unavailable"] == {"samples": "the sampling process ended early, signal 9"}
    assert (found["verdicts"], found["uuid"]) == ([], "GPU-aa11")


def test_a_sampling_process_that_broke_is_told(driver: Driver) -> None:
    driver(power={"breaks": "out of luck", "at": 2})
    with Monitor("cuda:0") as watched:
        assert wait_for(lambda: not is_alive(pid_of(watched)))
    reason = "the sampling process ended early, exit code 1 RuntimeError: out of luck"
    assert watched.result["unavailable"] == {"samples": reason}


def test_a_driver_that_hangs_blocks_nobody(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(power={"hangs": 60, "at": 2})
    monkeypatch.setattr(monitor, "STOP_S", 0.3)
    with Monitor("cuda:0") as watched:
        time.sleep(0.2)
    reason = "the sampling process did not answer for 0.3 s and was killed"
    assert watched.result["unavailable"] == {"samples": reason}
    assert not is_alive(pid_of(watched))


def test_a_driver_that_hangs_at_the_start_blocks_nobody(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(init={"hangs": 60})
    monkeypatch.setattr(monitor, "START_S", 0.3)
    with Monitor("cuda:0") as watched:
        pass
    assert watched.result["unavailable"] == {"nvml": "the sampling process took no sample within 0.3 s"}
    assert watched.result["verdicts"] == []
    assert not is_alive(pid_of(watched))


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ({"raises": "Driver Not Loaded"}, "NVML says: Driver Not Loaded"),
        ({"breaks": "out of luck"}, "the sampling process ended early, exit code 1 RuntimeError: out of luck"),
    ],
)
def test_a_driver_that_does_not_start_is_told(driver: Driver, init: dict[str, str], reason: str) -> None:
    driver(init=init)
    with Monitor("cuda:0") as watched:
        time.sleep(0.05)
    assert watched.result["unavailable"] == {"nvml": reason}
    assert watched.result["seconds"] >= 0.05


def test_without_nvidia_ml_py_a_sentence_says_so(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver()
    (Path(os.environ["PYTHONPATH"]) / "pynvml.py").write_text("raise ImportError")
    with Monitor("cuda:0") as watched:
        pass
    expected = {"nvml": "the package nvidia-ml-py is not installed"}
    assert watched.result["unavailable"] == expected
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert identify(None) == {"unavailable": expected}


def test_a_python_that_is_not_there_is_told(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with Monitor("cuda:0") as watched:
        pass
    assert "No such file" in watched.result["unavailable"]["nvml"]


def test_an_error_of_the_measurement_goes_through(driver: Driver) -> None:
    driver()
    watched = Monitor("cuda:0")
    with pytest.raises(KeyError, match="mine"), watched:
        raise KeyError("mine")
    assert watched.result["uuid"] == "GPU-aa11"
    assert not is_alive(pid_of(watched))


@pytest.mark.gpu
def test_a_real_gpu_is_watched() -> None:
    """Compared with nvidia-smi, which asks the same driver."""
    import torch

    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    work = torch.randn(4096, 4096, device="cuda:0")
    with Monitor("cuda:0", uuid) as watched:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            work @ work
            torch.cuda.synchronize()
    found = watched.result
    query = "--query-gpu=clocks.max.sm,power.limit,driver_version"
    asked = ["nvidia-smi", f"--id={found['uuid']}", query, "--format=csv,noheader,nounits"]
    clock, limit, version = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split(", ")
    assert found["uuid"] == f"GPU-{uuid}"
    assert (found["sm_max_mhz"], found["power_limit_w"]) == (int(clock), pytest.approx(float(limit), abs=0.01))
    assert identify(uuid)["driver"] == version.strip()
    assert found["samples"] > 5
    assert 0 < found["sm_mhz"]["min"] <= found["sm_mhz"]["max"] <= int(clock)
    # Whatever the GPU does, it draws less than its limit by far too little to miss a factor of a thousand.
    assert 10 < found["energy_j"] / found["sampled_s"] < 2 * float(limit)
    assert found["memory_device_mb"] > 4096 * 4096 * 4 / 1e6


# --- CPU --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def powercap() -> Iterator[Path]:
    """Two packages of a machine that has RAPL, in a folder that any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for domain, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "core"), ("0:1", "dram"), ("2", "psys")):
            path = Path(folder, f"intel-rapl:{domain}")
            path.mkdir()
            (path / "name").write_text(f"{name}\n")
            (path / "max_energy_range_uj").write_text("262143328850\n")
            (path / "energy_uj").write_text("1000000\n")
        (Path(folder) / "intel-rapl").mkdir()
        yield Path(folder)


def use(powercap: Path, domain: str, energy_uj: int) -> None:
    (powercap / f"intel-rapl:{domain}" / "energy_uj").write_text(f"{energy_uj}\n")


def test_energy_of_a_cpu_is_that_of_its_packages(powercap: Path) -> None:
    with Monitor("cpu", powercap=powercap) as watched:
        for domain, energy_uj in (("0", 31_000_000), ("1", 13_500_000), ("0:0", 9e9), ("0:1", 9e9), ("2", 9e9)):
            use(powercap, domain, int(energy_uj))
    assert watched.result["energy_j"] == 42.5
    assert watched.result["verdicts"] == []
    assert watched.result["device"] == "cpu"
    json.dumps(watched.result, allow_nan=False)


def test_the_energy_counter_of_a_cpu_may_wrap(powercap: Path) -> None:
    use(powercap, "0", 262_143_000_000)
    with Monitor("cpu", powercap=powercap) as watched:
        use(powercap, "0", 671_150)
    assert watched.result["energy_j"] == pytest.approx(1.0)


def test_a_counter_that_may_have_wrapped_twice_is_not_told() -> None:
    before, after = {"package": (0, 65_532_610_987)}, {"package": (5_000_000, 65_532_610_987)}
    assert monitor.joules(before, after, 100) == 5
    with pytest.raises(Absent, match="in 120 s the counter may have wrapped more than once"):
        monitor.joules(before, after, 120)


def test_packages_that_change_are_not_told(powercap: Path) -> None:
    with Monitor("cpu", powercap=powercap) as watched:
        (powercap / "intel-rapl:1" / "name").write_text("psys")
    assert "changed meanwhile" in watched.result["unavailable"]["energy_j"]


def test_a_cpu_without_rapl_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with Monitor("cpu", powercap=folder) as watched:
            pass
        assert watched.result["unavailable"]["energy_j"].startswith(f"{folder} has no CPU package")
        assert "energy_j" not in watched.result


@contextmanager
def other_user() -> Iterator[None]:
    """Act as a user without rights, if this one is root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_counter_for_root_alone_says_so(powercap: Path) -> None:
    for path in powercap.glob("*/energy_uj"):
        path.chmod(0o400 if os.geteuid() == 0 else 0)
    with other_user(), Monitor("cpu", powercap=powercap) as watched:
        pass
    reason = watched.result["unavailable"]["energy_j"]
    assert "Permission denied" in reason
    assert "CVE-2020-8694" in reason


def test_a_counter_that_makes_no_sense_says_so(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text("")
    with Monitor("cpu", powercap=powercap) as watched:
        pass
    assert "invalid literal" in watched.result["unavailable"]["energy_j"]


def test_clocks_are_those_of_the_cores_that_may_be_used(tmp_path: Path) -> None:
    for core, khz in ((0, 3_600_000), (1, 800_000), (2, 2_000_000)):
        (tmp_path / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "cpufreq" / "scaling_cur_freq").write_text(f"{khz}\n")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(f"processor\t: {n}\nmodel name\t: A\ncpu MHz\t\t: {n}500.25\n\n" for n in (1, 2, 12)))
    assert monitor.core_mhz({0, 2}, tmp_path, cpuinfo) == [3600, 2000]
    assert monitor.core_mhz({2, 12}, tmp_path / "nowhere", cpuinfo) == [2500.25, 12500.25]
    assert monitor.core_mhz({2, 12}, tmp_path, cpuinfo) == [2500.25, 12500.25]  # cpufreq does not know all of them
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert monitor.core_mhz({0}, tmp_path / "nowhere", cpuinfo) == []
    assert monitor.core_mhz({0}, tmp_path / "nowhere", tmp_path / "nowhere") == []


def test_clocks_are_looked_at_before_and_after(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([[3000.0, 1000.0], [3500.0, 3200.0]])
    monkeypatch.setattr(monitor, "core_mhz", lambda _: next(looks))
    with Monitor("cpu", powercap=powercap) as watched:
        pass
    assert watched.result["cpu_mhz"] == {"min": 1000, "median": 3100, "max": 3500}


def test_a_cpu_that_does_not_tell_its_clock_says_so(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "core_mhz", lambda _: [])
    with Monitor("cpu", powercap=powercap) as watched:
        pass
    assert set(watched.result["unavailable"]) == {"cpu_mhz"}


def test_who_must_share_a_core_is_interrupted() -> None:
    """Another process that never waits runs on the same core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1) as other:
            assert other.stdout
            other.stdout.readline()
            with Monitor("cpu") as watched:
                end = time.process_time() + 0.3
                while time.process_time() < end:
                    pass
            other.kill()
    finally:
        os.sched_setaffinity(0, cores)
    assert watched.result["involuntary_switches"] > 3


def test_watching_a_cpu_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with Monitor("cpu") as watched:
        pass
    assert watched.result["seconds"] < 60
