"""Stores that refuse what is logged: deleted experiments and files that cannot be written, each in one sentence."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import pytest
from conftest import python
from mlflow import MlflowClient
from stored_runs import EXPERIMENT, parent_and_jobs
from sweep_folders import announced, write_manifest, write_result

from pq_sweep.core.sentences import reason
from pq_sweep.results.sweeps import read_sweep
from pq_sweep.tracking import ui
from pq_sweep.tracking import view as views
from pq_sweep.tracking.fetch import fetch
from pq_sweep.tracking.tracker import Mlflow
from pq_sweep.types import UserError


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with MLflow's tables, which take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    with chdir(path.parent):  # MLflow makes a folder for files there
        MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Mlflow, "down", {})
    monkeypatch.setattr(Mlflow, "views", {})
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def file(tmp_path: Path, empty_store: Path) -> Path:
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))


@pytest.fixture
def uri(file: Path) -> str:
    return f"sqlite:///{file}"


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    write_result(folder, "0")
    write_result(folder, "1")
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """Collect what a user is warned of."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("pq_sweep").addHandler(handler)
    yield lines
    logging.getLogger("pq_sweep").removeHandler(handler)


def delete_experiment(uri: str) -> str:
    """Delete the experiment as the button of MLflow's interface does, and return its number."""
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(EXPERIMENT)
    number = client.create_experiment(EXPERIMENT) if found is None else found.experiment_id
    client.delete_experiment(number)
    return str(number)


@pytest.mark.slow
def test_a_deleted_experiment_names_the_remedies(uri: str, sweep: Path, said: list[str]) -> None:
    number = delete_experiment(uri)
    tracker = Mlflow(uri, EXPERIMENT)
    assert not tracker.begin(sweep)
    assert tracker.finish(sweep) == ""
    restore = f"MLFLOW_TRACKING_URI={uri} mlflow experiments restore --experiment-id {number}"
    assert said == [
        f"the MLflow experiment {EXPERIMENT!r} was deleted: bring it back by {restore}, or give"
        " tracking.experiment=another_name; results stay on disk, log them later by: python -m"
        f" pq_sweep.tracking sync {sweep}"
    ]


@pytest.mark.slow
def test_an_experiment_that_is_deleted_between_jobs_names_the_remedies(
    uri: str, sweep: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "RENEWED_S", 1e9)
    tracker = Mlflow(uri, EXPERIMENT)
    assert tracker.begin(sweep)
    assert tracker.log(sweep / "0")
    delete_experiment(uri)
    assert not tracker.log(sweep / "1")
    assert said[0].startswith(f"the MLflow experiment {EXPERIMENT!r} was deleted: bring it back by ")


@pytest.mark.slow
def test_what_was_deleted_is_complete_once_it_is_restored(uri: str, sweep: Path) -> None:
    number = delete_experiment(uri)
    assert not Mlflow(uri, EXPERIMENT).begin(sweep)
    MlflowClient(uri).restore_experiment(number)
    assert Mlflow(uri, EXPERIMENT).sync(sweep) == 2
    assert set(parent_and_jobs(uri)[1]) == {"0", "1"}


def test_a_report_of_a_deleted_experiment_names_the_remedies(uri: str, tmp_path: Path) -> None:
    delete_experiment(uri)
    with pytest.raises(UserError, match=rf"the MLflow experiment '{EXPERIMENT}' was deleted: bring it back by "):
        fetch(uri, EXPERIMENT, tmp_path / "fetched")


def test_the_interface_of_a_deleted_experiment_names_the_remedies(uri: str) -> None:
    number = delete_experiment(uri)
    client = MlflowClient(uri)
    with pytest.raises(UserError, match=rf"was deleted; bring it back by mlflow experiments restore .*{number}, or"):
        ui._experiments(client, EXPERIMENT)


def test_a_store_that_may_only_be_read_can_be_read(
    uri: str, file: Path, sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Mlflow(uri, EXPERIMENT).sync(sweep)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in (file, file.parent))
    (fetched,) = fetch(uri, EXPERIMENT, tmp_path / "fetched")
    assert read_sweep(fetched).count("finished") == 2


def test_another_experiment_goes_on(uri: str, sweep: Path) -> None:
    delete_experiment(uri)
    assert Mlflow(uri, "another").begin(sweep)


@pytest.mark.slow
def test_sync_to_a_deleted_experiment_says_so_in_one_sentence(uri: str, sweep: Path, tmp_path: Path) -> None:
    delete_experiment(uri)
    done = python(["-m", "pq_sweep.tracking", "sync", "sweep", "--uri", uri, "--experiment", EXPERIMENT], tmp_path,
                  dict(os.environ))  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"the MLflow experiment {EXPERIMENT!r} was deleted: bring it back by ")


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [EXPERIMENT, "Default"], ids=["new", "there"])
def test_a_store_that_may_only_be_read_is_one_sentence(
    file: Path, sweep: Path, said: list[str], experiment: str
) -> None:
    uri = f"sqlite:///file:{file}?mode=ro&uri=true"
    assert not Mlflow(uri, experiment).begin(sweep)
    (line,) = said
    assert line.startswith(f"MLflow store {uri} cannot be used (")
    assert "attempt to write a readonly database); results stay on disk" in line
    assert "INSERT" not in line


@pytest.mark.parametrize(("what", "why"), [("file", "mlflow.db"), ("folder", "")])
def test_a_file_or_folder_that_may_only_be_read_is_named(
    uri: str, file: Path, sweep: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, what: str, why: str
) -> None:
    """This user may be root, whom no permission stops, so the question is answered for it."""
    closed = file if what == "file" else file.parent
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed)
    assert not Mlflow(uri, EXPERIMENT).begin(sweep)
    assert said[0].startswith(f"MLflow store {uri} cannot be used ({closed} cannot be written); results stay on disk")


def test_a_folder_in_the_place_of_the_file_is_named(tmp_path: Path, sweep: Path, said: list[str]) -> None:
    (tmp_path / "taken.db").mkdir()
    assert not Mlflow(f"sqlite:///{tmp_path}/taken.db", EXPERIMENT).begin(sweep)
    assert f"({tmp_path}/taken.db is a folder)" in said[0]


def test_commands_to_repeat_are_fit_for_a_shell(tmp_path: Path, sweep: Path, said: list[str]) -> None:
    moved = sweep.rename(tmp_path / "a=b (1)")
    assert not Mlflow(f"sqlite:///{tmp_path}/nowhere/x.db", EXPERIMENT).begin(moved)
    assert said[0].endswith(f"sync '{moved}'")


@pytest.mark.slow
def test_a_file_that_is_no_database_is_one_sentence(tmp_path: Path, sweep: Path, said: list[str]) -> None:
    (tmp_path / "text.db").write_text("this is no database, " * 1000)
    assert not Mlflow(f"sqlite:///{tmp_path}/text.db", EXPERIMENT).begin(sweep)
    assert "text.db cannot be used (file is not a database)" in said[0]


def test_a_store_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Mlflow("sqlite:///~/runs/mlflow.db", EXPERIMENT).store == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert Mlflow("sqlite:////a/~b.db", EXPERIMENT).store == "sqlite:////a/~b.db"


def test_a_statement_is_no_reason() -> None:
    error = "(sqlite3.OperationalError) disk I/O error\n[SQL: INSERT INTO runs VALUES (?)]\n[parameters: ('x',)]"
    assert reason(RuntimeError(error)) == "disk I/O error"
