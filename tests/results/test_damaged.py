"""Folders that were moved, copied, cut short or made read-only: the right answer, or one sentence."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, Done, launch_in
from conftest import python
from sweep_folders import announced, write_error, write_manifest, write_result

from pq_sweep.core import folder as folders
from pq_sweep.results.commands import command, start_again
from pq_sweep.results.sweeps import Sweep, read_job, read_sweep
from pq_sweep.types import UserError

CUT: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "half": lambda text: text[: len(text) // 2],
    "last sign": lambda text: text.rstrip()[:-1],
    "null": lambda text: "null",
    "a list": lambda text: "[1]",
    "a part": lambda text: '{"fingerprint": "x"}',
    "zeros": lambda text: "\0" * len(text),
}
DAMAGED = "result.json is damaged, such as cut short; start the sweep again, which runs this job anew."


@pytest.fixture(autouse=True)
def nothing_was_said() -> None:
    folders._warn_of_damage.cache_clear()


def cut(path: Path, how: str) -> None:
    path.write_text(CUT[how](path.read_text()))


def show(folder: Path, *arguments: str) -> Done:
    return python(["-m", "pq_sweep.results", *arguments], folder, dict(os.environ))


@pytest.mark.parametrize("how", CUT)
def test_a_damaged_result_is_a_failure_that_says_so(tmp_path: Path, how: str) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    for job in ("0", "1"):
        write_result(sweep, job)
    cut(sweep / "0" / "result.json", how)
    damaged, whole = read_sweep(sweep).rows
    assert (damaged["status"], damaged["error"]) == ("failed", DAMAGED)
    assert whole["status"] == "finished"


def test_a_folder_in_the_place_of_a_result_is_a_failure_too(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"))
    (sweep / "0" / "result.json").mkdir(parents=True)
    assert read_sweep(sweep).rows[0]["error"] == DAMAGED


@pytest.mark.parametrize("how", ["empty", "half", "null", "a list"])
def test_a_damaged_manifest_is_said_once_and_jobs_speak_for_themselves(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"), announced("1"), announced("2"))
    write_result(sweep, "0")
    write_error(sweep, "1")
    cut(sweep / "sweep.json", how)
    with caplog.at_level(logging.WARNING):
        assert len(read_sweep(sweep).rows) == 2
        rows = read_sweep(sweep).rows
    assert [(row["job"], row["status"]) for row in rows] == [("0", "finished"), ("1", "failed")]
    assert rows[0]["name"] == "digits_cnn l1_global 0.5 none torch"
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{sweep / 'sweep.json'} is damaged, so jobs without a result are not known; repeat")


HYDRA = "hydra:\n  runtime:\n    choices:\n      model: mine\n      dataset: digits\n      pruner: remove\n"


def copy_of(job: Path, target: Path, *overrides: str) -> Path:
    """Give a job what Hydra writes of its own options, and copy it."""
    (job / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    (job / ".hydra" / "hydra.yaml").write_text(HYDRA)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(job, target)
    return target


@pytest.fixture
def sweeps(tmp_path: Path) -> tuple[Path, Path]:
    """Two sweeps of a finished job each."""
    found = []
    for name in ("ours", "theirs"):
        job = announced("0") | {"fingerprint": name, "overrides": ["pruner=l1_global", f"measure.iterations={name}"]}
        found.append(write_manifest(tmp_path / name, job))
        result = write_result(found[-1], "0")
        (found[-1] / "0" / "result.json").write_text(json.dumps(result | {"fingerprint": name}))
        (found[-1] / "0" / ".hydra" / "overrides.yaml").write_text(json.dumps(job["overrides"]))
    return found[0], found[1]


@pytest.mark.parametrize("name", ["0", "7", "a copy"])
def test_a_job_copied_from_another_sweep_shows_its_own_options(sweeps: tuple[Path, Path], name: str) -> None:
    """As a further job, or in the place of one."""
    ours, theirs = sweeps
    copy_of(theirs / "0", ours / name, "pruner=remove", "pruner.p=1", "seed=3")
    row = next(row for row in read_sweep(ours).rows if row["job"] == name)
    assert row["name"] == "mine remove 0.5 none torch"
    cut(ours / name / "result.json", "half")
    assert read_job(ours / name)["name"].startswith("mine remove 0.5 none ")
    shutil.copy(theirs / "0" / "result.json", ours / name)
    assert (row["model"], row["dataset"], row["pruner"], row["quantizer"]) == ("mine", "digits", "remove", "none")
    assert (row["given"]["pruner.p"], row["given"]["seed"]) == ("1", "3")
    assert read_job(ours / name)["name"] == row["name"]
    assert command(row) == "python launch.py pruner=remove pruner.p=1 seed=3"


def test_a_job_of_which_only_the_result_was_copied_has_a_name(sweeps: tuple[Path, Path]) -> None:
    ours, theirs = sweeps
    (ours / "copied").mkdir()
    shutil.copy(theirs / "0" / "result.json", ours / "copied")
    assert read_sweep(ours).rows[1]["name"] == "digits_cnn l1_global 0.5 none torch"


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("file", ["hydra.yaml", "overrides.yaml", "config.yaml"])
def test_what_hydra_wrote_may_be_cut_short_too(sweeps: tuple[Path, Path], file: str, share: float) -> None:
    job = copy_of(sweeps[1] / "0", sweeps[0] / "7", "pruner=remove", "pruner.p=1")
    path = job / ".hydra" / file
    path.write_text(path.read_text()[: int(len(path.read_text()) * share)])
    assert read_sweep(sweeps[0]).rows[1]["status"] == "finished"


def test_a_job_that_ran_before_the_code_changed_is_the_announced_one(sweeps: tuple[Path, Path]) -> None:
    manifest = json.loads((sweeps[0] / "sweep.json").read_text())
    manifest["jobs"][0] |= {"fingerprint": "another", "name": "announced 0"}
    (sweeps[0] / "sweep.json").write_text(json.dumps(manifest))
    assert read_sweep(sweeps[0]).rows[0]["given"] == {"measure.iterations": "ours"}


def test_a_sweep_without_a_manifest_is_told_apart_by_its_jobs(sweeps: tuple[Path, Path]) -> None:
    ours, theirs = sweeps
    copy_of(theirs / "0", ours / "1", "pruner=remove", "pruner.p=1")
    (ours / "sweep.json").unlink()
    assert read_sweep(ours).options == ("measure.iterations", "pruner.p")


def by_options(sweep: Sweep) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in ("name", "status", "given", "latency_ms/b1")} for row in sweep.rows]


def test_a_sweep_that_was_moved_stays_what_it_was(sweeps: tuple[Path, Path], tmp_path: Path) -> None:
    before = by_options(read_sweep(sweeps[0]))
    (tmp_path / "elsewhere").mkdir()
    moved = sweeps[0].rename(tmp_path / "elsewhere" / "renamed = moved")
    assert by_options(read_sweep(moved)) == before
    assert command(read_sweep(moved).rows[0]).startswith("python launch.py pruner=l1_global")


def test_a_sweep_whose_working_folder_is_gone_says_how_to_start_it(sweeps: tuple[Path, Path], tmp_path: Path) -> None:
    manifest = json.loads((sweeps[0] / "sweep.json").read_text())
    manifest |= {"arguments": ["launch.py", "pruner=l1"], "working_folder": str(tmp_path / "gone")}
    (sweeps[0] / "sweep.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"gone, where its command was given, is no longer there; repeat the command"):
        start_again(sweeps[0])


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_shown_nevertheless(sweeps: tuple[Path, Path], tmp_path: Path) -> None:
    (sweeps[0] / "results.csv").mkdir()  # which nobody may replace by a file
    done = show(tmp_path, "ours")
    assert (done.returncode, done.stderr) == (0, "")
    assert "digits_cnn" in done.stdout
    assert done.stdout.splitlines()[-1] == "CSV: ours/results.csv cannot be written (Is a directory)."


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_one_sentence(sweeps: tuple[Path, Path], tmp_path: Path) -> None:
    (sweeps[0] / "report.html").mkdir()
    done = python(["-m", "pq_sweep.report", "ours"], tmp_path, dict(os.environ))
    assert done.returncode == 1
    assert done.stderr == "ours/report.html cannot be written (Is a directory); give --output=FILE that can be.\n"


@pytest.mark.slow
def test_what_was_cut_short_is_made_again(tmp_path: Path) -> None:
    """Results, the announcement, and what the jobs of a sweep share."""
    own = ("hydra.sweep.dir=s", "tracking=none", "device=cpu", "pruner=none,l1_global", *SHORT)
    assert launch_in(tmp_path, *own).returncode == 0
    sweep = tmp_path / "s"
    for path in [*sweep.glob("*/result.json"), sweep / "sweep.json", *sweep.glob("baseline/*/*.json")]:
        cut(path, "half")
    done = launch_in(tmp_path, *own)
    assert (done.returncode, "Traceback" in done.stdout + done.stderr) == (0, False)
    assert [row["status"] for row in read_sweep(sweep).rows] == ["finished", "finished"]
