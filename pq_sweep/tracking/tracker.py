"""MLflow as a view of the job folders: a parent run for each sweep, a child for each job, uploaded exactly once.

The folders come first: a store that is down costs nothing, and `python -m pq_sweep.tracking sync FOLDER...` brings in
later what is missing.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from hydra.utils import instantiate

from pq_sweep.core.files import shared_file_system
from pq_sweep.core.folder import JobFolder, SweepFolder
from pq_sweep.core.limits import bounded
from pq_sweep.core.sentences import reason, without_password
from pq_sweep.results.rows import DONE
from pq_sweep.results.standing import Watch
from pq_sweep.tracking import table
from pq_sweep.tracking.store import SETTINGS, Store, import_mlflow, persistent
from pq_sweep.tracking.view import View, sight
from pq_sweep.types import UserError

__all__ = ["SETTINGS", "Mlflow", "NoTracking", "Tracker"]

T = TypeVar("T")

log = logging.getLogger(__name__)

DEFAULT_STORE = "mlflow.db"
# A store that hangs costs a job 15 s until it answers at all and PATIENCE_S until the job is logged, once in a process:
# jobs within AGAIN_S of a failure do without it, and later attempts are short.
PATIENCE_S = 40.0
SHORT_PATIENCE_S = 10.0
AGAIN_S = 60.0


class Tracker(Protocol):
    """Where results are logged beside their folders."""

    def begin(self, sweep: Path) -> bool: ...

    def log(self, job: Path) -> bool: ...

    def finish(self, sweep: Path) -> str: ...


@dataclass(frozen=True)
class NoTracking:
    """Keep results on disk only."""

    def begin(self, sweep: Path) -> bool:
        """Say that nothing will be logged."""
        return False

    def log(self, job: Path) -> bool:
        """Say that nothing is logged."""
        return False

    def finish(self, sweep: Path) -> str:
        """Return what to tell the user."""
        return ""


@dataclass(frozen=True)
class Mlflow:
    """An MLflow store: `uri`, else MLFLOW_TRACKING_URI, else SQLite in the working folder."""

    uri: str | None
    experiment: str
    log_model: bool = False
    # Stores that failed in this process, and when; the user is told once.
    down: ClassVar[dict[str, float]] = {}
    # What the last job was logged in, by store and sweep, for the next one.
    views: ClassVar[dict[tuple[Mlflow, str, Path], View]] = {}

    def begin(self, sweep: Path) -> bool:
        """Create or migrate the store and make the parent run, before jobs could do so at the same time.

        Return whether the store can be used.
        """
        file = Store(self.store).file
        if file and (kind := shared_file_system(file)):
            advice = "run an MLflow server, see docs/cluster.md"
            log.warning("%s lies on %s, where SQLite breaks when several nodes write to it; %s", file, kind, advice)
        return bool(self._attempt(sweep, lambda: self._within(lambda: self._begin(sweep))))

    def log(self, job: Path) -> bool:
        """Log one job, finished or failed; say whether the store has it."""
        if time.monotonic() - self.down.get(self.store, -math.inf) < AGAIN_S:
            return False
        return bool(self._attempt(job.parent, lambda: self._within(lambda: self._upload(job))))

    def finish(self, sweep: Path) -> str:
        """Log what is still missing, end the parent run, and say how to look at it."""
        experiment = self._attempt(sweep, lambda: self._upload_sweep(sweep)[1])
        return "" if experiment is None else self._how_to_open(experiment)

    def _how_to_open(self, experiment: str) -> str:
        """Return the address of the experiment's jobs, or the command that shows them."""
        if self.store.startswith("http"):
            return f"MLflow UI: {table.address(self.store, experiment)}"
        shown = without_password(self.store)
        named = (
            f" --uri {shlex.quote(shown)}" if shown == self.store or self.uri else ""
        )  # else the variable has the password
        default = " (or: make ui)" if self.store.endswith(f"/{DEFAULT_STORE}") else ""
        return f"MLflow UI: python -m pq_sweep.tracking ui{named}{default}"

    def sync(self, sweep: Path) -> int:
        """Log what is missing, raising if the store is down; return the number of jobs that were logged now."""
        Store(self.store).reach()
        import_mlflow()
        return self._upload_sweep(sweep)[0]

    @property
    def store(self) -> str:
        """Return the URI of the store; `~` in the path of an SQLite file is the user's folder."""
        given = self.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(DEFAULT_STORE).absolute()}"
        return re.sub(r"^sqlite:///(~[^/]*)", lambda home: f"sqlite:///{Path(home[1]).expanduser()}", given)

    def _attempt(self, sweep: Path, steps: Callable[[], T]) -> T | None:
        """Return what steps in the store come to; None if it is down or lost on the way, which is not an error."""
        try:
            Store(self.store).reach()
            import_mlflow()
            return steps()
        except Exception as error:
            self._give_up(sweep, error)
            return None

    def _within(self, step: Callable[[], T]) -> T:
        """Give a step a bounded time, and a second chance unless the store has failed before."""
        if self.store in self.down:
            return bounded(step, SHORT_PATIENCE_S)
        return bounded(partial(persistent, step), PATIENCE_S)

    def _give_up(self, sweep: Path, error: Exception) -> None:
        if self.store not in self.down:
            later = (
                f"results stay on disk, log them later by: python -m pq_sweep.tracking sync {shlex.quote(str(sweep))}"
            )
            why = self._refused() if "deleted" in str(error) else None
            shown = without_password(self.store)
            log.warning("%s; %s", why or f"MLflow store {shown} cannot be used ({reason(error).rstrip('.')})", later)
        self.down[self.store] = time.monotonic()

    def _refused(self) -> str | None:
        """Return the sentence in which the store refuses the experiment, such as one that was deleted."""
        try:
            bounded(lambda: Store(self.store).open(self.experiment), SHORT_PATIENCE_S)
        except UserError as error:
            return str(error).rstrip(".")
        except Exception:
            return None
        return None

    def _view(self, sweep: Path) -> View:
        return View(Store(self.store), self.experiment, sweep, self.log_model)

    def _begin(self, sweep: Path) -> bool:
        with closing(self._view(sweep)) as view:
            view.begin()
        return True

    def _upload(self, job: Path) -> bool:
        """Log a job in the view that the last job left if it is still good; one that fails or hangs is not left."""
        key = (self, self.store, job.parent.absolute())
        view = self.views.pop(key, None)
        if view is None or view.seen != sight(Store(self.store), job.parent):
            view = self._view(job.parent)
        with closing(view):
            view.upload(JobFolder(job))
        self.views[key] = view
        return True

    def _upload_sweep(self, sweep: Path) -> tuple[int, str]:
        """Log every job that is not yet, then the summary; return how many jobs were, and the experiment."""
        done = Watch(sweep).look()
        with closing(self._within(lambda: self._view(sweep))) as view:
            self._within(view.survey)
            jobs = [SweepFolder(sweep).job(row["job"]) for row in done.rows if row["status"] in (*DONE, "failed")]
            logged = sum(self._within(partial(view.upload, job)) for job in jobs)
            self._within(lambda: view.summarize(done))
        return logged, view.experiment


def tracker_of(folder: Path) -> Tracker:
    """Return where a sweep is logged; a password is not kept with it and has to come from the environment."""
    config = SweepFolder(folder).read_manifest().get("tracking")
    if not config:
        return NoTracking()
    if config.pop("from_environment", False) and "MLFLOW_TRACKING_URI" in os.environ:
        config["uri"] = None
    if "***" in str(config.get("uri")):
        config["uri"] = None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            log.warning("the address of the store holds a password; set MLFLOW_TRACKING_URI to log what is missing.")
            return NoTracking()
    tracker: Tracker = instantiate(config)
    return tracker
