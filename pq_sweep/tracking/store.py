"""Stores of MLflow as hundreds of jobs meet them: reached within seconds, made once, and never waited for without end.

The jobs' folders hold the results whatever a store does, so a store may cost a job seconds and nothing else.
"""

from __future__ import annotations

import logging
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pq_sweep.core.imports import quick_imports
from pq_sweep.core.limits import bounded
from pq_sweep.core.sentences import without_password
from pq_sweep.tracking.sqlite import copy_tables, empty_tables
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

T = TypeVar("T")

# No calls home, no chatter, and a server that does not answer costs seconds instead of minutes. MLflow would send a
# request that timed out again, which can make a run twice; `persistent` looks first what is there.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for each job, with the password of the address
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
REACH_S = 5.0  # until a store has to answer at all
CROWD_S = 10.0  # until a database has a connection left
LOCK_S = 30.0  # until another process has to have made the store, or to have logged the same job
# Take a lock or say at once that it is taken; it goes with its connection. Any number does that is always the same.
LOCKS = {"postgresql": "SELECT pg_try_advisory_lock(7091823)", "mysql": "SELECT GET_LOCK('pq_sweep', 0)"}
CROWDED = re.compile(r"too many (clients|connections)|connection slots", re.IGNORECASE)


@dataclass(frozen=True)
class Store:
    """The store at an address as the user wrote it."""

    uri: str

    @property
    def kind(self) -> str:
        """Return what it is: sqlite, postgresql, mysql, mssql, http, https, ..."""
        return self.uri.partition(":")[0].partition("+")[0]

    @property
    def address(self) -> str:
        """Return the address with a PostgreSQL driver that is installed, where none is named."""
        scheme, separator, rest = self.uri.partition("://")
        if self.kind != "postgresql":
            return self.uri
        named = scheme.partition("+")[2]
        driver = next((name for name in ([named] if named else ["psycopg2", "psycopg"]) if find_spec(name)), None)
        if driver is None:
            raise UserError(
                f"a PostgreSQL store needs {named or 'a driver'}, which is not installed; pip install '.[postgres]'."
            )
        return f"postgresql+{driver}{separator}{rest}"

    @property
    def file(self) -> Path | None:
        """Return the file of an SQLite store."""
        path = self.uri.removeprefix("sqlite:///").partition("?")[0].removeprefix("file:")
        return Path(path).absolute() if self.kind == "sqlite" and path else None

    @property
    def artifacts(self) -> str | None:
        """Return where files go: beside SQLite, for another database in the folder of the sweep's start.

        A server has its own place. MLflow's default is relative: each process would look in its own working folder.
        """
        if self.kind not in ("sqlite", "postgresql", "mysql", "mssql"):
            return None
        folder = self.file.parent if self.file else Path.cwd()
        return (folder / "mlartifacts").as_uri()

    def reach(self, *, writing: bool = True) -> None:
        """Raise if the store does not answer within seconds; MLflow itself would go on trying for minutes."""
        bounded(partial(self._touch, writing), REACH_S + CROWD_S)

    def _touch(self, writing: bool) -> None:
        if self.kind in ("http", "https"):
            import requests

            requests.get(f"{self.uri.rstrip('/')}/health", timeout=REACH_S).raise_for_status()
        elif self.kind in ("postgresql", "mysql", "mssql"):
            self._connect().close()
        elif self.file:
            self._touch_file(self.file, writing)

    def _touch_file(self, file: Path, writing: bool) -> None:
        """Raise if SQLite could not write: it needs the file and, for its journal, the folder."""
        if file.is_dir():
            raise OSError(f"{file} is a folder")
        for path in (file.parent, file) if writing else ():
            if not os.access(path, os.W_OK) and (path != file or file.exists()):
                raise OSError(f"{path} cannot be written")

    def open(self, experiment: str) -> tuple[MlflowClient, str]:
        """Return a client and the experiment's id; what is missing is made by one process at a time."""
        from mlflow import MlflowClient

        if self._has(experiment):
            client = MlflowClient(self.address)
            return client, self._experiment(client, experiment)
        with self._alone():
            new = self.file if self.file and not self.file.exists() else None
            if new and copy_tables(empty_tables(), new):
                new = None
            client = MlflowClient(self.address)
            if new:
                copy_tables(new, empty_tables(), empty=True)
            return client, self._experiment(client, experiment)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(name)  # one that was deleted too
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location=self.artifacts))
            except MlflowException:  # through a server, another process can have been faster
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        return self.active(found)

    def active(self, found: Experiment) -> str:
        """Return the id of an experiment, or raise a UserError if it was deleted: it is kept, but takes no runs."""
        if found.lifecycle_stage == "deleted":
            restore = f"mlflow experiments restore --experiment-id {found.experiment_id}"
            raise UserError(
                f"the MLflow experiment {found.name!r} was deleted: bring it back by MLFLOW_TRACKING_URI="
                f"{without_password(self.uri)} {restore}, or give tracking.experiment=another_name."
            )
        return str(found.experiment_id)

    def _has(self, experiment: str) -> bool:
        """Say whether the tables and the experiment are there; hundreds of jobs need not queue for the lock then."""
        import sqlalchemy

        if self.kind not in ("sqlite", *LOCKS) or (self.file and not self.file.exists()):
            return False
        query = sqlalchemy.text("SELECT 1 FROM experiments WHERE name = :name")
        with self._connect() as connection:
            try:
                return connection.execute(query, {"name": experiment}).first() is not None
            except sqlalchemy.exc.DatabaseError:  # no such table
                return False

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes from making the same tables or experiment, which wrecks a database for good."""
        if self.file:
            with held(Path(f"{self.file}.lock")):
                yield
        elif self.kind in LOCKS:
            with self._take_lock():
                yield
        else:
            yield

    def _take_lock(self) -> Any:
        """Return a connection that holds the lock; who waits for it takes no connection from who works."""
        import sqlalchemy

        end = time.monotonic() + LOCK_S
        while True:
            connection = self._connect()
            if connection.execute(sqlalchemy.text(LOCKS[self.kind])).scalar():
                return connection
            connection.close()
            if time.monotonic() > end:
                raise TimeoutError("another process has been making the tables for too long")
            time.sleep(random.uniform(0.2, 0.6))

    def _connect(self) -> Any:
        """Return a connection of its own, which ends when it is closed; wait for one if too many are open."""
        import sqlalchemy

        timeout = {"connect_timeout": int(REACH_S)} if self.kind in LOCKS else {}
        pool = sqlalchemy.pool.NullPool
        engine = sqlalchemy.create_engine(
            self.address, connect_args=timeout, poolclass=pool, isolation_level="AUTOCOMMIT"
        )
        end = time.monotonic() + CROWD_S
        while True:
            try:
                return engine.connect()
            except sqlalchemy.exc.OperationalError as error:
                if not _is_crowded(error) or time.monotonic() > end:
                    raise
            time.sleep(random.uniform(0.2, 1))


def import_mlflow() -> None:
    """Import MLflow without its calls home and its messages; what goes wrong is raised as well."""
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    with warnings.catch_warnings(), quick_imports("mlflow"):
        warnings.simplefilter("ignore")
        import mlflow  # noqa: F401
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def persistent(call: Callable[[], T]) -> T:
    """Return what a call gives at its second try, as servers restart; wait while a database has no connection left."""
    end = time.monotonic() + CROWD_S
    tries = 2
    while True:
        try:
            return call()
        except UserError:
            raise
        except Exception as error:
            tries -= not (_is_crowded(error) and time.monotonic() < end)
            if tries == 0:
                raise
        time.sleep(random.uniform(1, 3))


def _is_crowded(error: Exception) -> bool:
    return CROWDED.search(str(error)) is not None


@contextmanager
def held(path: Path, seconds: float = LOCK_S) -> Iterator[None]:
    """Hold a lock file; where none can be (a file system without locks, a read-only folder) go on without it.

    The kernel drops the lock with its process, on whichever node. Without it two processes may make a run of the same
    thing, which the end of the sweep or the next sync puts right.
    """
    from filelock import FileLock, Timeout

    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(path, seconds))
        except Timeout:
            raise TimeoutError(f"{path} is held by another process") from None
        except (OSError, NotImplementedError):
            pass
        yield
