"""A study of layers whose work SLURM does: a job for each layer, and what is kept when something goes wrong."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from cluster.site import ON_V100, Site, done, site_in, until
from cluster.slurm import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

LAYERS = ["stem.0.0", "fc2"]
SMALL = (f"layers=[{','.join(LAYERS)}]", "bits=[4]", "rows=2", "images=8", "inputs=12", "samples=1", "output=found")


def study(site: Site, *words: str) -> subprocess.Popen[str]:
    return site.start([sys.executable, "-m", "pq_sweep.study", "layers", *SMALL, ON_V100, *words])


def layers_of(folder: Path) -> list[str]:
    return [row["layer"] for row in csv.DictReader((folder / "layers.csv").open())]


def queued(slurm: Cluster, state: str) -> list[str]:
    return slurm.run("squeue", "--noheader", "--array", f"--states={state}", "--format=%i").split()


def test_layers_are_jobs_of_which_none_is_submitted_twice_or_lost(tmp_path: Path, slurm: Cluster) -> None:
    """The first process is killed, the second waits for its jobs and tells of the one that is cancelled."""
    site, found = site_in(tmp_path, slurm, ""), tmp_path / "found"
    site.env["PYTHONPATH"] = str(ROOT)
    late = 'hydra.launcher.setup=["sleep $((SLURM_ARRAY_TASK_ID * 90))"]'
    slurm.run("scontrol", "update", "PartitionName=v100", "State=DOWN")
    try:
        first = study(site, late)
        until(lambda: list((found / ".submitit").glob("*.json")), first)
        first.kill()
        first.communicate()
        jobs = queued(slurm, "PENDING")
        assert len(jobs) == len(LAYERS)
        second = study(site, late)
        time.sleep(8)
        assert queued(slurm, "PENDING") == jobs
    finally:
        slurm.run("scontrol", "update", "PartitionName=v100", "State=UP")
    until(lambda: jobs[-1] in queued(slurm, "RUNNING"), second)
    slurm.run("scancel", jobs[-1])
    told = done(second)

    assert told.returncode == 1, told.stderr
    (kept,) = layers_of(found)
    (lost,) = {*LAYERS} - {kept}
    why = f"digits_cnn {lost} is left out: SLURM job {jobs[-1]} ended: it was cancelled"
    assert why in " ".join(told.stdout.split())
    last = done(study(site))
    assert last.returncode == 0, last.stderr
    assert layers_of(found) == LAYERS
    assert len(list((found / ".submitit").glob("*/*_result.pkl"))) == len(LAYERS)
    assert len(list((found / "slices").iterdir())) == len(LAYERS)


def test_slurm_refuses_in_a_sentence(tmp_path: Path, slurm: Cluster) -> None:
    site = site_in(tmp_path, slurm, "")
    site.env["PYTHONPATH"] = str(ROOT)
    told = done(study(site, "hydra.launcher.partition=h100"))

    assert told.returncode == 1
    assert "no job could be started: " in told.stderr
    assert "invalid partition specified: h100" in told.stderr
    assert "Traceback" not in told.stderr
