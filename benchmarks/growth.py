"""What does a job more cost? `python -m benchmarks.growth` prints a table of sweeps of 10, 100 and 1,000 jobs.

Each is a `python launch.py -m` of its own in an empty folder: the embedded network pruned by as many different amounts,
measured as shortly as can be, MLflow on SQLite beside it. Seconds per job are those from the first result to the last,
of the clock and of the process's CPU; what comes before is the start, what comes after the end. Memory is what is
resident. MLflow's milliseconds are of logging the finished jobs into an empty store, one after another, the first one
apart. `results` is the command as a whole, and the table alone.

Per job it should be the same within 10 % from 100 jobs to 1,000, with less than 50 MB more, and the table of 1,000 jobs
in less than a second.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pq_sweep.results import read_sweep
from pq_sweep.runs import BEGUN
from pq_sweep.tables import tables
from pq_sweep.tracking import Mlflow

LAUNCH = Path(__file__).resolve().parent.parent / "launch.py"
SHORT = [
    "runtime=torch",
    "measure.batch_sizes=[1]",
    "measure.threads=1",
    "measure.iterations=5",
    "measure.warmup_s=0",
    "measure.min_s=0",
    "measure.max_s=0",
]
SETTLED = 10  # jobs after which everything is imported that jobs import
WIDTH = 200


@dataclass(frozen=True)
class Ran:
    """A sweep that ran: seconds of its parts, seconds of the CPU per job, and MB resident after jobs and at the end."""

    start_s: float
    job_s: float
    end_s: float
    cpu_s: float
    settled_mb: float
    last_mb: float
    end_mb: float


def main() -> None:
    """Run a sweep of each size and print what a job of it took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth", description=main.__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    rows = []
    for jobs in arguments.jobs:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), jobs))
    print(tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True))


def measure(folder: Path, jobs: int) -> dict[str, str]:
    """Run a sweep and return a row of the table."""
    ran, sweep = run(folder, jobs), folder / "sweep"
    command = seconds(lambda: subprocess.run([sys.executable, "-m", "pq_sweep.results", sweep], stdout=-3, check=True))
    drawn = statistics.median(seconds(lambda: tables(read_sweep(sweep), WIDTH)) for _ in range(5))
    more = ran.last_mb - ran.settled_mb
    return {
        "jobs": f"{jobs:,}",
        "start s": f"{ran.start_s:.1f}",
        "s/job": f"{ran.job_s:.3f}",
        "CPU s/job": f"{ran.cpu_s:.3f}",
        "end s": f"{ran.end_s:.1f}",
        f"MB after job {SETTLED}": f"{ran.settled_mb:.0f}",
        "after the last": f"{ran.last_mb:.0f}",
        "at the end": f"{ran.end_mb:.0f}",
        "more kB/job": f"{more * 1e3 / (jobs - SETTLED):.0f}" if jobs > SETTLED else "-",
        "MLflow ms/job": f"{1e3 * logged_s(sweep, folder):.0f}",
        "results s": f"{command:.1f}",
        "its table s": f"{drawn:.2f}",
    }


def run(folder: Path, jobs: int) -> Ran:
    """Run a sweep of some jobs and watch its process."""
    amounts = ",".join(f"{(number + 1) / (jobs + 1):.6f}" for number in range(jobs))
    chosen = ["pruner=l1_global", f"pruner.amount={amounts}", "hydra.sweep.dir=sweep", *SHORT]
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    env["PQ_SWEEP_CACHE"] = str(folder / "cache")
    began, before = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, LAUNCH, "-m", *chosen], cwd=folder, env=env, stdout=log, stderr=log)
        sizes = watched(process, [result(folder, min(SETTLED, jobs)), result(folder, jobs)])
    ended, after = time.time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != 0:
        sys.exit((folder / "log").read_text()[-5000:])
    first, last = (result(folder, number).stat().st_mtime for number in (1, jobs))
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ran(first - began, (last - first) / max(1, jobs - 1), ended - last, cpu_s / jobs, *sizes)


def result(folder: Path, number: int) -> Path:
    """Return what a job leaves when it is finished; the first one has number 1."""
    return folder / "sweep" / str(number - 1) / "result.json"


def watched(process: subprocess.Popen[Any], files: list[Path]) -> list[float]:
    """Wait for a process to end, and return its MB when each of the files was there, and at the end."""
    sizes: list[float] = []
    size = 0.0
    while process.poll() is None:
        size = resident_mb(process.pid) or size
        if len(sizes) < len(files) and files[len(sizes)].exists():
            sizes.append(size)
        time.sleep(0.1)
    return [*sizes, *[size] * (len(files) - len(sizes)), size]


def resident_mb(pid: int) -> float:
    """Return the MB of a process that are in memory, or 0 if it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def logged_s(sweep: Path, folder: Path) -> float:
    """Log the jobs of a sweep into an empty store and return the median seconds of all but the first."""
    shutil.rmtree(sweep / BEGUN)  # as before the sweep
    tracker = Mlflow(f"sqlite:///{folder}/empty.db", "growth")
    tracker.begin(sweep)
    jobs = [sweep / row["job"] for row in read_sweep(sweep).rows]
    return statistics.median([seconds(lambda job=job: tracker.log(job)) for job in jobs][1:])


def seconds(step: Callable[[], object]) -> float:
    """Return what a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
