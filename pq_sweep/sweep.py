"""What happens around the jobs: check the grid and announce it, run each job, draw the results at the end."""

from __future__ import annotations

import logging
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from pq_sweep.check import problems
from pq_sweep.environment import command_line, git_state, without_password
from pq_sweep.progress import write_json
from pq_sweep.results import GROUPS, job_name, read_json, read_sweep
from pq_sweep.tables import show
from pq_sweep.tracking import Tracker
from pq_sweep.types import UserError

log = logging.getLogger(__name__)


class Sweep(Callback):
    """Hydra callback that refuses an impossible grid before its first job and writes `sweep.json`."""

    folder: Path | None = None
    tracker: Tracker | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the jobs of a sweep."""
        _or_exit(lambda: self._begin(config, compose_grid(config)))

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the job of a single run (hydra.mode=RUN)."""
        with open_dict(config):
            config.hydra.job.num = 0
        _or_exit(lambda: self._begin(config, [config]))

    def _begin(self, config: DictConfig, jobs: list[DictConfig] | None) -> None:
        refuse_impossible(jobs or [])
        announced = [announce(job) for job in jobs or []]
        refuse_shared_folders([job["folder"] for job in announced])
        folder = claim_folder(config)
        shutil.rmtree(folder / "baseline", ignore_errors=True)  # weights or images may have changed since
        earlier = read_json(folder / "sweep.json") or {}
        manifest = {
            "id": earlier.get("id", uuid.uuid4().hex),
            "created": earlier.get("created", time.time()),
            "command": command_line(),
            "git": git_state(),
            "jobs": announced,
        }
        write_json(folder / "sweep.json", manifest)
        Sweep.folder, Sweep.tracker = folder, instantiate(config.tracking)
        Sweep.tracker.begin(folder)


def compose_grid(config: DictConfig) -> list[DictConfig] | None:
    """Compose every job of the grid as Hydra's basic sweeper will, or None under another sweeper."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith("BasicSweeper"):
        return None
    loader = GlobalHydra.instance().config_loader()
    params = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*params, *config.hydra.overrides.task])
    if any(override.key_or_group == "experiment" and override.is_sweep_override() for override in overrides):
        raise UserError(
            "experiment=a,b would run without the grids of both files; start one sweep for each experiment."
        )
    grid = BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]
    return [_compose(loader, config, list(overrides), number) for number, overrides in enumerate(grid)]


def _compose(loader: Any, config: DictConfig, overrides: list[str], number: int) -> DictConfig:
    job: DictConfig = loader.load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.num = number
    return job


def refuse_impossible(jobs: list[DictConfig]) -> None:
    """Raise one UserError that lists everything that is wrong in the grid, each problem once."""
    found: dict[str, list[int]] = {}
    for number, job in enumerate(jobs):
        for problem in problems(OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])):
            found.setdefault(problem, []).append(number)
    if found:
        lines = [
            f"{problem} ({len(numbers)} of {len(jobs)} jobs)" if len(jobs) > 1 else problem
            for problem, numbers in found.items()
        ]
        raise UserError("\n".join(lines))


def refuse_shared_folders(folders: list[str]) -> None:
    """Raise a UserError if two jobs would write into one folder."""
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"hydra.sweep.subdir={twice} is the folder of several jobs; use ${{hydra.job.num}} in it.")


def announce(job: DictConfig) -> dict[str, Any]:
    """Return what is known of a job before it runs."""
    chosen, folder = job.hydra.runtime.choices, str(job.hydra.sweep.subdir)
    if "/" in folder:
        raise UserError(
            f"hydra.sweep.subdir={folder} is nested; job folders lie side by side, such as ${{hydra.job.num}}."
        )
    choices = {group: str(chosen.get(group)) for group in GROUPS}
    choices |= {"amount": OmegaConf.select(job, "pruner.amount"), "device": str(job.device), "seed": job.seed}
    return {
        "folder": folder,
        "name": job_name(choices),
        "choices": choices,
        "overrides": [without_password(override) for override in job.hydra.overrides.task],
    }


def run_job(cfg: DictConfig) -> None:
    """Run one job in the folder that Hydra gave it and log it.

    A failing job does not raise: Hydra would leave out the batches after it. `error.json` and `job.log` say what went
    wrong, and `finish` makes the exit code of it.
    """
    from pq_sweep.job import run

    folder = Path(HydraConfig.get().runtime.output_dir)
    jobs = (read_json(folder.parent / "sweep.json") or {}).get("jobs", [])
    place = next((number for number, job in enumerate(jobs, 1) if job["folder"] == folder.name), 1)
    name = jobs[place - 1]["name"] if jobs else folder.name
    try:
        run(cfg, folder, f"job {place} of {max(len(jobs), 1)}: {name}")
    except Exception as error:
        log.error("job %s failed: %s", folder.name, error)
        log.debug("traceback", exc_info=True)
    instantiate(cfg.tracking).log(folder)


def finish() -> bool:
    """Draw the results of the sweep of this process; say whether every job finished."""
    if Sweep.folder is None or Sweep.tracker is None:
        return True
    sweep = read_sweep(Sweep.folder)
    show(sweep)
    print(Sweep.tracker.finish(Sweep.folder))
    return sweep.count("finished") == len(sweep.rows)


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
