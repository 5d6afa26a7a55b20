"""What does one more job cost? `python -m benchmarks.growth` prints a table of sweeps of 10, 100 and 1,000 jobs.

Each sweep is a `python launch.py -m` of its own in an empty folder. It prunes the embedded network by as many different
amounts as it has jobs, measures as briefly as possible, and logs to MLflow on SQLite. Seconds per job, by the clock and
of the CPU, are those from the first result to the last. The start is the time before, which includes composing all
jobs, and the end the time after. MB are what the process has in memory. MLflow's milliseconds are for logging the
finished jobs into an empty store, one by one, without the first, which opens the store. `results` is the time of the
whole command, and that of its table alone.

From 100 jobs to 1,000, the cost per job should stay the same within 10 %, memory should grow by less than 50 MB, and
the table of 1,000 jobs should take less than a second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tabulate import tabulate

from pq_sweep.core.folder import SweepFolder
from pq_sweep.results.sweeps import read_sweep
from pq_sweep.results.terminal import tables
from pq_sweep.tracking.tracker import Mlflow

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
SETTLED = 10  # after this many jobs, everything that jobs import has been imported
WIDTH = 200


@dataclass(frozen=True)
class Seen:
    """A process at some moment: the time, the CPU seconds that it took until then, and its memory."""

    time_s: float
    cpu_s: float
    mb: float


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
    start_s, (first, settled, last, end) = run(folder, jobs)
    sweep, more = folder / "sweep", max(1, jobs - 1)
    command = [sys.executable, "-m", "pq_sweep.results", str(sweep)]
    return {
        "jobs": f"{jobs:,}",
        "start s": f"{start_s:.1f}",
        "s/job": f"{(last.time_s - first.time_s) / more:.3f}",
        "CPU s/job": f"{(last.cpu_s - first.cpu_s) / more:.3f}",
        "end s": f"{end.time_s - last.time_s:.1f}",
        f"MB after job {min(SETTLED, jobs)}": f"{settled.mb:.0f}",
        "after the last": f"{last.mb:.0f}",
        "kB/job between": f"{(last.mb - settled.mb) * 1e3 / (jobs - SETTLED):.0f}" if jobs > SETTLED else "-",
        "MB at the end": f"{end.mb:.0f}",
        "MLflow ms/job": f"{1e3 * logged_s(sweep, folder):.0f}",
        "results s": f"{seconds(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)):.1f}",
        "its table s": f"{statistics.median(seconds(lambda: tables(read_sweep(sweep), WIDTH)) for _ in range(5)):.2f}",
    }


def run(folder: Path, jobs: int) -> tuple[float, list[Seen]]:
    """Run a sweep; return the seconds to its first result, and its state then, at the tenth, the last and its end."""
    amounts = ",".join(f"{(number + 1) / (jobs + 1):.6f}" for number in range(jobs))
    chosen = ["pruner=l1_global", f"pruner.amount={amounts}", "hydra.sweep.dir=sweep", *SHORT]
    env = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    env["PQ_SWEEP_CACHE"] = str(folder / "cache")
    results = [folder / "sweep" / str(number - 1) / "result.json" for number in (1, min(SETTLED, jobs), jobs)]
    began = time.monotonic()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, LAUNCH, "-m", *chosen], cwd=folder, env=env, stdout=log, stderr=log)
        seen = watched(process, results)
    if process.returncode != 0:
        sys.exit((folder / "log").read_text()[-5000:])
    return seen[0].time_s - began, seen


def watched(process: subprocess.Popen[bytes], files: list[Path]) -> list[Seen]:
    """Wait for a process to end; return its state when each of the files appeared, and at its end."""
    seen: list[Seen] = []
    now = look(process.pid)
    while process.poll() is None:
        now = look(process.pid) or now
        while now and len(seen) < len(files) and files[len(seen)].exists():
            seen.append(now)
        time.sleep(0.05)
    return [*seen, *[now] * (len(files) + 1 - len(seen))] if now else []


def look(pid: int) -> Seen | None:
    """Look at a process, or return None if it has ended."""
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    user, system, pages = (int(numbers[place]) for place in (11, 12, 21))
    if pages == 0:
        return None
    return Seen(time.monotonic(), (user + system) / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


def logged_s(sweep: Path, folder: Path) -> float:
    """Log the jobs of a sweep into an empty store and return the median seconds of all but the first."""
    shutil.rmtree(SweepFolder(sweep).begun)  # as before the sweep
    tracker = Mlflow(f"sqlite:///{folder}/empty.db", "growth")
    tracker.begin(sweep)
    jobs = [sweep / row["job"] for row in read_sweep(sweep).rows]
    return statistics.median([seconds(partial(tracker.log, job)) for job in jobs][1:])


def seconds(step: Callable[[], object]) -> float:
    """Return what a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
