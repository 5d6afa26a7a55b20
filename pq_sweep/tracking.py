"""MLflow as a view of the job folders: a parent run for each sweep, a child for each job, uploaded exactly once.

The folders come first: a store that is down costs nothing, and `python -m pq_sweep.tracking sync FOLDER...` brings in
later what is missing. Runs are found again by tags, so whatever was interrupted is completed and nothing is doubled.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pq_sweep.environment import without_password
from pq_sweep.results import GROUPS, find_sweeps, metrics, read_job, read_json, read_sweep
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

# No calls home, and a server that does not answer costs seconds instead of minutes.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
DEFAULT_STORE = "mlflow.db"
MAX_VALUE = 6000  # MLflow's limit for the length of a parameter


class Tracker(Protocol):
    """Where results are logged beside their folders."""

    def begin(self, sweep: Path) -> None: ...

    def log(self, job: Path) -> None: ...

    def finish(self, sweep: Path) -> str: ...


@dataclass(frozen=True)
class NoTracking:
    """Keep results on disk only."""

    def begin(self, sweep: Path) -> None:
        """Nothing to prepare."""

    def log(self, job: Path) -> None:
        """Nothing to log."""

    def finish(self, sweep: Path) -> str:
        """Return what to tell the user."""
        return ""


@dataclass(frozen=True)
class Mlflow:
    """An MLflow store: `uri`, else MLFLOW_TRACKING_URI, else SQLite in the working folder."""

    uri: str | None
    experiment: str
    # Stores that did not answer in this process; the user is told once.
    down: ClassVar[set[str]] = set()

    def begin(self, sweep: Path) -> None:
        """Create or migrate the store and make the parent run, before jobs could do so at the same time."""
        with self._connected(sweep) as client:
            if client is not None:
                with self._alone():
                    self._parent(client, sweep)

    def log(self, job: Path) -> None:
        """Log one job, finished or failed."""
        with self._connected(job.parent) as client:
            if client is not None:
                self._upload(client, job)

    def finish(self, sweep: Path) -> str:
        """Log what is still missing, end the parent run, and say how to look at it."""
        with self._connected(sweep) as client:
            if client is not None:
                self._upload_sweep(client, sweep)
                return self._how_to_open()
        return ""

    def _how_to_open(self) -> str:
        shown = without_password(self.store)
        if shown.startswith("http"):
            return f"MLflow UI: {shown}"
        default = " (or: make ui)" if shown.endswith(f"/{DEFAULT_STORE}") else ""
        return f"MLflow UI: mlflow ui --backend-store-uri {shown}{default}"

    def sync(self, sweep: Path) -> int:
        """Log what is missing, raising if the store is down; return the number of jobs that were logged now."""
        self.reach()
        return self._upload_sweep(self._client(), sweep)

    @property
    def store(self) -> str:
        """Return the URI of the store."""
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_STORE).absolute()}"

    def reach(self) -> None:
        """Raise if the store does not answer within seconds; MLflow itself would go on trying for minutes."""
        scheme = self.store.partition("://")[0]
        if scheme in ("http", "https"):
            import requests

            requests.get(f"{self.store.rstrip('/')}/health", timeout=5).raise_for_status()
        elif scheme.startswith(("postgresql", "mysql", "mssql")):
            import sqlalchemy

            timeout = {"connect_timeout": 5} if scheme.startswith(("postgresql", "mysql")) else {}
            sqlalchemy.create_engine(self.store, connect_args=timeout).connect().close()
        elif scheme == "sqlite":
            folder = Path(self.store.removeprefix("sqlite:///")).parent
            if not os.access(folder, os.W_OK):
                raise OSError(f"{folder} cannot be written")

    @contextmanager
    def _connected(self, sweep: Path) -> Iterator[MlflowClient | None]:
        """Give a client, or None if the store is down; losing it on the way is not an error either."""
        if self.store in self.down:
            yield None
            return
        try:
            self.reach()
            client = self._client()
        except Exception as error:
            self._give_up(sweep, error)
            yield None
            return
        try:
            yield client
        except Exception as error:
            self._give_up(sweep, error)

    def _give_up(self, sweep: Path, error: Exception) -> None:
        self.down.add(self.store)
        reason = without_password(" ".join(str(error).split())[:200])
        later = f"results stay on disk, log them later by: python -m pq_sweep.tracking sync {sweep}"
        log.warning("MLflow store %s cannot be used (%s); %s", without_password(self.store), reason, later)
        log.debug("traceback", exc_info=True)

    def _client(self) -> MlflowClient:
        for key, value in SETTINGS.items():
            os.environ.setdefault(key, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mlflow import MlflowClient
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        with self._alone():
            client = MlflowClient(self.store)
            client.search_experiments(max_results=1)  # creates or migrates a local store
        return client

    def _alone(self) -> AbstractContextManager[object]:
        """Keep other processes from creating the same local store or experiment, which would wreck it for good."""
        if not self.store.startswith("sqlite:///"):
            return nullcontext()
        from filelock import FileLock

        return FileLock(f"{self.store.removeprefix('sqlite:///')}.lock")

    def _experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found:
            return str(found.experiment_id)
        local = self.store.startswith("sqlite:///")
        artifacts = (
            (Path(self.store.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri() if local else None
        )
        return str(client.create_experiment(self.experiment, artifact_location=artifacts))

    def _find(self, client: MlflowClient, experiment: str, tags: dict[str, str]) -> Any:
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        runs = client.search_runs([experiment], filter_string=text, max_results=1)
        return runs[0] if runs else None

    def _parent(self, client: MlflowClient, sweep: Path) -> tuple[str, str]:
        """Return the experiment and the parent run of a sweep, made if it is not there."""
        manifest = read_manifest(sweep)
        experiment = self._experiment(client)
        tags = {"pq_sweep.sweep": manifest["id"], "pq_sweep.kind": "sweep"}
        run = self._find(client, experiment, tags)
        if run is None:
            notes = {"pq_sweep.folder": str(sweep.absolute()), "pq_sweep.command": manifest.get("command", "")}
            commit = (manifest.get("git") or {}).get("commit")
            notes |= {"mlflow.source.git.commit": commit} if commit else {}
            start = int(manifest.get("created", 0) * 1000) or None
            run = client.create_run(
                experiment, start_time=start, tags=tags | notes, run_name="/".join(sweep.absolute().parts[-2:])
            )
        return experiment, str(run.info.run_id)

    def _upload_sweep(self, client: MlflowClient, sweep: Path) -> int:
        """Log every job that is not yet, then the summary."""
        done = read_sweep(sweep)
        jobs = [sweep / row["job"] for row in done.rows if row["status"] in ("finished", "failed")]
        logged = sum(self._upload(client, job) for job in jobs)
        _, parent = self._parent(client, sweep)
        for status in ("finished", "failed", "missing"):
            client.set_tag(parent, f"pq_sweep.{status}", str(done.count(status)))
        if (sweep / "results.csv").exists():
            client.log_artifact(parent, str(sweep / "results.csv"))
        client.set_terminated(parent, "FINISHED" if done.count("finished") == len(done.rows) else "FAILED")
        return logged

    def _upload(self, client: MlflowClient, job: Path) -> bool:
        """Log one job as a child run; return False if the store has it already."""
        result, error = read_json(job / "result.json"), read_json(job / "error.json")
        record = result or error
        if record is None:
            return False
        experiment, parent = self._parent(client, job.parent)
        status = "FINISHED" if result else "FAILED"
        tags = {"pq_sweep.sweep": read_manifest(job.parent)["id"], "pq_sweep.job": job.name}
        run = self._find(client, experiment, tags)
        started = f"{record['started']:.6f}"
        if run is not None and run.data.tags.get("pq_sweep.started") != started:
            client.delete_run(run.info.run_id)  # the job ran again; parameters of a run cannot change
            run = None
        if run is not None and run.info.status == status:
            return False
        row = read_job(job)
        notes = {"mlflow.parentRunId": parent, "pq_sweep.started": started, "pq_sweep.folder": str(job.absolute())}
        if run is None:
            run = client.create_run(experiment, int(record["started"] * 1000), tags | notes, row["name"])
        self._fill(client, run.info.run_id, job, row, notes)
        ended = int((record["started"] + record["seconds"]) * 1000) if result else None
        client.set_terminated(run.info.run_id, status, ended)
        return True

    def _fill(self, client: MlflowClient, run: str, job: Path, row: dict[str, Any], notes: dict[str, str]) -> None:
        """Log parameters, metrics, tags and files of one job, in one batch each."""
        from mlflow.entities import Metric, Param, RunTag

        result = read_json(job / "result.json")
        if result:
            when = int((result["started"] + result["seconds"]) * 1000)
            values = [Metric(key, float(value), when, 0) for key, value in metrics(result).items()]
            tags = _result_tags(result)
        else:
            values, tags = [], {"pq_sweep.error": row["error"], "pq_sweep.stage": row["stage"]}
        params = [Param(key, value[:MAX_VALUE]) for key, value in parameters(job, row).items()]
        client.log_batch(
            run, values, params, [RunTag(key, str(value)[:MAX_VALUE]) for key, value in (notes | tags).items()]
        )
        client.log_dict(run, job_config(job), "config.yaml")
        for name in ("result.json", "error.json", *(path.name for path in job.glob("*.svg"))):
            if (job / name).exists():
                client.log_artifact(run, str(job / name))


def read_manifest(sweep: Path) -> dict[str, Any]:
    """Return what is known of a sweep; one without `sweep.json` is known by its folder."""
    manifest: dict[str, Any] | None = read_json(sweep / "sweep.json")
    return manifest or {"id": hashlib.sha256(str(sweep.resolve()).encode()).hexdigest()[:32]}


def job_config(job: Path) -> dict[str, Any]:
    """Return the composed config of a job without where it was logged, which may hold a password."""
    from omegaconf import OmegaConf

    path = job / ".hydra" / "config.yaml"
    config: Any = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else {}
    return {str(group): values for group, values in config.items() if group != "tracking"}


def parameters(job: Path, row: dict[str, Any]) -> dict[str, str]:
    """Return a job's choices and options by name: `pruner`, `pruner.amount`, ..."""
    options: dict[str, str] = {}
    for group, values in job_config(job).items():
        if isinstance(values, dict):
            options |= {f"{group}.{key}": str(value) for key, value in values.items() if key != "_target_"}
        elif values is not None:
            options[group] = str(values)
    return options | {name: str(row[name]) for name in GROUPS if name in row}


def _result_tags(result: dict[str, Any]) -> dict[str, Any]:
    environment, session = result["environment"], result["session"]
    tags = {
        "pq_sweep.device": environment["device"],
        "pq_sweep.engine": session["engine"],
        "pq_sweep.precision": session["precision"],
        "pq_sweep.protocol": result["config"]["measure"]["name"],
        "pq_sweep.host": environment["host"],
    }
    git = environment["git"]
    return tags | ({"mlflow.source.git.commit": git["commit"], "pq_sweep.git_dirty": git["dirty"]} if git else {})


def main() -> None:
    """Log the jobs of sweep folders that MLflow does not have yet."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.tracking", description=main.__doc__)
    parser.add_argument("action", choices=["sync"])
    parser.add_argument("folders", nargs="+", type=Path, help="sweep folders, or folders that contain some")
    parser.add_argument(
        "--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db in the working folder"
    )
    parser.add_argument("--experiment", default="pq_sweep")
    arguments = parser.parse_args()
    tracker = Mlflow(arguments.uri, arguments.experiment)
    try:
        for sweep in find_sweeps(arguments.folders):
            print(f"{sweep.folder}: {tracker.sync(sweep.folder)} of {len(sweep.rows)} jobs logged now")
    except UserError as error:
        sys.exit(str(error))
    except Exception as error:
        reason = without_password(" ".join(str(error).split())[:300])
        sys.exit(f"MLflow store {without_password(tracker.store)} cannot be used: {reason}")


if __name__ == "__main__":
    main()
