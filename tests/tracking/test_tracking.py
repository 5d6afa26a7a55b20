"""MLflow as a view of the folders: complete, never doubled, and never in the way when the store is down."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest
from cluster.services import mlflow_server
from commands import LAUNCH, SHORT, Done
from conftest import Launch, only_sweep, python, refused, results
from mlflow import MlflowClient
from omegaconf import OmegaConf
from stored_runs import EXPERIMENT, all_runs, artifact, artifacts, parent_and_jobs
from sweep_folders import announced, real_result, write_error, write_manifest, write_result, write_status

from pq_sweep.core.files import shared_file_system
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.limits import bounded
from pq_sweep.core.result import Result
from pq_sweep.core.sentences import without_password
from pq_sweep.results.rows import metrics
from pq_sweep.results.spreadsheet import write_csv
from pq_sweep.results.sweeps import read_sweep
from pq_sweep.tracking import __main__ as command
from pq_sweep.tracking import sqlite
from pq_sweep.tracking import store as stores
from pq_sweep.tracking import tracker as tracking
from pq_sweep.tracking import view as runs
from pq_sweep.tracking.store import Store, held
from pq_sweep.tracking.table import address
from pq_sweep.tracking.tracker import Mlflow, NoTracking

NO_DATABASE = "postgresql+psycopg2://user:s3cret@127.0.0.1:9/pq"
DOWN = {
    "server": "http://user:s3cret@127.0.0.1:9",
    "folder": "sqlite:///nowhere/mlflow.db",
    "database": NO_DATABASE,
    "scheme": "nonsense://user:s3cret@127.0.0.1:9",
}


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process starts with: no store is known to be down or open, and no variable names one."""
    monkeypatch.setattr(Mlflow, "down", {})
    monkeypatch.setattr(Mlflow, "views", {})
    monkeypatch.setattr(runs, "RENEWED_S", math.inf)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path) -> str:
    path = tmp_path / "store" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(empty_store, path)
    return f"sqlite:///{path}"


@pytest.fixture
def tracker(uri: str) -> Mlflow:
    return Mlflow(uri, EXPERIMENT)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep of a finished and a failed job."""
    folder = write_manifest(tmp_path / "multirun" / "day" / "hour", announced("0", amount=0.1), announced("1"))
    write_result(folder, "0")
    write_error(folder, "1", "no channel is left.")
    return folder


def track(tracker: Mlflow, sweep: Path) -> str:
    """Log a sweep as its process does."""
    tracker.begin(sweep)
    for row in read_sweep(sweep).rows:
        tracker.log(sweep / row["job"])
    write_csv(read_sweep(sweep))
    return tracker.finish(sweep)


def sync(folder: Path, *arguments: str) -> Done:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    return python(["-m", "pq_sweep.tracking", "sync", *arguments], folder, kept)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.slow
def test_sweep_is_a_parent_with_a_child_per_job(uri: str, tracker: Mlflow, sweep: Path) -> None:
    said = track(tracker, sweep)
    parent, jobs = parent_and_jobs(uri)
    assert {name: run.info.status for name, run in jobs.items()} == {"0": "FINISHED", "1": "FAILED"}
    assert parent.info.status == "FAILED"
    counts = {key: parent.data.tags[f"pq_sweep.{key}"] for key in ("finished", "failed", "missing")}
    assert counts == {"finished": "1", "failed": "1", "missing": "0"}
    assert parent.data.tags["pq_sweep.command"] == "python launch.py"
    assert parent.info.run_name == "day/hour"
    assert artifact(uri, parent, "results.csv") == (sweep / "results.csv").read_text()
    assert said == f"MLflow UI: python -m pq_sweep.tracking ui --uri {uri} (or: make ui)"


@pytest.mark.slow
def test_parent_of_a_sweep_without_failures_is_finished(uri: str, tracker: Mlflow, tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"))
    write_result(sweep, "0")
    track(tracker, sweep)
    parent, _ = parent_and_jobs(uri)
    assert parent.info.status == "FINISHED"


def test_finished_job(uri: str, tracker: Mlflow, sweep: Path) -> None:
    track(tracker, sweep)
    run = parent_and_jobs(uri)[1]["0"]
    result = json.loads((sweep / "0" / "result.json").read_text())
    assert run.data.metrics == pytest.approx(metrics(Result.of(result)))
    chosen = {"model": "digits_cnn", "pruner": "l1_global", "pruner.amount": "0.5", "quantizer": "none", "seed": "0"}
    assert {key: run.data.params.get(key) for key in chosen} == chosen
    assert run.data.params["runtime"] == "torch"
    assert run.data.tags["pq_sweep.precision"] == "fp32"
    assert run.info.run_name == "digits_cnn l1_global 0.1 none torch"
    assert artifacts(uri, run) == {"config.yaml", "result.json"}
    assert json.loads(artifact(uri, run, "result.json")) == result
    assert run.info.end_time - run.info.start_time == pytest.approx(result["seconds"] * 1000, abs=2)


def test_the_gpu_of_a_job_and_its_software_are_tags(uri: str, tracker: Mlflow, tmp_path: Path) -> None:
    """By them one sees in MLflow whether two runs may be compared."""
    nvml = {"driver": "580.65.06", "sm_max_mhz": 1410, "mig": False, "unavailable": {"vbios": "not supported"}}
    gpu = {
        "name": "NVIDIA A100",
        "uuid": "1f2e",
        "compute_capability": "8.0",
        "cuda": "13.0",
        "cudnn": 91900,
        "nvml": nvml,
    }
    result = real_result()
    result["environment"] |= {"gpu": gpu, "versions": {"torch": "2.15.0", "tensorrt": "10.13.3.9"}}
    write_manifest(tmp_path / "sweep", announced("0"))
    write_result(tmp_path / "sweep", "0", result)
    tracker.finish(tmp_path / "sweep")
    tags = parent_and_jobs(uri)[1]["0"].data.tags
    found = {
        name.removeprefix("pq_sweep."): value for name, value in tags.items() if "gpu." in name or "version." in name
    }

    assert found == {
        "gpu.name": "NVIDIA A100",
        "gpu.uuid": "1f2e",
        "gpu.compute_capability": "8.0",
        "gpu.cuda": "13.0",
        "gpu.cudnn": "91900",
        "gpu.driver": "580.65.06",
        "gpu.sm_max_mhz": "1410",
        "gpu.mig": "False",
        "version.torch": "2.15.0",
        "version.tensorrt": "10.13.3.9",
    }


def test_failed_job(uri: str, tracker: Mlflow, sweep: Path) -> None:
    track(tracker, sweep)
    run = parent_and_jobs(uri)[1]["1"]
    assert run.data.tags["pq_sweep.error"] == "no channel is left."
    assert run.data.tags["pq_sweep.stage"] == "prune"
    assert run.data.params["pruner"] == "l1_global"
    assert run.data.metrics == {}
    assert "error.json" in artifacts(uri, run)


def test_config_in_the_store_holds_no_password(uri: str, tracker: Mlflow, sweep: Path) -> None:
    path = sweep / "0" / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("uri: null", f"uri: {NO_DATABASE}"))
    assert "s3cret" in path.read_text()
    track(tracker, sweep)
    run = parent_and_jobs(uri)[1]["0"]
    assert "s3cret" not in artifact(uri, run, "config.yaml")
    assert "pruner" in artifact(uri, run, "config.yaml")
    assert "s3cret" not in str(run.to_dictionary())


def test_second_sync_uploads_nothing(uri: str, tracker: Mlflow, sweep: Path) -> None:
    assert tracker.sync(sweep) == 2
    before = {run.info.run_id for run in all_runs(uri)}
    assert tracker.sync(sweep) == 0
    assert {run.info.run_id for run in all_runs(uri)} == before
    parent_and_jobs(uri)


def test_a_sweep_is_known_whole_however_many_pages_its_runs_are(
    uri: str, tracker: Mlflow, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pq_sweep.tracking.view.PAGE", 2)
    write_manifest(sweep, *(announced(str(number)) for number in range(5)))
    for number in range(2, 5):
        write_result(sweep, str(number))
    assert tracker.sync(sweep) == 5
    looked_up = []
    monkeypatch.setattr("pq_sweep.tracking.view.View._only", lambda *arguments: looked_up.append(arguments))
    assert tracker.sync(sweep) == 0
    assert not looked_up
    assert set(parent_and_jobs(uri)[1]) == {"0", "1", "2", "3", "4"}


def test_sync_after_a_whole_sweep_uploads_nothing(tracker: Mlflow, sweep: Path) -> None:
    track(tracker, sweep)
    assert tracker.sync(sweep) == 0


def test_sync_takes_only_what_has_ended(uri: str, tracker: Mlflow, sweep: Path) -> None:
    write_manifest(sweep, *(announced(str(number)) for number in range(4)))
    write_status(sweep, "2", os.getppid())
    assert tracker.sync(sweep) == 2
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}
    write_result(sweep, "2")
    assert tracker.sync(sweep) == 1
    assert set(parent_and_jobs(uri)[1]) == {"0", "1", "2"}


def test_a_job_that_ran_again_replaces_its_run(uri: str, tracker: Mlflow, sweep: Path) -> None:
    tracker.sync(sweep)
    (sweep / "1" / "error.json").unlink()
    write_result(sweep, "1")
    assert tracker.sync(sweep) == 1
    parent, jobs = parent_and_jobs(uri)
    assert jobs["1"].info.status == "FINISHED"
    assert jobs["1"].data.metrics["accuracy"] > 0
    assert "pq_sweep.error" not in jobs["1"].data.tags
    assert parent.info.status == "FINISHED"


def test_representations_of_layers_go_to_the_store_with_their_picture(uri: str, tracker: Mlflow, sweep: Path) -> None:
    files = JobFolder(sweep / "0")
    files.representations.write_text("epoch,layer,snr_db\n1,fc1,12.5\n")
    files.representations_drawn.write_text("<svg></svg>")
    track(tracker, sweep)
    run = parent_and_jobs(uri)[1]["0"]
    assert {"representations.csv", "representations.svg"} <= artifacts(uri, run)
    assert artifact(uri, run, "representations.csv") == files.representations.read_text()


def test_job_that_was_killed_while_it_was_logged_is_completed(uri: str, tracker: Mlflow, sweep: Path) -> None:
    tracker.begin(sweep)
    parent, _ = parent_and_jobs(uri)
    tags = {"pq_sweep.sweep": "id of hour", "pq_sweep.job": "0", "mlflow.parentRunId": parent.info.run_id}
    half = MlflowClient(uri).create_run(parent.info.experiment_id, tags=tags)
    assert half.info.status == "RUNNING"
    assert tracker.sync(sweep) == 2
    run = parent_and_jobs(uri)[1]["0"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["accuracy"] > 0
    assert artifacts(uri, run) == {"config.yaml", "result.json"}


def test_runs_made_twice_become_one(uri: str, tracker: Mlflow, sweep: Path) -> None:
    """As on a file system without locks: another parent, with a child of a job that is logged already."""
    tracker.sync(sweep)
    parent, jobs = parent_and_jobs(uri)
    client = MlflowClient(uri)
    tags = {"pq_sweep.sweep": "id of hour", "pq_sweep.kind": "sweep"}
    other = client.create_run(parent.info.experiment_id, tags=tags)
    kept = ("pq_sweep.sweep", "pq_sweep.job", "pq_sweep.started")
    tags = {key: jobs["0"].data.tags[key] for key in kept} | {"mlflow.parentRunId": other.info.run_id}
    client.create_run(parent.info.experiment_id, tags=tags)
    client.set_tag(jobs["1"].info.run_id, "mlflow.parentRunId", other.info.run_id)
    assert tracker.sync(sweep) == 0
    _, after = parent_and_jobs(uri)
    assert {name: run.info.status for name, run in after.items()} == {"0": "FINISHED", "1": "FAILED"}


def test_parent_runs_while_jobs_are_to_come(uri: str, tracker: Mlflow, sweep: Path) -> None:
    write_manifest(sweep, *(announced(str(number)) for number in range(3)))
    write_status(sweep, "2", os.getppid())
    tracker.begin(sweep)
    tracker.finish(sweep)
    assert parent_and_jobs(uri)[0].info.status == "RUNNING"
    write_result(sweep, "2")
    tracker.sync(sweep)
    assert parent_and_jobs(uri)[0].info.status == "FAILED"
    tracker.begin(sweep)
    assert parent_and_jobs(uri)[0].info.status == "RUNNING"


def test_sync_where_no_lock_can_be(uri: str, tracker: Mlflow, sweep: Path) -> None:
    for folder in (sweep, sweep / "0", sweep / "1"):
        (folder / ".mlflow.lock").mkdir()  # as little of a lock file as in a folder that cannot be written
    assert tracker.sync(sweep) == 2
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}


def test_lock_is_held_and_waited_for_a_bounded_time(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with held(lock), pytest.raises(TimeoutError, match="lock is held by another process"), held(lock, 0.2):
        pass
    with held(lock, 0.2):
        pass


def test_experiment_that_another_process_made_first_is_used(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = MlflowClient(uri)
    made, look = client.create_experiment("raced"), MlflowClient.get_experiment_by_name
    seen = [None]  # as before the other process made it
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", lambda *names: seen.pop() if seen else look(*names))
    assert Store(uri)._experiment(client, "raced") == made


def test_call_that_hangs_is_left_behind() -> None:
    over = Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0 s"):
        bounded(lambda: over.wait(30), 0.1)
    over.set()
    assert bounded(lambda: 7, 10) == 7
    with pytest.raises(ValueError, match="broken"):
        bounded(lambda: int("broken"), 10)


SLURM = {"slurm_job_id": "130", "slurmd_nodename": "a1", "slurm_job_partition": "a100"}


def test_job_is_found_by_its_number_in_slurm(uri: str, tracker: Mlflow, sweep: Path) -> None:
    result = real_result()
    result["environment"]["slurm"] = SLURM | {"slurm_array_job_id": "123", "slurm_array_task_id": "4"}
    write_result(sweep, "0", result)
    path = sweep / "1" / "error.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"slurm": SLURM | {"state": "TIMEOUT", "exit_code": "0:15"}})
    )
    tracker.sync(sweep)
    tags = {name: run.data.tags for name, run in parent_and_jobs(uri)[1].items()}
    found = {key: tags["0"].get(f"pq_sweep.{key}") for key in ("slurm_job", "node", "partition", "slurm_state")}
    assert found == {"slurm_job": "123_4", "node": "a1", "partition": "a100", "slurm_state": None}
    found = {key: tags["1"].get(f"pq_sweep.{key}") for key in ("slurm_job", "node", "slurm_state", "exit_code")}
    assert found == {"slurm_job": "130", "node": "a1", "slurm_state": "TIMEOUT", "exit_code": "0:15"}


MOUNTS = """\
22 1 0:21 / / rw,relatime - ext4 /dev/sda1 rw
23 22 0:22 / /home rw,relatime shared:1 - nfs4 server:/home rw,vers=4.2
24 22 0:23 / /scratch rw - lustre 10.0.0.1@tcp:/scratch rw,flock
25 24 0:24 / /scratch/local\\040disk rw - xfs /dev/sdb1 rw
26 22 0:25 / /data rw - autofs systemd-1 rw
27 22 0:26 / /data rw - fuse.sshfs me@host:/ rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/mlflow.db", ""),
        ("/home/me/mlflow.db", "nfs4"),
        ("/homes/mlflow.db", ""),
        ("/scratch/x/mlflow.db", "lustre"),
        ("/scratch/local disk/mlflow.db", ""),
        ("/data/mlflow.db", "fuse.sshfs"),
    ],
)
def test_shared_file_system(path: str, kind: str) -> None:
    assert shared_file_system(Path(path), MOUNTS) == kind


def test_sqlite_on_a_shared_file_system_is_warned_about(
    tracker: Mlflow, sweep: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "shared_file_system", lambda path: "nfs4")
    tracker.begin(sweep)
    (warning,) = warned(caplog)
    assert "mlflow.db lies on nfs4" in warning
    assert "run an MLflow server, see docs/cluster.md" in warning


@pytest.mark.parametrize(
    ("uri", "installed", "address"),
    [
        ("postgresql://me@h/n", {"psycopg2"}, "postgresql+psycopg2://me@h/n"),
        ("postgresql://me@h/n", {"psycopg"}, "postgresql+psycopg://me@h/n"),
        ("postgresql://me@h/n", {"psycopg", "psycopg2"}, "postgresql+psycopg2://me@h/n"),
        ("postgresql+psycopg://me@h/n", {"psycopg", "psycopg2"}, "postgresql+psycopg://me@h/n"),
        ("http://h:5000", set(), "http://h:5000"),
    ],
)
def test_postgresql_driver_is_the_one_installed(
    uri: str, installed: set[str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "find_spec", lambda name: name in installed or None)
    assert Store(uri).address == address


@pytest.mark.parametrize("uri", ["postgresql://me:s3cret@h/n", "postgresql+psycopg2://me:s3cret@h/n"])
def test_postgresql_without_a_driver_says_what_to_install(
    uri: str, sweep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    said = refused(lambda: Store(uri).address)
    assert "pip install '.[postgres]'" in said
    assert "s3cret" not in said
    track(Mlflow(uri, EXPERIMENT), sweep)
    (warning,) = warned(caplog)
    assert "pip install '.[postgres]'" in warning


# Imports all of pq_sweep, then MLflow as pq_sweep does.
IMPORT = """
import os, pkgutil, sys, importlib, pq_sweep
for module in pkgutil.walk_packages(pq_sweep.__path__, "pq_sweep."):
    importlib.import_module(module.name)
assert "mlflow" not in sys.modules
pq_sweep.tracking.store.import_mlflow()
from mlflow.telemetry.utils import is_telemetry_disabled
print(is_telemetry_disabled(), os.environ["DO_NOT_TRACK"], os.environ["MLFLOW_DISABLE_TELEMETRY"])
"""


@pytest.mark.slow
def test_mlflow_is_never_imported_before_its_calls_home_are_off(tmp_path: Path) -> None:
    off = ("MLFLOW", "DO_NOT_TRACK", "CI", "PYTEST", "GITHUB")  # in tests MLflow is silent of its own accord
    env = {key: value for key, value in os.environ.items() if not key.startswith(off)}
    done = python(["-c", IMPORT], tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "true", "true"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["old", "größe λ", "it's"])
def test_sweep_without_manifest_is_logged_once(uri: str, tracker: Mlflow, tmp_path: Path, name: str) -> None:
    write_result(tmp_path / name, "0")
    assert [tracker.sync(tmp_path / name) for _ in range(2)] == [1, 0]
    assert set(parent_and_jobs(uri)[1]) == {"0"}


def test_two_sweeps_are_two_parents(uri: str, tracker: Mlflow, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_result(write_manifest(tmp_path / name, announced("0")), "0")
        tracker.sync(tmp_path / name)
    kinds = [run.data.tags.get("pq_sweep.kind") for run in all_runs(uri)]
    assert sorted(kinds, key=str) == [None, None, "sweep", "sweep"]


# Jobs that one process logs, one after another


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The experiments that were looked up, which is done for each view."""
    found, look = list[str](), Store.open
    monkeypatch.setattr(Store, "open", lambda store, name: found.append(name) or look(store, name))
    return found


def test_jobs_share_a_view_that_keeps_no_connection(uri: str, tracker: Mlflow, sweep: Path, opened: list[str]) -> None:
    store = uri.removeprefix("sqlite:///")
    tracker.begin(sweep)
    opened.clear()
    for name in ("0", "1"):
        assert Mlflow(uri, EXPERIMENT).log(sweep / name)  # each job has a tracker of its own
        assert not any(os.path.realpath(file) == store for file in Path("/proc/self/fd").iterdir())
    assert opened == [EXPERIMENT]
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}


def test_sweeps_and_experiments_in_turn(uri: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_manifest(tmp_path / name, announced("0"), announced("1"))
        write_result(tmp_path / name, "0")
        write_result(tmp_path / name, "1")
    for job in ("0", "1"):
        for name, experiment in (("a", "first"), ("b", "first"), ("a", "second")):
            assert Mlflow(uri, experiment).log(tmp_path / name / job)
    found = {
        experiment: sorted(run.data.tags["pq_sweep.sweep"] for run in all_runs(uri, experiment))
        for experiment in ("first", "second")
    }
    assert found == {"first": ["id of a"] * 3 + ["id of b"] * 3, "second": ["id of a"] * 3}


@pytest.mark.parametrize("signed", [True, False])
def test_job_that_ran_again_in_the_same_process_replaces_its_run(
    uri: str, tracker: Mlflow, sweep: Path, signed: bool
) -> None:
    tracker.log(sweep / "1")
    if not signed:  # as in a folder that an earlier version logged, or that was copied without hidden files
        shutil.rmtree(sweep / ".mlflow")
    (sweep / "1" / "error.json").unlink()
    write_result(sweep, "1")
    tracker.log(sweep / "1")
    assert parent_and_jobs(uri)[1]["1"].info.status == "FINISHED"


def test_sync_finds_a_run_that_no_sign_tells_of(uri: str, tracker: Mlflow, sweep: Path) -> None:
    """As of a copy of the folder from before the job was logged."""
    tracker.log(sweep / "1")
    (sweep / ".mlflow" / "1").unlink()
    (sweep / "1" / "error.json").unlink()
    write_result(sweep, "1")
    assert tracker.sync(sweep) == 2
    assert parent_and_jobs(uri)[1]["1"].info.status == "FINISHED"


def test_jobs_announced_meanwhile_are_known(uri: str, tracker: Mlflow, sweep: Path) -> None:
    tracker.log(sweep / "0")
    write_manifest(sweep, announced("0"), announced("1"), announced("2", model="mine"))
    write_result(sweep, "2")
    tracker.log(sweep / "2")
    assert parent_and_jobs(uri)[1]["2"].data.params["model"] == "mine"


def rows_of(store: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(store)) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["whole", "damaged", "cut"])
def test_a_new_store_takes_its_tables_from_an_earlier_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: str
) -> None:
    """And nothing else: where artifacts lie is its own."""
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))
    one, two = (tmp_path / name / "mlflow.db" for name in ("one", "two"))
    one.parent.mkdir()
    two.parent.mkdir()
    Store(f"sqlite:///{one}").open("mine")
    tables = sqlite.empty_tables()
    assert rows_of(tables, "SELECT * FROM experiments") == []
    if kept == "damaged":
        tables.write_bytes(b"no database at all " * 100)
    elif kept == "cut":
        tables.write_bytes(tables.read_bytes()[: tables.stat().st_size // 2])
    Store(f"sqlite:///{two}").open("mine")

    # Of the statements themselves MLflow's migrations write the choices of a column now in one order, now in another.
    for query in ("SELECT type, name, tbl_name FROM sqlite_master ORDER BY name", "SELECT * FROM alembic_version"):
        assert rows_of(one, query) == rows_of(two, query) == rows_of(tables, query)
    statements = [rows_of(store, "SELECT sql FROM sqlite_master ORDER BY name") for store in (one, two)]
    assert kept != "whole" or statements[0] == statements[1]
    for store in (one, two):
        found = rows_of(store, "SELECT name, artifact_location FROM experiments ORDER BY name")
        assert [name for name, _ in found] == ["Default", "mine"]
        assert str(found[1][1]) == (store.parent / "mlartifacts").as_uri()
    assert sorted(path.name for path in tables.parent.iterdir()) == [tables.name]


def test_store_file_that_is_replaced_between_jobs(
    uri: str, tracker: Mlflow, sweep: Path, empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.begin(sweep)
    tracker.log(sweep / "0")
    shutil.copy(empty_store, tmp_path / "new.db")
    (tmp_path / "new.db").rename(uri.removeprefix("sqlite:///"))
    tracker.log(sweep / "1")
    assert set(parent_and_jobs(uri)[1]) == {"1"}
    tracker.finish(sweep)
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}
    assert warned(caplog) == []


@pytest.mark.slow
@pytest.mark.parametrize("tables", ["kept", "unknown"])
def test_store_file_that_is_deleted_between_jobs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    uri: str,
    tracker: Mlflow,
    sweep: Path,
    caplog: pytest.LogCaptureFixture,
    tables: str,
) -> None:
    """MLflow makes tables when it opens a store and not again; with empty ones at hand there is a new store."""
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))
    if tables == "kept":
        Store(f"sqlite:///{tmp_path / 'other.db'}").open("other")
    tracker.begin(sweep)
    tracker.log(sweep / "0")
    Path(uri.removeprefix("sqlite:///")).unlink()
    assert tracker.log(sweep / "1") is (tables == "kept")
    assert len(warned(caplog)) == (0 if tables == "kept" else 1)
    missing = 1 if tables == "kept" else 2
    assert f"{missing} of 2 jobs logged now" in sync(tmp_path, "multirun", "--uri", uri).stdout
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}


@pytest.mark.slow
@pytest.mark.parametrize("noticed", [True, False])
def test_parent_that_is_deleted_between_jobs_is_made_again(
    uri: str, tracker: Mlflow, sweep: Path, monkeypatch: pytest.MonkeyPatch, noticed: bool
) -> None:
    tracker.log(sweep / "0")
    MlflowClient(uri).delete_run(parent_and_jobs(uri)[0].info.run_id)
    if noticed:  # some time later
        monkeypatch.setattr(runs, "RENEWED_S", 1e-6)
    tracker.log(sweep / "1")
    assert len(all_runs(uri)) == (3 if noticed else 2)
    tracker.finish(sweep)
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}


@pytest.mark.slow
def test_view_that_failed_is_not_used_again(
    uri: str, tracker: Mlflow, sweep: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.log(sweep / "0")
    fill, errors = runs.View._fill, [ConnectionError("lost")]

    def interrupted(*arguments: object) -> None:
        if errors:
            raise errors.pop()
        fill(*arguments)

    monkeypatch.setattr(runs.View, "_fill", interrupted)
    assert tracker.log(sweep / "1")
    assert len(opened) == 2
    assert parent_and_jobs(uri)[1]["1"].info.status == "FAILED"


def test_config_is_read_as_it_was_composed(tmp_path: Path) -> None:
    odd = {"small": 1e-05, "tiny": 1e-7, "large": 1e22, "infinite": float("inf"), "number": "1e-3", "word": "on"}
    odd |= {"day": "2026-01-02", "time": "1:30", "octal": "010", "null": None, "empty": "", "text": "größe\n: #"}
    config = OmegaConf.create({"group": odd | {"list": [1, "2", [3.0]], "later": "${seed}"}, "seed": 0})
    path = tmp_path / ".hydra" / "config.yaml"
    path.parent.mkdir()
    OmegaConf.save(config, path)
    assert runs.job_config(JobFolder(tmp_path)) == OmegaConf.to_container(config)


def test_long_values_are_shortened(uri: str, tracker: Mlflow, tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0", model="m" * 7000))
    write_result(sweep, "0")
    assert tracker.sync(sweep) == 1
    assert parent_and_jobs(uri)[1]["0"].data.params["model"] == "m" * 6000


@pytest.mark.slow
@pytest.mark.parametrize("name", DOWN)
def test_store_that_is_down_costs_one_warning(
    tmp_path: Path, sweep: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert track(Mlflow(DOWN[name], EXPERIMENT), sweep) == ""
    assert time.monotonic() - start < 10
    (warning,) = warned(caplog)
    assert f"python -m pq_sweep.tracking sync {sweep}" in warning
    assert "s3cret" not in caplog.text
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_server_that_does_not_answer_is_given_up(sweep: Path, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        track(Mlflow(f"http://127.0.0.1:{silent.getsockname()[1]}", EXPERIMENT), sweep)
    assert time.monotonic() - start < 20
    assert len(warned(caplog)) == 1


@pytest.fixture
def hanging_server() -> Iterator[str]:
    """A server that says it is well, and answers nothing else."""
    over = Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/health":
                over.wait(60)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        over.set()
        server.shutdown()


# Logs a job to a store that hangs, and ends.
LOG = """
import sys, time
from pathlib import Path
from pq_sweep.tracking import tracker as tracking
tracking.PATIENCE_S = 1
job = Path(sys.argv[2])
tracking.import_mlflow()
start = time.monotonic()
tracking.Mlflow(sys.argv[1], "pq_sweep").log(job)
print(time.monotonic() - start, time.time())
"""


@pytest.mark.slow
def test_process_ends_although_its_store_hangs(hanging_server: str, tmp_path: Path, sweep: Path) -> None:
    done = python(["-c", LOG, hanging_server, str(sweep / "0")], tmp_path, dict(os.environ))
    ended = time.time()
    assert done.returncode == 0, done.stderr
    assert f"{hanging_server} cannot be used (no answer within 1 s); results stay on disk" in done.stderr
    waited, returned = (float(word) for word in done.stdout.split())
    assert waited < 10
    assert ended - returned < 10


@pytest.mark.slow
def test_job_waits_for_a_locked_store_a_bounded_time(
    uri: str, tracker: Mlflow, sweep: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker.begin(sweep)
    monkeypatch.setattr(tracking, "PATIENCE_S", 1)
    with closing(sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        start = time.monotonic()
        tracker.log(sweep / "0")
        assert time.monotonic() - start < 5
        tracker.log(sweep / "1")
        assert time.monotonic() - start < 5
    assert len(warned(caplog)) == 1
    assert "MLflow UI" in tracker.finish(sweep)
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}


def test_store_that_comes_back_is_used_again(
    tmp_path: Path, empty_store: Path, sweep: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "late" / "mlflow.db"
    uri = f"sqlite:///{store}"
    tracker = Mlflow(uri, EXPERIMENT)
    tracker.begin(sweep)
    store.parent.mkdir()
    shutil.copy(empty_store, store)
    tracker.log(sweep / "0")  # too soon
    assert all_runs(uri) == []
    monkeypatch.setattr(tracking, "AGAIN_S", 0)
    tracker.log(sweep / "0")
    assert set(parent_and_jobs(uri)[1]) == {"0"}
    assert "MLflow UI" in tracker.finish(sweep)
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}
    assert len(warned(caplog)) == 1


@pytest.mark.slow
def test_store_that_breaks_on_the_way_is_given_up(
    uri: str, tracker: Mlflow, sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.begin(sweep)
    Path(uri.removeprefix("sqlite:///")).write_bytes(b"no database at all " * 100)
    tracker.log(sweep / "0")
    tracker.log(sweep / "1")
    assert tracker.finish(sweep) == ""
    assert len(warned(caplog)) == 1


@pytest.mark.slow
def test_what_a_store_missed_comes_later(tmp_path: Path, uri: str, sweep: Path) -> None:
    track(Mlflow(DOWN["server"], EXPERIMENT), sweep)
    done = sync(tmp_path, "multirun", "--uri", uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "multirun/day/hour: 2 of 2 jobs logged now"
    parent, jobs = parent_and_jobs(uri)
    assert set(jobs) == {"0", "1"}
    assert "results.csv" in artifacts(uri, parent)


@pytest.mark.slow
def test_job_ends_well_when_the_store_is_down(tmp_path: Path, launch: Launch) -> None:
    done = launch(*SHORT, env={"MLFLOW_TRACKING_URI": DOWN["server"]})
    assert done.returncode == 0, done.stderr
    assert len(results(only_sweep(tmp_path))) == 1
    shown = done.stdout + done.stderr
    assert shown.count("cannot be used") == 1
    assert shown.count("python -m pq_sweep.tracking sync multirun/") == 1
    assert "s3cret" not in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "mlflow.db").exists()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert written == []


@pytest.mark.slow
@pytest.mark.parametrize("name", DOWN)
def test_sync_to_a_store_that_is_down_says_so_in_one_sentence(tmp_path: Path, sweep: Path, name: str) -> None:
    done = sync(tmp_path, "multirun", "--uri", DOWN[name])
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    address = without_password(DOWN[name])
    no_store = f"--uri={address} is no address of an MLflow store; give one such as "
    assert line.startswith(no_store if name == "scheme" else f"MLflow store {address} cannot be used: ")
    assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.slow
def test_sync_of_no_folder_is_refused(tmp_path: Path) -> None:
    done = sync(tmp_path, "nowhere")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "nowhere is not a folder" in line


def test_environment_variable_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Mlflow(None, EXPERIMENT).store == f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert Mlflow(None, EXPERIMENT).store == "http://host:5000"
    assert Mlflow("sqlite:///mine.db", EXPERIMENT).store == "sqlite:///mine.db"


def test_sync_honours_the_environment_variable(
    tmp_path: Path, uri: str, sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(sys, "argv", ["tracking", "sync", "multirun"])
    command.main()
    assert len(all_runs(uri)) == 3
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://host:5000/path", "http://host:5000/path"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("https://user:s3cret@host/x", "https://user:***@host/x"),
        ("postgresql+psycopg2://me:s3cret@db:5432/pq", "postgresql+psycopg2://me:***@db:5432/pq"),
        ("redis://:s3cret@host", "redis://:***@host"),
        ("'mysql://me:s:3/cret@db/pq' failed", "'mysql://me:***@db/pq' failed"),
        ("a=http://u:s3cret@h b=http://v:t0psecret@i", "a=http://u:***@h b=http://v:***@i"),
        ("mail me@example.org at 10:30", "mail me@example.org at 10:30"),
    ],
)
def test_without_password(text: str, expected: str) -> None:
    assert without_password(text) == expected


def test_password_in_the_query_is_hidden_too() -> None:
    assert "s3cret" not in without_password("postgresql+psycopg2://db/pq?user=me&password=s3cret")


def test_no_tracking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweep: Path) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    tracker = NoTracking()
    tracker.begin(sweep)
    tracker.log(sweep / "0")
    assert tracker.finish(sweep) == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_parameters_are_the_choices_and_their_options(sweep: Path) -> None:
    (row, _) = read_sweep(sweep).rows
    found = runs.parameters(JobFolder(sweep / "0"), row)
    assert found["pruner"] == "l1_global"
    assert found["measure.batch_sizes"] == "[1]"
    assert not any("_target_" in key or key.startswith("tracking") for key in found)


# Connects once every process is ready to.
BEGIN = """
import sys, time, mlflow
from pathlib import Path
from pq_sweep.tracking import Mlflow
sweep = Path(sys.argv[1])
(sweep / "ready").touch()
while not Path("go").exists():
    time.sleep(0.001)
tracker = Mlflow(None, "pq_sweep")
tracker.begin(sweep)
print(tracker.finish(sweep))
"""


@pytest.mark.slow
def test_sweeps_that_start_at_once_share_a_new_store(tmp_path: Path, environment: dict[str, str]) -> None:
    sweeps = [write_manifest(tmp_path / name) for name in ("a", "b")]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN, sweep.name],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for sweep in sweeps
    ]
    while not all(
        (sweep / "ready").exists() or process.poll() for sweep, process in zip(sweeps, processes, strict=True)
    ):
        time.sleep(0.05)
    (tmp_path / "go").touch()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all("MLflow UI: " in output and "cannot be used" not in output for output in outputs), outputs
    kinds = [run.data.tags.get("pq_sweep.kind") for run in all_runs(f"sqlite:///{tmp_path / 'mlflow.db'}")]
    assert kinds == ["sweep", "sweep"]


@pytest.mark.slow
def test_real_server(tmp_path: Path, environment: dict[str, str]) -> None:
    with mlflow_server(tmp_path, f"sqlite:///{tmp_path / 'server.db'}") as server:
        url = server.uri
        env = environment | {"MLFLOW_TRACKING_URI": url}
        done = python([LAUNCH, *SHORT, "pruner=l1"], tmp_path, env)
        assert done.returncode == 0, done.stderr
        parent, jobs = parent_and_jobs(url)
        assert f"MLflow UI: {address(url, parent.info.experiment_id)}" in done.stdout
        (result,) = results(only_sweep(tmp_path))
        assert jobs["0"].data.metrics == pytest.approx(metrics(Result.of(result)))
        assert jobs["0"].info.status == parent.info.status == "FINISHED"
        assert artifacts(url, jobs["0"]) == {"config.yaml", "result.json", "layers.json", "samples.npz"}
        assert artifacts(url, parent) == {"results.csv", "sweep.json", "comparison.json", "pareto.png"}
        again = sync(tmp_path, "multirun", "--uri", url)
        assert "0 of 1 jobs logged now" in again.stdout
    assert not (tmp_path / "mlflow.db").exists()
