"""What the doctor finds of Python, CPU, disk, SLURM and the tracking store is true."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from machines import advice, machine, remedy

from pq_sweep.doctor import machine as looking
from pq_sweep.doctor.examine import judged
from pq_sweep.doctor.machine import cgroup_cpus, unmet, without_home

# Python


def test_packages_that_do_not_fit_are_named() -> None:
    wanted = ["torch<2.16,>=2.10", "mlflow<3.18", "Scikit_Learn>=1.4", "rich>=13", "tensorrt>=10; extra == 'gpu'"]
    there = {"torch": "2.15.0+cu130", "mlflow": "3.18.0", "scikit-learn": "1.7"}
    assert list(unmet(wanted, there)) == ["mlflow<3.18 (here: 3.18.0)", "rich>=13 (here: none)"]
    assert "mlflow<3.18 (here: 3.18.0)" in remedy("python", machine(python={"unmet": ["mlflow<3.18 (here: 3.18.0)"]}))


def test_the_packages_here_fit() -> None:
    wanted = looking.requirements()
    assert any(line.startswith("torch") for line in wanted)
    assert list(unmet(wanted, looking.installed())) == []


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert without_home("/home/me/work") == "~/work"
    assert without_home("sqlite:////home/me/mlflow.db") == "sqlite:///~/mlflow.db"
    assert without_home("/home/merlin/work") == "/home/merlin/work"
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data/work") == "/data/work"


# CPU


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),
        ("0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "50000 100000"}, 0.5),
        ("0::/job", {"job/cpu.max": "max 100000"}, None),
        ("0::/../outside/the/container", {"cpu.max": "200000 100000"}, 2.0),
        ("4:memory:/a\n1:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "75000"}
         | {"cpu,cpuacct/a/cpu.cfs_period_us": "50000"}, 1.5),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("1:cpuset:/a\n0::/", {}, None),
    ],
)  # fmt: skip
def test_the_least_quota_above_a_process_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cgroup_cpus(membership, tmp_path) == expected


def test_threads_above_the_quota_are_advised_against() -> None:
    (sentence,) = advice("cpu", machine(cpu={"cgroup_cpus": 1.5}))
    assert "measure.threads=1" in sentence
    assert advice("cpu", machine(cpu={"cgroup_cpus": 2.0})) == []


# Disk


def test_folders_are_looked_at(tmp_path: Path) -> None:
    found = looking.look_at_folder(tmp_path / "not" / "made" / "yet")
    assert found["error"] == ""
    assert found["free_gb"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_problem() -> None:
    found = looking.look_at_folder(Path("/proc"))
    assert found["error"]
    assert "set PQ_SWEEP_CACHE" in remedy("disk", machine(disk={"cache": found}))


def test_a_full_disk_is_a_problem() -> None:
    cache = machine()["disk"]["cache"] | {"free_gb": 0.3}
    assert "0.3 GB free" in remedy("disk", machine(disk={"cache": cache}))


@pytest.mark.slow
def test_the_cache_is_where_jobs_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "mine"))
    assert looking.look_at_disk()["cache"]["path"] == without_home(str(tmp_path / "mine"))


# SLURM


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put SLURM's tools on an otherwise empty PATH, each as a line of shell."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(**scripts: str) -> None:
        for name, line in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)

    return put


SINFO = 'case "$*" in --version) echo slurm 22.05.8;; *) echo "v100*   up  2 nodes gpu:v100:1";; esac'


def test_no_slurm_is_no_problem(tools: Callable[..., None]) -> None:
    assert advice("slurm", machine(slurm=looking.look_at_slurm()), "not here") == []


def test_slurm_that_answers_is_told(tools: Callable[..., None]) -> None:
    tools(sbatch="exit 1", sinfo=SINFO, sacct="exit 0")
    section = judged("slurm", machine(slurm=looking.look_at_slurm()))
    assert (section.verdict, section.remedies) == ("ok", [])
    assert section.details["tools"] == ["sbatch", "sinfo", "sacct"]
    assert section.details["version"] == "slurm 22.05.8"
    assert section.details["partitions"] == ["v100* up 2 nodes gpu:v100:1"]
    assert section.details["accounting"] == "answers"


@pytest.mark.parametrize("sacct", [{}, {"sacct": "echo Slurm accounting storage is disabled >&2; exit 1"}])
def test_slurm_without_accounting_is_no_problem_but_told(tools: Callable[..., None], sacct: dict[str, str]) -> None:
    tools(sinfo=SINFO, **sacct)
    found = looking.look_at_slurm()
    assert found["accounting"] == (
        "Slurm accounting storage is disabled" if sacct else "sacct: No such file or directory"
    )
    (sentence,) = advice("slurm", machine(slurm=found))
    assert "without accounting" in sentence


@pytest.mark.parametrize(
    ("sinfo", "words"),
    [
        ("echo sinfo: error: a >&2; echo sinfo: fatal: no configuration source >&2; exit 1", "no configuration source"),
        ("exec /bin/sleep 60", "no answer within 1 s"),
    ],
)
def test_slurm_that_does_not_answer_is_a_problem(
    tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch, sinfo: str, words: str
) -> None:
    monkeypatch.setattr(looking, "SLURM_S", 1.0)
    tools(sinfo=sinfo, sacct="exit 0")
    start = time.monotonic()
    assert words in remedy("slurm", machine(slurm=looking.look_at_slurm()))
    assert time.monotonic() - start < 10


# Tracking


def test_the_default_store_is_in_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = looking.look_at_tracking()
    assert (found["store"], found["error"]) == (without_home(f"sqlite:///{tmp_path}/mlflow.db"), "")
    assert not list(tmp_path.iterdir())


def test_a_server_that_hangs_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pq_sweep.tracking.store.REACH_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # which never answers
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@{address}")
        found = looking.look_at_tracking()
    assert found["store"] == f"http://user:***@{address}"
    sentence = remedy("tracking", machine(tracking=found))
    assert "timed out" in sentence
    assert "tracking=none" in sentence
    assert "s3cret" not in str(found)


def test_sqlite_on_a_network_file_system_is_told() -> None:
    (sentence,) = advice("tracking", machine(tracking={"network": "nfs4"}))
    assert "SQLite on nfs4" in sentence
