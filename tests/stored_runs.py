"""What a test finds in an MLflow store."""

from __future__ import annotations

from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run

EXPERIMENT = "pq_sweep"


def all_runs(uri: str, experiment: str = EXPERIMENT) -> list[Run]:
    client = MlflowClient(uri)
    found = client.get_experiment_by_name(experiment)
    return [] if found is None else list(client.search_runs([found.experiment_id]))


def parent_and_jobs(uri: str, experiment: str = EXPERIMENT) -> tuple[Run, dict[str, Run]]:
    """Return the only parent run and its children by job; every run is one or the other, and none is double."""
    found = all_runs(uri, experiment)
    (parent,) = (run for run in found if run.data.tags.get("pq_sweep.kind") == "sweep")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    jobs = {run.data.tags["pq_sweep.job"]: run for run in children}
    assert len(found) == 1 + len(children) == 1 + len(jobs)
    return parent, jobs


def artifacts(uri: str, run: Run) -> set[str]:
    return {item.path for item in MlflowClient(uri).list_artifacts(run.info.run_id)}


def artifact(uri: str, run: Run, name: str) -> str:
    return Path(MlflowClient(uri).download_artifacts(run.info.run_id, name)).read_text()
