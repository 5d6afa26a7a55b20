"""Addresses of stores: what MLflow takes is left alone, and anything else is refused with what is meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, refused
from hydra import compose, initialize_config_dir

from pq_sweep.sweep.grid import tracking_problems
from pq_sweep.tracking.addresses import address_problem, require_address
from pq_sweep.tracking.fetch import collect

TAKEN = (
    "sqlite:///mlflow.db", "sqlite:////x/mlflow.db", "sqlite:///~/mlflow.db",
    "sqlite:///file:/x.db?mode=ro&uri=true", "http://localhost:5000", "http://localhost:5000/", "https://user:word@host/mlflow",
    "postgresql://user@host/name", "postgresql+psycopg://user@host/name", "mysql+pymysql://user@host/name",
    "mssql+pyodbc://user@host/name", "databricks", "databricks://profile", "databricks-uc",
)  # fmt: skip
MEANT = {
    "localhost:5000": "http://localhost:5000",
    "127.0.0.1:5000": "http://127.0.0.1:5000",
    "127.0.0.1": "http://127.0.0.1:5000",
    "localhost": "http://localhost:5000",
    "my-server:5000/path": "http://my-server:5000/path",
    "mlflow.my-site.org": "http://mlflow.my-site.org",
    "//server/mlflow": "http://server/mlflow",
    "http:/one-slash": "http://one-slash",
    "http:localhost:5000": "http://localhost:5000",
    "https:///host": "https://host",
    "HTTP://host:5000": "http://host:5000",
    "http://host:5000/#/experiments/1": "http://host:5000",
    "mlflow.db": "sqlite:///mlflow.db",
    "~/mlruns": "sqlite:///~/mlruns.db",
    "./store": "sqlite:///store.db",
    "/nowhere/store/": "sqlite:////nowhere/store.db",
    "file:///nowhere/mlruns": "sqlite:////nowhere/mlruns.db",
    "file:mlruns": "sqlite:///mlruns.db",
    "sqlite:/x.db": "sqlite:////x.db",
    "sqlite:x.db": "sqlite:///x.db",
    "sqlite://x.db": "sqlite:///x.db",
    "sqlite://": "sqlite:///mlflow.db",
    "postgres://user@host/name": "postgresql://user@host/name",
    "postgresql:/user@host/name": "postgresql://user@host/name",
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("uri", TAKEN)
def test_what_mlflow_takes_is_taken(uri: str) -> None:
    assert address_problem(uri, "tracking.uri") is None


@pytest.mark.parametrize("uri", MEANT)
def test_anything_else_is_refused_with_what_is_meant(uri: str) -> None:
    assert address_problem(uri, "tracking.uri") == (
        f"tracking.uri={uri} is no address of an MLflow store; give tracking.uri={MEANT[uri]}."
    )
    assert address_problem(MEANT[uri], "tracking.uri") is None


def test_a_word_may_be_a_server_or_a_file_and_what_is_unknown_is_told_the_forms(tmp_path: Path) -> None:
    assert "give --uri=http://my-server:5000 or --uri=sqlite:///my-server.db." in refused(
        lambda: require_address("my-server", "--uri")
    )
    for uri in ("s3://bucket/x", "htp://host:5000", "C:\\store"):
        assert "give one such as http://host:5000, sqlite:///mlflow.db or" in str(address_problem(uri, "--uri"))
    (tmp_path / "my-server").mkdir()
    assert str(address_problem("my-server", "--uri")).endswith("give --uri=sqlite:///my-server/mlflow.db.")


def test_passwords_are_not_told() -> None:
    problem = address_problem("postgres://user:s3cret@host/name", "tracking.uri")
    assert problem is not None
    assert "s3cret" not in problem


def test_jobs_and_reports_are_refused_before_they_begin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def told(*overrides: str) -> list[str]:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return list(tracking_problems(compose("config", overrides=list(overrides))))

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert told() == []
    (problem,) = told("tracking.uri=localhost:5000")
    assert problem.endswith("give tracking.uri=http://localhost:5000.")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    (problem,) = told()
    assert problem.startswith("MLFLOW_TRACKING_URI=./mlruns is no address")
    assert told("tracking=none") == told("tracking.uri=sqlite:///mlflow.db") == []
    assert refused(lambda: collect(["an_experiment"], "pq_sweep", tmp_path)) == problem
