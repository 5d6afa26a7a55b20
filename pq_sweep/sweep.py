"""What happens around the jobs: check the grid and announce it, run each job, draw the results at the end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from pq_sweep import results
from pq_sweep.environment import command_line, git_state, without_password
from pq_sweep.fingerprint import fingerprint
from pq_sweep.grid import Grid, compose_grid, compose_job, read_grid
from pq_sweep.imports import quick_imports
from pq_sweep.progress import PROGRESS, is_leaving, write_json
from pq_sweep.results import finished
from pq_sweep.rows import read_json
from pq_sweep.search import check_search
from pq_sweep.tables import show
from pq_sweep.tracking import NoTracking, Tracker
from pq_sweep.types import Stopped, UserError
from pq_sweep.watch import Watch, is_logged, watch

log = logging.getLogger(__name__)


class Sweep(Callback):
    """Hydra callback that refuses an impossible grid before its first job and writes `sweep.json`."""

    folder: Path | None = None
    tracker: Tracker | None = None
    log: Callable[[Path], bool] | None = None  # of who watches, if the store can be used
    announced: list[dict[str, Any]] = []  # noqa: RUF012 (replaced, never changed)
    found: list[str] = []  # noqa: RUF012 (replaced, never changed) what a search came to

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the jobs of a sweep."""
        _or_exit(lambda: self._begin(config, compose_grid(config)))

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the job of a single run (hydra.mode=RUN)."""
        with open_dict(config):
            config.hydra.job.num = 0
        _or_exit(lambda: self._begin(config, [config]))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Forget the config of a job that is over: its launcher keeps what Hydra returns until the sweep ends."""
        job_return.cfg = job_return.hydra_cfg = None

    def _begin(self, config: DictConfig, jobs: Iterable[DictConfig]) -> None:
        register_plugins()
        grid = read_grid(jobs)
        if config.get("search"):  # the grid is of what is searched for, not of jobs
            if config.hydra.mode == RunMode.RUN:
                raise UserError("search chooses the jobs of a sweep; leave out hydra.mode=RUN.")
            check_search(config.search, grid.announced)
            grid = Grid()
        folder = claim_folder(config)
        earlier = read_json(folder / "sweep.json") or {}
        if config.resume:
            grid.refuse_other(folder, earlier.get("jobs") or [])
        if config.hydra.launcher.get("prefetch"):
            grid.prefetch(folder)
        tracker = instantiate(config.tracking)
        manifest = {
            "id": earlier.get("id", uuid.uuid4().hex),
            "created": earlier.get("created", time.time()),
            "started": time.time(),
            "command": command_line(),
            "arguments": [without_password(argument) for argument in sys.argv],
            "working_folder": str(Path.cwd()),
            "tracking": describe_tracking(config.tracking, tracker),
            "git": git_state(),
            "jobs": grid.announced or (earlier.get("jobs") if config.get("search") else None) or [],
        }
        write_json(folder / "sweep.json", manifest)
        Sweep.folder, Sweep.tracker, Sweep.announced = folder, tracker, grid.announced
        Sweep.log = tracker.log if tracker.begin(folder) else None

    @staticmethod
    def announce(config: DictConfig, jobs: list[list[str]], first: int) -> list[dict[str, Any]]:
        """Check and announce more jobs of a sweep that chooses them as it goes; `first` is the first one's number."""
        folder = Path(config.hydra.sweep.dir)
        grid = read_grid(compose_job(config, job, number) for number, job in enumerate(jobs, first))
        manifest = read_json(folder / "sweep.json")
        if config.resume:
            grid.refuse_other(folder, manifest["jobs"])
        if config.hydra.launcher.get("prefetch"):
            grid.prefetch(folder)
        Sweep.announced = [*Sweep.announced[:first], *grid.announced]
        later = manifest["jobs"][len(Sweep.announced) :]  # of an earlier start of this search
        write_json(folder / "sweep.json", manifest | {"jobs": [*Sweep.announced, *later]})
        return grid.announced


def register_plugins() -> None:
    """Make our launchers and sweeper known to Hydra, which does not find those of an editable install by itself."""
    from hydra.core.plugins import Plugins

    from hydra_plugins import pq_sweep_launcher as ours

    for plugin in (ours.CheckedSweeper, ours.SlurmLauncher, ours.LocalLauncher):
        Plugins.instance().register(plugin)


def describe_tracking(config: DictConfig, tracker: Tracker) -> dict[str, Any]:
    """Return where results are logged, for whoever finishes the sweep from elsewhere; passwords are left out."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    store = getattr(tracker, "store", None)
    if not store:
        return values
    return values | {"uri": without_password(store), "from_environment": values.get("uri") is None}


def run_job(cfg: DictConfig) -> None:
    """Run one job in the folder that Hydra gave it and log it.

    A failing job does not raise: Hydra would leave out the batches after it. `error.json` and `job.log` say what went
    wrong, and `finish` makes the exit code of it.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    jobs = (read_json(folder.parent / "sweep.json") or {}).get("jobs", [])
    place = next((number for number, job in enumerate(jobs, 1) if job["folder"] == folder.name), 1)
    label = f"job {place} of {max(len(jobs), 1)}: {jobs[place - 1]['name'] if jobs else folder.name}"
    if not cfg.resume and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        (folder / PROGRESS).unlink(missing_ok=True)
    elif finished(folder, fingerprint(cfg)):
        log.info("%s | reused: finished earlier", label)
        return
    try:
        with quick_imports("torch"):
            from pq_sweep.job import run
        with clean_stop():
            run(cfg, folder, label)
    except (Exception, SystemExit) as error:
        if is_leaving(error):
            raise
        log.error("job %s failed: %s", folder.name, error)
        log.debug("traceback", exc_info=True)
    if not is_logged(folder):
        instantiate(cfg.tracking).log(folder)


@contextmanager
def clean_stop() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a job that is stopped leaves word of it."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the rest is clearing up
        raise Stopped("the job was stopped by SIGTERM, as by scancel or preemption; start the sweep again to continue.")

    if threading.current_thread() is not threading.main_thread():
        yield  # only there can signals be handled
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finish() -> bool:
    """Draw the results of the sweep of this process; say whether every job finished."""
    if Sweep.folder is None or Sweep.tracker is None:
        return True
    return conclude(Watch(Sweep.folder).look(), Sweep.tracker)


def conclude(sweep: results.Sweep, tracker: Tracker) -> bool:
    """Draw results, write the CSV and bring the store up to date; say whether every job finished."""
    show(sweep)
    print(tracker.finish(sweep.folder))
    for line in Sweep.found:
        print(line)
    if sweep.count("pending", "running"):
        print(f"jobs go on; watch them by: python -m pq_sweep.results {sweep.folder} --watch")
    return sweep.count("finished") == len(sweep.rows)


def show_sweep(folder: Path, *, watching: bool) -> bool:
    """Draw a sweep as it stands, or watch it to its end and do what its launcher would have; say if all went well."""
    if watching:
        tracker = tracker_of(folder)
        return conclude(watch(folder, log=tracker.log if tracker.begin(folder) else None), tracker)
    show(Watch(folder, patient=False).look())
    return True


def tracker_of(folder: Path) -> Tracker:
    """Return where a sweep is logged; a password is not kept with it and has to come from the environment."""
    config = (read_json(folder / "sweep.json") or {}).get("tracking")
    if not config:
        return NoTracking()
    if config.pop("from_environment", False) and "MLFLOW_TRACKING_URI" in os.environ:
        config["uri"] = None
    if "***" in str(config.get("uri")):
        config["uri"] = None
        if "MLFLOW_TRACKING_URI" not in os.environ:
            log.warning("the address of the store holds a password; set MLFLOW_TRACKING_URI to log what is missing.")
            return NoTracking()
    tracker: Tracker = instantiate(config)
    return tracker


def start_again(folder: Path) -> int:
    """Start a sweep once more by its own command, in its folder, and return the exit code; what is done stays."""
    manifest = read_json(folder / "sweep.json") or {}
    given = manifest.get("arguments", ())
    arguments = [word for word in given if not word.startswith("hydra.sweep.dir=") and word != "resume=false"]
    if not arguments or any("***" in word for word in arguments):
        raise UserError(
            f"{folder} cannot be started again from here: its command is not known, or held a password; repeat the"
            f" command with hydra.sweep.dir={folder}."
        )
    # Overrides have to stand together, options before or behind them.
    place = next((number for number, word in enumerate(arguments[1:], 1) if "=" in word.lstrip("-")), len(arguments))
    arguments.insert(place, f"hydra.sweep.dir={folder.absolute()}")
    return subprocess.run([sys.executable, *arguments], cwd=manifest["working_folder"], check=False).returncode


def claim_folder(config: DictConfig) -> Path:
    """Make the sweep's folder, for this sweep alone unless the user named one (to run a sweep again in its place).

    Two sweeps that start in the same second would share `multirun/<date>/<time>`: the later one gets a suffix.
    """
    wanted = Path(config.hydra.sweep.dir)
    named = any(override.startswith("hydra.sweep.dir=") for override in config.hydra.overrides.hydra)
    folder, number = wanted, 1
    try:
        wanted.parent.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                folder.mkdir(exist_ok=named)
                break
            except FileExistsError:
                if named:
                    raise
                number += 1
                folder = wanted.with_name(f"{wanted.name}-{number}")
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise UserError(
            f"the output folder {folder} cannot be written ({error.strerror}); set hydra.sweep.dir to one that can."
        ) from error
    if folder != wanted:
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={folder}")  # what the jobs are composed from
        config.hydra.sweep.dir = str(folder)
    return folder


def _or_exit(begin: Any) -> None:
    """Hydra turns errors in callbacks into warnings; a grid that cannot run has to end the program."""
    from pq_sweep.cli import explain

    try:
        begin()
    except Exception as error:
        raise SystemExit(explain(error)) from error
