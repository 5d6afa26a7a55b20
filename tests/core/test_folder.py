"""The folders of sweeps and jobs: what their files tell."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from pq_sweep.core.folder import Inside, JobFolder, SweepFolder, is_job

ERROR = {"type": "ValueError", "message": "it broke.", "stage": "prune", "started": 1.0}


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    folder = SweepFolder(tmp_path / "sweep").job("3")
    folder.path.mkdir(parents=True)
    return folder


def test_a_job_knows_its_sweep(job: JobFolder, tmp_path: Path) -> None:
    assert job.name == "3"
    assert job.sweep == SweepFolder(tmp_path / "sweep")
    assert job.sweep.manifest == tmp_path / "sweep" / "sweep.json"


def test_only_its_own_result_finishes_a_job(job: JobFolder) -> None:
    assert not job.finished("key")
    job.result.write_text("[1]")
    assert not job.finished("key")
    job.result.write_text(json.dumps({"fingerprint": "key"}))
    assert job.finished("key")
    assert not job.finished("other")
    job.result.write_text('{"fingerprint": "key"')
    assert not job.finished("key")


def test_why_a_job_failed_is_told_until_it_is_forgotten(job: JobFolder) -> None:
    assert job.read_error() is None
    job.write_error(ERROR)
    assert job.read_error() == ERROR
    job.forget_error()
    assert job.read_error() is None


def test_an_error_goes_beside_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "3").touch()  # a file stands where the folder would be
    job = JobFolder(tmp_path / "3")
    job.write_error(ERROR)
    assert (tmp_path / "3.error.json").exists()
    assert job.read_error() == ERROR


def test_an_error_that_can_be_written_nowhere_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.ERROR):
        JobFolder(tmp_path / "file" / "3").write_error(ERROR)
    assert caplog.text.count("cannot be written") == 2


def test_clearing_leaves_nothing_that_a_job_made_and_all_that_is_the_users(job: JobFolder) -> None:
    names = [name for name, value in vars(JobFolder).items() if isinstance(value, Inside)]
    kept = {"result", "status", "config", "log", "layers", "store_lock"}  # told anew, or not a job's own
    for name in names:
        path: Path = getattr(job, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if name in ("engine", "dense") else path.touch()
    (job.engine / "b1.engine").touch()
    for path in (job.kept("prune"), job.path / "notes.txt"):
        path.touch()
    job.clear()
    left = {str(path.relative_to(job.path)) for path in job.path.rglob("*") if path.is_file()}
    assert left == {os.path.relpath(getattr(job, name), job.path) for name in kept} | {"notes.txt"}


def test_jobs_that_are_over_are_found_by_result_or_error(tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path)
    for name, sign in (("0", "result.json"), ("1", "error.json"), ("2", "status.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / sign).touch()
    assert sweep.over() == {"0", "1"}
    assert [is_job(tmp_path / name) for name in "012"] == [True, True, False]
    assert sweep.read_manifest() == {}
    assert sweep.announced() == []
