"""Sweeps as a researcher runs them on a cluster, and everything that goes wrong there."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import Done
from stored_runs import parent_and_jobs

from cluster.services import Server
from cluster.site import ON_V100, Site, done, read, site_in, until
from cluster.slurm import Cluster
from pq_sweep.core.folder import SweepFolder

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

ANYWHERE = "hydra.launcher.partition='v100,a100'"


@pytest.fixture
def site(tmp_path: Path, slurm: Cluster, server: Server) -> Site:
    return site_in(tmp_path, slurm, server.uri)


# --- twelve jobs on three nodes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory, slurm: Cluster, server: Server) -> tuple[Site, Done]:
    site = site_in(tmp_path_factory.mktemp("twelve"), slurm, server.uri)
    amounts = "pruner.amount=0.1,0.2,0.3,0.5,0.7,0.9"
    return site, site.sweep(
        "twelve", ON_V100, "node=v100,a100", "pruner=l1_global", amounts, "tracking.experiment=twelve"
    )


def test_twelve_jobs_run_where_they_should(twelve: tuple[Site, Done]) -> None:
    site, ran = twelve
    assert ran.returncode == 0, ran.stderr
    rows = site.rows("twelve")
    assert [row["status"] for row in rows] == ["finished"] * 12
    assert {(row["node_type"], row["partition"]) for row in rows} == {("v100", "v100"), ("a100", "a100")}
    assert {row["node"] for row in rows} == {"v1", "v2", "a1"}
    assert all((row["node"] == "a1") == (row["partition"] == "a100") for row in rows)
    assert len({row["slurm_job"] for row in rows}) == 12


def test_twelve_children_of_one_parent_name_where_they_ran(twelve: tuple[Site, Done], server: Server) -> None:
    rows = {row["job"]: row for row in twelve[0].rows("twelve")}
    parent, children = parent_and_jobs(server.uri, "twelve")
    assert parent.info.status == "FINISHED"
    assert children.keys() == rows.keys()
    for job, run in children.items():
        assert run.info.status == "FINISHED"
        for tag in ("node", "partition", "slurm_job"):
            assert run.data.tags[f"pq_sweep.{tag}"] == rows[job][tag]
        assert run.data.metrics["accuracy"] == float(rows[job]["accuracy"])


def test_kinds_of_nodes_do_not_share_a_reference(twelve: tuple[Site, Done]) -> None:
    assert len(list((twelve[0].folder / "twelve" / "baseline").iterdir())) == 2


# --- accidents --------------------------------------------------------------------------------------------------------

KINDS = ("nothing", "raise", "exit", "vanish", "killed", "cancelled", "full", "node_dies")
REASONS = {
    "raise": r"the stage prune failed in \w+\.py, line \d+; .+ \(ArithmeticError: this pruner divides by nothing\)\.",
    "exit": r"the job called sys\.exit\(3\) instead of raising an error\.",
    "vanish": r"SLURM job \d+_\d+ ended: it failed, exit code 4 \(state FAILED, node \w+\)\.",
    "killed": r"SLURM job \d+_\d+ ended: it failed, killed by signal 9 \(often: out of memory\) \(state FAILED, .*",
    "cancelled": r"the job was stopped by SIGTERM.* SLURM job \d+_\d+ ended: it was cancelled .*state CANCELLED.*",
    "full": r"SLURM job \d+_\d+ ended: it failed, exit code 1 \(state FAILED, node \w+\)\.",
}


@pytest.fixture(scope="module")
def accidents(tmp_path_factory: pytest.TempPathFactory, slurm: Cluster, server: Server) -> tuple[Site, Done]:
    """A sweep in which nearly everything happens that can."""
    site = site_in(tmp_path_factory.mktemp("accidents"), slurm, server.uri)
    others = [late(site, "times_out"), late(site, "never_ends", "hydra.launcher.max_num_timeout=0")]
    launcher = site.launch("accidents", *grid_of_accidents(KINDS), "tracking.experiment=accidents")
    until(lambda: site.tries("cancelled"), launcher)
    job = until(lambda: read(site.folder / "accidents" / "submitted.json")["jobs"][str(KINDS.index("cancelled"))]["id"])
    slurm.run("scancel", job)
    (node,) = until(lambda: site.tries("node_dies"), launcher)
    slurm.kill_node(node)
    until(lambda: len(site.tries("node_dies")) == 2, launcher)
    ended = done(launcher)
    slurm.start_node(node)
    assert [done(other).returncode for other in others] == [0, 1]
    return site, ended


def grid_of_accidents(kinds: tuple[str, ...]) -> tuple[str, ...]:
    grid = f"pruner.kind={','.join(kinds)}"
    return (ON_V100, ANYWHERE, "pruner=accident", grid)


def running(slurm: Cluster) -> str:
    return slurm.run("squeue", "--noheader", "--array", "--format=%i|%T")


def test_every_accident_has_one_row_with_its_reason(accidents: tuple[Site, Done]) -> None:
    site, ended = accidents
    assert ended.returncode == 1
    rows = {row["pruner.kind"]: row for row in site.rows("accidents")}
    assert list(rows) == list(KINDS)
    assert {kind for kind, row in rows.items() if row["status"] == "finished"} == {"nothing", "node_dies"}
    for kind, reason in REASONS.items():
        assert rows[kind]["status"] == "failed"
        assert re.fullmatch(reason, rows[kind]["error"]), rows[kind]["error"]
        assert rows[kind]["error"] in " ".join(ended.stdout.split())
    assert "last words of a vanishing job" in ended.stdout


def test_a_job_whose_node_died_ran_again(accidents: tuple[Site, Done]) -> None:
    site, _ = accidents
    assert len(site.tries("node_dies")) == 2
    result = read(site.folder / "accidents" / str(KINDS.index("node_dies")) / "result.json")
    assert len(result["tries"]) == 2


def test_no_run_of_an_accident_stays_open(accidents: tuple[Site, Done], server: Server) -> None:
    parent, children = parent_and_jobs(server.uri, "accidents")
    assert parent.info.status == "FAILED"
    rows = {row["job"]: row for row in accidents[0].rows("accidents")}
    assert children.keys() == rows.keys()
    for job, run in children.items():
        assert run.info.status == ("FINISHED" if rows[job]["status"] == "finished" else "FAILED")
        assert run.data.tags.get("pq_sweep.error", "") == rows[job]["error"]


def test_the_second_start_runs_only_what_is_missing(accidents: tuple[Site, Done], server: Server) -> None:
    site, _ = accidents
    (site.folder / "signs" / "over").touch()
    before = {kind: len(site.tries(kind)) for kind in KINDS}
    again = site.sweep("accidents", *grid_of_accidents(KINDS), "tracking.experiment=accidents")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [row["status"] for row in site.rows("accidents")] == ["finished"] * len(KINDS)
    assert {kind for kind in KINDS if len(site.tries(kind)) > before[kind]} == set(REASONS)
    parent, children = parent_and_jobs(server.uri, "accidents")
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    assert len(children) == len(KINDS)


def late(site: Site, kind: str, *more: str) -> subprocess.Popen[str]:
    """Start a job that waits for its time limit; a minute is SLURM's shortest, and it warns up to 30 s too early."""
    limits = ("hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=10", "hydra.launcher.gpus_per_node=0")
    return site.launch(f"late_{kind}", *grid_of_accidents((kind,)), *limits, *more, "tracking=none")


def test_a_job_that_hits_its_time_limit_goes_on_where_it_was(accidents: tuple[Site, Done]) -> None:
    site, _ = accidents
    (row,) = site.rows("late_times_out")
    assert row["status"] == "finished"
    assert len(site.tries("times_out")) == 2
    assert len(read(site.folder / "late_times_out" / "0" / "result.json")["tries"]) == 2


def test_a_job_that_hits_its_time_limit_too_often_says_what_to_raise(accidents: tuple[Site, Done]) -> None:
    (row,) = accidents[0].rows("late_never_ends")
    assert row["status"] == "failed"
    assert row["error"] == (
        "Job not requeued because: timed-out too many times; raise hydra.launcher.timeout_min or max_num_timeout."
    )


def test_without_accounting_nothing_hangs(tmp_path: Path, forgetful: Cluster) -> None:
    """SLURM's controller remembers for some minutes how a job ended."""
    kinds = ("nothing", "killed", "raise")
    site = site_in(tmp_path, forgetful, "")
    ended = site.sweep("forgetful", *grid_of_accidents(kinds), "tracking=none")
    assert ended.returncode == 1
    fine, killed, raised = site.rows("forgetful")
    assert [row["status"] for row in (fine, killed, raised)] == ["finished", "failed", "failed"]
    assert len({row["slurm_job"].partition("_")[0] for row in (fine, killed, raised)}) == 2  # arrays
    assert re.fullmatch(r"SLURM job \d+_1 ended: it failed, killed by signal 9 .*", killed["error"]), killed["error"]


# --- the launcher and the store go away ------------------------------------------------------------------------------


def test_jobs_outlive_launcher_and_server(site: Site, slurm: Cluster, server: Server) -> None:
    """The server stops for half of the sweep, the launcher is killed; `--watch` finishes what it would have done."""
    grid = (ON_V100, "pruner=l1_global", "pruner.amount=0.1,0.3,0.5,0.7", "tracking.experiment=orphans")
    launcher = site.launch("orphans", *grid)
    folder = site.folder / "orphans"
    until(lambda: list(folder.glob("*/result.json")), launcher)
    server.stop()
    launcher.send_signal(signal.SIGKILL)
    launcher.communicate()
    until(lambda: len(list(folder.glob("*/result.json"))) == 4)
    slurm.wait_for_idle(120)
    server.start()
    watched = site.results("orphans", "--watch")
    assert watched.returncode == 0, watched.stderr
    assert [row["status"] for row in site.rows("orphans")] == ["finished"] * 4
    parent, children = parent_and_jobs(server.uri, "orphans")
    assert {run.info.status for run in (parent, *children.values())} == {"FINISHED"}
    assert len(children) == 4


def test_what_is_queued_is_not_submitted_again(site: Site, slurm: Cluster) -> None:
    """Two launchers of one sweep, the first of which was killed while its jobs still waited."""
    slurm.run("scontrol", "update", "PartitionName=a100", "State=DOWN")
    grid = ("hydra/launcher=slurm_a100", "pruner=l1_global", "pruner.amount=0.1,0.5", "tracking=none")
    try:
        first = site.launch("waiting", *grid)
        # SLURM has the jobs a moment before the launcher has written down which they are.
        until(SweepFolder(site.folder / "waiting").submitted.exists, first)
        first.kill()
        first.communicate()
        assert running(slurm).count("PENDING") == 2
        seen = site.results("waiting")
        assert "0 done, 2 pending" in seen.stdout
        second = site.launch("waiting", *grid)
        time.sleep(8)
        assert running(slurm).count("PENDING") == 2
    finally:
        slurm.run("scontrol", "update", "PartitionName=a100", "State=UP")
    assert done(second).returncode == 0
    assert [row["status"] for row in site.rows("waiting")] == ["finished"] * 2
    before = times_of_results(site, "waiting")
    again = site.results("waiting", "--resubmit-failed")
    assert again.returncode == 0, again.stderr
    assert "0 jobs submitted, 2 finished or queued before" in again.stdout
    assert times_of_results(site, "waiting") == before


def times_of_results(site: Site, sweep: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in site.folder.glob(f"{sweep}/*/result.json")}


# --- what never starts -----------------------------------------------------------------------------------------------


def test_an_impossible_grid_submits_nothing_and_says_all(site: Site, slurm: Cluster) -> None:
    slurm.wait_for_idle(60)  # jobs of the test before may still be leaving
    wrong = ("model.weights=/nowhere/weights.pth", "node=v100,h100", "runtime=torch", "quantizer=int8", "device=cuda")
    ended = site.sweep("wrong", ON_V100, *wrong)
    assert ended.returncode == 1
    for problem in ("/nowhere/weights.pth is no file", "node=h100 is not known", "cannot run precision int8"):
        assert problem in ended.stderr
    assert not (site.folder / "wrong" / "submitted.json").exists()
    assert running(slurm) == ""


def test_what_does_not_load_is_told_before_anything_is_submitted(site: Site) -> None:
    (site.folder / "other.pth").write_bytes(b"no checkpoint")
    wrong = ("model.weights=other.pth", "seed=0,1", "hydra.launcher.prefetch=true")
    ended = site.sweep("unloadable", ON_V100, *wrong, "tracking=none")
    assert ended.returncode == 1
    assert "other.pth" in ended.stderr
    assert not (site.folder / "unloadable" / "submitted.json").exists()


def test_slurm_refuses_what_it_does_not_have(site: Site) -> None:
    ended = site.sweep("refused", "hydra/launcher=slurm", "hydra.launcher.partition=h100", "tracking=none")
    assert ended.returncode == 1
    assert re.search(r"SLURM took no jobs: .*invalid partition", ended.stderr)


# --- a search ---------------------------------------------------------------------------------------------------------


def test_a_search_submits_round_after_round(site: Site) -> None:
    ran = site.sweep(
        "search", ON_V100, "search=constraint", "pruner=l1_global,l1", "search.step=0.45", "search.low=0.05"
    )
    rows = site.rows("search")

    assert ran.returncode == 0, ran.stderr
    assert [row["status"] for row in rows] == ["finished"] * len(rows)
    assert [row["pruner"] for row in rows[:3]] == ["none", "l1_global", "l1"]
    assert all(row["slurm_job"] for row in rows)
    assert re.search(r"pruner=l1_global: pruner.amount=0\.\d+ is the largest within 1", ran.stdout)
