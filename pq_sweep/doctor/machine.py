"""Look at what a job needs besides accelerators: Python, CPU, disk, SLURM and the tracking store."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

from pq_sweep.core.environment import cache_home, device_name, git_state, slurm, versions
from pq_sweep.core.files import shared_file_system
from pq_sweep.core.hardware import CPU, cpu_flags
from pq_sweep.core.sentences import reason, without_password
from pq_sweep.doctor import Facts
from pq_sweep.doctor.children import first_line, last_line
from pq_sweep.tracking.store import Store

SLURM_S = 8.0  # for an answer of the controller, or of the accounting
CGROUPS = Path("/sys/fs/cgroup")
INSTRUCTION_SETS = {"avx2", "avx512f"}.union(*(found.flags for table in CPU.values() for found in table.values()))


def look_at_python() -> Facts:
    """Look at Python and the packages."""
    git = git_state() or {}
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "executable": without_home(sys.executable),
        "commit": git.get("commit", "")[:12] + (" with changes" if git.get("dirty") else ""),
        "versions": versions(),
        "unmet": list(unmet(requirements(), installed())),
    }


def requirements() -> list[str]:
    """Return what this package requires, or nothing if it runs from its folder without being installed."""
    try:
        return requires("pq-sweep") or []
    except PackageNotFoundError:
        return []


def installed() -> dict[str, str]:
    """Return the versions of all packages by their normalized names."""
    from packaging.utils import canonicalize_name

    first_last = reversed(list(distributions()))  # if a package is found twice, Python imports the first
    return {canonicalize_name(found.name): found.version for found in first_last if found.name}


def unmet(requirements: Iterable[str], installed: dict[str, str]) -> Iterator[str]:
    """Yield each requirement, such as "torch>=2.10", that is not met, with the version that is installed."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for wanted in map(Requirement, requirements):
        found = installed.get(canonicalize_name(wanted.name))
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and (found is None or not wanted.specifier.contains(found, prereleases=True)):
            yield f"{wanted.name}{wanted.specifier} (here: {found or 'none'})"


def look_at_cpu() -> Facts:
    """Look at the CPU and memory, and at how much of the CPU a container or SLURM allows."""
    memory_kib = dict(re.findall(r"^(\w+): +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE))
    membership = Path("/proc/self/cgroup")
    return {
        "name": device_name("cpu"),
        "architecture": platform.machine(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "cgroup_cpus": cgroup_cpus(membership.read_text()) if membership.exists() else None,
        "instruction_sets": sorted(INSTRUCTION_SETS & cpu_flags()),
        "memory_gb": round(int(memory_kib["MemTotal"]) * 1024 / 1e9, 1),
        "memory_free_gb": round(int(memory_kib["MemAvailable"]) * 1024 / 1e9, 1),
    }


def cgroup_cpus(membership: str, root: Path = CGROUPS) -> float | None:
    """Return the CPUs' worth of time that the cgroups in `membership` (/proc/self/cgroup) allow; None is no limit."""
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)  # the second version names no controllers
        base = root / controllers
        group = base / path.lstrip("/")
        if not controllers or "cpu" in controllers.split(","):
            limits += [_cpus(folder) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return min((limit for limit in limits if limit is not None), default=None)


def _cpus(group: Path) -> float | None:
    """Return quota by period of a group; they are in one file, or in two in the first version of cgroups."""
    files = [group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    quota, period, *_ = [*" ".join(file.read_text() for file in files if file.is_file()).split(), "max", "max"]
    return None if quota in ("max", "-1") else round(int(quota) / int(period), 2)


def look_at_disk() -> Facts:
    """Look at the folders that jobs write to."""
    return {"working folder": look_at_folder(Path.cwd()), "cache": look_at_folder(cache_home())}


def look_at_folder(path: Path) -> Facts:
    """Look at a folder or, if it does not exist, at the closest existing one above it."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return {
        "path": without_home(str(path)),
        "free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
        "network": shared_file_system(there.resolve()),
        "error": _lock_error(there),
    }


def _lock_error(folder: Path) -> str:
    """Say why files in a folder cannot be written or locked, as jobs do, or "" if they can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or first_line(error)
    return ""


def look_at_slurm() -> Facts:
    """Ask SLURM's command line tools, if they are here."""
    tools = [tool for tool in ("sbatch", "squeue", "scontrol", "sinfo", "sacct") if shutil.which(tool)]
    if not tools:
        return {"tools": []}
    answers, printed = _ask("sinfo", "--noheader", "--format=%P %a %D nodes %G")
    accounting, complaint = _ask("sacct", "--noheader", "--allocations", "--starttime=now")
    return {
        "tools": tools,
        "version": _ask("sinfo", "--version")[1] if answers else None,
        "error": "" if answers else last_line(printed),
        "partitions": [" ".join(line.split()) for line in printed.splitlines()] if answers else [],
        "accounting": "" if accounting else last_line(complaint),
        "job": slurm(),
    }


def _ask(*command: str) -> tuple[bool, str]:
    """Say whether a command works within seconds, and what it prints or complains about."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {SLURM_S:.0f} s"
    except OSError as error:
        return False, f"{command[0]}: {error.strerror}"
    return done.returncode == 0, (done.stderr.strip() or done.stdout if done.returncode else done.stdout).strip()


def look_at_tracking() -> Facts:
    """Try to reach the store that a sweep would log to."""
    from pq_sweep.tracking.tracker import Mlflow

    store, error = Store(Mlflow(None, "").store), ""
    try:
        store.reach()
    except Exception as problem:
        error = reason(problem)
    return {
        "store": without_home(without_password(store.uri)),
        "from": "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "the working folder",
        "network": shared_file_system(store.file) if store.file else "",
        "error": error,
    }


def without_home(path: str) -> str:
    """Write the user's home folder as ~: its name is nobody's business."""
    return re.sub(rf"(?<!\w){re.escape(str(Path.home()))}(?=/|$)", "~", path) if Path.home() != Path("/") else path
