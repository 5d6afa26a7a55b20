"""Tracking as a cluster uses it: many first clients at once, and stores that stop, hang, are crowded or full."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import python
from stored_runs import artifacts, parent_and_jobs
from sweep_folders import announced, write_error, write_manifest, write_result

from cluster.services import Postgres, Server
from pq_sweep.tracking import store as stores
from pq_sweep.tracking import tracker as tracking
from pq_sweep.tracking.store import Store
from pq_sweep.tracking.tracker import Mlflow
from pq_sweep.tracking.view import View

pytestmark = pytest.mark.slurm

JOBS = ("0", "1", "2", "3")

# Forks a process for each of the jobs it is given; all log theirs at the same moment, MLflow being imported before.
CLIENTS = """
import os, sys, time
from pathlib import Path
from pq_sweep.tracking.store import import_mlflow
from pq_sweep.tracking import Mlflow

import_mlflow()
import mlflow.store.tracking.sqlalchemy_store
import mlflow.tracking.client

uri, experiment, sweep, *jobs = sys.argv[1:]
start = time.monotonic() + 1
clients = []
for job in jobs:
    if (client := os.fork()) == 0:
        time.sleep(max(0, start - time.monotonic()))
        tracker = Mlflow(uri, experiment)
        tracker.log(Path(sweep, job))
        os._exit(len(tracker.down))
    clients.append(client)
sys.exit(any([os.waitpid(client, 0)[1] for client in clients]))
"""

# Logs a job while no file may grow beyond the size that the store has; small pages are full after a few values.
FULL = """
import resource, sqlite3, sys
from pathlib import Path
from pq_sweep.tracking import Mlflow

uri, experiment, job = sys.argv[1:]
store = Path(uri.removeprefix("sqlite:///"))
sqlite3.connect(store, isolation_level=None).executescript("PRAGMA journal_mode=DELETE; PRAGMA page_size=512; VACUUM")
size = store.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
Mlflow(uri, experiment).log(Path(job))
"""


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process starts with: no store is known to be down."""
    monkeypatch.setattr(Mlflow, "down", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep whose jobs have ended, one of them by failing."""
    folder = write_manifest(tmp_path / "multirun" / "day" / "hour", *map(announced, JOBS))
    for job in JOBS[:-1]:
        write_result(folder, job)
    write_error(folder, JOBS[-1])
    return folder


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> str:
    """A name that no other test has, as they share a store."""
    return str(request.node.name)


def address(kind: str, request: pytest.FixtureRequest) -> str:
    """Start what is meant and return its address."""
    if kind == "sqlite":
        return f"sqlite:///{request.getfixturevalue('tmp_path') / 'mlflow.db'}"
    return str(request.getfixturevalue("database" if kind == "postgresql" else "server").uri)


def clients(tmp_path: Path, uri: str, experiment: str, sweep: Path, *jobs: str) -> None:
    """Log jobs in as many processes at once."""
    done = python(["-c", CLIENTS, uri, experiment, str(sweep), *jobs], tmp_path, dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "cannot be used" not in done.stderr


def is_logged_once(uri: str, experiment: str) -> None:
    """Check that each job has one run, of one parent, and none is still running."""
    parent, jobs = parent_and_jobs(uri, experiment)
    ended = {name: run.info.status for name, run in jobs.items()}
    assert ended == dict.fromkeys(JOBS[:-1], "FINISHED") | {JOBS[-1]: "FAILED"}
    assert parent.info.status == "FAILED"
    assert all(artifacts(uri, jobs[job]) == {"config.yaml", "result.json"} for job in JOBS[:-1])


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", ["sqlite", "postgresql", "server"])
def test_first_clients_at_once(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, sweep: Path, experiment: str
) -> None:
    """Each job by two processes, as if its launcher logged it as well."""
    uri = address(kind, request)
    clients(tmp_path, uri, experiment, sweep, *JOBS, *JOBS)
    assert parent_and_jobs(uri, experiment)[0].info.status == "RUNNING"
    tracker = Mlflow(uri, experiment)
    assert tracker.sync(sweep) == 0
    is_logged_once(uri, experiment)


def test_tables_are_made_by_one_process_at_a_time(database: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    """Apart from the race itself, which second tries mostly mend."""
    store, other = Store(database.uri), Store(database.uri)
    with store._alone():
        monkeypatch.setattr(stores, "LOCK_S", 0.5)
        with pytest.raises(TimeoutError, match="another process"), other._alone():
            pass
    with other._alone():
        pass


def test_more_clients_than_connections(database: Postgres, tmp_path: Path, sweep: Path, experiment: str) -> None:
    uri = database.new_database("crowded", connections=5)
    Mlflow(uri, experiment).begin(sweep)
    clients(tmp_path, uri, experiment, sweep, *JOBS, *JOBS)
    assert Mlflow(uri, experiment).sync(sweep) == 0
    is_logged_once(uri, experiment)


def test_server_that_is_away_for_half_of_the_jobs(
    server: Server, sweep: Path, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Mlflow(server.uri, experiment)
    tracker.begin(sweep)
    tracker.log(sweep / "0")
    tracker.log(sweep / "1")
    server.stop()
    tracker.log(sweep / "2")
    tracker.log(sweep / "3")
    (warning,) = warnings(caplog)
    assert f"python -m pq_sweep.tracking sync {sweep}" in warning
    server.start()
    assert set(parent_and_jobs(server.uri, experiment)[1]) == {"0", "1"}
    assert tracker.finish(sweep).startswith(f"MLflow UI: {server.uri}/#/experiments/")
    is_logged_once(server.uri, experiment)


def in_the_middle(monkeypatch: pytest.MonkeyPatch, event: Callable[[], None]) -> None:
    """Let something happen once, when the run of a job is made and not yet filled."""
    fill, events = View._fill, [event]

    def interrupted(*arguments: Any) -> None:
        while events:
            events.pop()()
        fill(*arguments)

    monkeypatch.setattr(View, "_fill", interrupted)


@pytest.mark.parametrize("kind", ["postgresql", "server"])
@pytest.mark.parametrize(("end", "restore"), [("kill", "start"), ("pause", "resume")])
def test_database_that_breaks_while_a_job_is_logged(
    kind: str,
    end: str,
    restore: str,
    request: pytest.FixtureRequest,
    database: Postgres,
    sweep: Path,
    experiment: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = Mlflow(address(kind, request), experiment)
    tracker.begin(sweep)
    monkeypatch.setattr(tracking, "PATIENCE_S", 5)
    in_the_middle(monkeypatch, getattr(database, end))
    start = time.monotonic()
    try:
        tracker.log(sweep / "0")
        tracker.log(sweep / "1")
        assert time.monotonic() - start < 15
    finally:
        getattr(database, restore)()
    assert len(warnings(caplog)) == 1
    monkeypatch.setattr(tracking, "SHORT_PATIENCE_S", 30)  # on a busy machine
    assert "MLflow UI" in tracker.finish(sweep)
    is_logged_once(tracker.store, experiment)
    assert tracker.sync(sweep) == 0


def test_full_store(tmp_path: Path, sweep: Path, experiment: str) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    tracker = Mlflow(uri, experiment)
    tracker.begin(sweep)
    start = time.monotonic()
    done = python(["-c", FULL, uri, experiment, str(sweep / "0")], tmp_path, dict(os.environ))
    assert time.monotonic() - start < 60
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot be used") == 1
    assert "Traceback" not in done.stderr
    tracker.finish(sweep)
    is_logged_once(uri, experiment)


def test_files_of_a_database_lie_where_the_sweep_started(
    database: Postgres, tmp_path: Path, sweep: Path, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = database.uri.replace("+psycopg2", "")
    monkeypatch.chdir(tmp_path)
    Mlflow(uri, experiment).begin(sweep)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    Mlflow(uri, experiment).finish(sweep)
    is_logged_once(database.uri, experiment)
    assert list(elsewhere.iterdir()) == []
    assert len(list((tmp_path / "mlartifacts").rglob("result.json"))) == len(JOBS) - 1
