"""The SLURM that other tests rely on: it schedules, loses nodes and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import slurm as harness
from cluster.slurm import Cluster, Unavailable, cluster, short_folder

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def keep_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(harness.KEEP, raising=False)


def test_three_nodes_are_idle(slurm: Cluster) -> None:
    slurm.wait_for_idle()
    states = slurm.run("sinfo", "--noheader", "--Node", "--format", "%N %P %G %T").splitlines()
    assert sorted(line.split() for line in states) == [
        ["a1", "a100", "gpu:a100:2", "idle"],
        ["v1", "v100*", "gpu:v100:1", "idle"],
        ["v2", "v100*", "gpu:v100:1", "idle"],
    ]


def test_a_job_sees_its_gpu_and_the_users_environment(slurm: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "output"
    report = "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $HOME $(command -v srun) $SLURM_CONF"
    job = submit(slurm, report, "--partition=a100", "--gres=gpu:1", f"--output={output}")
    slurm.wait_for_idle()
    assert output.read_text().split() == ["a1", "0", str(Path.home()), "/usr/bin/srun", slurm.env["SLURM_CONF"]]
    until(lambda: slurm.run("sacct", "-nXP", "-j", job, "-o", "State,ExitCode").strip() == "COMPLETED|0:0")


def test_the_job_of_a_dead_node_runs_again_elsewhere(slurm: Cluster, tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.touch()
    job = submit(slurm, f'echo $SLURMD_NODENAME >> {started}; [ "$SLURM_RESTART_COUNT" ] || sleep 600')
    until(lambda: len(started.read_text().split()) == 1)
    dead = started.read_text().strip()
    other = submit(slurm, "sleep 600", "--partition=a100")
    slurm.kill_node(dead, report=True)
    assert not harness.processes(f"SLURM_CONF={slurm.folder}/", f"SLURMD_NODENAME={dead}\0")
    until(lambda: len(started.read_text().split()) == 2)
    assert set(started.read_text().split()) == {"v1", "v2"}
    assert slurm.run("squeue", "--noheader", "--job", other, "--format", "%T").strip() == "RUNNING"
    slurm.start_node(dead)
    slurm.run("scancel", other)
    slurm.wait_for_idle()
    assert "Restarts=1" in slurm.run("scontrol", "show", "job", job)


def test_jobs_outlive_the_controller(slurm: Cluster) -> None:
    job = submit(slurm, "sleep 600")
    running = ("squeue", "--noheader", "--states=RUNNING", "--format", "%A")
    until(lambda: slurm.run(*running).split() == [job])
    slurm.stop_controller()
    assert slurm.daemons["slurmctld"].poll() == 0
    slurm.start_controller()
    assert slurm.run(*running).split() == [job]
    slurm.run("scancel", job)


def test_stopping_leaves_nothing_behind_and_others_alone(slurm: Cluster) -> None:
    with short_folder() as folder:
        with cluster(folder, accounting=False, max_array_size=20) as second:
            # Neither SIGTERM nor a new session saves a process.
            submit(second, "trap '' TERM; setsid sleep 600 & sleep 600; sleep 600", "--array=0-19%1")
            until(lambda: "RUNNING" in second.run("squeue", "--format=%T"))
            with pytest.raises(RuntimeError, match="accounting storage is disabled"):
                second.run("sacct")
            with pytest.raises(RuntimeError, match="Invalid job array"):
                submit(second, "true", "--array=0-20")
            assert mentioning(folder)
        assert not mentioning(folder)
    assert not folder.exists()
    assert all(daemon.poll() is None for daemon in slurm.daemons.values())
    test_three_nodes_are_idle(slurm)


def test_nothing_outlives_a_killed_test_run(slurm: Cluster) -> None:
    code = """if True:
        import sys
        from cluster.slurm import cluster, short_folder
        with short_folder() as folder, cluster(folder, accounting=False):
            print(folder, flush=True)
            sys.stdin.read()
    """
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], env=env, text=True, **pipes) as process:
        assert process.stdout
        folder = Path(process.stdout.readline().strip())
        assert mentioning(folder)
        process.send_signal(signal.SIGKILL)
    until(lambda: not mentioning(folder) and not folder.exists())


def test_a_failed_start_says_why_and_leaves_nothing_behind(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = harness.CONFIGS["slurm.conf"].replace("KillWait=5", "KillWait=soon")
    monkeypatch.setitem(harness.CONFIGS, "slurm.conf", broken)
    with short_folder() as folder:
        with pytest.raises(RuntimeError, match=r"slurmctld ended with 1:\n.*KillWait"), cluster(folder):
            pass
        assert not mentioning(folder)


def test_without_slurm_the_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "PROGRAMS", str(tmp_path))
    with pytest.raises(Unavailable, match=r"no munged, .*: apt-get install .*slurm-wlm munge$"):
        cluster(tmp_path, accounting=False).__enter__()


def submit(running: Cluster, script: str, *options: str) -> str:
    """Submit a shell script and return the job's id."""
    return running.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()


def until(done: Callable[[], bool], timeout: float = 30) -> None:
    """Wait until something is done, but not for ever."""
    end = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def mentioning(folder: Path) -> list[str]:
    """Return the processes that have a folder in their command line or environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in text:
            found.append(process.name)
    return found
