"""Hydra's own tests of launchers for ours, and several jobs at once on this machine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import LAUNCH, SHORT, Done
from conftest import ROOT, new_user, python
from hydra import version
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from hydra_plugins import pq_sweep_launcher as ours
from pq_sweep.sweep.current import CURRENT

# Another program finds our launchers when our configuration is on its search path.
OURS = f"hydra.searchpath=[{ROOT / 'conf'}]"


@pytest.fixture(autouse=True)
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Register our plugins as launch.py does, for a program that announces no jobs.

    Hydra's tests are written for its defaults of version 1.1, under which a job runs in its folder; what other tests
    chose in this process would hold.
    """
    before = version.getbase()
    version.VersionBase.instance().setbase(version.__compat_version__)
    for plugin in (ours.CheckedSweeper, ours.SlurmLauncher, ours.LocalLauncher):
        Plugins.instance().register(plugin)
    monkeypatch.setattr(CURRENT, "announced", [])
    yield
    version.VersionBase.instance().version_base = before


def test_plugins_are_known() -> None:
    found = {f"{plugin.__module__}.{plugin.__name__}" for plugin in Plugins.instance().discover(Launcher)}
    assert found >= {f"hydra_plugins.pq_sweep_launcher.{name}" for name in ("LocalLauncher", "SlurmLauncher")}


# --- Hydra's tests ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("launcher_name", "overrides"), [("local_parallel", [OURS])])
class TestLocalLauncher(LauncherTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(("launcher_name", "overrides"), [("local_parallel", [OURS, "hydra.sweeper.max_batch_size=2"])])
class TestLocalLauncherInBatches(BatchedSweeperTestSuite):
    pass


# Runs a program that does not know of us as if our plugins had been installed with it.
WITH_PLUGINS = """
import runpy, sys
from hydra.core.plugins import Plugins
from hydra_plugins import pq_sweep_launcher as ours

for plugin in (ours.CheckedSweeper, ours.SlurmLauncher, ours.LocalLauncher):
    Plugins.instance().register(plugin)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [
        (
            {},
            [
                "-m",
                OURS,
                "hydra/hydra_logging=disabled",
                "hydra/job_logging=disabled",
                "hydra/launcher=local_parallel",
            ],
        )
    ],
)
class TestLocalLauncherIntegration(IntegrationTestSuite):
    def generate_custom_cmd(self) -> Callable[..., list[str]]:
        return lambda command, filename: [sys.executable, "-c", WITH_PLUGINS, *command[1:]]


# --- what local_parallel adds -----------------------------------------------------------------------------------------

ASKING = """
import os
import hydra

@hydra.main(version_base="1.3", config_path=None)
def ask(cfg):
    with open("told.txt", "w") as file:
        file.write(repr([os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "SUBMITIT_LOCAL_WITH_SHELL")]))

ask()
"""


@pytest.mark.slow
@pytest.mark.parametrize("visible", [None, "", "0,1"])
def test_jobs_see_the_devices_that_the_launcher_sees(tmp_path: Path, visible: str | None) -> None:
    (tmp_path / "ask.py").write_text(ASKING)
    env = {key: value for key, value in new_user().items() if key != "CUDA_VISIBLE_DEVICES"}
    env |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    # Behind a shell submitit looks for a job under the shell's number, which bash gives to what it runs last.
    done = python(["-c", WITH_PLUGINS, "ask.py", "-m", OURS, "hydra/launcher=local_parallel"], tmp_path, env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "told.txt").read_text() == repr([visible, ""])


# Each leaves word of when its process began and how far it came, in seconds since the machine started.
ACCIDENTS = """
import os, signal, time
from pathlib import Path

def accident(model, data, *, kind):
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    begin, now = ticks / os.sysconf("SC_CLK_TCK"), time.clock_gettime(time.CLOCK_BOOTTIME)
    Path(f"{kind}.span").write_text(f"{begin} {now}")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("raises"):
        raise ArithmeticError("this pruner divides by nothing.")
"""
KINDS = ("killed", "nothing", "raises", "raises_again")


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A sweep of two batches, one job at once, in which accidents happen."""
    folder = tmp_path_factory.mktemp("accidents")
    (folder / "mine.py").write_text(ACCIDENTS)
    (folder / "conf" / "pruner").mkdir(parents=True)
    (folder / "conf" / "pruner" / "mine.yaml").write_text("_target_: mine.accident\nkind: nothing\n")
    limits = ("hydra.launcher.array_parallelism=1", "hydra.sweeper.max_batch_size=2", "hydra.sweep.dir=s")
    grid = ("pruner=mine", f"pruner.kind={','.join(KINDS)}", "tracking=none")
    arguments = [LAUNCH, "-m", "--config-dir", "conf", "hydra/launcher=local_parallel", *limits, *SHORT, *grid]
    return folder / "s", python(arguments, folder, new_user())


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.slow
def test_a_job_that_dies_does_not_stop_the_others(accidents: tuple[Path, Done]) -> None:
    folder, done = accidents
    assert done.returncode == 1
    assert read(folder / "1" / "result.json")["status"] == "finished"
    for job in ("2", "3"):
        message = read(folder / job / "error.json")["message"]
        assert re.match(r"the stage prune failed in \w+\.py, line \d+; choose another pruner", message)
        assert message.endswith("(ArithmeticError: this pruner divides by nothing).")
        assert f"job {job} (digits_cnn mine none auto) failed at prune: {message}" in done.stdout


@pytest.mark.slow
def test_a_job_that_dies_is_a_row_with_its_stage(accidents: tuple[Path, Done]) -> None:
    """It cannot say itself what killed it; where it was is known."""
    folder, done = accidents
    assert not (folder / "0" / "result.json").exists()
    assert "1 done, 3 failed" in done.stdout
    assert (
        "job 0 (digits_cnn mine none auto) failed at prune: The process of the job ended without a result"
        in done.stdout
    )


@pytest.mark.slow
def test_jobs_wait_for_each_other_in_every_batch(accidents: tuple[Path, Done]) -> None:
    folder, _ = accidents
    spans = [tuple(map(float, (folder.parent / f"{kind}.span").read_text().split())) for kind in KINDS]
    assert all(begin < now for begin, now in spans)
    assert all(now <= begin for (_, now), (begin, _) in pairwise(spans)), spans
