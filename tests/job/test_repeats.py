"""Latency in fresh processes: each measures the job's own network, the middle one counts, and none outlives the job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import LAUNCH, SHORT, launch_in
from conftest import ROOT, new_user
from cuda_stand_in import Machine
from hydra import compose, initialize_config_dir
from nvml_stand_in import stand_in

from pq_sweep.core.fingerprint import file_hash
from pq_sweep.core.result import Memory, Speed
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job import repeats
from pq_sweep.job import run as job
from pq_sweep.job.fresh import KeptStages, check_artifact
from pq_sweep.job.repeats import RepeatFailed, combine, require_shareable, share_network
from pq_sweep.job.stages import Stages
from pq_sweep.measure.timing import DRIFT
from pq_sweep.types import UserError

PROGRESS = "progress.json"

ONNX = ("pruner=l1", "quantizer=int8", "runtime=onnxruntime")
TRAINED = ("pruner=remove", "recovery=finetune", "recovery.epochs=1")
PAIRED = ("measure.paired=true", "measure.batch_sizes=[1,2]")

# A pruner that does as `again` says in every process but the first.
FICKLE = """
import os
from pathlib import Path

import torch

def prune(model, data, *, amount, again):
    first = Path("first")
    if not first.exists():
        first.write_text(str(os.getpid()))
    elif first.read_text() != str(os.getpid()):
        exec(again)
"""
OTHER_WEIGHTS = "with torch.no_grad(): model.module.fc1.weight.zero_()"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a job in this process and return its result."""
    folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["tracking=none", *SHORT, *overrides])
    job.run(config, folder)
    return read(folder / "result.json")


@dataclass(frozen=True)
class Pair:
    """The same job measured here and in two fresh processes, and the share of a core that the job kept meanwhile."""

    here: Path
    apart: Path
    busy: float

    @property
    def results(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return read(self.here / "result.json"), read(self.apart / "result.json")

    @property
    def artifacts(self) -> tuple[Path, Path]:
        here, apart = self.results
        return self.here / here["session"]["artifact"], self.apart / apart["session"]["artifact"]


def measured(root: Path, overrides: tuple[str, ...]) -> Pair:
    """Run a job both ways."""
    busy = []

    def watched(*arguments: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        found = repeats.measure_apart(*arguments)
        busy.append((time.process_time() - cpu) / (time.perf_counter() - wall))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "measure_apart", watched)
        run(root / "0", *overrides)
        run(root / "1", *overrides, "measure.repeats=2")
    return Pair(root / "0", root / "1", *busy)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], Pair]:
    done: dict[tuple[str, ...], Pair] = {}

    def pair(overrides: tuple[str, ...]) -> Pair:
        if overrides not in done:
            done[overrides] = measured(tmp_path_factory.mktemp("sweep"), overrides)
        return done[overrides]

    return pair


Pairs = Callable[[tuple[str, ...]], Pair]
each = pytest.mark.parametrize("overrides", [(*ONNX, *PAIRED), TRAINED], ids=["onnx", "trained"])


# --- what is measured -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@each
def test_a_fresh_process_measures_the_job_s_own_network(pairs: Pairs, overrides: tuple[str, ...]) -> None:
    """The artifact of the torch runtime was last written by a fresh process."""
    here, apart = pairs(overrides).artifacts

    assert here.read_bytes() == apart.read_bytes()


@pytest.mark.slow
@each
def test_all_but_the_speed_is_that_of_a_job_without_repeats(pairs: Pairs, overrides: tuple[str, ...]) -> None:
    here, apart = pairs(overrides).results
    same = ("accuracy", "network", "images", "size_bytes", "baseline", "session", "hardware")

    assert {key: here[key] for key in same} == {key: apart[key] for key in same}
    assert here["prep_s"].keys() == apart["prep_s"].keys()
    assert len(apart["tries"]) == 1
    assert apart["prep_s"] == {key: apart["stage_s"][key] for key in apart["prep_s"]}
    spent = [seconds for name, seconds in apart["stage_s"].items() if name not in apart["from_cache"]]
    assert sum(spent) <= apart["seconds"]
    assert {path.name for path in pairs(overrides).here.iterdir()} == {
        path.name for path in pairs(overrides).apart.iterdir()
    }


@pytest.mark.slow
@each
def test_the_middle_repeat_counts_and_all_samples_are_kept(pairs: Pairs, overrides: tuple[str, ...]) -> None:
    _, result = pairs(overrides).results
    with np.load(pairs(overrides).apart / "samples.npz") as samples:
        for size, timed in result["latency"].items():
            medians = [float(np.median(samples[f"repeat{number}_b{size}_host"] / 1e6)) for number in (1, 2)]
            assert timed["repeats"]["p50_ms"] == medians
            assert timed["p50_ms"] == min(medians) == medians[timed["repeats"]["middle"] - 1]
            assert timed["repeats"]["spread"] == pytest.approx((max(medians) - min(medians)) / min(medians))
            assert ("repeats" in timed["unstable"]) is (timed["repeats"]["spread"] > DRIFT)
        assert {name.partition("_")[0] for name in samples} == {"repeat1", "repeat2"}


@pytest.mark.slow
def test_pairs_are_timed_in_each_fresh_process(pairs: Pairs) -> None:
    pair = pairs((*ONNX, *PAIRED))
    ratio = pair.results[1]["paired"]["2"]
    with np.load(pair.apart / "samples.npz") as samples:
        found = [
            float(np.median(samples[f"repeat{number}_b2_paired_dense"] / samples[f"repeat{number}_b2_paired"]))
            for number in (1, 2)
        ]

    assert ratio["repeats"]["speedup"] == found
    assert ratio["speedup"] == min(found)


@pytest.mark.slow
@each
def test_the_job_waits_without_a_thread_that_spins(pairs: Pairs, overrides: tuple[str, ...]) -> None:
    assert pairs(overrides).busy < 0.5  # of a core; a thread that spins takes a whole one


@pytest.mark.slow
@each
def test_stages_say_which_repeat_it_is(pairs: Pairs, overrides: tuple[str, ...]) -> None:
    stages = list(pairs(overrides).results[1]["stage_s"])
    ours = [name for name in stages if "repeat" in name]

    assert [name for name in ours if name.endswith(" b1") and "latency" in name] == [
        "latency repeat 1/2 b1",
        "latency repeat 2/2 b1",
    ]
    assert {"start repeat 1/2", "load repeat 1/2", "start repeat 2/2", "load repeat 2/2"} <= set(ours)
    assert not [name for name in stages if name.startswith("latency b")]


def test_peaks_of_memory_are_the_highest_of_all_repeats() -> None:
    def found(p50_ms: float, peak: float | None, nvml: float | None) -> Speed:
        timed = {"p50_ms": p50_ms, "unstable": []}
        return Speed.of({"latency": {"1": timed}, "peak_memory_mb": peak, "memory": {"nvml_process_mb": nvml}})

    combined = combine([found(2.0, 70.0, None), found(1.0, None, 3.0), found(3.0, 50.0, 5.0)])

    assert combined.latency["1"].p50_ms == 2.0
    assert combined.peak_memory_mb == 70.0
    assert combined.memory == Memory.of({"nvml_process_mb": 5.0})
    assert combine([found(1.0, None, None)]).peak_memory_mb is None


@pytest.mark.parametrize(("mode", "repeats", "refused"), [(0, 3, False), (3, 1, False), (3, 3, True)])
def test_a_gpu_for_one_process_has_no_room_for_repeats(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: int, repeats: int, refused: bool
) -> None:
    """The job's own process holds it to the end."""
    Machine().install(monkeypatch)
    stand_in(tmp_path / "driver", monkeypatch)(gpus=[{"uuid": "GPU-aa11", "name": "A100", "compute_mode": mode}])
    require_shareable("cpu", repeats)
    expected = pytest.raises(UserError, match=r"repeats=3 needs fresh processes, and cuda:0 is in .* EXCLUSIVE_PROCESS")
    with expected if refused else nullcontext():
        require_shareable("cuda:0", repeats)


# --- the same network -------------------------------------------------------------------------------------------------


@pytest.fixture
def fickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Run a job with a pruner of one's own that does otherwise in a fresh process."""
    (tmp_path / "fickle.py").write_text(FICKLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def job_of(again: str) -> dict[str, Any]:
        return run(tmp_path / "0", "pruner._target_=fickle.prune", f"+pruner.again='{again}'", "measure.repeats=2")

    return job_of


@pytest.mark.slow
def test_a_step_that_never_repeats_itself_changes_nothing(fickle: Callable[[str], Any], tmp_path: Path) -> None:
    result = fickle(OTHER_WEIGHTS)
    weights = torch.load(tmp_path / "0" / "model.pt", weights_only=True)["fc1.weight"]

    assert result["network"]["sparsity"] == 0
    assert torch.equal(weights, digits_cnn().module.fc1.weight)


def test_a_network_is_kept_once_and_taken_from_then_on(tmp_path: Path) -> None:
    stage, first, other = Stages(tmp_path, ""), digits_cnn(), digits_cnn(weights=None)
    share_network(stage, first)
    share_network(stage, other)

    states = first.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_another_artifact_is_not_measured(tmp_path: Path) -> None:
    (tmp_path / "model.engine").write_bytes(b"one")
    expected = file_hash(tmp_path / "model.engine")
    check_artifact(tmp_path / "model.engine", expected)
    (tmp_path / "model.engine").write_bytes(b"two")
    with pytest.raises(RepeatFailed, match=r"model\.engine is not what .* measure\.repeats=1\."):
        check_artifact(tmp_path / "model.engine", expected)


def test_a_fresh_process_reads_what_is_kept_and_writes_nothing(tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    stage.resume("key")
    stage.keep_in_job("one", lambda: 1)
    before, told = (tmp_path / PROGRESS).read_bytes(), list[dict[str, Any]]()
    kept = KeptStages(tmp_path, told.append)
    kept.resume("key")
    with kept("load"):
        assert kept.keep_in_job("one", lambda: 2) == 1
        assert kept.keep_in_job("two", lambda: 2) == 2

    assert told == [{"stage": "load"}]
    assert (tmp_path / PROGRESS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS]


def test_a_job_whose_code_changed_is_not_measured_on(tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    stage.resume("key")
    stage.keep_in_job("one", lambda: 1)
    with pytest.raises(RepeatFailed, match="changed since the job started; start it again"):
        KeptStages(tmp_path, print).resume("another")
    assert (tmp_path / PROGRESS).exists()


# --- failing ----------------------------------------------------------------------------------------------------------


LED = "repeat 1/2: the stage repeat failed in fickle.py, line 12; see in job.log where (ValueError: no room for it)."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("again", "message", "told"),
    [
        ('raise ValueError("no room\\nfor it")', LED, "ValueError: no room"),
        ("os.kill(os.getpid(), 9)", "repeat 1/2 ended without a result, signal 9 (often: out of memory).", ""),
        ('os.write(2, b"goodbye"); os._exit(3)', "repeat 1/2 ended without a result, exit code 3.", "goodbye"),
    ],
)
def test_a_repeat_that_fails_fails_the_job(
    fickle: Callable[[str], Any], tmp_path: Path, again: str, message: str, told: str
) -> None:
    with pytest.raises(RepeatFailed) as caught:
        fickle(again)
    error = read(tmp_path / "0" / "error.json")

    assert str(caught.value) == error["message"] == message
    assert error["stage"] == "prune repeat 1/2"
    assert told in error["traceback"]
    assert told in "\n".join(getattr(caught.value, "__notes__", []))
    assert not (tmp_path / "0" / "result.json").exists()


# --- stopping and going on --------------------------------------------------------------------------------------------

SLOW = ("tracking=none", "hydra.sweep.dir=s", *SHORT, "measure.repeats=2", "measure.min_s=3", "measure.max_s=30")


def descendants(pid: int) -> set[int]:
    """Return the processes that a process started, and those that they started."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def gone(pids: set[int], seconds: float = 10) -> bool:
    """Say whether processes end within some seconds."""
    end = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def end_in(folder: Path, stage: str, number: signal.Signals, everyone: bool) -> tuple[int, set[int]]:
    """Start a job and send a signal when it is in a stage; return its exit code and the processes that it had."""
    process = subprocess.Popen(
        [sys.executable, LAUNCH, *SLOW], cwd=folder, env=new_user(), stderr=subprocess.PIPE, start_new_session=True
    )
    status, end = folder / "s" / "0" / "status.json", time.monotonic() + 200
    while not status.exists() or read(status)["stage"] != stage:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{stage} was not reached"
        time.sleep(0.05)
    started = descendants(process.pid)
    (os.killpg if everyone else os.kill)(process.pid, number)
    process.communicate(timeout=60)
    return process.returncode, started


@pytest.mark.slow
def test_a_stopped_job_stops_its_repeat_and_goes_on_behind_those_that_are_done(tmp_path: Path) -> None:
    """As scancel does, every process of the job is told to stop."""
    code, started = end_in(tmp_path, "latency repeat 2/2 b1", signal.SIGTERM, everyone=True)
    error, progress = read(tmp_path / "s" / "0" / "error.json"), read(tmp_path / "s" / "0" / PROGRESS)
    assert code == 143
    assert (error["type"], error["stage"]) == ("Stopped", "latency repeat 2/2 b1")
    assert started
    assert gone(started)
    first = progress["kept"]["repeat 1"]["value"]["latency"]["1"]["p50_ms"]
    before = len((tmp_path / "s" / "0" / "job.log").read_text())

    done = launch_in(tmp_path, *SLOW)

    assert done.returncode == 0, done.stdout + done.stderr
    result = read(tmp_path / "s" / "0" / "result.json")
    assert result["latency"]["1"]["repeats"]["p50_ms"][0] == first
    assert len(result["tries"]) == 2
    again = (tmp_path / "s" / "0" / "job.log").read_text()[before:]
    assert "repeat 1/2" not in again
    assert "latency repeat 2/2 b1" in again
    assert not list((tmp_path / "s" / "0").glob("*.kept.pt"))


@pytest.mark.slow
def test_a_repeat_does_not_outlive_a_job_that_is_killed(tmp_path: Path) -> None:
    code, started = end_in(tmp_path, "latency repeat 1/2 b1", signal.SIGKILL, everyone=False)

    assert code == -signal.SIGKILL
    assert started
    assert gone(started)
