"""How the jobs of the small sweep ended."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from pq_sweep.core.files import read_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.doctor.children import last_line
from pq_sweep.doctor.gpu_check import NO_TIME, ROOT, Check, Ending, Limit
from pq_sweep.doctor.gpu_check.children import run_python
from pq_sweep.results.rows import Row
from pq_sweep.results.sweeps import read_sweep
from pq_sweep.types import UserError

LEAST_TOP1 = 0.95  # on the digits; the uncompressed network has 98.6 %
STORE = "mlflow.db"


def run_jobs(name: str, overrides: tuple[str, ...], device: str, folder: Path, limit: Limit) -> list[Check]:
    """Start jobs in a working folder of their own and return how each ended."""
    log, jobs = folder / "launch.log", folder / "jobs"
    given = [f"device={device}", f"hydra.sweep.dir={jobs}", *overrides]
    started = time.monotonic()
    # A cache of its own, so that engines are really built, and the user's cache stays as it is.
    cache = {"PQ_SWEEP_CACHE": str(folder.parent / "cache")}
    code = run_python([str(ROOT / "launch.py"), "-m", *given], folder, limit.seconds, log, cache)
    said = last_line(log.read_text(errors="replace"))
    ending = limit.ending if code is None else ("failed", f"ended with exit code {code}: {said}")
    rows = read_sweep(jobs).rows
    if not rows:
        return [Check("sweep", name, *ending, time.monotonic() - started)]
    checks = [check_job(row, jobs / row["job"], device, ending, late=code is None) for row in rows]
    return checks + ([check_store(folder / STORE, len(rows))] if "tracking=mlflow" in overrides else [])


def check_job(row: Row, folder: Path, device: str, ending: Ending, *, late: bool = False) -> Check:
    """Judge a job: it is finished, ran on the device asked for, and the network still knows the digits."""
    verdict, reason = _ending(row, folder, ending, late)
    if verdict == "passed" and not row["device"].startswith(device):
        verdict, reason = "failed", f"it ran on {row['device']} instead of {device}"
    elif verdict == "passed" and row["dataset"] == "digits" and row["accuracy"] < LEAST_TOP1:
        verdict, reason = "failed", f"it knows {row['accuracy']:.1%} of the digits instead of at least {LEAST_TOP1:.0%}"
    seconds = (read_json(JobFolder(folder).result) or {}).get("seconds")
    short = [f"{key.partition('/')[2]} {row[key]:.3g} ms" for key in row if key.startswith("latency_ms/")]
    figures = {key: value for key, value in row.items() if key not in ("job", "name", "status", "stage", "error")}
    return Check("sweep", row["name"], verdict, reason, seconds, ", ".join(short), figures)


def _ending(row: Row, folder: Path, ending: Ending, late: bool) -> Ending:
    """Say how a job ended; it was not tried if this machine lacks what it needs or it did not begin in time."""
    if row["status"] == "finished":
        return "passed", ""
    if error := JobFolder(folder).read_error():
        return ("not tried" if error["type"] == UserError.__name__ else "failed"), error["message"]
    if late and not row["stage"]:
        return "not tried", NO_TIME
    verdict, reason = ending
    return verdict, f"{reason}, at stage {row['stage']}" if row["stage"] else reason


def check_store(path: Path, jobs: int) -> Check:
    """Check that MLflow's store has a finished run for each job, and one for the sweep."""
    try:
        with closing(sqlite3.connect(path)) as store:
            ((runs,),) = store.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
    except sqlite3.Error as error:
        return Check("sweep", "mlflow", "failed", f"the store cannot be read: {error}")
    problem = "" if runs == jobs + 1 else f"the store has {runs} finished runs instead of {jobs + 1}"
    return Check("sweep", "mlflow", "failed" if problem else "passed", problem)
