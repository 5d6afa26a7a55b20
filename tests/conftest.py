"""Fixtures of all tests: the command line as a user runs it, and the shared data if it is there."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from forked import Forks

from pq_sweep.types import UserError

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"  # where a process of its own finds what tests share
SHARED = ROOT.parent / "shared" / "data"

FORKS = Forks(ROOT)

Launch = Callable[..., subprocess.CompletedProcess[str]]
Ran = tuple[Path, subprocess.CompletedProcess[str]]


# What takes longest begins first, in this order: a worker that begins with it late would end alone.
LONGEST = (
    "tests/cluster/",
    "tests/test_photographs.py",
    "tests/tracking/",
    "tests/sweep/",
    "tests/results/test_shipping.py",
    "tests/job/",
    "tests/test_examples.py",
    "tests/test_experiments.py",
    "tests/test_environments.py",
    "tests/test_suite.py",
    "tests/test_support.py",
    "tests/results/test_documented.py",
    "tests/compress/test_quantizers.py",
    "tests/doctor/",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give pytest-xdist's workers whole classes and modules, as their tests share what is expensive."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            """All tests of the cluster share one SLURM."""
            return "tests/cluster/" if nodeid.startswith("tests/cluster/") else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the garbage collector leave alone what stays until the end, and look seldom: it takes 7 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run the fast tests first, those of the cluster last, and skip, saying why, what needs a device or program."""
    if is_worker(config):
        items.sort(key=lambda item: next((n for n, part in enumerate(LONGEST) if part in item.nodeid), len(LONGEST)))
    else:
        items.sort(key=lambda item: [item.get_closest_marker(name) is not None for name in ("slurm", "slow")])
    missing = {
        "gpu": "" if torch.cuda.is_available() else "needs a CUDA device and torch finds none",
        "chromium": "" if shutil.which("chromium") else "needs Chromium: apt-get install chromium",
    }
    for item in items:
        for name, reason in missing.items():
            if reason and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    FORKS.close()


def is_worker(config: pytest.Config) -> bool:
    """Say whether this process is one of several that share the tests."""
    return hasattr(config, "workerinput")


@pytest.fixture(scope="session", autouse=True)
def own_turns(request: pytest.FixtureRequest) -> Iterator[None]:
    """Give a worker a temporary folder of its own: the jobs of all would wait there for their turns on the device.

    The users who run daemons have to reach it.
    """
    if not is_worker(request.config):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="pq-tests-") as folder, pytest.MonkeyPatch.context() as patch:
        Path(folder).chmod(0o755)
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """On 8x8 images several threads wait for each other longer than they work, above all on a busy machine."""
    threads = torch.get_num_threads()
    alone = not is_worker(request.config)
    torch.set_num_threads(threads if alone and request.node.get_closest_marker("slow") else 1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def image_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep decoded images of all tests in one folder that is not the user's."""
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def environment() -> dict[str, str]:
    return new_user()


@pytest.fixture
def launch(tmp_path: Path, environment: dict[str, str]) -> Launch:
    """Run launch.py in an empty folder, where `multirun/` and `mlflow.db` then are."""

    def run(
        *overrides: str, timeout: float = 300, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return python([str(ROOT / "launch.py"), *overrides], tmp_path, environment | (env or {}), timeout)

    return run


@pytest.fixture(scope="session")
def readme_sweep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run what `make sweep` runs, and return the folder where it ran and how it ended; one worker runs it for all."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if is_worker(request.config) else base) / "readme"
    kept = folder / "done.pickle"
    with FileLock(folder.with_suffix(".lock")):
        if not kept.exists():
            folder.mkdir()
            line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if "launch.py -m" in line)
            done = python([str(ROOT / "launch.py"), *line.split()[2:]], folder, new_user(), 300)
            kept.write_bytes(pickle.dumps(done))
    return folder, pickle.loads(kept.read_bytes())


def python(
    arguments: Sequence[str], folder: Path, env: dict[str, str], timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run this Python with `arguments` in `folder` and return what it printed."""
    if FORKS.can_run(arguments, env):
        return FORKS.run(arguments, folder, env, timeout)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def only_sweep(folder: Path) -> Path:
    """Return the one sweep folder under `folder`/multirun."""
    (found,) = folder.glob("multirun/*/*/sweep.json")
    return found.parent


def results(sweep: Path) -> list[dict[str, Any]]:
    """Return the results of a sweep's jobs in order."""
    paths = sorted(sweep.glob("*/result.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in paths]


@pytest.fixture
def shared_data() -> Path:
    """The folder of real weights and photographs; tests that need it are skipped where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("needs real weights and photographs in shared/data, which are not here")
    return SHARED


def refused(call: Callable[[], Any]) -> str:
    """Return the one sentence with which `call` is refused."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def hear_signals() -> None:
    """Let Ctrl-C and a closed terminal reach a new process, which the tests' own shell may have had ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def new_user() -> dict[str, str]:
    """The environment of a new user: no tracking server, no telemetry, not within another make."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HYDRA", "MAKE"))}
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true"}
