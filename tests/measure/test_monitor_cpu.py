"""What is seen of a CPU: folders play the one of RAPL, all else is real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pq_sweep.measure.monitor import Monitor, cpu
from pq_sweep.measure.monitor.nvml import Absent


@pytest.fixture
def powercap() -> Iterator[Path]:
    """Two packages of a machine that has RAPL, in a folder that any user may enter."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        for domain, name in (("0", "package-0"), ("1", "package-1"), ("0:0", "core"), ("0:1", "dram"), ("2", "psys")):
            path = Path(folder, f"intel-rapl:{domain}")
            path.mkdir()
            (path / "name").write_text(f"{name}\n")
            (path / "max_energy_range_uj").write_text("262143328850\n")
            (path / "energy_uj").write_text("1000000\n")
        (Path(folder) / "intel-rapl").mkdir()
        yield Path(folder)


def use(powercap: Path, domain: str, energy_uj: int) -> None:
    (powercap / f"intel-rapl:{domain}" / "energy_uj").write_text(f"{energy_uj}\n")


def test_energy_of_a_cpu_is_that_of_its_packages(powercap: Path) -> None:
    with Monitor("cpu", powercap=powercap) as watched:
        for domain, energy_uj in (("0", 31_000_000), ("1", 13_500_000), ("0:0", 9e9), ("0:1", 9e9), ("2", 9e9)):
            use(powercap, domain, int(energy_uj))
    assert watched.result["energy_j"] == 42.5
    assert watched.result["verdicts"] == []
    assert watched.result["device"] == "cpu"
    json.dumps(watched.result, allow_nan=False)


def test_the_energy_counter_of_a_cpu_may_wrap(powercap: Path) -> None:
    use(powercap, "0", 262_143_000_000)
    with Monitor("cpu", powercap=powercap) as watched:
        use(powercap, "0", 671_150)
    assert watched.result["energy_j"] == pytest.approx(1.0)


def test_a_counter_that_may_have_wrapped_twice_is_not_told() -> None:
    before, after = {"package": (0, 65_532_610_987)}, {"package": (5_000_000, 65_532_610_987)}
    assert cpu.joules(before, after, 100) == 5
    with pytest.raises(Absent, match="in 120 s the counter may have wrapped more than once"):
        cpu.joules(before, after, 120)


def test_packages_that_change_are_not_told(powercap: Path) -> None:
    with Monitor("cpu", powercap=powercap) as watched:
        (powercap / "intel-rapl:1" / "name").write_text("psys")
    assert "changed meanwhile" in watched.result["unavailable"]["energy_j"]


def test_a_cpu_without_rapl_says_so(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with Monitor("cpu", powercap=folder) as watched:
            pass
        assert watched.result["unavailable"]["energy_j"].startswith(f"{folder} has no CPU package")
        assert "energy_j" not in watched.result


@contextmanager
def other_user() -> Iterator[None]:
    """Act as a user without rights, if this one is root."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_counter_for_root_alone_says_so(powercap: Path) -> None:
    for path in powercap.glob("*/energy_uj"):
        path.chmod(0o400 if os.geteuid() == 0 else 0)
    with other_user(), Monitor("cpu", powercap=powercap) as watched:
        pass
    reason = watched.result["unavailable"]["energy_j"]
    assert "Permission denied" in reason
    assert "CVE-2020-8694" in reason


def test_a_counter_that_makes_no_sense_says_so(powercap: Path) -> None:
    (powercap / "intel-rapl:0" / "energy_uj").write_text("")
    with Monitor("cpu", powercap=powercap) as watched:
        pass
    assert "invalid literal" in watched.result["unavailable"]["energy_j"]


def test_clocks_are_those_of_the_cores_that_may_be_used(tmp_path: Path) -> None:
    for core, khz in ((0, 3_600_000), (1, 800_000), (2, 2_000_000)):
        (tmp_path / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "cpufreq" / "scaling_cur_freq").write_text(f"{khz}\n")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("".join(f"processor\t: {n}\nmodel name\t: A\ncpu MHz\t\t: {n}500.25\n\n" for n in (1, 2, 12)))
    assert cpu.core_mhz({0, 2}, tmp_path, cpuinfo) == [3600, 2000]
    assert cpu.core_mhz({2, 12}, tmp_path / "nowhere", cpuinfo) == [2500.25, 12500.25]
    assert cpu.core_mhz({2, 12}, tmp_path, cpuinfo) == [2500.25, 12500.25]  # cpufreq does not know all of them
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    assert cpu.core_mhz({0}, tmp_path / "nowhere", cpuinfo) == []
    assert cpu.core_mhz({0}, tmp_path / "nowhere", tmp_path / "nowhere") == []


def test_clocks_are_looked_at_before_and_after(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([[3000.0, 1000.0], [3500.0, 3200.0]])
    monkeypatch.setattr(cpu, "core_mhz", lambda _: next(looks))
    with Monitor("cpu", powercap=powercap) as watched:
        pass
    assert watched.result["cpu_mhz"] == {"min": 1000, "median": 3100, "max": 3500}


def test_a_cpu_that_does_not_tell_its_clock_says_so(powercap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "core_mhz", lambda _: [])
    with Monitor("cpu", powercap=powercap) as watched:
        pass
    assert set(watched.result["unavailable"]) == {"cpu_mhz"}


def test_who_must_share_a_core_is_interrupted() -> None:
    """Another process that never waits runs on the same core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=-1) as other:
            assert other.stdout
            other.stdout.readline()
            with Monitor("cpu") as watched:
                end = time.process_time() + 0.3
                while time.process_time() < end:
                    pass
            other.kill()
    finally:
        os.sched_setaffinity(0, cores)
    assert watched.result["involuntary_switches"] > 3


def test_watching_a_cpu_starts_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with Monitor("cpu") as watched:
        pass
    assert watched.result["seconds"] < 60
