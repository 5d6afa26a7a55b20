"""`make ui`: MLflow's server on this machine alone, and the address at which it shows the jobs of all sweeps."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pq_sweep.core.sentences import without_password
from pq_sweep.results.rows import batch_sizes
from pq_sweep.tracking import table
from pq_sweep.tracking.store import SETTINGS, Store, import_mlflow
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

HOST = "127.0.0.1"
START_S = 180.0  # the first start on a slow disk, or one that brings the tables of an older MLflow up to date
STOP_S = 20.0
LATEST = 50  # jobs of which the columns of a view are learnt


def show(uri: str, experiment: str | None, port: int) -> None:
    """Say where the jobs of a store are shown, and serve MLflow's pages until Ctrl-C unless a server does already."""
    store = Store(uri)
    if store.kind in ("http", "https"):
        store.reach()
        _tell(uri, uri, experiment)
        return
    shown = without_password(uri)
    if store.file and not store.file.exists():
        raise UserError(
            f"the MLflow store {shown} is not there yet; run `make sweep` first, or name another store by --uri or"
            " MLFLOW_TRACKING_URI."
        )
    _refuse_taken(port)
    print(f"starting MLflow on {shown} ...", file=sys.stderr)
    with _ending_by_signal(), _served(store, port) as server:
        _tell(f"http://{HOST}:{port}", uri, experiment)
        server.wait()


def _tell(server: str, uri: str, experiment: str | None) -> None:
    """Print the address of each experiment's jobs, the newest first, and open that one where there is a desktop."""
    found = _views(server, experiment)
    if not found:
        print(f"MLflow: {server} ({without_password(uri)} has no sweep yet; `make sweep` logs one)", flush=True)
        return
    for name, address in found.items():
        print(f"MLflow{f', {name}' if len(found) > 1 else ''}: {address}", flush=True)
    open_browser(next(iter(found.values())))


def _views(server: str, experiment: str | None) -> dict[str, str]:
    """Return the addresses of the views by experiment, the one with the newest job first, all saved anew."""
    import_mlflow()
    from mlflow import MlflowClient

    client = MlflowClient(server)
    latest = {each: _latest(client, each) for each in _experiments(client, experiment)}
    filled = sorted((each for each, runs in latest.items() if runs), key=lambda each: -latest[each][0].info.start_time)
    for each in filled:
        runs = latest[each]
        table.save(client, each, batch_sizes([run.data.metrics for run in runs]), [run.info.run_name for run in runs])
    return {client.get_experiment(each).name: table.address(server, each) for each in filled}


def _experiments(client: MlflowClient, name: str | None) -> list[str]:
    """Return the experiments that have a view, and the one of that name, or the usual one before its first sweep ends.

    Raises:
        UserError: If an experiment is asked for by name that is not there, or was deleted.
    """
    known = client.get_experiment_by_name(name or "pq_sweep")
    if name and known is None:
        raise UserError(f"there is no experiment {name!r} in the store; leave out --experiment to see which there are.")
    if name and known and known.lifecycle_stage == "deleted":
        restore = f"mlflow experiments restore --experiment-id {known.experiment_id}"
        raise UserError(f"the experiment {name!r} was deleted; bring it back by {restore}, or leave out --experiment.")
    ids = [known.experiment_id] if known else []
    if not name:
        ids += [each.experiment_id for each in client.search_experiments(filter_string=f"tags.`{table.TAG}` != ''")]
    return list(dict.fromkeys(ids))


def _latest(client: MlflowClient, experiment: str) -> list[Run]:
    """Return the newest jobs of an experiment."""
    return list(client.search_runs([experiment], table.JOBS, max_results=LATEST, order_by=["start_time DESC"]))


def open_browser(address: str) -> None:
    """Open a page where there is a desktop; a browser that would take over the terminal is none."""
    graphical = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if not graphical and sys.platform not in ("darwin", "win32"):
        return
    with suppress(webbrowser.Error, OSError):
        browser = webbrowser.get()
        if type(browser) is not webbrowser.GenericBrowser:
            browser.open(address)


def _refuse_taken(port: int) -> None:
    """Raise a UserError if something else listens on the port."""
    with socket.socket() as probe:
        probe.settimeout(2)
        if probe.connect_ex((HOST, port)) == 0:
            raise UserError(
                f"port {port} of {HOST} is taken, perhaps by an earlier `make ui`; give another, such as"
                f" `make ui PORT={port + 1}`."
            )


@contextmanager
def _ending_by_signal() -> Iterator[None]:
    """Let what would kill this process end it in order, so that no server stays behind."""

    def end(number: int, frame: object) -> None:
        sys.exit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _served(store: Store, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run MLflow's server on a store, from when it answers; its address, with its password, is in no list of processes.

    Raises:
        UserError: If the server does not start, or ends by itself.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    # Its job runner is for what nobody does here, and costs seconds at the start.
    env = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | SETTINGS | os.environ
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen(
                command,
                env=env | {"MLFLOW_BACKEND_STORE_URI": store.address},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            if not _answers(server, port):
                raise UserError(f"MLflow's server does not start: {_complaint(log)}.")
            yield server
            if server.poll() is not None:
                raise UserError(f"MLflow's server has ended: {_complaint(log)}.")
        finally:
            _end(server)


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until a server answers; say whether it does."""
    import requests

    end = time.monotonic() + START_S
    while server.poll() is None:
        with suppress(requests.RequestException):
            if requests.get(f"http://{HOST}:{port}/health", timeout=2).ok:
                return True
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return False


def _complaint(log: Path) -> str:
    """Return the last error that a server wrote, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return without_password([*lines[-1:], *errors][-1] if lines else "it said nothing").rstrip(".")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server, which Ctrl-C has told already."""
    try:
        server.terminate()
        server.wait(STOP_S)
    except subprocess.TimeoutExpired:
        server.kill()
