"""What MLflow shows of a sweep: a parent run, and a child run for each job with its figures and files.

Runs are found again by tags, so whatever was interrupted is completed and nothing is doubled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import yaml

from pq_sweep.core.folder import JobFolder, SweepFolder
from pq_sweep.core.groups import GROUPS
from pq_sweep.core.result import Result
from pq_sweep.results.origin import known
from pq_sweep.results.rows import DONE, SLURM_COLUMNS, Row, batch_sizes, metrics, read_row
from pq_sweep.results.sweeps import Sweep
from pq_sweep.tracking import table
from pq_sweep.tracking.store import Store, held

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger(__name__)

RENEWED_S = 60.0  # until a view is opened anew: the parent run may be deleted, or a server have another database
ONNX = ("onnx", "onnxruntime", "onnxruntime-gpu")
TABLE = "comparison.json"  # in the form of MLflow's tables
PAGE = 100  # runs that are read at once: each takes 0.1 MB
MAX_VALUE = 6000  # MLflow's limit for the length of a parameter
# Those of libyaml where it is there: ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)

# How a run ended, and when its job was started.
State = tuple[str, str | None]


class View:
    """One sweep in a store: the parent run, made if it is not there, and a child for each job."""

    def __init__(self, store: Store, experiment: str, sweep: Path, log_model: bool = False) -> None:
        self.sweep, self.files, self.log_model = sweep, SweepFolder(sweep), log_model
        self.manifest = read_manifest(sweep)
        self.announced = {job["folder"]: job for job in self.manifest.get("jobs") or ()}
        self.client, self.experiment = store.open(experiment)
        # None for a job that has several runs.
        self.logged: dict[str, State | None] = {}
        self.parent = self._find_or_make_parent()
        self.seen = sight(store, sweep)

    def close(self) -> None:
        """Give back the connections that MLflow keeps: jobs share those of a database, and a file may be replaced."""
        engine = getattr(self.client._tracking_client.store, "engine", None)
        if engine is not None:
            engine.dispose()

    def begin(self) -> None:
        """Show that the sweep runs, be it again."""
        if self.parent.info.status != "RUNNING":
            self.client.update_run(self.parent.info.run_id, "RUNNING")

    def upload(self, job: JobFolder) -> bool:
        """Log one job as a child run; return False if the store has it already."""
        result, error = Result.read(job.result), job.read_error()
        if not result and not error:
            return False
        begun = result.started if result else (error or {})["started"]
        status, started = "FINISHED" if result else "FAILED", f"{begun:.6f}"
        if self.logged.get(job.name) == (status, started):
            return False
        with held(job.store_lock):  # the job, its launcher and a sync can be here at the same time
            run = None if self._is_new(job) else self._only(self._find({"pq_sweep.job": job.name}), started)
            if run is not None and _state(run) == (status, started):
                return False
            row = read_row(job, known(job, self.announced.get(job.name)))
            tags = self._tags(job, row, result, started)
            if run is None:
                run = self.client.create_run(self.experiment, int(begun * 1000), tags, row["name"])
                tags = {}
            self._fill(run, job, row, result, tags)
            ended = int((result.started + result.seconds) * 1000) if result else None
            self.client.set_terminated(run.info.run_id, status, ended)
        return True

    def _is_new(self, job: JobFolder) -> bool:
        """Say whether nobody has ever begun to log a job: looking for its run takes the longer, the more there are."""
        try:
            (self.files.begun / job.name).touch(exist_ok=False)
        except OSError:  # somebody has, or it is not known
            return False
        return job.name not in self.logged

    def survey(self) -> None:
        """Learn which jobs are logged, and put right what processes made twice that could not lock each other out."""
        parent = self.parent.info.run_id
        found: dict[str, list[State]] = defaultdict(list)
        for run in self._each({}):
            if "pq_sweep.job" in run.data.tags:
                found[run.data.tags["pq_sweep.job"]].append(_state(run))
                if run.data.tags.get("mlflow.parentRunId") != parent:
                    self.client.set_tag(run.info.run_id, "mlflow.parentRunId", parent)
        for run in self._find({"pq_sweep.kind": "sweep"}):
            if run.info.run_id != parent:
                self.client.delete_run(run.info.run_id)
        self.logged = {job: states[0] if len(states) == 1 else None for job, states in found.items()}

    def summarize(self, done: Sweep) -> None:
        """Log how many jobs ended how, and end the parent run unless some are still to come."""
        parent = self.parent.info.run_id
        for status in ("finished", *(["built"] if done.count("built") else []), "failed", "missing"):
            self.client.set_tag(parent, f"pq_sweep.{status}", str(done.count(status)))
        for path in (self.files.table, self.files.manifest):
            if path.exists():
                self.client.log_artifact(parent, str(path))
        if done.count("finished"):
            self._sum_up(done)
        if done.count("running") or done.count("pending"):
            self.client.update_run(parent, "RUNNING")
        else:
            self.client.set_terminated(parent, "FINISHED" if done.count(*DONE) == len(done.rows) else "FAILED")

    def _sum_up(self, done: Sweep) -> None:
        """Log what the jobs come to: a table, the Pareto figure, the best figures, and a recommendation as note."""
        from mlflow.entities import Metric, RunTag

        try:
            from pq_sweep.tracking.summary import summary

            found = summary(done)
        except Exception as error:  # the jobs are logged, and the run has to end
            log.warning("the summary of %s cannot be made: %s", self.sweep, error)
            log.debug("traceback", exc_info=True)
            return
        parent, now = self.parent.info.run_id, int(time.time() * 1000)
        tables = json.dumps([{"path": TABLE, "type": "table"}])
        tags = [RunTag("mlflow.note.content", found.note), RunTag("mlflow.loggedArtifacts", tables)]
        self.client.log_batch(parent, [Metric(key, value, now, 0) for key, value in found.metrics.items()], tags=tags)
        self.client.log_dict(parent, found.table, TABLE)
        table.save(self.client, self.experiment, batch_sizes(done.rows), [row["name"] for row in done.rows])
        with TemporaryDirectory() as folder:
            for name, content in found.figures.items():
                (Path(folder) / name).write_bytes(content)
            self.client.log_artifacts(parent, folder)

    def _find(self, tags: dict[str, str]) -> list[Run]:
        """Return the runs of the sweep that have the tags; if there is one to keep, every process has it first."""
        return sorted(self._each(tags), key=lambda run: (run.info.status == "RUNNING", run.info.run_id))

    def _each(self, tags: dict[str, str]) -> Iterator[Run]:
        """Yield the runs of the sweep that have the tags; only some at a time are in memory."""
        wanted = {"pq_sweep.sweep": self.manifest["id"]} | tags
        text = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
        token: str | None = None
        while True:
            page = self.client.search_runs([self.experiment], text, max_results=PAGE, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _only(self, runs: list[Run], started: str) -> Run | None:
        """Return the run to go on with; delete doubles, and those of an earlier try, whose values cannot change."""
        kept = next((run for run in runs if run.data.tags.get("pq_sweep.started") == started), None)
        for run in runs:
            if run is not kept:
                self.client.delete_run(run.info.run_id)
        return kept

    def _find_or_make_parent(self) -> Run:
        tags = {"pq_sweep.kind": "sweep"}
        found = self._find(tags)
        if not found:
            with held(self.files.store_lock):
                found = self._find(tags) or [self._make_parent(tags)]
        return found[0]

    def _make_parent(self, tags: dict[str, str]) -> Run:
        about = {
            "pq_sweep.sweep": self.manifest["id"],
            "pq_sweep.folder": str(self.sweep.absolute()),
            "pq_sweep.command": self.manifest.get("command", ""),
        }
        commit = (self.manifest.get("git") or {}).get("commit")
        about |= {"mlflow.source.git.commit": commit} if commit else {}
        start = int(self.manifest.get("created", 0) * 1000) or None
        name = "/".join(self.sweep.absolute().parts[-2:])
        with suppress(OSError):
            self.files.begun.mkdir(exist_ok=True)
        return self.client.create_run(self.experiment, start_time=start, tags=tags | about, run_name=name)

    def _tags(self, job: JobFolder, row: Row, result: Result | None, started: str) -> dict[str, str]:
        """Return what tells of a job which it is, how it ended and where it ran."""
        tags = {
            "pq_sweep.sweep": self.manifest["id"],
            "pq_sweep.job": job.name,
            "mlflow.parentRunId": self.parent.info.run_id,
            "pq_sweep.started": started,
            "pq_sweep.folder": str(job.path.absolute()),
        }
        tags |= _result_tags(result) if result else {"pq_sweep.error": row["error"], "pq_sweep.stage": row["stage"]}
        tags |= {f"pq_sweep.{key}": row[key] for key in ("status", *SLURM_COLUMNS) if key in row}
        return {key: str(value)[:MAX_VALUE] for key, value in tags.items()}

    def _fill(self, run: Run, job: JobFolder, row: Row, result: Result | None, tags: dict[str, str]) -> None:
        """Log parameters, metrics, tags and files of one job, in one batch each."""
        from mlflow.entities import Metric, Param, RunTag
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        when = int((result.started + result.seconds) * 1000) if result else 0
        figures = metrics(result) if result else {}
        self.client.log_batch(
            run.info.run_id,
            [Metric(key, float(value), when, 0) for key, value in figures.items()],
            [Param(key, value[:MAX_VALUE]) for key, value in parameters(job, row).items()],
            [RunTag(key, value) for key, value in tags.items()],
        )
        # The client would ask the store for the run that is at hand.
        repository = get_artifact_repository(run.info.artifact_uri, self.client.tracking_uri)
        with TemporaryDirectory() as folder:
            tables = (job.layers, job.representations, job.samples)
            for path in (job.result, *tables, *job.errors, *job.path.glob("*.svg")):
                if path.exists():
                    (Path(folder) / path.name).symlink_to(path.absolute())
            (Path(folder) / "config.yaml").write_text(yaml.dump(job_config(job), Dumper=DUMPER))
            repository.log_artifacts(folder)
        if self.log_model and result:
            self._log_model(run.info.run_id, job, result)

    def _log_model(self, run: str, job: JobFolder, result: Result) -> None:
        """Log the graph that ran so that mlflow.pyfunc and mlflow.onnx load it, with what it takes and gives."""
        artifact, network = job.path / result.session.artifact, result.network
        if artifact.suffix != ".onnx":
            log.warning("tracking.log_model needs an ONNX graph, and job %s ran %s", job.name, artifact.name)
            return
        import mlflow.onnx
        import numpy as np
        import onnx
        from mlflow.models import ModelSignature
        from mlflow.types import Schema, TensorSpec

        kind = np.dtype(np.float32)
        taken = Schema([TensorSpec(kind, (-1, *network.input), "input")])
        given = Schema([TensorSpec(kind, (-1, network.classes), "output")])
        versions = result.environment["versions"]
        with TemporaryDirectory() as folder:
            mlflow.onnx.save_model(
                onnx.load(artifact),
                f"{folder}/model",
                signature=ModelSignature(taken, given),
                pip_requirements=[f"{name}=={versions[name]}" for name in ONNX if name in versions],
            )
            self.client.log_artifacts(run, f"{folder}/model", "model")


def sight(store: Store, sweep: Path) -> tuple[object, ...]:
    """Return what is another when jobs were announced, the store's file was replaced, or a view has served its time."""
    jobs, file = (path and path.exists() and path.stat() for path in (SweepFolder(sweep).manifest, store.file))
    return (
        jobs and (jobs.st_ino, jobs.st_mtime_ns),
        file and (file.st_dev, file.st_ino),
        time.monotonic() // RENEWED_S,
    )


def _state(run: Run) -> State:
    return run.info.status, run.data.tags.get("pq_sweep.started")


def read_manifest(sweep: Path) -> dict[str, Any]:
    """Return what is known of a sweep; one without `sweep.json` is known by its folder."""
    manifest = SweepFolder(sweep).read_manifest()
    return manifest or {"id": hashlib.sha256(str(sweep.resolve()).encode()).hexdigest()[:32]}


def job_config(job: JobFolder) -> dict[str, Any]:
    """Return the composed config of a job without where it was logged, which may hold a password."""
    config = yaml.load(job.config.read_text(), LOADER) if job.config.exists() else {}
    return {str(group): values for group, values in config.items() if group != "tracking"}


def parameters(job: JobFolder, row: dict[str, Any]) -> dict[str, str]:
    """Return a job's choices and options by name: `pruner`, `pruner.amount`, ..."""
    options: dict[str, str] = {}
    for group, values in job_config(job).items():
        if isinstance(values, dict):
            options |= {f"{group}.{key}": str(value) for key, value in values.items() if key != "_target_"}
        elif values is not None:
            options[group] = str(values)
    return options | {name: str(row[name]) for name in GROUPS if name in row}


def _result_tags(result: Result) -> dict[str, Any]:
    environment, session = result.environment, result.session
    tags = {
        "pq_sweep.device": environment["device"],
        "pq_sweep.engine": session.engine,
        "pq_sweep.precision": session.precision,
        **({"pq_sweep.simulated": simulated} if (simulated := session.details.get("simulated")) else {}),
        "pq_sweep.protocol": result.config["measure"]["name"],
        "pq_sweep.host": environment["host"],
    }
    tags |= _provenance(environment)
    git = environment["git"]
    return tags | ({"mlflow.source.git.commit": git["commit"], "pq_sweep.git_dirty": git["dirty"]} if git else {})


def _provenance(environment: dict[str, Any]) -> dict[str, Any]:
    """Return what tells whether two rows may be compared: versions and, on a GPU, which one, its driver and clocks."""
    gpu = dict(environment["gpu"] or {})
    gpu |= {key: value for key, value in gpu.pop("nvml", {}).items() if key != "unavailable"}
    found = {f"version.{name}": text for name, text in environment["versions"].items()}
    found |= {f"gpu.{name}": value for name, value in gpu.items() if value is not None}
    return {f"pq_sweep.{name}": value for name, value in found.items()}
