"""Which GPU a device is, and what it is: the driver is played, and where there is a GPU it is asked too."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from nvml_stand_in import MACHINE, STAND_IN, Driver, loaded, stand_in

from pq_sweep.measure.monitor import identify, identity, nvml
from pq_sweep.measure.monitor.nvml import Absent, Device


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return stand_in(tmp_path / "driver", monkeypatch)


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
    assert nvml.wanted_device(index, uuid, visible) == wanted


@pytest.mark.parametrize(("index", "visible"), [(0, ""), (2, "2,0"), (1, "0,-1,1"), (0, "none"), (1, "0,x,1")])
def test_a_device_that_cuda_does_not_see_is_absent(index: int, visible: str) -> None:
    with pytest.raises(Absent, match=f"CUDA_VISIBLE_DEVICES={visible} has no device {index}"):
        nvml.wanted_device(index, None, visible)


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
    assert nvml.choose_gpu(wanted, known, order) == place


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
        nvml.choose_gpu(wanted, known, None)


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
    assert nvml.locate(driver(gpus=MACHINE), index, uuid, environ) == found


def test_an_instance_has_no_power_of_its_own(driver: Driver) -> None:
    missing: dict[str, str] = {}
    found = nvml.read(driver(gpus=MACHINE), nvml.SAMPLED, Device("GPU-cc11", "MIG-2", mig=True), missing)
    assert set(missing) == {"power_w", "energy_j", "utilization_percent"}
    assert {*missing.values()} == {"NVML knows it of whole GPUs only, and this is a MIG instance"}
    assert set(found) == set(nvml.SAMPLED) - set(missing)


def test_memory_and_processes_need_to_know_the_instance(driver: Driver) -> None:
    missing: dict[str, str] = {}
    nvml.read(driver(gpus=MACHINE), nvml.SAMPLED, Device("GPU-cc11", None, mig=True), missing)
    assert {name for name, reason in missing.items() if "does not name the instance" in reason} == {
        "memory_device_mb",
        "processes",
    }


@pytest.mark.parametrize(("look_s", "pause_s"), [(0.0, 0.1), (0.0005, 0.1), (0.001, 0.1), (0.02, 2.0)])
def test_looks_take_less_than_a_hundredth_of_the_time(look_s: float, pause_s: float) -> None:
    """Else they might be in the slowest hundredth of the calls that are timed meanwhile, which is what p99 tells."""
    assert nvml.pause({"look_s": look_s}) == pytest.approx(pause_s)


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
        "compute_mode": "default",
        "persistence": False,
        "power_limit_w": 400,
        "sm_max_mhz": 1410,
        "memory_max_mhz": 1593,
        "pcie_generation": 3,
        "pcie_max_generation": 4,
        "pcie_width": 8,
        "pcie_max_width": 16,
        "unavailable": dict.fromkeys(("mig", "sm_application_mhz", "memory_application_mhz"), "Not Supported")
        | {"mig_instance": "the GPU is not divided into MIG instances"},
    }
    assert identify("aa11")["uuid"] == "GPU-aa11"


def test_an_instance_is_identified_with_the_gpu_around_it(driver: Driver) -> None:
    driver(gpus=MACHINE)
    found = identify("MIG-2")
    assert (found["uuid"], found["name"], found["mig"]) == ("MIG-2", "A100 MIG 1g.5gb", True)
    assert found["mig_instance"] == {"gpu_uuid": "GPU-cc11", "gpu_instance": 8, "compute_instance": 0}
    assert set(found["unavailable"]) == {"sm_application_mhz", "memory_application_mhz"}


def test_a_divided_gpu_is_identified_without_the_instance(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(gpus=MACHINE[2:3])
    found = identify(None)
    assert (found["mig"], found["driver"]) == (True, "580.1")
    unknown = {name for name, reason in found["unavailable"].items() if "does not name the instance" in reason}
    assert unknown == {"uuid", "name", "memory_mb", "mig_instance"}


def test_a_gpu_that_is_not_there_is_not_identified(driver: Driver) -> None:
    driver()
    assert identify("GPU-zz") == {"unavailable": {"nvml": "0 of the 1 GPUs that NVML sees have the UUID GPU-zz"}}


def test_the_stand_in_has_the_functions_of_the_real_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that the monitor uses exists in both with the same parameters, besides those with defaults."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    real = pytest.importorskip("pynvml", reason="needs nvidia-ml-py to compare with")
    (tmp_path / "pynvml.py").write_text(STAND_IN)
    stand_in = loaded(tmp_path / "pynvml.py")
    trees = [ast.parse(Path(module.__file__).read_text()) for module in (nvml, identity)]
    used = {
        node.attr
        for tree in trees
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
