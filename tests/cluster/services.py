"""A real PostgreSQL and a real MLflow server on the loopback, for tests: `with postgres(folder) as database: ...`."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from cluster.slurm import Unavailable

START_S = 120
STOP_S = 20


@dataclass
class Service:
    """A program on a port that is its own, stopped and started at will; its log stays in the folder."""

    command: Sequence[str]
    port: int
    log: Path
    ready: Callable[[], bool]
    env: dict[str, str] = field(default_factory=dict)
    user: str | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.log.parent if self.user is None else "/",
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **become(self.user),
            )
        end = time.monotonic() + START_S
        while not self.ready():
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
                raise RuntimeError(f"{self.command[0]} did not start; the end of its log:\n{tail}")
            time.sleep(0.1)

    def stop(self) -> None:
        """Ask it to end, and see to it."""
        if self.process is not None:
            self.resume()
            self.process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
            self.kill()

    def kill(self) -> None:
        """Leave it no time for anything, nor its children."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def descendants(pid: int) -> list[int]:
    """Return the processes that a process started, and those that they started."""
    try:
        children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in (child, *descendants(child))]


@dataclass
class Postgres(Service):
    """PostgreSQL with an empty database `mlflow` of the user `pq`, who is no superuser."""

    @property
    def uri(self) -> str:
        return self._uri("mlflow")

    def new_database(self, name: str, connections: int = -1) -> str:
        """Make another database, which may refuse more than some connections; return its address."""
        self.execute(f"CREATE DATABASE {name} OWNER pq CONNECTION LIMIT {connections}")
        return self._uri(name)

    def execute(self, command: str) -> None:
        """Run an SQL command as superuser."""
        import psycopg2

        address = f"host=127.0.0.1 port={self.port} user=admin dbname=postgres connect_timeout=5"
        with closing(psycopg2.connect(address)) as connection:
            connection.autocommit = True
            connection.cursor().execute(command)

    def _uri(self, name: str) -> str:
        return f"postgresql+psycopg2://pq@127.0.0.1:{self.port}/{name}"


@dataclass
class Server(Service):
    """An MLflow server that keeps the files of runs itself."""

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """Run a fresh PostgreSQL, which refuses to run as root, and stop it whatever happens."""
    initdb, program = _program("initdb"), _program("postgres")
    user = "postgres" if os.geteuid() == 0 else None
    data = Path(tempfile.mkdtemp(prefix="pq-postgres-", dir=None if user else folder))
    if user:
        shutil.chown(data, user)
    port = free_port()
    try:
        command = [initdb, "--pgdata", str(data), "--username=admin", "--auth=trust", "--no-sync", "--no-locale"]
        run(command, user)
        options = {"fsync": "off", "unix_socket_directories": "", "shared_buffers": "16MB", "max_connections": "60"}
        command = [program, "-D", str(data), "-h", "127.0.0.1", "-p", str(port)]
        command += [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        database = Postgres(command, port, folder / "postgres.log", lambda: _answers(database), user=user)
        database.start()
        try:
            database.execute("CREATE ROLE pq LOGIN CREATEDB")
            database.new_database("mlflow")
            yield database
        finally:
            database.stop()
    finally:
        shutil.rmtree(data, ignore_errors=True)


@contextmanager
def mlflow_server(folder: Path, backend_uri: str) -> Iterator[Server]:
    """Run `mlflow server` and stop it whatever happens."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", backend_uri, "--artifacts-destination", str(folder / "artifacts")]
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    server = Server(command, port, folder / "server.log", lambda: _is_healthy(server), env)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """Return a port that nothing listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def become(user: str | None) -> dict[str, Any]:
    """Return the arguments of subprocess with which a program runs as another user."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}


def run(command: Sequence[str], user: str | None) -> None:
    """Run a program to its end."""
    done = subprocess.run(
        command, cwd="/", capture_output=True, text=True, timeout=START_S, check=False, **become(user)
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def _program(name: str) -> str:
    """Return where a program is: Debian hides it from PATH, and leaves there what runs it."""
    hidden = Path("/usr/lib/postgresql").glob(f"*/bin/{name}") if shutil.which("pg_ctlcluster") else ()
    found = shutil.which(name) or next((str(path) for path in sorted(hidden, reverse=True)), None)
    if found is None:
        raise Unavailable("PostgreSQL is not installed: apt-get install --no-install-recommends postgresql")
    return found


def _answers(database: Postgres) -> bool:
    import psycopg2

    try:
        database.execute("SELECT 1")
    except psycopg2.OperationalError:
        return False
    return True


def _is_healthy(server: Server) -> bool:
    try:
        with urlopen(f"{server.uri}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False
