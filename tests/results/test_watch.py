"""Watching a sweep by its folders and by what SLURM says of its jobs; SLURM is played by small scripts."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import hear_signals, new_user, python, refused
from rich.console import Console
from sweep_folders import announced, dead_pid, write_error, write_manifest, write_result, write_status

from pq_sweep.core.files import read_json, tail, write_json
from pq_sweep.core.folder import JobFolder, SweepFolder
from pq_sweep.results import slurm, watch
from pq_sweep.results.commands import start_again
from pq_sweep.results.rows import Row
from pq_sweep.results.slurm import Ended, Queued
from pq_sweep.results.standing import WATCHED_S, Watch, is_logged, remember
from pq_sweep.results.sweeps import Sweep, read_sweep
from pq_sweep.results.watch import Logger, table
from pq_sweep.tracking.tracker import Mlflow, NoTracking, tracker_of

UNKNOWN = "it left the queue without a result, and SLURM keeps no record of why"
LATER = 60.0  # seconds that a job may be gone without a word


@dataclass
class Queue:
    """SLURM's command line tools: each prints a file, and fails where there is none."""

    folder: Path

    def prints(self, tool: str, *lines: str) -> None:
        (self.folder / f"{tool}.out").write_text("".join(f"{line}\n" for line in lines))

    def fails(self, tool: str) -> None:
        (self.folder / f"{tool}.out").unlink(missing_ok=True)

    def asked(self, tool: str) -> list[str]:
        path = self.folder / f"{tool}.asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """An empty queue of a cluster that remembers nothing of jobs that are over."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("squeue", "sacct", "scontrol"):
        script = folder / tool
        script.write_text(f'#!/bin/sh\necho "$*" >> {folder}/{tool}.asked\nexec cat {folder}/{tool}.out 2>/dev/null\n')
        script.chmod(0o755)
    found = Queue(folder)
    found.prints("squeue")
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    return found


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of three jobs that were submitted as an array; the last lines of the first one's stderr are there."""
    folder = write_manifest(tmp_path / "sweep", *(announced(str(number)) for number in range(3)))
    logs = folder / ".submitit" / "12_0"
    logs.mkdir(parents=True)
    (logs / "12_0_0_log.err").write_text("".join(f"line {number}\n" for number in range(40)))
    remember(folder, {str(number): submitted(f"12_{number}") for number in range(3)})
    return folder


def submitted(job: str) -> dict[str, Any]:
    path = f".submitit/{job}/{job}_0"
    return {"id": job, "submitted": 1.7e9, "pickle": f"{path}_result.pkl", "stderr": f"{path}_log.err"}


def others_wait(queue: Queue, *lines: str) -> None:
    """Let the first job have left the queue, unless `lines` say something else; the other two wait."""
    queue.prints("squeue", *lines, "12_1|PENDING||Priority", "12_2|PENDING||Priority")


def first(found: Sweep) -> Row:
    return found.rows[0]


def ended_with(folder: Path, code: str = "pickled") -> None:
    """Let the first job's process have said goodbye to submitit."""
    (folder / submitted("12_0")["pickle"]).write_text(code)


def error_of(folder: Path, job: str = "0") -> dict[str, Any]:
    found = JobFolder(folder / job).read_error()
    assert found is not None
    return found


# --- in the queue -----------------------------------------------------------------------------------------------------


def test_the_queue_says_who_waits_and_who_runs(sweep: Path, queue: Queue) -> None:
    queue.prints(
        "squeue", "12_0|RUNNING|v1|None", "12_1|PENDING||Resources", "12_2|REQUEUED||BeginTime", "99|RUNNING|v2|"
    )
    write_status(sweep, "0", dead_pid())
    found = Watch(sweep).look()
    assert [(row["status"], row.get("node"), row.get("reason")) for row in found.rows] == [
        ("running", "v1", ""),
        ("pending", "", "Resources"),
        ("pending", "", "BeginTime"),
    ]
    assert first(found)["stage"] == "accuracy"
    assert found.summary == "0 done, 1 running, 2 pending"
    (asked,) = queue.asked("squeue")
    assert f"--user={sweep.stat().st_uid}" in asked
    assert "--array" in asked
    assert not queue.asked("sacct")


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("CONFIGURING", "pending"),
        ("SPECIAL_EXIT", "pending"),
        ("COMPLETING", "running"),
        ("SUSPENDED", "running"),
        ("STOPPED", "running"),
    ],
)
def test_every_state_in_the_queue_is_waiting_or_running(sweep: Path, queue: Queue, state: str, status: str) -> None:
    others_wait(queue, f"12_0|{state}|v1|None")
    assert first(Watch(sweep).look())["status"] == status


def test_a_reason_may_hold_anything(sweep: Path, queue: Queue) -> None:
    others_wait(queue, "12_0|PENDING||Nodes required for job are DOWN|DRAINED or reserved", "a line of nothing")
    assert first(Watch(sweep).look())["reason"] == "Nodes required for job are DOWN|DRAINED or reserved"


def test_a_requeued_job_is_no_failure(sweep: Path, queue: Queue) -> None:
    """Its first try left an error, and the controller remembers that try."""
    write_error(sweep, "0", "the job was stopped by SIGTERM.")
    queue.prints("scontrol", "JobId=12 ArrayTaskId=0 JobState=PREEMPTED ExitCode=0:15 NodeList=v1")
    others_wait(queue, "12_0|PENDING||BeginTime")
    assert first(Watch(sweep).look())["status"] == "pending"
    assert "slurm" not in error_of(sweep)


def test_a_sweep_that_was_not_submitted_asks_nobody(sweep: Path, queue: Queue) -> None:
    SweepFolder(sweep).submitted.unlink()
    write_status(sweep, "0", os.getppid())
    assert [row["status"] for row in Watch(sweep).look().rows] == ["running", "missing", "missing"]
    assert not queue.asked("squeue")


def test_jobs_are_remembered_beside_earlier_ones(sweep: Path) -> None:
    remember(sweep, {"1": submitted("40_0")})
    jobs = read_json(SweepFolder(sweep).submitted)["jobs"]
    assert {name: job["id"] for name, job in jobs.items()} == {"0": "12_0", "1": "40_0", "2": "12_2"}


# --- out of the queue -------------------------------------------------------------------------------------------------

ENDINGS = {
    "12_0|FAILED|0:0|v1\n12_0.batch|FAILED|9:0|v1\n12_0.0|FAILED|0:9|v1": (
        "it failed, killed by signal 9 (often: out of memory) (state FAILED, node v1)",
        "0:9",
    ),
    "12_0|FAILED|137:0|v1\n12_0.batch|FAILED|137:0|v1": (
        "it failed, killed by signal 9 (often: out of memory) (state FAILED, node v1)",
        "137:0",
    ),
    "12_0|FAILED|4:0|v1\n12_0.0|FAILED|4:0|v1": ("it failed, exit code 4 (state FAILED, node v1)", "4:0"),
    "12_0|CANCELLED by 1000|0:0|v1\n12_0.0|CANCELLED|0:15|v1": (
        "it was cancelled (state CANCELLED, node v1)",
        "0:15",
    ),
    "12_0|CANCELLED by 0|0:0|None assigned": ("it was cancelled (state CANCELLED)", "0:0"),
    "12_0|OUT_OF_MEMORY|0:125|v1\n12_0.0|OUT_OF_MEMORY|0:125|v1": (
        "it needed more memory than it had asked for; raise hydra.launcher.mem_gb (state OUT_OF_MEMORY, node v1)",
        "0:125",
    ),
    "12_0|TIMEOUT|0:0|v1\n12_0.0|CANCELLED|0:15|v1": (
        "it hit its time limit; raise hydra.launcher.timeout_min or max_num_timeout (state TIMEOUT, node v1)",
        "0:15",
    ),
    "12_0|NODE_FAIL|1:0|v1": ("its node failed (state NODE_FAIL, node v1)", "1:0"),
    "12_0|PREEMPTED|0:0|v1": ("it was preempted and not requeued (state PREEMPTED, node v1)", "0:0"),
}


@pytest.mark.parametrize("printed", ENDINGS)
def test_accounting_says_how_a_job_ended(sweep: Path, queue: Queue, printed: str) -> None:
    """Within the grace time already: SLURM has given the job up."""
    others_wait(queue)
    queue.prints("sacct", *printed.splitlines())
    write_status(sweep, "0", dead_pid())
    row = first(Watch(sweep, grace_s=LATER).look())
    why, code = ENDINGS[printed]
    assert (row["status"], row["stage"]) == ("failed", "accuracy")
    assert row["error"] == f"SLURM job 12_0 ended: {why}."
    error = error_of(sweep)
    assert error["type"] == "Lost"
    assert error["slurm"]["slurm_job"] == "12_0"
    assert error["slurm"]["exit_code"] == code
    assert "--jobs=12_0" in queue.asked("sacct")[0]


def test_the_controller_says_it_where_there_is_no_accounting(sweep: Path, queue: Queue) -> None:
    others_wait(queue)
    queue.prints(
        "scontrol",
        "JobId=13 ArrayJobId=12 ArrayTaskId=0 JobName=pq_sweep UserId=u(1000) JobState=NODE_FAIL Reason=NodeDown"
        " Requeue=1 ExitCode=0:0 Partition=v100 ReqNodeList=(null) ExcNodeList=(null) NodeList=v1 BatchHost=v1",
    )
    row = first(Watch(sweep, grace_s=LATER).look())
    assert row["error"] == "SLURM job 12_0 ended: its node failed (state NODE_FAIL, node v1)."
    assert (row["slurm_job"], row["node"], row["slurm_state"]) == ("12_0", "v1", "NODE_FAIL")
    assert queue.asked("scontrol")[0] == "--oneliner show job 12_0"


def test_the_controller_may_name_no_node(sweep: Path, queue: Queue) -> None:
    others_wait(queue)
    queue.prints("scontrol", "JobId=12 JobState=CANCELLED ExitCode=0:0 NodeList=(null)")
    row = first(Watch(sweep, grace_s=LATER).look())
    assert row["error"] == "SLURM job 12_0 ended: it was cancelled (state CANCELLED)."


def test_a_job_that_nobody_remembers_is_lost_after_a_while(sweep: Path, queue: Queue) -> None:
    others_wait(queue)
    eyes = Watch(sweep, grace_s=LATER)
    for _ in range(2):
        row = first(eyes.look())
        assert (row["status"], row["reason"]) == ("running", "left the queue")
    assert JobFolder(sweep / "0").read_error() is None
    eyes.gone_since["0"] -= LATER
    row = first(eyes.look())
    assert row["status"] == "failed"
    assert re.fullmatch(
        r"SLURM job 12_0 ended: it left the queue .* no record of why \(state unknown\)\.", row["error"]
    )


def test_the_grace_time_begins_anew_for_a_job_that_came_back(sweep: Path, queue: Queue) -> None:
    eyes = Watch(sweep, grace_s=LATER)
    others_wait(queue)
    eyes.look()
    eyes.gone_since["0"] -= LATER
    others_wait(queue, "12_0|RUNNING|v2|None")
    assert first(eyes.look())["status"] == "running"
    others_wait(queue)
    assert first(eyes.look())["status"] == "running"
    assert JobFolder(sweep / "0").read_error() is None


def test_completed_without_a_result_is_waited_for(sweep: Path, queue: Queue) -> None:
    """The result may not have reached this host yet."""
    others_wait(queue)
    queue.prints("sacct", "12_0|COMPLETED|0:0|v1", "12_0.0|COMPLETED|0:0|v1")
    eyes = Watch(sweep, grace_s=LATER)
    assert first(eyes.look())["status"] == "running"
    write_result(sweep, "0")
    assert first(eyes.look())["status"] == "finished"
    (sweep / "0" / "result.json").unlink()
    eyes.gone_since["0"] -= LATER
    assert "it ended without a result (state COMPLETED, node v1)" in first(eyes.look())["error"]


def test_silence_of_slurm_declares_nobody_dead(sweep: Path, queue: Queue) -> None:
    others_wait(queue, "12_0|RUNNING|v1|None")
    eyes = Watch(sweep, grace_s=0)
    eyes.look()
    queue.fails("squeue")
    rows = eyes.look().rows
    assert [row["status"] for row in rows] == ["running", "pending", "pending"]  # as was said last
    rows = Watch(sweep, grace_s=0).look().rows
    assert [(row["status"], row["reason"]) for row in rows] == [("running", "SLURM does not answer")] * 3
    assert not list(sweep.glob("**/error.json"))
    assert not queue.asked("sacct")


def test_slurm_that_hangs_does_not_answer(sweep: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    (queue.folder / "squeue").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(slurm, "PATIENCE_S", 0.2)
    start = time.monotonic()
    assert first(Watch(sweep, grace_s=0).look())["reason"] == "SLURM does not answer"
    assert time.monotonic() - start < 10


def test_without_slurm_the_folders_count(sweep: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(sweep))
    write_result(sweep, "0")
    rows = Watch(sweep, grace_s=0).look().rows
    assert [row["status"] for row in rows] == ["finished", "running", "running"]


def test_a_job_that_was_given_up_stays_failed_where_slurm_does_not_answer(sweep: Path, queue: Queue) -> None:
    """Otherwise a sweep with a killed job would be watched for ever on a machine without SLURM."""
    others_wait(queue)
    queue.prints("sacct", "12_0|TIMEOUT|0:0|v1")
    assert first(Watch(sweep).look())["status"] == "failed"
    queue.fails("squeue")
    assert first(Watch(sweep).look())["status"] == "failed"


# --- what is written down ---------------------------------------------------------------------------------------------


def test_slurms_reason_is_added_once_to_the_jobs_own(sweep: Path, queue: Queue) -> None:
    write_error(sweep, "0", "the job was stopped by SIGTERM.")
    others_wait(queue)
    queue.prints("sacct", "12_0|CANCELLED by 0|0:0|v1")
    expected = "the job was stopped by SIGTERM. SLURM job 12_0 ended: it was cancelled (state CANCELLED, node v1)."
    for eyes in (Watch(sweep), Watch(sweep)):
        for _ in range(2):
            row = first(eyes.look())
            assert (row["error"], row["stage"]) == (expected, "prune")
    error = error_of(sweep)
    assert (error["type"], error["traceback"]) == ("ValueError", "Traceback")
    assert len(queue.asked("sacct")) == 1


def test_a_job_that_failed_in_order_is_left_alone(sweep: Path, queue: Queue) -> None:
    write_error(sweep, "0", "no channel is left.")
    ended_with(sweep)
    others_wait(queue, "12_0|COMPLETING|v1|None")
    before = (sweep / "0" / "error.json").read_bytes()
    row = first(Watch(sweep, grace_s=0).look())
    assert (row["status"], row["error"]) == ("failed", "no channel is left.")
    assert (sweep / "0" / "error.json").read_bytes() == before


def test_a_job_that_could_not_start_shows_its_stderr(sweep: Path, queue: Queue) -> None:
    ended_with(sweep)
    others_wait(queue)
    row = first(Watch(sweep, grace_s=0).look())
    assert (row["status"], row["stage"]) == ("failed", "start")
    assert "could not start" in row["error"]
    assert row["stderr"] == [f"line {number}" for number in range(25, 40)]


def test_a_result_wins_over_everything(sweep: Path, queue: Queue) -> None:
    write_result(sweep, "0")
    write_error(sweep, "0", "an earlier try failed.")
    before = (sweep / "0" / "error.json").read_bytes()
    queue.prints("sacct", "12_0|FAILED|1:0|v1")
    for line in ((), ("12_0|COMPLETING|v1|None",)):
        others_wait(queue, *line)
        assert first(Watch(sweep, grace_s=0).look())["status"] == "finished"
    assert (sweep / "0" / "error.json").read_bytes() == before


def test_the_end_of_stderr_is_kept(sweep: Path, queue: Queue) -> None:
    others_wait(queue)
    queue.prints("sacct", "12_0|FAILED|1:0|v1")
    Watch(sweep).look()
    assert error_of(sweep)["stderr"] == [f"line {number}" for number in range(25, 40)]


def test_a_job_whose_folder_cannot_be_written_is_told_of_beside_it(sweep: Path, queue: Queue) -> None:
    (sweep / "0").symlink_to(sweep / "a disk that is gone")
    others_wait(queue)
    queue.prints("sacct", "12_0|NODE_FAIL|0:0|v1")
    row = first(Watch(sweep).look())
    assert (row["status"], row["slurm_state"]) == ("failed", "NODE_FAIL")
    assert "its node failed" in read_json(sweep / "0.error.json")["message"]
    assert [row["job"] for row in Watch(sweep).look().rows] == ["0", "1", "2"]
    assert len(queue.asked("sacct")) == 1


def test_a_file_in_the_place_of_a_jobs_folder_hides_no_other_job(sweep: Path, queue: Queue) -> None:
    (sweep / "0").touch()
    others_wait(queue)
    queue.prints("sacct", "12_0|FAILED|1:0|v1")
    found = Watch(sweep).look()
    assert [row["status"] for row in found.rows] == ["failed", "pending", "pending"]
    assert (sweep / "0.error.json").exists()


def test_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "log.err"
    path.write_bytes(b"x" * 100_000 + b"\n\xff last\n")
    assert tail(path)[-1] == "\ufffd last"
    assert sum(map(len, tail(path))) <= 16_000
    assert tail(tmp_path / "none.err") == tail(tmp_path) == []


# --- SLURM's words ----------------------------------------------------------------------------------------------------


def test_every_end_has_a_sentence() -> None:
    for state in slurm.ENDS:
        ended = Ended(state, "0:0", "n1")
        sentence = ended.explain("5_2")
        assert re.fullmatch(rf"SLURM job 5_2 ended: [^.]*(\.[a-z_]+[^.]*)*\(state {state}, node n1\)\.", sentence)
        assert slurm.ENDS[state] in sentence
        assert ended.final == (state != "COMPLETED")
    assert len({Ended(state).explain("5") for state in slurm.ENDS}) == len(slurm.ENDS)


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("0:9", ", killed by signal 9 (often: out of memory) "),
        ("137:0", ", killed by signal 9 (often: out of memory) "),
        ("0:11", ", killed by signal 11 ("),
        ("1:0", ", exit code 1 ("),
        ("128:0", ", exit code 128 ("),
    ],
)
def test_exit_codes_are_told(code: str, told: str) -> None:
    assert f"it failed{told}" in Ended("FAILED", code).explain("5")
    assert "signal" not in Ended("TIMEOUT", code).explain("5")


def test_an_unknown_end_is_not_final() -> None:
    assert not Ended().final
    assert not Ended("RUNNING").final
    assert Ended().explain("5") == f"SLURM job 5 ended: {UNKNOWN} (state unknown)."


def test_a_job_that_accounting_still_sees_running_has_not_ended(queue: Queue) -> None:
    """The database lags; the controller knows better."""
    queue.prints("sacct", "5|RUNNING|0:0|v1")
    assert slurm.ended("5") == Ended()
    queue.prints("scontrol", "JobId=5 JobState=FAILED ExitCode=2:0 NodeList=v1")
    assert slurm.ended("5") == Ended("FAILED", "2:0", "v1")


def test_other_jobs_in_accounting_are_not_meant(queue: Queue) -> None:
    queue.prints("sacct", "12_11|FAILED|0:0|v1", "12_1.0|FAILED|0:9|v1", "12_1.extern|COMPLETED|0:0|v1")
    assert slurm.ended("12_1") == Ended()


def test_the_queue_is_read(queue: Queue) -> None:
    queue.prints("squeue", "12_3|PENDING||Resources", "7|RUNNING|v1|None")
    assert slurm.queue(0) == {"12_3": Queued("PENDING", "", "Resources"), "7": Queued("RUNNING", "v1", "None")}
    queue.prints("squeue")
    assert slurm.queue(0) == {}
    queue.fails("squeue")
    assert slurm.queue(0) is None


def test_the_size_of_arrays(queue: Queue) -> None:
    queue.prints("scontrol", "Configuration data as of now", "MaxArraySize            = 64", "MaxJobCount = 10000")
    assert slurm.max_array_size() == 64
    assert queue.asked("scontrol") == ["show config"]
    queue.fails("scontrol")
    assert slurm.max_array_size() == 1001


# --- to the end -------------------------------------------------------------------------------------------------------


def results(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = python(["-m", "pq_sweep.results", *arguments], folder, new_user())
    return done.returncode, done.stdout, done.stderr


def test_a_finished_sweep_is_watched_to_its_end_at_once(sweep: Path, queue: Queue) -> None:
    for number in range(3):
        write_result(sweep, str(number))
    code, out, err = results(sweep.parent, "sweep", "--watch")
    assert code == 0, err
    assert "sweep: 3 done" in out
    with (sweep / "results.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["finished"] * 3


def clock_of(monkeypatch: pytest.MonkeyPatch, pause: Callable[[float], None]) -> None:
    """Let what watches, and nothing else, pause in this way."""
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))


def test_watching_ends_with_the_last_job(
    sweep: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One job a look: it runs, then it is there."""
    looks: list[float] = []

    def pause(seconds: float) -> None:
        write_result(sweep, str(len(looks)))
        looks.append(seconds)
        queue.prints("squeue", *(f"12_{number}|RUNNING|v1|None" for number in range(len(looks), 3)))

    queue.prints("squeue", "12_0|RUNNING|v1|None", "12_1|PENDING||Resources", "12_2|PENDING||Resources")
    clock_of(monkeypatch, pause)
    found = watch.watch(sweep)
    assert found.summary == "3 done"
    assert len(looks) == 3
    assert capsys.readouterr().err.splitlines() == [
        f"{sweep}: 0 done, 1 running, 2 pending",
        f"{sweep}: 1 done, 2 running",
        f"{sweep}: 2 done, 1 running",
        f"{sweep}: 3 done",
    ]


def test_watching_goes_on_while_the_caller_is_busy(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SweepFolder(sweep).submitted.unlink()
    answers = iter([True, True, False])
    clock_of(monkeypatch, lambda seconds: None)
    assert watch.watch(sweep, busy=lambda: next(answers)).count("missing") == 3
    assert list(answers) == []


# --- who logs ---------------------------------------------------------------------------------------------------------


def test_jobs_are_logged_as_they_end(sweep: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first look finds what was there before, which is logged at the end, like what the last look finds."""
    write_result(sweep, "0")
    logged: list[str] = []
    steps = iter(("1", "2"))

    def pause(seconds: float) -> None:
        assert SweepFolder(sweep).watched.exists()
        job = next(steps)
        write_result(sweep, job)
        assert is_logged(JobFolder(sweep / job))
        queue.prints("squeue", *(["12_2|RUNNING|v1|None"] if job == "1" else []))

    def log(job: Path) -> bool:
        logged.append(job.name)
        return True

    queue.prints("squeue", "12_1|RUNNING|v1|None", "12_2|PENDING||Resources")
    clock_of(monkeypatch, pause)
    assert watch.watch(sweep, log=log).summary == "3 done"
    assert logged in (["1"], ["1", "2"])
    assert not SweepFolder(sweep).watched.exists()
    assert not is_logged(JobFolder(sweep / "2"))


def test_jobs_log_themselves_while_who_watches_cannot(sweep: Path) -> None:
    answers, called = iter([False, True]), Event()

    def log(job: Path) -> bool:
        called.set()
        return next(answers)

    logger = Logger(sweep, log)
    with closing(logger):
        logger.take(read_sweep(sweep))
        for job, able in (("0", False), ("1", True)):
            called.clear()
            write_result(sweep, job)
            logger.take(read_sweep(sweep))
            assert called.wait(10)
            until(lambda able=able: logger.able is able)
            logger.take(read_sweep(sweep))
            assert is_logged(JobFolder(sweep / job)) is able


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_store_that_is_slow_holds_nobody_up(sweep: Path) -> None:
    release = Event()
    logger = Logger(sweep, lambda job: release.wait(30))
    logger.take(read_sweep(sweep))
    for job in ("0", "1", "2"):
        write_result(sweep, job)
        logger.take(read_sweep(sweep))
    release.set()
    logger.close()


def test_who_was_killed_logs_no_more(sweep: Path) -> None:
    """The sign of one that died stays; it is old when a job ends later."""
    write_result(sweep, "0")
    sign = SweepFolder(sweep).watched
    sign.touch()
    assert is_logged(JobFolder(sweep / "0"))
    ended = (sweep / "0").stat().st_mtime
    os.utime(sign, (ended - WATCHED_S - 1, ended - WATCHED_S - 1))
    assert not is_logged(JobFolder(sweep / "0"))


def test_who_stops_watching_is_told_that_jobs_go_on(sweep: Path, queue: Queue) -> None:
    others_wait(queue, "12_0|RUNNING|v1|None")
    process = subprocess.Popen(
        [sys.executable, "-m", "pq_sweep.results", "sweep", "--watch"],
        cwd=sweep.parent,
        env=new_user(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
    )
    assert process.stderr is not None
    assert "1 running" in process.stderr.readline()  # it watches
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGINT)
    assert err.splitlines() == ["no longer watched; jobs of SLURM go on"]


def test_the_live_table_counts_what_it_does_not_show(sweep: Path, queue: Queue) -> None:
    write_manifest(sweep, *(announced(str(number)) for number in range(50)))
    remember(sweep, {str(number): submitted(f"12_{number}") for number in range(50)})
    write_error(sweep, "49", "no channel is left.")
    ended_with_pickle = sweep / submitted("12_49")["pickle"]
    ended_with_pickle.parent.mkdir(parents=True)
    ended_with_pickle.touch()
    write_status(sweep, "40", dead_pid())
    waiting = [f"12_{number}|PENDING||Priority" for number in range(40)]
    queue.prints("squeue", *waiting, *(f"12_{number}|RUNNING|v1|None" for number in range(40, 49)))
    output = StringIO()
    Console(width=120, file=output).print(table(Watch(sweep).look(), 61))
    drawn = output.getvalue()
    assert "9 running, 40 pending; watched for 61 s" in " ".join(drawn.split())
    assert "no channel is left." in drawn
    assert len(re.findall(r"│ (?:running|failed|pending) +│", drawn)) == watch.SHOWN
    assert "and 20 pending" in drawn
    assert re.search(r"│ 40 .*│ running +│ accuracy +│ v1", drawn)


# --- by whom it was started -------------------------------------------------------------------------------------------


def with_tracking(folder: Path, uri: str | None) -> Path:
    config = {"_target_": "pq_sweep.tracking.Mlflow", "uri": uri, "experiment": "cluster"}
    write_json(folder / "sweep.json", {"tracking": config, "jobs": []})
    return folder


def test_results_are_logged_where_the_sweep_logs(tmp_path: Path) -> None:
    tracker = tracker_of(with_tracking(tmp_path, "http://store:5000"))
    assert tracker == Mlflow("http://store:5000", "cluster")


def test_a_password_is_not_kept_and_has_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with_tracking(tmp_path, "postgresql://me:***@store/mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert isinstance(tracker_of(tmp_path), NoTracking)
    (record,) = caplog.records
    assert "set MLFLOW_TRACKING_URI" in record.getMessage()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:secret@store/mlflow")
    tracker = tracker_of(tmp_path)
    assert isinstance(tracker, Mlflow)
    assert (tracker.store, tracker.experiment) == ("postgresql://me:secret@store/mlflow", "cluster")


def test_a_sweep_without_tracking_is_not_logged(tmp_path: Path) -> None:
    assert isinstance(tracker_of(tmp_path), NoTracking)
    write_json(tmp_path / "sweep.json", {"tracking": {"_target_": "pq_sweep.tracking.NoTracking"}})
    assert isinstance(tracker_of(tmp_path), NoTracking)


ECHO = "import json, os, sys\njson.dump([os.getcwd(), sys.argv[1:]], open('called.json', 'w'))\nsys.exit(5)\n"


@pytest.mark.parametrize(
    ("given", "called"),
    [
        (["-m", "a=1", "b=2"], ["-m", "HERE", "a=1", "b=2"]),
        (["a=1", "hydra.sweep.dir=s", "-m"], ["HERE", "a=1", "-m"]),
        (["hydra.run.dir=s", "a=1"], ["HERE", "a=1"]),
        (["a=1", "++hydra.run.dir=s", "++hydra.sweep.dir=s"], ["HERE", "a=1"]),
        (["--config-dir", "conf", "-m", "a=1"], ["--config-dir", "conf", "-m", "HERE", "a=1"]),
        (["-m"], ["-m", "HERE"]),
        ([], ["HERE"]),
    ],
)
def test_a_sweep_starts_again_by_its_command_in_its_folder(tmp_path: Path, given: list[str], called: list[str]) -> None:
    folder, site = tmp_path / "s", tmp_path / "site"
    for path in (folder, site):
        path.mkdir()
    (site / "echo.py").write_text(ECHO)
    write_json(folder / "sweep.json", {"arguments": ["echo.py", *given], "working_folder": str(site)})
    assert start_again(folder) == 5
    expected = [word.replace("HERE", f"hydra.sweep.dir={folder}") for word in called]
    assert json.loads((site / "called.json").read_text()) == [str(site), expected]


@pytest.mark.parametrize("arguments", [[], ["launch.py", "tracking.uri=postgresql://me:***@store/mlflow"]])
def test_what_cannot_be_started_again_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    write_json(tmp_path / "sweep.json", {"arguments": arguments, "working_folder": str(tmp_path)})
    assert f"repeat the command with hydra.sweep.dir={tmp_path}" in refused(lambda: start_again(tmp_path))


def test_a_refusal_to_start_again_is_one_line(tmp_path: Path) -> None:
    write_manifest(tmp_path / "s")
    code, _, err = results(tmp_path, "s", "--resubmit-failed")
    assert code == 1
    assert len(err.splitlines()) == 1
