"""Turns on a device, among real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import new_user

from pq_sweep.job.stages import Stages
from pq_sweep.job.turns import Turns

# Takes turns again and again, and writes when each began and ended.
WORKER = """
import sys, time
from pq_sweep.job.turns import Turns

turns, alone, seconds, times = Turns("cpu"), sys.argv[1] == "alone", float(sys.argv[2]), int(sys.argv[3])
print("ready", flush=True)
for _ in range(times):
    with turns.take(alone):
        start = time.monotonic()
        time.sleep(seconds)
        print(start, time.monotonic(), flush=True)
"""
Turn = tuple[float, float]


@pytest.fixture(autouse=True)
def own_locks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def worker(kind: str, seconds: float, times: int, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, kind, str(seconds), str(times)]
    return subprocess.Popen(command, env=new_user() | environment, stdout=subprocess.PIPE, text=True)


def turns_of(process: subprocess.Popen[str]) -> list[Turn]:
    said = process.communicate(timeout=60)[0].splitlines()[1:]
    assert process.returncode == 0
    return [(float(start), float(end)) for start, end in map(str.split, said)]


def overlap(one: Turn, other: Turn) -> bool:
    return one[0] < other[1] and other[0] < one[1]


@pytest.mark.slow
def test_who_measures_is_alone_and_who_prepares_is_not() -> None:
    others = [worker("among", 0.05, 20) for _ in range(3)]
    measuring = [worker("alone", 0.05, 5) for _ in range(2)]
    alone = [turns_of(process) for process in measuring]
    among = [turns_of(process) for process in others]

    assert [len(turns) for turns in alone] == [5, 5]  # though the others never all paused
    assert not any(overlap(one, other) for one in alone[0] for other in alone[1])
    assert not any(overlap(one, other) for turns in alone for one in turns for rest in among for other in rest)
    assert any(overlap(one, other) for one in among[0] for other in [*among[1], *among[2]])


def test_a_killed_process_holds_nothing() -> None:
    process = worker("alone", 60, 1)
    assert process.stdout
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    with Turns("cpu").take(alone=True):
        assert time.monotonic() - start < 30


def test_jobs_with_cores_of_their_own_do_not_wait() -> None:
    process = worker("alone", 60, 1, SLURM_JOB_ID="7")
    try:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.3)
        start = time.monotonic()
        with Turns("cpu").take(alone=True):
            assert time.monotonic() - start < 30
    finally:
        process.kill()
        process.wait()


def test_a_stage_inside_a_stage_belongs_to_its_turn(tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    stage.turns = Turns("cpu")
    with stage("outer"), stage("inner", alone=True):
        pass
    with stage("latency b1", alone=True), stage("inner"):
        pass

    assert set(stage.seconds) == {"outer", "inner", "latency b1"}


def test_without_a_place_for_locks_a_job_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / f"pq_sweep-{os.getuid()}").touch()
    with Turns("cpu").take(alone=True):
        pass

    assert "other jobs cannot be kept off the device" in caplog.text
