"""The small sweep: jobs started as a user starts them, in every runtime that this machine has."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pq_sweep.core.files import read_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.doctor.children import last_line
from pq_sweep.doctor.gpu_check import ROOT, Check, Verdict
from pq_sweep.doctor.gpu_check.children import run_python
from pq_sweep.results.rows import Row
from pq_sweep.results.sweeps import read_sweep
from pq_sweep.types import UserError

RUNTIMES = ROOT / "conf" / "runtime"
SHORT = ("measure=quick", "measure.batch_sizes=[1,32]", "tracking=none")
PRECISIONS = {"none": "fp32", "fp16": "fp16", "bf16": "bf16", "int8": "int8"}
# The trained network is there for its accuracy, the large one with random weights for its speed.
DIGITS = ("model=digits_cnn", "dataset=digits")
RESNET50 = ("model=resnet50", "model.weights=null", "dataset=fake", "dataset.images=64")
LEAST_TOP1 = 0.95  # on the digits; the uncompressed network has 98.6 %
STORE = "mlflow.db"
NO_TIME = "no time was left; give a larger --budget-s"
TIME_IS_UP = "not finished when time was up"
START_S = 20.0  # with less time left no further part is started


@dataclass(frozen=True)
class Launch:
    """Jobs that are started together, and the modules that they need beyond those that every job needs."""

    name: str
    runtime: str
    overrides: tuple[str, ...]
    needs: tuple[str, ...] = ()


def launches(device: str) -> Iterator[Launch]:
    """Yield the parts of the sweep by importance: torch, then pruning and tracking with it, then other runtimes."""
    torch = (*DIGITS, "runtime=torch")
    others = sorted({path.stem for path in RUNTIMES.glob("*.yaml")} - {"auto", "torch"})
    yield _of_digits("torch", device)
    yield _of_resnet50("torch", quantizers("torch", device))
    yield Launch("pruned", "torch", (*torch, "pruner=l1_global", "recovery=bn_reestimate,finetune"))
    yield Launch("removed", "torch", (*torch, "pruner=remove", "recovery=finetune"), ("torch_pruning",))
    yield Launch("tracked", "torch", (*torch, "tracking=mlflow", f"tracking.uri=sqlite:///{STORE}"), ("mlflow",))
    able = [runtime for runtime in others if quantizers(runtime, device)]
    yield from (_of_digits(runtime, device) for runtime in able)
    yield from (_of_resnet50(runtime, ["fp16"]) for runtime in able)


def quantizers(runtime: str, device: str) -> list[str]:
    """Name the quantizers whose precision a runtime has on a device."""
    from hydra.utils import get_class
    from omegaconf import OmegaConf

    able: Any = get_class(OmegaConf.load(RUNTIMES / f"{runtime}.yaml")._target_)
    precisions = able.precisions.get(device.partition(":")[0], ())
    return [name for name, precision in PRECISIONS.items() if precision in precisions]


def _of_digits(runtime: str, device: str) -> Launch:
    chosen = ",".join(quantizers(runtime, device))
    return Launch(f"digits_cnn {runtime}", runtime, (*DIGITS, f"runtime={runtime}", f"quantizer={chosen}"))


def _of_resnet50(runtime: str, chosen: list[str]) -> Launch:
    overrides = (*RESNET50, f"runtime={runtime}", f"quantizer={','.join(chosen)}")
    return Launch(f"resnet50 {runtime}", runtime, overrides, ("torchvision",))


def run_sweep(device: str, planned: list[Launch], folder: Path, deadline: float) -> list[Check]:
    """Run the parts of the sweep until `deadline` (s, monotonic); skip a part if a module, the device or time lacks."""
    checks = []
    for launch in planned:
        seconds = deadline - time.monotonic()
        reason = lacking(launch, device)
        if not reason and seconds < START_S:
            reason = NO_TIME
        if reason:
            checks.append(Check("sweep", launch.name, "skipped", reason))
        else:
            checks += run_launch(launch, device, folder.absolute() / launch.name.replace(" ", "-"), seconds)
    return checks


def lacking(launch: Launch, device: str) -> str:
    """Say what a part of the sweep lacks on this machine, or return "" if nothing."""
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    if missing := [module for module in launch.needs if not is_there(module)]:
        return f"{', '.join(missing)} is not installed"
    return why_not(instantiate(OmegaConf.load(RUNTIMES / f"{launch.runtime}.yaml"), _convert_="all"), device)


def why_not(runtime: Any, device: str) -> str:
    """Say what a runtime lacks on this machine, or return "" if nothing."""
    try:
        runtime.require(device)
    except (UserError, ImportError) as error:
        return str(error)
    return ""


def is_there(module: str) -> bool:
    """Say whether a module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False


def run_launch(launch: Launch, device: str, folder: Path, seconds: float) -> list[Check]:
    """Start jobs in a working folder of their own and return how each ended."""
    folder.mkdir()
    log, jobs = folder / "launch.log", folder / "jobs"
    given = [f"device={device}", f"hydra.sweep.dir={jobs}", *SHORT, *launch.overrides]
    started = time.monotonic()
    # A cache of its own, so that engines are really built, and the user's cache stays as it is.
    cache = {"PQ_SWEEP_CACHE": str(folder.parent / "cache")}
    code = run_python([str(ROOT / "launch.py"), "-m", *given], folder, seconds, log, cache)
    said = last_line(log.read_text(errors="replace"))
    ending = TIME_IS_UP if code is None else f"ended with exit code {code}: {said}"
    rows = read_sweep(jobs).rows
    if not rows:
        return [Check("sweep", launch.name, "failed", ending, time.monotonic() - started)]
    checks = [check_job(row, jobs / row["job"], device, ending) for row in rows]
    return checks + ([check_store(folder / STORE, len(rows))] if "mlflow" in launch.needs else [])


def check_job(row: Row, folder: Path, device: str, ending: str) -> Check:
    """Judge a job: it is finished, ran on the device asked for, and the network still knows the digits."""
    verdict, reason = _ending(row, folder, ending)
    if verdict == "passed" and not row["device"].startswith(device):
        verdict, reason = "failed", f"it ran on {row['device']} instead of {device}"
    elif verdict == "passed" and row["dataset"] == "digits" and row["accuracy"] < LEAST_TOP1:
        verdict, reason = "failed", f"it knows {row['accuracy']:.1%} of the digits instead of at least {LEAST_TOP1:.0%}"
    seconds = (read_json(JobFolder(folder).result) or {}).get("seconds")
    short = [f"{key.partition('/')[2]} {row[key]:.3g} ms" for key in row if key.startswith("latency_ms/")]
    figures = {key: value for key, value in row.items() if key not in ("job", "name", "status", "stage", "error")}
    return Check("sweep", row["name"], verdict, reason, seconds, ", ".join(short), figures)


def _ending(row: Row, folder: Path, ending: str) -> tuple[Verdict, str]:
    """Say how a job ended; it counts as skipped if this machine lacks what it needs or it did not begin in time."""
    if row["status"] == "finished":
        return "passed", ""
    if error := JobFolder(folder).read_error():
        return ("skipped" if error["type"] == UserError.__name__ else "failed"), error["message"]
    if ending == TIME_IS_UP and not row["stage"]:
        return "skipped", NO_TIME
    return "failed", f"{ending}, at stage {row['stage']}" if row["stage"] else ending


def check_store(path: Path, jobs: int) -> Check:
    """Check that MLflow's store has a finished run for each job, and one for the sweep."""
    try:
        with closing(sqlite3.connect(path)) as store:
            ((runs,),) = store.execute("SELECT count(*) FROM runs WHERE status = 'FINISHED'")
    except sqlite3.Error as error:
        return Check("sweep", "mlflow", "failed", f"the store cannot be read: {error}")
    problem = "" if runs == jobs + 1 else f"the store has {runs} finished runs instead of {jobs + 1}"
    return Check("sweep", "mlflow", "failed" if problem else "passed", problem)
