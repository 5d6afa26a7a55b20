"""The sampling process: the driver is played, all else is real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from commands import HEAVY, imported
from nvml_stand_in import MACHINE, Driver, stand_in

from pq_sweep.measure.monitor import Monitor, identify, nvml, sampler
from pq_sweep.measure.monitor.sampler import Sampler

NOBODY = 2**22 + 1  # Linux counts processes to 2**22


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    return stand_in(tmp_path / "driver", monkeypatch)


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


@pytest.mark.slow
def test_a_gpu_is_sampled_by_another_process(driver: Driver) -> None:
    driver(others=[NOBODY], reasons=0x4)
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
    assert 2 <= found["samples"] <= found["seconds"] / nvml.PERIOD_S + 1
    assert found["rows"]["t_s"] == sorted(found["rows"]["t_s"])
    assert found["sm_mhz"] == {"min": 1300, "median": 1300, "max": 1300}
    assert (found["temperature_c"], found["power_w"], found["utilization_percent"]) == (61, 250, 80)
    assert (found["memory_device_mb"], found["memory_process_mb"]) == (3000, 2000)
    assert (found["other_pids"], found["verdicts"]) == ([NOBODY], ["power_capped", "shared"])
    assert found["throttle_reasons"] == ["sw_power_cap"]
    assert not found["unavailable"].keys() - {"processes_outside"}
    json.dumps(found, allow_nan=False)


def test_a_driver_that_answers_slowly_is_asked_seldom(driver: Driver) -> None:
    driver(power={"hangs": 0.02})
    with Monitor("cuda:0", "aa11") as watched:
        time.sleep(0.6)

    assert watched.result["look_ms"]["min"] > 20
    assert watched.result["samples"] == 2  # just before and just after


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
    assert [*json.loads(done.stdout.splitlines()[1])] == ["rows", "missing", "family"]
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
from pq_sweep.measure.monitor import Monitor
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


@contextmanager
def orphan() -> Iterator[int]:
    """Run a process whose parent has ended, so that nothing connects it with this one."""
    command = ["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"]
    pid = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)


WITH_A_FAMILY = """
import json, os, subprocess, sys
from pq_sweep.measure.monitor import Monitor
with subprocess.Popen(["sleep", "60"]) as child:
    others = [os.getppid(), child.pid, *map(int, sys.argv[1:])]
    os.environ["STAND_IN"] = json.dumps({"others": others})
    with Monitor("cuda:0") as watched:
        child.kill()
        child.wait()
print(json.dumps(watched.result))
"""


def test_a_process_shares_a_device_with_others_but_not_with_its_family(driver: Driver) -> None:
    """It measures while its parent, which is this process, and its child, which ends meanwhile, compute there too."""
    driver()
    with orphan() as stranger:
        for more, verdicts in (([], []), ([stranger], ["shared"])):
            command = [sys.executable, "-c", WITH_A_FAMILY, *map(str, more)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            assert (found["other_pids"], found["verdicts"]) == (more, verdicts)
            assert found["memory_process_mb"] == 2000


def test_ancestors_and_descendants_are_the_family(tmp_path: Path) -> None:
    odd = tmp_path / "a) S 1 (b"  # the kernel tells the name of a program unquoted, just before its parent
    shutil.copy(str(shutil.which("sh")), odd)
    own, script = os.getpid(), 'sleep 60 & echo "$!"; wait'
    with subprocess.Popen(["sh", "-c", script], executable=odd, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        grandchild = int(child.stdout.readline())
        try:
            assert all(nvml.is_related(pid, own) for pid in (own, child.pid, grandchild))
            assert all(nvml.is_related(pid, grandchild) for pid in (own, child.pid))
        finally:
            os.kill(grandchild, signal.SIGKILL)
    assert nvml.is_related(grandchild, own)  # although it has ended
    assert not nvml.is_related(NOBODY, own)
    with orphan() as stranger:
        assert not nvml.is_related(stranger, own)


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
    monkeypatch.setattr(sampler, "STOP_S", 0.3)
    with Monitor("cuda:0") as watched:
        time.sleep(0.2)
    reason = "the sampling process did not answer for 0.3 s and was killed"
    assert watched.result["unavailable"] == {"samples": reason}
    assert not is_alive(pid_of(watched))


def test_a_driver_that_hangs_at_the_start_blocks_nobody(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(init={"hangs": 60})
    monkeypatch.setattr(sampler, "START_S", 0.3)
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


def test_a_container_is_recognised() -> None:
    """It is a new pid namespace, in which the new process is number 1."""
    look = "import os, pq_sweep.measure.monitor.sampler as m; print(os.getpid(), m._is_isolated())"
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", look]
    try:
        inside = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a kernel that lets users make namespaces, and unshare")
    assert inside == ["1", "True"]
