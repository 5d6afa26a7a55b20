"""The check of a GPU machine: its steps, how it judges, and its tests and sweep run for real."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, hear_signals, new_user, python
from gpu.test_answers import BY_OPTION, BY_PRECISION
from hydra import compose, initialize_config_dir

from pq_sweep import gpu_check as command
from pq_sweep.core.environment import device_name
from pq_sweep.core.files import read_json, write_json
from pq_sweep.doctor.gpu_check import NO_TIME, Check, Limit, Step, Verdict
from pq_sweep.doctor.gpu_check import report as written
from pq_sweep.doctor.gpu_check.children import python_path, run_python
from pq_sweep.doctor.gpu_check.jobs import Launch
from pq_sweep.doctor.gpu_check.machine import Machine
from pq_sweep.doctor.gpu_check.outcomes import check_job, check_store
from pq_sweep.doctor.gpu_check.report import BEGUN, NOT_REACHED, Report, exit_code, problem, slug
from pq_sweep.doctor.gpu_check.steps import DIGITS, STEPS, of_digits, of_tests, of_torch
from pq_sweep.doctor.gpu_check.suite import Suite
from pq_sweep.job.check import problems

TORCH_TESTED = Check("tests", "test_torch::test_it", "passed")
TORCH_SWEPT = Check("sweep", "resnet50 none fp16 torch", "passed")
Checks = dict[str, Check]
GPU = Machine({"device": "NVIDIA L4", "versions": {"torch": "2.11.0"}}, cuda="13.0")


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


def test_left_out():
    pass


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


def outcomes_of(folder: Path, source: str, seconds: float = 60, *, keyword: str = "", cut: bool = False) -> Checks:
    """Run a module of tests and return the checks by name."""
    tests, scratch = folder / "tests", folder / "scratch"
    tests.mkdir()
    scratch.mkdir()
    (tests / "test_generated.py").write_text(source)
    step = Suite(name="step", seconds=60, selected=("test_generated.py",), keyword=keyword, tests=tests)
    checks = step.run("cuda:0", scratch, Limit(seconds, cut))
    return {check.name.removeprefix("test_generated::"): check for check in checks}


def test_every_outcome_of_a_test_is_told(tmp_path: Path) -> None:
    found = outcomes_of(tmp_path, GENERATED, keyword="not left_out")

    outcomes = {name: (check.verdict, check.reason) for name, check in found.items()}
    assert outcomes == {
        "test_passes": ("passed", ""),
        "test_fails": ("failed", "AssertionError: sums are wrong"),
        "test_is_skipped": ("not tried", "tensorrt is not installed"),
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
        assert verdict(found["step"]) == ("failed", f"not finished within {seconds} s")
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

    assert found["step"].verdict == "failed"
    assert reason in found["step"].reason


# Sweep


def composed(*overrides: str) -> Iterator[Any]:
    """Yield the config of every job of a grid."""
    pairs = [override.partition("=") for override in overrides]
    choices = [[value] if value.startswith("[") else value.split(",") for _, _, value in pairs]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for values in product(*choices):
            yield compose("config", [f"{key}={value}" for (key, _, _), value in zip(pairs, values, strict=True)])


def launches() -> list[Launch]:
    return [step for step in STEPS if isinstance(step, Launch)]


def asked(device: str) -> Iterator[tuple[str, ...]]:
    """Yield the overrides of the sweep and of the tests on the GPU."""
    yield from filter(None, (launch.chosen(device) for launch in launches()))
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
    names = [launch.name for launch in launches()]

    assert names[:2] == ["digits_cnn torch", "resnet50 torch"]
    for path in (ROOT / "conf" / "runtime").glob("*.yaml"):
        assert path.stem == "auto" or {f"digits_cnn {path.stem}", f"resnet50 {path.stem}"} <= set(names)
    chosen = {launch.name: launch.chosen("cuda:0") for launch in launches()}
    assert chosen["digits_cnn torch"][-2:] == ("runtime=torch", "quantizer=none,fp16,bf16")
    assert chosen["digits_cnn tensorrt"][-1] == "quantizer=none,fp16,bf16,int8"
    assert chosen["resnet50 onnxruntime"][-1] == "quantizer=fp16"
    assert of_digits("tensorrt", 60).chosen("cpu") == ()


COLLECT = """
import json
import pytest
from pq_sweep.doctor.gpu_check.steps import STEPS
from pq_sweep.doctor.gpu_check.suite import TESTS, Suite


class Plugin:
    def pytest_collection_finish(self, session):
        self.found = [item.nodeid for item in session.items]


def collected(*selection):
    plugin = Plugin()
    pytest.main(["--collect-only", "-p", "no:cacheprovider", *selection], [plugin])
    return plugin.found


steps = {step.name: collected(*step.selection) for step in STEPS if isinstance(step, Suite)}
print(json.dumps([collected("-m", "gpu", str(TESTS)), steps]))
"""


@pytest.mark.slow
def test_every_test_for_a_gpu_is_in_just_one_step() -> None:
    done = python(["-c", COLLECT], ROOT, new_user())
    assert done.returncode == 0, done.stderr
    every, steps = json.loads(done.stdout.splitlines()[-1])

    assert Counter(name for names in steps.values() for name in names) == Counter(every)
    assert all(steps.values())
    assert len(every) > 30


def run(launch: Launch, folder: Path) -> list[Check]:
    """Run jobs on the CPU, in a folder of their own."""
    own = folder / launch.name
    own.mkdir()
    return launch.run("cpu", own, Limit(300))


@pytest.mark.slow
def test_the_sweep_runs_on_a_cpu(tmp_path: Path) -> None:
    wrong = (*DIGITS, "pruner=l1_global", "pruner.amount=2")
    (refused,) = run(Launch(name="impossible", seconds=60, runtime="torch", overrides=wrong), tmp_path)
    (absent,) = run(of_digits("tensorrt", 60), tmp_path)
    job, store = run(next(launch for launch in launches() if launch.name == "tracked"), tmp_path)

    assert (refused.name, refused.verdict) == ("impossible", "failed")
    assert "pruner.amount=2" in refused.reason
    assert verdict(absent) == ("not tried", "runtime=tensorrt has none of these precisions on cpu")
    assert [(job.name, job.verdict), (store.name, store.verdict)] == [
        ("digits_cnn none none torch", "passed"),
        ("mlflow", "passed"),
    ]
    assert job.short.startswith("b1 ")
    assert job.figures["accuracy"] > 0.98
    assert job.seconds is not None
    assert (tmp_path / "cache").is_dir()


def job(folder: Path, **changes: Any) -> Check:
    """Judge a job that finished on cuda:0 but for some changes; `error` is the type of what it failed of."""
    row = {"name": "digits_cnn none none torch", "status": "finished", "stage": "", "error": "", "device": "cuda:0"}
    row |= {"dataset": "digits", "accuracy": 0.986, "latency_ms/b1": 0.25}
    row |= {name: value for name, value in changes.items() if name != "late"}
    if row["error"]:
        write_json(folder / "error.json", {"type": row["error"], "message": "it cannot be."})
    late = changes.pop("late", None)
    ending = late.ending if late else ("failed", "ended with exit code 1: so it was")
    return check_job(row, folder, "cuda:0", ending, late=bool(late))


def verdict(check: Check) -> tuple[Verdict, str]:
    return check.verdict, check.reason


def test_a_job_is_judged_by_how_it_ended_where_and_by_its_answers(tmp_path: Path) -> None:
    finished = job(tmp_path)
    assert (verdict(finished), finished.short) == (("passed", ""), "b1 0.25 ms")
    assert verdict(job(tmp_path, device="cpu")) == ("failed", "it ran on cpu instead of cuda:0")
    assert job(tmp_path, accuracy=0.9).reason == "it knows 90.0% of the digits instead of at least 95%"
    assert verdict(job(tmp_path, accuracy=0.001, dataset="fake")) == ("passed", "")


@pytest.mark.parametrize(("error", "expected"), [("UserError", "not tried"), ("RuntimeMismatch", "failed")])
def test_a_job_that_refuses_what_the_machine_lacks_was_not_tried(tmp_path: Path, error: str, expected: Verdict) -> None:
    assert verdict(job(tmp_path, status="failed", error=error)) == (expected, "it cannot be.")


def test_a_job_that_did_not_end_failed_unless_it_had_no_time_to_begin(tmp_path: Path) -> None:
    late, cut = Limit(60), Limit(30, cut=True)

    assert verdict(job(tmp_path, status="missing")) == ("failed", "ended with exit code 1: so it was")
    assert verdict(job(tmp_path, status="missing", late=late)) == ("not tried", NO_TIME)
    assert verdict(job(tmp_path, status="missing", late=late, stage="build")) == (
        "failed",
        "not finished within 60 s, at stage build",
    )
    assert verdict(job(tmp_path, status="missing", late=cut, stage="build")) == (
        "not tried",
        f"{NO_TIME}, at stage build",
    )


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
    left_out = Check("sweep", "digits_cnn tensorrt", "not tried", "no TensorRT")

    assert green([TORCH_TESTED, TORCH_SWEPT, left_out])
    assert problem([TORCH_TESTED, TORCH_SWEPT, Check("sweep", "mlflow", "failed")]) == "1 of 3 checks failed"
    assert problem([TORCH_TESTED, left_out]) == "nothing of torch was checked by the sweep"
    assert problem([left_out]) == "nothing could be tried on a GPU"
    assert not green([Check("tests", "test_torch::test_it", "not tried"), TORCH_SWEPT])
    assert not green([TORCH_TESTED, Check("sweep", "resnet50 none fp16 onnxruntime", "passed")])


def test_the_exit_code_tells_success_failure_and_nothing_tried_apart() -> None:
    left_out = Check("sweep", "digits_cnn tensorrt", "not tried", "no TensorRT")

    assert exit_code([TORCH_TESTED, TORCH_SWEPT, left_out]) == 0
    assert exit_code([TORCH_TESTED, TORCH_SWEPT, Check("sweep", "mlflow", "failed")]) == 1
    assert exit_code([TORCH_TESTED, left_out]) == 1
    assert exit_code([left_out, Check("machine", "torch", "failed")]) == 1
    assert exit_code([left_out]) == exit_code([]) == 2


class Noted(Step):
    """A step that passes."""

    part = "tests"

    def run(self, device: str, folder: Path, limit: Limit) -> list[Check]:
        if self.name == "broken":
            raise OSError("no space left")
        return [Check(self.part, self.name, "passed", seconds=limit.seconds)]


def steps(*names: str) -> tuple[Step, ...]:
    return tuple(Noted(name=name, seconds=60) for name in names)


def a_report(folder: Path, *names: str, budget_s: float = 480, spent_s: float = 0) -> Report:
    return Report(folder / "results", GPU, steps(*names), budget_s, time.monotonic() - spent_s)


def test_a_report_is_whole_after_every_step(tmp_path: Path) -> None:
    report = a_report(tmp_path, "torch", "tensorrt", "speed")
    report.write()
    assert report.path == tmp_path / "results" / "nvidia-l4.json"
    assert read_json(report.path)["not_tried"] == {
        "tests: torch": BEGUN, "tests: tensorrt": NOT_REACHED, "tests: speed": NOT_REACHED
    }  # fmt: skip
    report.add([TORCH_TESTED])
    found = read_json(report.path)

    assert found["not_tried"] == {"tests: tensorrt": BEGUN, "tests: speed": NOT_REACHED}
    assert found["counts"] == {"passed": 1, "not tried": 2}
    assert found["problem"] == "nothing of torch was checked by the sweep"
    assert found["environment"]["versions"] == {"torch": "2.11.0"}
    assert Check(**found["checks"][0]) == TORCH_TESTED
    assert not found["complete"]
    report.add([])
    report.add([TORCH_SWEPT])
    assert read_json(report.path)["complete"]
    assert read_json(report.path)["problem"] is None


def test_the_limit_of_a_step_is_its_own_longer_with_the_budget_or_what_is_left(tmp_path: Path) -> None:
    (step,) = steps("torch")

    assert a_report(tmp_path).limit(step) == Limit(60)
    assert a_report(tmp_path, budget_s=240).limit(step) == Limit(60)
    assert a_report(tmp_path, budget_s=960).limit(step) == Limit(120)
    late = a_report(tmp_path, spent_s=450).limit(step)
    assert (round(late.seconds), late.cut, late.ending) == (30, True, ("not tried", NO_TIME))


def test_a_report_of_no_time_does_not_replace_that_of_the_device(tmp_path: Path) -> None:
    report = a_report(tmp_path, "torch", "tensorrt", spent_s=470)
    report.write()

    assert report.path.name == "nvidia-l4-not-tried.json"
    assert a_report(tmp_path, "torch", spent_s=450).path.name == "nvidia-l4.json"
    slow = a_report(tmp_path, "torch")
    named = slow.path
    slow.start -= 470
    assert slow.path == named, "the name stays as time goes by"


def test_a_disk_that_is_full_costs_only_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, content: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(command, "look_at", lambda device: GPU)
    monkeypatch.setattr(written, "write_json", full)
    code = command.check("cuda:0", tmp_path, 480, steps("torch", "resnet50 torch"))

    shown = capsys.readouterr()
    assert code == 1
    assert "resnet50 torch" in shown.out
    assert f"{tmp_path / 'nvidia-l4.json'} cannot be written (No space left on device)" in shown.err


def test_a_step_that_breaks_is_a_failure_and_one_without_time_is_not_started(tmp_path: Path) -> None:
    broken, fine = steps("broken", "fine")
    report = a_report(tmp_path)

    (failed,) = command.attempt(broken, report, "cuda:0", tmp_path / "0")
    assert verdict(failed) == ("failed", "OSError: no space left")
    (passed,) = command.attempt(fine, report, "cuda:0", tmp_path / "1")
    assert (passed.verdict, passed.seconds) == ("passed", 60)
    (late,) = command.attempt(fine, a_report(tmp_path, spent_s=470), "cuda:0", tmp_path / "2")
    assert verdict(late) == ("not tried", NO_TIME)
    assert not (tmp_path / "2").exists()


STOPPED = """
import sys
from pathlib import Path
from pq_sweep import gpu_check
from pq_sweep.doctor.gpu_check import Check, Step
from pq_sweep.doctor.gpu_check.children import run_python
from pq_sweep.doctor.gpu_check.machine import Machine

folder = Path(sys.argv.pop())


class Quick(Step):
    part = "tests"

    def run(self, device, folder, limit):
        return [Check(self.part, self.name, "passed")]


class Endless(Step):
    part = "sweep"

    def run(self, device, where, limit):
        code = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
        run_python(["-c", code, str(folder / "pid")], where, limit.seconds)


gpu_check.look_at = lambda device: Machine({"device": "NVIDIA L4"}, "13.0")
kinds = {"one": Quick, "two": Endless, "three": Quick}
gpu_check.check.__defaults__ = (tuple(kind(name=name, seconds=60) for name, kind in kinds.items()),)
sys.argv += ["--output", str(folder)]
gpu_check.main()
"""


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_check_that_is_stopped_leaves_a_whole_report(tmp_path: Path, stop: signal.Signals) -> None:
    own = {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)], cwd=ROOT, env=new_user() | own, stderr=subprocess.PIPE,
        preexec_fn=hear_signals,
    )  # fmt: skip
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(stop)
    _, printed = process.communicate(timeout=30)
    code, child = process.returncode, int(pid.read_text())

    found = read_json(tmp_path / "nvidia-l4.json")
    assert [(check["name"], check["verdict"]) for check in found["checks"]] == [
        ("one", "passed"), ("two", "not tried"), ("three", "not tried")
    ]  # fmt: skip
    assert found["not_tried"] == {"sweep: two": BEGUN, "tests: three": NOT_REACHED}
    if stop is not signal.SIGKILL:
        assert (code, printed) == (1, b"the check was stopped\n")
        assert not alive(child)
    else:
        os.killpg(child, signal.SIGKILL)


# The command line


def refused_by_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *given: str) -> str:
    """Return what the command says before it looks at anything."""
    monkeypatch.setattr(sys, "argv", ["gpu_check", *given])
    monkeypatch.setattr(command, "look_at", lambda device: pytest.fail("it looked at the device"))
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("given", ["0", "-480", "19.9", "nan", "inf", "five", ""])
def test_seconds_in_which_nothing_can_be_tried_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    told = refused_by_the_command(monkeypatch, capsys, f"--budget-s={given}")
    assert told.endswith(f"argument --budget-s: {given} is not valid; give a number of seconds from 20 on")


@pytest.mark.parametrize("name", ["a_file", "a_file/inside"])
def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / "a_file").touch()
    told = refused_by_the_command(monkeypatch, capsys, f"--output={tmp_path / name}")
    assert f"the folder {tmp_path / name} cannot be written (" in told
    assert told.endswith("; give another by --output")


def test_a_second_check_does_not_begin_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with command.reserved(tmp_path, command.Parser()):
        told = refused_by_the_command(monkeypatch, capsys, f"--output={tmp_path}")
    assert told.endswith(f"another check is writing into {tmp_path}; wait until it has ended")
    with command.reserved(tmp_path, command.Parser()):
        assert list(tmp_path.iterdir()) == []


def test_a_package_without_its_checkout_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert f"{tmp_path} has no environment.yml; run this in a checkout" in refused_by_the_command(monkeypatch, capsys)


SPEAKING = """
import os, subprocess, sys, time
from pq_sweep.doctor.gpu_check.streams import open_streams, say

open_streams()
for number in range(3):
    say("\u250f a table")
    time.sleep(0.1)
subprocess.run([sys.executable, "-c", "print('a child')"], check=True)
say("an error", error=True)
print("done", file=open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("how", ["", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "| head -1", "> /dev/full"])
def test_nothing_fails_because_of_who_reads_what_is_printed(tmp_path: Path, how: str) -> None:
    (tmp_path / "speak.py").write_text(SPEAKING)
    script = f"set -e; {sys.executable} speak.py said {how}"
    own = {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, env=new_user() | own, capture_output=True, check=False)

    assert (tmp_path / "said").read_text() == "done\n", done.stderr
    assert done.returncode == 0
    assert not how or done.stderr.strip() in (b"an error", b"")
    assert how or done.stdout.startswith(b"\\u250f a table\n")


@pytest.mark.slow
def test_tests_and_sweep_become_a_report_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    chosen = (of_tests("torch", 60, "test_torch.py"), of_torch("plain", ()))
    code = command.check("cpu", tmp_path / "results", 480, chosen)

    (path,) = (tmp_path / "results").iterdir()
    assert path.name == f"{slug(device_name('cpu'))}.json"
    report = json.loads(path.read_text())
    assert (code, report["problem"]) == (1, "nothing of torch was checked by the tests")
    assert report["environment"].keys() >= {"versions", "python", "os", "git", "gpu"}
    assert not report["environment"].keys() & {"host", "command", "slurm"}
    assert {reason for name, reason in report["not_tried"].items() if name.startswith("tests: ")} == {
        "needs a CUDA device and torch finds none"
    }
    swept = [(check["name"], check["verdict"]) for check in report["checks"] if check["part"] == "sweep"]
    assert swept == [("digits_cnn none none torch", "passed")]
    printed = capfd.readouterr().out
    assert str(path) in printed
    assert "digits_cnn none none torch" in printed
