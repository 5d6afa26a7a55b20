"""`make ui`: the address that it prints shows the jobs of all sweeps with their figures, without a click."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from browser import Seen, started
from cluster.services import descendants, free_port, postgres
from cluster.slurm import Unavailable
from conftest import ROOT, Ran, hear_signals, new_user, only_sweep, python
from mlflow import MlflowClient
from playwright.sync_api import Page
from stored_runs import parent_and_jobs
from sweep_folders import announced, finished, real_result, write_error, write_manifest, write_result

from pq_sweep.tracking import table
from pq_sweep.tracking.tracker import Mlflow

LARGE, SMALL = {"width": 1920, "height": 1080}, {"width": 1440, "height": 900}
README = [
    "digits_cnn l1_global 0.9 none torch",
    "digits_cnn l1_global 0.5 none torch",
    "digits_cnn l1_global 0.1 none torch",
]

# Of each row of MLflow's table what its cells say, as far as they are on the screen, and whether names are whole.
READ = """
() => {
  const screen = document.querySelector('.ag-center-cols-viewport').getBoundingClientRect();
  const rows = {};
  for (const cell of document.querySelectorAll('.ag-row .ag-cell')) {
    const place = cell.getBoundingClientRect();
    const pinned = cell.closest('.ag-pinned-left-cols-container');
    if (!pinned && place.right > screen.right) continue;
    const name = cell.querySelector('a span');
    const row = rows[cell.closest('.ag-row').getAttribute('row-index')] ??= {};
    row[cell.getAttribute('col-id')] = (name ?? cell).innerText.trim();
    if (name) row.whole = [name, ...function* () { for (let e = name; e !== cell; e = e.parentElement) yield e; }()]
      .every(each => each.scrollWidth <= each.clientWidth || each.clientWidth === 0);
  }
  return Object.keys(rows).sort((a, b) => a - b).map(key => rows[key]);
}
"""


@dataclass
class Shown:
    """A running `ui`, what it printed, and what it tells besides."""

    process: subprocess.Popen[str]
    lines: list[str]
    log: Path
    port: int

    @property
    def address(self) -> str:
        found = re.search(r"http\S+", self.lines[0])
        assert found, (self.lines, self.log.read_text())
        return found.group()


@contextmanager
def shown(folder: Path, *arguments: str, lines: int = 1, **environ: str) -> Iterator[Shown]:
    """Run what `make ui` runs, until it has printed so many lines, and end it as Ctrl-C does."""
    log, port = folder / "ui.log", free_port()
    env = {name: value for name, value in new_user().items() if "DISPLAY" not in name} | environ
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "pq_sweep.tracking", "ui", "--port", str(port), *arguments],
            cwd=folder,
            env=env,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            preexec_fn=hear_signals,
        )
    assert process.stdout is not None
    try:
        yield Shown(process, [process.stdout.readline().rstrip() for _ in range(lines)], log, port)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(40)
        finally:
            process.stdout.close()
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)


def ui(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run what `make ui` runs where it comes to an end by itself."""
    return python(["-m", "pq_sweep.tracking", "ui", *arguments], folder, new_user() | environ, 120)


def write_second(folder: Path) -> Path:
    """Write a sweep of a job that is slower than all of the README's sweep, one that is faster, and one that failed."""
    sweep = write_manifest(folder / "second", *(announced(str(number), pruner="remove") for number in range(3)))
    for number, latency in enumerate((5e4, 1e-4)):
        result = real_result()
        result["latency"]["1"] |= {"p50_ms": latency, "p50_ci95_ms": [latency, latency]}
        write_result(sweep, str(number), result)
    write_error(sweep, "2")
    return sweep


@pytest.fixture(scope="module")
def browsed(readme_sweep: Ran, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the store that `make sweep` left."""
    folder = tmp_path_factory.mktemp("browsed")
    shutil.copy(readme_sweep[0] / "mlflow.db", folder)
    return folder


@pytest.fixture(scope="module")
def page_of_make_sweep(browsed: Path) -> Iterator[Shown]:
    """`ui` of the store that `make sweep` left."""
    with shown(browsed) as running:
        yield running


def open_table(chromium: Any, address: str, screen: dict[str, int], jobs: int) -> Seen:
    """Open an address in a window that is new to it, and wait until so many rows are there."""
    seen: Seen = chromium.open(address, viewport=screen)
    seen.page.set_default_timeout(60_000)
    wait_for_rows(seen.page, jobs)
    return seen


def wait_for_rows(page: Page, jobs: int) -> None:
    page.get_by_text(f"{jobs} matching runs").first.wait_for()
    page.locator("[col-id='metrics.`latency_ms/b1`'].ag-cell").nth(jobs - 1).wait_for()


def figure(row: dict[str, str], name: str) -> float:
    return float(row[f"metrics.`{name}`"].rstrip("…."))


@pytest.mark.slow
@pytest.mark.chromium
def test_make_ui_shows_the_figures_of_make_sweep_without_a_click(page_of_make_sweep: Shown, readme_sweep: Ran) -> None:
    with (only_sweep(readme_sweep[0]) / "results.csv").open(newline="") as file:
        expected = [*csv.DictReader(file)][::-1]
    with started() as chromium:
        large = open_table(chromium, page_of_make_sweep.address, LARGE, 3)
        small = open_table(chromium, page_of_make_sweep.address, SMALL, 3)
        seen = {name: window.page.evaluate(READ) for name, window in (("large", large), ("small", small))}
        large.shoot("mlflow-jobs")
        small.shoot("mlflow-jobs-small")

    for rows in seen.values():
        assert [row[table.NAME] for row in rows] == README
        assert all(row["whole"] for row in rows)
        for name in ("accuracy", "latency_ms/b1"):
            assert [figure(row, name) for row in rows] == pytest.approx(
                [float(job[name]) for job in expected], rel=1e-3
            )
    for name in ("accuracy_drop_points", "latency_ms/b8", "latency_ms/b32"):
        found = [figure(row, name) for row in seen["large"]]
        assert found == pytest.approx([float(job[name]) for job in expected], rel=1e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.chromium
def test_jobs_of_two_sweeps_are_sorted_by_latency_and_a_kept_view_stays(browsed: Path, tmp_path: Path) -> None:
    shutil.copy(browsed / "mlflow.db", tmp_path)
    assert Mlflow(f"sqlite:///{tmp_path}/mlflow.db", "pq_sweep").sync(write_second(tmp_path)) == 3
    with shown(tmp_path) as running, started() as chromium:
        page = open_table(chromium, running.address, LARGE, 6).page
        page.get_by_role("columnheader").filter(has_text="latency_ms/b1").first.click()
        page.get_by_text("Sort: latency_ms/b1").wait_for()
        page.wait_for_function(f"() => ({READ})()[0]['metrics.`latency_ms/b1`'] === '50000'")
        rows = page.evaluate(READ)
        page.get_by_text("Override saved view").click()
        page.reload()
        wait_for_rows(page, 6)

    latencies = [figure(row, "latency_ms/b1") for row in rows[:5]]
    assert latencies == sorted(latencies, reverse=True)
    assert (latencies[0], latencies[-1]) == (5e4, 1e-4)
    assert set(README) < {row[table.NAME] for row in rows}
    assert rows[5]["metrics.`latency_ms/b1`"] == "-"  # the one that failed


@pytest.mark.slow
@pytest.mark.chromium
def test_mlflows_page_compares_the_jobs_of_make_sweep(browsed: Path, page_of_make_sweep: Shown) -> None:
    parent, jobs = parent_and_jobs(f"sqlite:///{browsed}/mlflow.db")
    chosen = json.dumps([jobs[name].info.run_id for name in "012"])
    experiment = parent.info.experiment_id
    with started() as chromium:
        root = page_of_make_sweep.address.partition("#")[0]
        compare = chromium.open(f'{root}#/compare-runs?runs={chosen}&experiments=["{experiment}"]', viewport=LARGE)
        compare.page.set_default_timeout(60_000)
        compare.page.get_by_text("Comparing 3 Runs").first.wait_for()
        compare.page.get_by_text("accuracy", exact=True).first.wait_for()
        compared = compare.page.inner_text("body")
        compare.shoot("mlflow-compare")

    for name in "012":
        assert f"{jobs[name].data.metrics['accuracy']:.3f}"[:4] in compared


# Without a browser


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store of three experiments with sweeps, the last one the newest, and one without.

    The view of the first is what earlier versions left, the sweep of the second has not ended yet.
    """
    folder = tmp_path_factory.mktemp("several")
    uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    client.create_experiment("of somebody else")
    for number, experiment in enumerate(("first", "pq_sweep", "last")):
        sweep = write_manifest(folder / experiment, announced("0"))
        write_result(sweep, "0", finished(number, 0.3, "none") | {"started": 1.7e9 + number})
        Mlflow(uri, experiment).sync(sweep)
    old = json.dumps({"selectedColumns": ["metrics.`accuracy`", "metrics.`latency_ms/b64`"]})
    ids = {each.name: each.experiment_id for each in client.search_experiments()}
    client.set_experiment_tag(ids["first"], table.TAG, old)
    client.delete_experiment_tag(ids["pq_sweep"], table.TAG)
    return folder


@pytest.fixture(scope="module")
def served(store: Path) -> Iterator[Shown]:
    """`ui` of that store."""
    with shown(store, lines=3) as running:
        yield running


def view_of(client: MlflowClient, experiment: str) -> dict[str, Any]:
    return dict(json.loads(client.get_experiment_by_name(experiment).tags[table.TAG]))


@pytest.mark.slow
def test_ui_names_every_experiment_with_sweeps_the_newest_first(store: Path, served: Shown, tmp_path: Path) -> None:
    client = MlflowClient(f"sqlite:///{store}/mlflow.db")
    server = f"http://127.0.0.1:{served.port}"
    ids = [client.get_experiment_by_name(name).experiment_id for name in ("last", "pq_sweep", "first")]
    again = ui(tmp_path, MLFLOW_TRACKING_URI=server)
    one = ui(tmp_path, "--uri", server, "--experiment", "first")
    none = ui(tmp_path, "--uri", server, "--experiment", "nonsense")
    busy = ui(store, "--port", str(served.port))

    expected = [f"MLflow, {name}: {table.address(server, id_)}" for name, id_ in
                zip(("last", "pq_sweep", "first"), ids, strict=True)]  # fmt: skip
    assert served.lines == expected == again.stdout.splitlines()
    assert one.stdout == f"MLflow: {table.address(server, ids[2])}\n"
    assert (none.returncode, none.stderr) == (
        1, "there is no experiment 'nonsense' in the store; leave out --experiment to see which there are.\n",
    )  # fmt: skip
    assert busy.returncode == 1
    assert busy.stderr == (
        f"port {served.port} of 127.0.0.1 is taken, perhaps by an earlier `make ui`; give another, such as"
        f" `make ui PORT={served.port + 1}`.\n"
    )
    assert [name for name in view_of(client, "first")["selectedColumns"] if "latency" in name] == [
        f"metrics.`latency_ms/b{size}`" for size in (1, 8, 64)
    ]
    assert view_of(client, "pq_sweep")["searchFilter"] == table.JOBS


@pytest.mark.slow
def test_ui_of_postgresql_shows_its_password_to_nobody(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"))
    write_result(sweep, "0")
    try:
        with postgres(tmp_path) as database:
            uri = database.uri.replace("pq@", "pq:s3cret@")
            Mlflow(uri, "pq_sweep").sync(sweep)
            with shown(tmp_path, MLFLOW_TRACKING_URI=uri) as running:
                expected = table.address(f"http://127.0.0.1:{running.port}", "1")
                processes = [running.process.pid, *descendants(running.process.pid)]
                commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes]
    except Unavailable as error:
        pytest.skip(str(error))

    assert running.lines == [f"MLflow: {expected}"]
    assert len(commands) >= 3  # mlflow starts uvicorn
    assert "s3cret" not in str(commands) + running.log.read_text()


@pytest.mark.slow
def test_ui_of_a_store_without_sweeps_says_so_and_ctrl_c_ends_it_and_its_server_without_a_word(tmp_path: Path) -> None:
    MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_experiments()
    with shown(tmp_path) as running:
        assert running.lines == [
            f"MLflow: http://127.0.0.1:{running.port} (sqlite:///{tmp_path}/mlflow.db has no sweep yet; `make sweep`"
            " logs one)"
        ]
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.process.wait(40) == 0
    told = running.log.read_text().splitlines()

    assert len(told) == 1
    assert told[0].startswith("starting MLflow on sqlite:")
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", running.port)) != 0


@pytest.mark.slow
def test_ui_that_is_terminated_leaves_no_server(store: Path) -> None:
    with shown(store, "--experiment", "last") as running:
        running.process.terminate()  # as `kill` does: the server is told nothing of it
        assert running.process.wait(40) == 128 + signal.SIGTERM
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", running.port)) != 0


@pytest.mark.slow
def test_ui_opens_the_browser_of_a_desktop_and_no_other(served: Shown, tmp_path: Path) -> None:
    for name, note in (("xdg-open", "opened"), ("lynx", "took the terminal")):
        program = tmp_path / name / name
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "{note} $1" >> {tmp_path}/opened\n')
        program.chmod(0o755)
    server = f"http://127.0.0.1:{served.port}"
    for programs, environ in (("xdg-open", {"DISPLAY": ":7"}), ("lynx", {"DISPLAY": ":7"}), ("xdg-open", {})):
        path = {"PATH": str(tmp_path / programs), "TERM": "xterm", "DISPLAY": "", "WAYLAND_DISPLAY": ""} | environ
        done = ui(tmp_path, "--uri", server, "--experiment", "last", **path)
        assert done.returncode == 0, done.stderr
    end = time.monotonic() + 10
    while not (tmp_path / "opened").exists() and time.monotonic() < end:
        time.sleep(0.1)

    assert (tmp_path / "opened").read_text() == f"opened {served.address}\n"


@pytest.mark.slow
def test_ui_without_a_store_says_to_make_a_sweep_first(tmp_path: Path) -> None:
    done = ui(tmp_path)

    assert done.returncode == 1
    assert done.stderr == (
        f"the MLflow store sqlite:///{tmp_path}/mlflow.db is not there yet; run `make sweep` first, or name another"
        " store by --uri or MLFLOW_TRACKING_URI.\n"
    )
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.slow
def test_ui_of_a_server_that_is_down_says_so_without_its_password(tmp_path: Path) -> None:
    done = ui(tmp_path, MLFLOW_TRACKING_URI="http://me:s3cret@127.0.0.1:9")

    assert done.returncode == 1
    assert done.stderr.startswith("MLflow store http://me:***@127.0.0.1:9 cannot be used: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_ui_tells_why_its_server_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database at all")
    done = ui(tmp_path, "--port", str(free_port()))

    assert done.returncode == 1
    assert "MLflow's server does not start: " in done.stderr
    assert "file is not a database" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_view_keeps_the_columns_and_the_room_that_it_had(store: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(store / "mlflow.db")) as source, closing(sqlite3.connect(tmp_path / "m.db")) as copy:
        source.backup(copy)
    client = MlflowClient(f"sqlite:///{tmp_path}/m.db")
    experiment = client.get_experiment_by_name("last").experiment_id
    table.save(client, experiment, [16], ["x" * 60])
    table.save(client, experiment, [1], ["x"])
    view = view_of(client, "last")

    found = [name for name in view["selectedColumns"] if "latency" in name]
    assert found == [f"metrics.`latency_ms/b{size}`" for size in (1, 8, 16)]
    assert view["columnWidths"][table.NAME] == 50 + 7 * 60
    table.save(client, experiment, range(1000, 2000), ["x" * 5000])
    assert len(client.get_experiment(experiment).tags[table.TAG]) < 5000  # MLflow's limit


def test_an_address_holds_no_password() -> None:
    assert table.address("https://me:s3cret@host:80/mlflow/", "7") == (
        "https://host:80/mlflow/#/experiments/7/runs?viewStateShareKey=pq_sweep"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("given", "options"), [((), ""), (("PORT=5077",), " --port 5077")])
def test_make_ui_runs_ui(given: tuple[str, ...], options: str) -> None:
    done = subprocess.run(["make", "-n", "ui", *given], cwd=ROOT, capture_output=True, text=True, check=True)

    assert f"-m pq_sweep.tracking ui{options}" in [
        line.partition("python ")[2].strip() for line in done.stdout.splitlines()
    ]
