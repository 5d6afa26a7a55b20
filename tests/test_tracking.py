"""MLflow as a view of the folders: complete, never doubled, and never in the way when the store is down."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from commands import LAUNCH, SHORT, Done
from conftest import Launch, only_sweep, python, results
from mlflow import MlflowClient
from mlflow.entities import Run
from sweep_folders import announced, write_error, write_manifest, write_result, write_status

from pq_sweep import tracking
from pq_sweep.environment import without_password
from pq_sweep.results import metrics, read_sweep, write_csv
from pq_sweep.tracking import Mlflow, NoTracking

EXPERIMENT = "pq_sweep"
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
    """What a process starts with: no store is known to be down, and no variable names one."""
    monkeypatch.setattr(Mlflow, "down", set())
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


def all_runs(uri: str) -> list[Run]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def parent_and_jobs(uri: str) -> tuple[Run, dict[str, Run]]:
    """Return the only parent run and its children by job; every run is one or the other, and none is double."""
    found = all_runs(uri)
    (parent,) = (run for run in found if run.data.tags.get("pq_sweep.kind") == "sweep")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    jobs = {run.data.tags["pq_sweep.job"]: run for run in children}
    assert len(found) == 1 + len(children) == 1 + len(jobs)
    return parent, jobs


def artifacts(uri: str, run: Run) -> set[str]:
    return {item.path for item in MlflowClient(uri).list_artifacts(run.info.run_id)}


def artifact(uri: str, run: Run, name: str) -> str:
    return Path(MlflowClient(uri).download_artifacts(run.info.run_id, name)).read_text()


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
    assert said == f"MLflow UI: mlflow ui --backend-store-uri {uri} (or: make ui)"


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
    assert run.data.metrics == pytest.approx(metrics(result))
    chosen = {"model": "digits_cnn", "pruner": "l1_global", "pruner.amount": "0.5", "quantizer": "none", "seed": "0"}
    assert {key: run.data.params.get(key) for key in chosen} == chosen
    assert run.data.params["runtime"] == "torch"
    assert run.data.tags["pq_sweep.precision"] == "fp32"
    assert run.info.run_name == "digits_cnn l1_global 0.1 none torch"
    assert artifacts(uri, run) == {"config.yaml", "result.json"}
    assert json.loads(artifact(uri, run, "result.json")) == result
    assert run.info.end_time - run.info.start_time == pytest.approx(result["seconds"] * 1000, abs=2)


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


def test_long_values_are_shortened(uri: str, tracker: Mlflow, tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0", model="m" * 7000))
    write_result(sweep, "0")
    assert tracker.sync(sweep) == 1
    assert parent_and_jobs(uri)[1]["0"].data.params["model"] == "m" * 6000


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


def test_store_that_breaks_on_the_way_is_given_up(
    uri: str, tracker: Mlflow, sweep: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker.begin(sweep)
    Path(uri.removeprefix("sqlite:///")).write_bytes(b"no database at all " * 100)
    tracker.log(sweep / "0")
    tracker.log(sweep / "1")
    assert tracker.finish(sweep) == ""
    assert len(warned(caplog)) == 1


def test_what_a_store_missed_comes_later(tmp_path: Path, uri: str, sweep: Path) -> None:
    track(Mlflow(DOWN["server"], EXPERIMENT), sweep)
    done = sync(tmp_path, "multirun", "--uri", uri)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "multirun/day/hour: 2 of 2 jobs logged now"
    parent, jobs = parent_and_jobs(uri)
    assert set(jobs) == {"0", "1"}
    assert "results.csv" in artifacts(uri, parent)


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


@pytest.mark.parametrize("name", DOWN)
def test_sync_to_a_store_that_is_down_says_so_in_one_sentence(tmp_path: Path, sweep: Path, name: str) -> None:
    done = sync(tmp_path, "multirun", "--uri", DOWN[name])
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"MLflow store {without_password(DOWN[name])} cannot be used: ")
    assert "s3cret" not in done.stdout + done.stderr


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
    tracking.main()
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
    found = tracking.parameters(sweep / "0", row)
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def wait_until_healthy(url: str, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(f"{url}/health", timeout=2) as answer:
                assert answer.status == 200
                return
        except (URLError, OSError):
            time.sleep(0.3)
    pytest.fail("mlflow server did not start")


@contextmanager
def mlflow_server(folder: Path, env: dict[str, str]) -> Iterator[str]:
    """Run `mlflow server` in `folder` on a free port of the loopback and stop it whatever happens."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", "sqlite:///server.db", "--workers", "1"]
    settings = env | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=settings, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_real_server(tmp_path: Path, environment: dict[str, str]) -> None:
    with mlflow_server(tmp_path, environment) as url:
        env = environment | {"MLFLOW_TRACKING_URI": url}
        done = python([LAUNCH, *SHORT, "pruner=l1"], tmp_path, env)
        assert done.returncode == 0, done.stderr
        assert f"MLflow UI: {url}" in done.stdout
        parent, jobs = parent_and_jobs(url)
        (result,) = results(only_sweep(tmp_path))
        assert jobs["0"].data.metrics == pytest.approx(metrics(result))
        assert jobs["0"].info.status == parent.info.status == "FINISHED"
        assert artifacts(url, jobs["0"]) == {"config.yaml", "result.json"}
        assert artifacts(url, parent) == {"results.csv"}
        again = sync(tmp_path, "multirun", "--uri", url)
        assert "0 of 1 jobs logged now" in again.stdout
    assert not (tmp_path / "mlflow.db").exists()
