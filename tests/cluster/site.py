"""A user's place on a cluster, where sweeps are started and looked at."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands import LAUNCH, SHORT, Done
from conftest import ROOT, new_user

from cluster.slurm import Cluster

ON_V100 = "hydra/launcher=slurm_v100"


@dataclass
class Site:
    """A user's working folder on a cluster."""

    folder: Path
    env: dict[str, str]

    def launch(self, name: str, *overrides: str) -> subprocess.Popen[str]:
        """Start a sweep in the folder `name`."""
        options = ("-m", "--config-dir", "conf", f"hydra.sweep.dir={name}", *SHORT, "hydra.launcher.prefetch=false")
        return self.start([sys.executable, LAUNCH, *options, *overrides])

    def start(self, command: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True)

    def sweep(self, name: str, *overrides: str) -> Done:
        """Run a sweep to its end."""
        return done(self.launch(name, *overrides))

    def results(self, *arguments: str) -> Done:
        return done(self.start([sys.executable, "-m", "pq_sweep.results", *arguments]))

    def tries(self, kind: str) -> list[str]:
        """Return the nodes on which an accident's job was tried."""
        path = self.folder / "signs" / f"{kind}.tries"
        return path.read_text().split() if path.exists() else []

    def rows(self, name: str) -> list[dict[str, str]]:
        with (self.folder / name / "results.csv").open() as file:
            return list(csv.DictReader(file))


def done(process: subprocess.Popen[str], seconds: float = 540) -> Done:
    """Wait for a process; what it printed says why, if it takes too long."""
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"still running after {seconds} s: {process.communicate()}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def until(condition: Callable[[], Any], launcher: subprocess.Popen[str] | None = None, seconds: float = 150) -> Any:
    """Wait for something to be so, as long as the launcher runs, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert launcher is None or launcher.poll() is None, f"the launcher ended: {done(launcher)}"
        assert time.monotonic() < end, "it did not come to pass in time"
        time.sleep(0.2)
    return found


def site_in(folder: Path, slurm: Cluster, tracking: str) -> Site:
    (folder / "signs").mkdir()
    (folder / "conf" / "pruner").mkdir(parents=True)
    (folder / "conf" / "pruner" / "accident.yaml").write_text(
        "_target_: cluster.accidents.accident\nkind: nothing\namount: 0.5\n"
    )
    paths = {"PYTHONPATH": str(ROOT / "tests"), "ACCIDENT_SIGNS": str(folder / "signs")}
    return Site(folder, new_user() | slurm.env | paths | {"MLFLOW_TRACKING_URI": tracking})


def read(path: Path) -> Any:
    return json.loads(path.read_text())
