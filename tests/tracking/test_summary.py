"""What MLflow has of a sweep beside its jobs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SHORT, Done, launch_in
from conftest import new_user, python
from mlflow import MlflowClient
from stored_runs import artifact, artifacts, parent_and_jobs
from sweep_folders import announced, finished, write_error, write_manifest, write_result

from pq_sweep.results.spreadsheet import write_csv
from pq_sweep.results.sweeps import read_sweep
from pq_sweep.tracking.tracker import Mlflow

pytestmark = pytest.mark.slow  # runs a sweep first


def told(folder: Path, *arguments: str, **environ: str) -> Done:
    return python(["-m", "pq_sweep.report", *arguments], folder, new_user() | environ)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uncompressed job, two compressed ones and one that failed."""
    folder = tmp_path_factory.mktemp("summary") / "multirun" / "day" / "hour"
    amounts = (0.0, 0.3, 0.6)
    jobs = [announced(str(n), pruner="remove" if n else "none", amount=amount) for n, amount in enumerate(amounts)]
    write_manifest(folder, *jobs, announced("3"))
    for number, amount in enumerate(amounts):
        write_result(folder, str(number), finished(number, amount, "none"))
    write_error(folder, "3", "no channel is left.")
    return folder


@pytest.fixture(scope="module")
def uri(sweep: Path) -> str:
    """A store that has the sweep."""
    store = f"sqlite:///{sweep.parents[2]}/mlflow.db"
    write_csv(read_sweep(sweep))
    assert Mlflow(store, "pq_sweep").sync(sweep) == 4
    return store


def test_the_parent_sums_up_its_jobs(uri: str, sweep: Path) -> None:
    parent, _ = parent_and_jobs(uri)
    table: dict[str, Any] = json.loads(artifact(uri, parent, "comparison.json"))
    note = parent.data.tags["mlflow.note.content"]

    assert {"results.csv", "sweep.json", "comparison.json", "pareto.png"} <= artifacts(uri, parent)
    assert [row[table["columns"].index("status")] for row in table["data"]] == ["finished"] * 3 + ["failed"]
    assert parent.data.metrics["best/engine_size_mb"] == pytest.approx(0.4, rel=1e-4)
    assert parent.data.metrics["best/latency_ms/b1"] == pytest.approx(8 * 0.7)
    assert "job 1: " in note
    assert "least latency at batch 1 with accuracy_drop at most 1 points" in note
    assert "| job" in note


def test_logging_the_summary_again_does_not_double_it(uri: str, sweep: Path) -> None:
    Mlflow(uri, "pq_sweep").sync(sweep)
    parent, _ = parent_and_jobs(uri)

    assert len(json.loads(artifact(uri, parent, "comparison.json"))["data"]) == 4


def test_children_say_how_they_ended(uri: str) -> None:
    _, jobs = parent_and_jobs(uri)

    assert {name: run.data.tags["pq_sweep.status"] for name, run in jobs.items()} == {
        "0": "finished", "1": "finished", "2": "finished", "3": "failed",
    }  # fmt: skip


def test_a_report_can_be_made_from_the_store_alone(uri: str, sweep: Path, tmp_path: Path) -> None:
    by_uri = told(tmp_path, uri, "--output", "a.html", "--tables", "a")
    by_name = told(tmp_path, "pq_sweep", "--output", "b.html", "--tables", "b", MLFLOW_TRACKING_URI=uri)
    by_folder = told(tmp_path, str(sweep), "--output", "c.html", "--tables", "c")

    assert [done.returncode for done in (by_uri, by_name, by_folder)] == [0, 0, 0], by_uri.stderr
    tables = [(tmp_path / name / "comparison.csv").read_text() for name in "abc"]
    assert tables[0] == tables[1] == tables[2]
    assert "no channel is left." in (tmp_path / "a.html").read_text()


def test_an_experiment_that_is_not_there_is_told_with_those_that_are(uri: str, tmp_path: Path) -> None:
    done = told(tmp_path, "nonsense", MLFLOW_TRACKING_URI=uri)

    assert done.returncode == 1
    assert done.stderr.startswith("'nonsense' is neither a folder nor an experiment in sqlite:")
    assert "'pq_sweep'" in done.stderr


def test_a_logged_model_is_loaded_back_and_gives_the_same_answers(tmp_path: Path) -> None:
    done = launch_in(
        tmp_path, "quantizer=int8", "runtime=onnxruntime", "tracking.log_model=true", "hydra.sweep.dir=sweep", *SHORT
    )
    assert done.returncode == 0, done.stderr
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    _, jobs = parent_and_jobs(uri)
    local = MlflowClient(uri).download_artifacts(jobs["0"].info.run_id, "model", str(tmp_path))
    import mlflow.pyfunc
    import onnxruntime

    images = np.random.default_rng(0).random((3, 1, 8, 8), dtype=np.float32)
    model = mlflow.pyfunc.load_model(local)
    (expected,) = onnxruntime.InferenceSession(str(tmp_path / "sweep" / "0" / "model.onnx")).run(
        None, {"input": images}
    )

    assert model.metadata.signature.inputs.to_dict()[0]["tensor-spec"]["shape"] == (-1, 1, 8, 8)
    assert np.array_equal(next(iter(model.predict({"input": images}).values())), expected)


def test_a_summary_that_fails_does_not_leave_the_sweep_open(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ArithmeticError("nothing can be drawn.")

    monkeypatch.setattr("pq_sweep.tracking.summary.summary", broken)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    Mlflow(store, "pq_sweep").sync(sweep)

    assert parent_and_jobs(store)[0].info.status == "FAILED"  # as one of its jobs is
    assert "cannot be made: nothing can be drawn." in caplog.text
