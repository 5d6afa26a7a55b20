"""The check of a GPU machine: what it says without one, how it judges, and its tests and sweep run for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import HEAVY, Done, imported, said
from conftest import ROOT, new_user, python
from gpu.test_answers import BY_OPTION, BY_PRECISION
from hydra import compose, initialize_config_dir

from pq_sweep import gpu_check as command
from pq_sweep.core.environment import device_name
from pq_sweep.core.files import write_json
from pq_sweep.doctor.gpu_check import Check, Verdict
from pq_sweep.doctor.gpu_check.children import python_path, run_python
from pq_sweep.doctor.gpu_check.jobs import DIGITS, NO_TIME, SHORT, Launch, check_job, check_store, launches, run_sweep
from pq_sweep.doctor.gpu_check.report import assemble, problem, slug
from pq_sweep.doctor.gpu_check.suite import run_tests
from pq_sweep.job.check import problems

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
# What no job with the digits under torch needs.
OPTIONAL = ("mlflow", "tensorrt", "onnxruntime", "onnx", "onnxscript", "torchvision", "torch_pruning", "matplotlib",
            "sqlalchemy", "submitit", "requests", "pynvml")  # fmt: skip
TORCH_TESTED = Check("tests", "test_torch::test_it", "passed")
TORCH_SWEPT = Check("sweep", "resnet50 none fp16 torch", "passed")


def without(folder: Path, *modules: str) -> dict[str, str]:
    """Return an environment in which a Python finds none of the modules."""
    lines = ["import sys", *(f"sys.modules[{module!r}] = None" for module in modules)]
    (folder / "sitecustomize.py").write_text("\n".join(lines))
    return new_user() | {"PYTHONPATH": str(folder)}


def gpu_check(folder: Path, env: dict[str, str], *options: str) -> Done:
    return python([*options, "-m", "pq_sweep.gpu_check", "--output", str(folder / "results")], ROOT, env)


def sentence(done: Done) -> str:
    """Return the one line that a failing command says."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    (line,) = said(done.stderr)
    return line


# Without a GPU


@pytest.mark.slow
def test_without_a_gpu_it_says_so_and_looks_no_further(tmp_path: Path) -> None:
    done = gpu_check(tmp_path, new_user() | NO_GPU, "-X", "importtime")

    assert sentence(done).startswith(f"gpu-check needs a CUDA device and torch {torch.__version__} finds none here (")
    assert imported(done.stderr) & {*HEAVY, "hydra", "pytest", "rich"} == {"torch"}
    assert not (tmp_path / "results").exists()


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    assert "this Python has no torch" in sentence(gpu_check(tmp_path, without(tmp_path, "torch")))


@pytest.mark.slow
def test_make_says_that_there_is_no_gpu_and_fails() -> None:
    command = ["make", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, env=new_user() | NO_GPU, capture_output=True, text=True, check=False)

    assert done.returncode != 0
    assert done.stderr.startswith("gpu-check needs a CUDA device")


def test_missing_packages_are_named_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.absent() == ""
    for module in ("zstandard", "hydra_plugins.hydra_submitit_launcher"):
        monkeypatch.setitem(sys.modules, module, None)

    assert command.absent().startswith("gpu-check needs hydra-submitit-launcher, zstandard, which this Python lacks; ")


# Processes


def alive(pid: int) -> bool:
    """Say whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_what_a_process_started_ends_with_it(tmp_path: Path) -> None:
    started = tmp_path / "pid"
    script = f"sleep 300 & echo $! > {started}.new; mv {started}.new {started}; exec sleep 300"
    code = run_python(["-c", f"import os; os.execvp('sh', ['sh', '-c', {script!r}])"], tmp_path, 4.0, tmp_path / "log")

    assert code is None
    deadline = time.monotonic() + 5
    while alive(int(started.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int(started.read_text()))


def test_the_python_path_means_the_same_in_every_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)

    assert python_path({}) == str(ROOT)
    assert python_path({"PYTHONPATH": "wheels::/else"}) == os.pathsep.join(
        map(str, [ROOT, tmp_path / "wheels", "/else"])
    )


# Tests

GENERATED = """
import pytest

pytestmark = pytest.mark.gpu


def test_passes(record_property):
    record_property("ratio", "1.003")


def test_fails():
    assert 1 + 1 == 3, "sums are wrong"


def test_is_skipped():
    pytest.skip("tensorrt is not installed")


@pytest.fixture
def broken():
    raise RuntimeError("no such fixture")


@pytest.mark.parametrize("name", ["a"])
def test_cannot_start(broken, name):
    pass
"""
SLEEPING = """
import time
import pytest

pytestmark = pytest.mark.gpu


def test_quick():
    pass


def test_slow():
    time.sleep(300)


def test_never_reached():
    pass
"""


def outcomes_of(folder: Path, source: str, seconds: float = 60) -> dict[str, Check]:
    """Run a module of tests and return the checks by name."""
    tests, scratch = folder / "tests", folder / "scratch"
    tests.mkdir()
    scratch.mkdir()
    (tests / "test_generated.py").write_text(source)
    return {check.name.removeprefix("test_generated::"): check for check in run_tests(tests, scratch, seconds)}


def test_every_outcome_of_a_test_is_told(tmp_path: Path) -> None:
    found = outcomes_of(tmp_path, GENERATED)

    outcomes = {name: (check.verdict, check.reason) for name, check in found.items()}
    assert outcomes == {
        "test_passes": ("passed", ""),
        "test_fails": ("failed", "AssertionError: sums are wrong"),
        "test_is_skipped": ("skipped", "tensorrt is not installed"),
        "test_cannot_start[a]": ("failed", 'failed on setup with "RuntimeError: no such fixture"'),
    }
    assert (found["test_passes"].short, found["test_passes"].figures) == ("ratio 1.003", {"ratio": "1.003"})
    assert all(check.part == "tests" and check.seconds is not None for check in found.values())


@pytest.fixture
def in_the_background() -> Iterator[None]:
    """As a shell starts what stands before an `&`: deaf to the keyboard's interrupt."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.usefixtures("in_the_background")
def test_tests_that_take_too_long_are_stopped_and_told(tmp_path: Path) -> None:
    for seconds in (5, 20, 80):  # on a busy machine even the quick test takes its time to begin
        folder = tmp_path / str(seconds)
        folder.mkdir()
        found = outcomes_of(folder, SLEEPING, seconds)
        assert (found["pytest"].verdict, found["pytest"].reason) == (
            "failed",
            f"the tests did not end within {seconds} s",
        )
        if "test_quick" in found:
            break

    assert found["test_quick"].verdict == "passed"
    assert "test_never_reached" not in found


@pytest.mark.parametrize(
    ("source", "reason"),
    [("import nothing_of_this_name", "exit code 2"), ("def test_of_no_gpu(): pass", "exit code 5")],
)
def test_tests_that_do_not_run_are_a_failure(tmp_path: Path, source: str, reason: str) -> None:
    found = outcomes_of(tmp_path, source)

    assert found["pytest"].verdict == "failed"
    assert reason in found["pytest"].reason


# Sweep


def composed(*overrides: str) -> Iterator[Any]:
    """Yield the config of every job of a grid."""
    pairs = [override.partition("=") for override in overrides]
    choices = [[value] if value.startswith("[") else value.split(",") for _, _, value in pairs]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for values in product(*choices):
            yield compose("config", [f"{key}={value}" for (key, _, _), value in zip(pairs, values, strict=True)])


def asked(device: str) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of the sweep and of the tests on the GPU."""
    for launch in launches(device):
        yield (*SHORT, *launch.overrides)
    if device != "cpu":
        yield from ((f"quantizer={quantizer}", f"runtime={runtime}") for quantizer, runtime in BY_PRECISION)
        yield from ((f"runtime={runtime}", f"runtime.{option}") for runtime, option in BY_OPTION)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_nothing_that_is_asked_for_is_refused_before_it_starts(device: str) -> None:
    refused = [problems(config) for overrides in asked(device) for config in composed(f"device={device}", *overrides)]

    assert len(refused) > 10
    assert not any(refused), refused


def test_the_sweep_has_every_runtime_of_the_device_in_all_precisions() -> None:
    names = [launch.name for launch in launches("cuda:0")]

    assert names[:2] == ["digits_cnn torch", "resnet50 torch"]
    for path in (ROOT / "conf" / "runtime").glob("*.yaml"):
        assert path.stem == "auto" or {f"digits_cnn {path.stem}", f"resnet50 {path.stem}"} <= set(names)
    chosen = {launch.name: launch.overrides[-1] for launch in launches("cuda:0")}
    assert chosen["digits_cnn torch"] == "quantizer=none,fp16,bf16"
    assert chosen["digits_cnn tensorrt"] == "quantizer=none,fp16,bf16,int8"
    assert not any("tensorrt" in launch.name for launch in launches("cpu"))


@pytest.mark.slow
def test_the_sweep_runs_on_a_cpu(tmp_path: Path) -> None:
    refused = Launch("impossible", "torch", (*DIGITS, "runtime=torch", "quantizer=int8"))
    tracked = next(launch for launch in launches("cpu") if launch.name == "tracked")
    checks = run_sweep("cpu", [refused, tracked], tmp_path, time.monotonic() + 300)

    assert [check.name for check in checks] == ["impossible", "digits_cnn none none torch", "mlflow"]
    assert [check.verdict for check in checks] == ["failed", "passed", "passed"]
    assert "cannot run precision int8" in checks[0].reason
    assert checks[1].short.startswith("b1 ")
    assert checks[1].figures["accuracy"] > 0.98
    assert checks[1].seconds is not None
    assert (tmp_path / "cache").is_dir()


SWEPT = """
import json, sys, time
from dataclasses import asdict
from pathlib import Path
from pq_sweep.doctor.gpu_check.jobs import launches, run_sweep

planned = [launch for launch in launches("cpu") if launch.name != "pruned"]
checks = run_sweep("cpu", planned, Path(sys.argv[1]), time.monotonic() + 300)
print(json.dumps([asdict(check) for check in checks]))
"""


@pytest.mark.slow
def test_what_is_not_installed_is_skipped_and_torch_is_swept_all_the_same(tmp_path: Path) -> None:
    blocked, jobs = tmp_path / "blocked", tmp_path / "jobs"
    blocked.mkdir()
    jobs.mkdir()
    done = python(["-c", SWEPT, str(jobs)], ROOT, without(blocked, *OPTIONAL), timeout=300)

    assert done.returncode == 0, done.stderr
    found = [Check(**check) for check in json.loads(done.stdout)]
    assert [check.name for check in found if check.verdict == "passed"] == [
        "digits_cnn none none torch",
        "digits_cnn none bf16 torch",
    ]
    skipped = {check.name: check.reason for check in found if check.verdict == "skipped"}
    assert skipped["tracked"] == "mlflow is not installed"
    assert skipped["removed"] == "torch_pruning is not installed"
    assert skipped["resnet50 torch"] == "torchvision is not installed"
    assert "onnxruntime" in skipped["digits_cnn onnxruntime"]
    assert len(skipped) + 2 == len(found)


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    (check,) = run_sweep("cpu", [Launch("late", "torch", ())], tmp_path, time.monotonic() + 1)

    assert (check.verdict, check.reason) == ("skipped", NO_TIME)
    assert list(tmp_path.iterdir()) == []


def job(folder: Path, **changes: Any) -> Check:
    """Judge a job that finished on cuda:0 but for some changes; `error` is the type of what it failed of."""
    row = {"name": "digits_cnn none none torch", "status": "finished", "stage": "", "error": "", "device": "cuda:0"}
    row |= {"dataset": "digits", "accuracy": 0.986, "latency_ms/b1": 0.25} | changes
    if row["error"]:
        write_json(folder / "error.json", {"type": row["error"], "message": "it cannot be."})
    return check_job(row, folder, "cuda:0", changes.pop("ending", "ended with exit code 1: so it was"))


def verdict(check: Check) -> tuple[Verdict, str]:
    return check.verdict, check.reason


def test_a_job_is_judged_by_how_it_ended_where_and_by_its_answers(tmp_path: Path) -> None:
    finished = job(tmp_path)
    assert (verdict(finished), finished.short) == (("passed", ""), "b1 0.25 ms")
    assert verdict(job(tmp_path, device="cpu")) == ("failed", "it ran on cpu instead of cuda:0")
    assert job(tmp_path, accuracy=0.9).reason == "it knows 90.0% of the digits instead of at least 95%"
    assert verdict(job(tmp_path, accuracy=0.001, dataset="fake")) == ("passed", "")


@pytest.mark.parametrize(("error", "expected"), [("UserError", "skipped"), ("RuntimeMismatch", "failed")])
def test_a_job_that_refuses_what_the_machine_lacks_is_skipped(tmp_path: Path, error: str, expected: Verdict) -> None:
    assert verdict(job(tmp_path, status="failed", error=error)) == (expected, "it cannot be.")


def test_a_job_that_did_not_end_failed_unless_it_had_no_time_to_begin(tmp_path: Path) -> None:
    late = "not finished when time was up"

    assert verdict(job(tmp_path, status="missing")) == ("failed", "ended with exit code 1: so it was")
    assert verdict(job(tmp_path, status="missing", ending=late)) == ("skipped", NO_TIME)
    assert verdict(job(tmp_path, status="missing", ending=late, stage="build")) == ("failed", f"{late}, at stage build")


def test_a_store_without_runs_is_a_failure(tmp_path: Path) -> None:
    check = check_store(tmp_path / "mlflow.db", 1)

    assert (check.verdict, check.reason) == ("failed", "the store cannot be read: no such table: runs")


# Report


@pytest.mark.parametrize(
    ("name", "expected"),
    [("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"), ("Tesla V100-SXM2-32GB", "tesla-v100-sxm2-32gb"),
     ("AMD EPYC (8 cores)", "amd-epyc-8-cores")],
)  # fmt: skip
def test_a_report_is_named_after_the_device(name: str, expected: str) -> None:
    assert slug(name) == expected


def green(checks: Iterable[Check]) -> bool:
    return problem(list(checks)) == ""


def test_a_machine_is_green_if_nothing_failed_and_torch_was_tested_and_swept() -> None:
    skipped = Check("sweep", "digits_cnn tensorrt", "skipped", "no TensorRT")

    assert green([TORCH_TESTED, TORCH_SWEPT, skipped])
    assert problem([TORCH_TESTED, TORCH_SWEPT, Check("sweep", "mlflow", "failed")]) == "1 of 3 checks failed"
    assert problem([TORCH_TESTED, skipped]) == "nothing of torch was checked by the sweep"
    assert problem([]) == "nothing of torch was checked by the tests or the sweep"
    assert not green([Check("tests", "test_torch::test_it", "skipped"), TORCH_SWEPT])
    assert not green([TORCH_TESTED, Check("sweep", "resnet50 none fp16 onnxruntime", "passed")])


def test_a_report_says_what_was_not_checked_and_why() -> None:
    checks = [TORCH_TESTED, Check("sweep", "tracked", "skipped", "mlflow is not installed")]
    report = assemble(
        {"device": "NVIDIA L4", "versions": {"torch": "2.11.0"}}, checks, "2026-11-22T10:00:00+00:00", 3.21
    )

    assert report["not_checked"] == {"sweep: tracked": "mlflow is not installed"}
    assert report["counts"] == {"passed": 1, "skipped": 1}
    assert report["problem"] == "nothing of torch was checked by the sweep"
    assert report["environment"]["versions"] == {"torch": "2.11.0"}
    assert [Check(**check) for check in report["checks"]] == checks


@pytest.mark.slow
def test_tests_and_sweep_become_a_report_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one = Launch("digits_cnn torch", "torch", (*DIGITS, "runtime=torch"))
    monkeypatch.setattr(command, "launches", lambda device: [one])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    told = command.check("cpu", tmp_path / "results", budget_s=300)

    assert told == "nothing of torch was checked by the tests"
    (path,) = (tmp_path / "results").iterdir()
    assert path.name == f"{slug(device_name('cpu'))}.json"
    report = json.loads(path.read_text())
    assert report["problem"] == told
    assert report["environment"].keys() >= {"versions", "python", "os", "git", "gpu"}
    assert not report["environment"].keys() & {"host", "command", "slurm"}
    reasons = {reason for name, reason in report["not_checked"].items() if name.startswith("tests: ")}
    assert reasons == {"needs a CUDA device and torch finds none"}
    (swept,) = (check for check in report["checks"] if check["part"] == "sweep")
    assert (swept["name"], swept["verdict"]) == ("digits_cnn none none torch", "passed")
    printed = capfd.readouterr().out
    assert str(path) in printed
    assert "digits_cnn none none torch" in printed
