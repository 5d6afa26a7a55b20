"""A driver that answers by a script, in the place of pynvml in a process and its children."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

# What it is to answer is in STAND_IN of the environment, or what goes wrong and from which call on.
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
    if handle.startswith("MIG-"):
        return nvmlDeviceGetName(nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)) + " MIG 1g.5gb"
    return gpu_of(handle)["name"]

def nvmlDeviceGetGpuInstanceId(device):
    return 7 + gpu_of(nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device))["instances"].index(device)

def nvmlDeviceGetComputeInstanceId(device):
    return 0

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

def nvmlDeviceGetComputeMode(handle):
    return gpu_of(handle).get("compute_mode", 0)

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
MACHINE = [
    {"uuid": "GPU-aa11", "name": "A100", "forbidden": True},
    {"uuid": "GPU-bb11", "name": "A100"},
    {"uuid": "GPU-cc11", "name": "A100", "instances": ["MIG-1", "MIG-2"]},
    {"uuid": "GPU-dd11", "name": "A100", "instances": ["MIG-3"]},
]

Driver = Callable[..., ModuleType]


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Put the driver where this process and its children import pynvml from; what it answers can be given."""
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
