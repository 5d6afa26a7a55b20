"""Where the jobs of a report come from: sweep folders, or what MLflow has of them."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.core.groups import GROUPS
from pq_sweep.core.sentences import reason, without_password
from pq_sweep.results.sweeps import Sweep, find_sweeps, merge
from pq_sweep.tracking.addresses import require_address
from pq_sweep.tracking.store import Store, import_mlflow
from pq_sweep.tracking.tracker import Mlflow
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

FILES = ("result.json", "error.json", "layers.json")
DOWNLOADS = 8  # at once


def collect(sources: list[str], experiment: str, scratch: Path) -> Sweep:
    """Return the jobs of all sources as one sweep.

    A source is a folder, a tracking URI (its `experiment` is read), or the name of an experiment in the store of
    MLFLOW_TRACKING_URI, else in mlflow.db. What comes from MLflow is written below `scratch` as the folders were.
    """
    folders = [Path(source) for source in sources if Path(source).is_dir()]
    for number, source in enumerate(sources):
        if not Path(source).is_dir():
            require_address(source if "://" in source else None, "source")
            uri, name = (source, experiment) if "://" in source else (Mlflow(None, source).store, source)
            folders += fetch(uri, name, scratch / str(number))
    return merge(find_sweeps(folders))


def fetch(uri: str, experiment: str, target: Path) -> list[Path]:
    """Write the sweeps of an experiment as folders again, and return these."""
    store = Store(uri)
    shown = without_password(store.address)
    if store.file and not store.file.exists():
        raise UserError(f"{experiment!r} is no folder, and the MLflow store {shown} does not exist.")
    try:
        return _fetch(store, experiment, target)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the MLflow store {shown} cannot be used: {reason(error)}") from error


def _fetch(store: Store, experiment: str, target: Path) -> list[Path]:
    store.reach(writing=False)
    import_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(store.address)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        known = ", ".join(repr(each.name) for each in client.search_experiments())
        where = without_password(store.address)
        raise UserError(f"{experiment!r} is neither a folder nor an experiment in {where}; experiments are: {known}.")
    runs = list(_runs(client, store.active(found)))
    parents = [run for run in runs if run.data.tags.get("pq_sweep.kind") == "sweep"]
    return [_write_sweep(client, parent, runs, target / parent.info.run_id) for parent in parents]


def _runs(client: MlflowClient, experiment: str) -> list[Run]:
    from mlflow.store.entities import PagedList

    runs: list[Run] = []
    page: PagedList[Run] | None = None
    while page is None or page.token:
        page = client.search_runs([experiment], max_results=1000, page_token=page.token if page else None)
        runs += page
    return runs


def _write_sweep(client: MlflowClient, parent: Run, runs: list[Run], target: Path) -> Path:
    """Write one sweep: what was announced, and the files of each job."""
    from tqdm import tqdm

    jobs = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    jobs.sort(key=lambda run: run.info.start_time)
    folder = target / str(parent.info.run_name).replace("/", "_")
    for run in jobs:
        (folder / _folder_of(run)).mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(_manifest(client, parent, jobs, folder)))
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        done = pool.map(lambda run: _write_job(client, run, folder / _folder_of(run)), jobs)
        for _ in tqdm(done, total=len(jobs), desc="jobs from MLflow", disable=None, leave=False):
            pass
    return folder


def _folder_of(run: Run) -> str:
    """Return the name of a job's folder, from whoever could write to the store: nothing outside the sweep's."""
    return Path(run.data.tags["pq_sweep.job"]).name


def _manifest(client: MlflowClient, parent: Run, jobs: list[Run], folder: Path) -> dict[str, Any]:
    """Return sweep.json as it was logged, else what the runs say of it."""
    if any(item.path == "sweep.json" for item in client.list_artifacts(parent.info.run_id)):
        path = Path(client.download_artifacts(parent.info.run_id, "sweep.json", str(folder)))
        return dict(json.loads(path.read_text()))
    announced = [
        {"folder": _folder_of(run), "name": run.info.run_name, "choices": _choices(run.data.params), "overrides": []}
        for run in jobs
    ]
    tags = parent.data.tags
    return {"id": tags["pq_sweep.sweep"], "command": tags.get("pq_sweep.command", ""), "jobs": announced}


def _choices(params: dict[str, str]) -> dict[str, Any]:
    return {group: params.get(group, "none") for group in GROUPS} | {"amount": params.get("pruner.amount")}


def _write_job(client: MlflowClient, run: Run, folder: Path) -> None:
    held = {item.path for item in client.list_artifacts(run.info.run_id)}
    for name in FILES:
        if name in held:
            client.download_artifacts(run.info.run_id, name, str(folder))
