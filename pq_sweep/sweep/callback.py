"""What Hydra tells of a sweep: its grid is checked and announced before the first job, or refused."""

from __future__ import annotations

import logging
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf, open_dict

from pq_sweep.core.environment import command_line, git_state
from pq_sweep.core.files import write_json
from pq_sweep.core.folder import SweepFolder
from pq_sweep.core.groups import FOLDER_OPTIONS, option_of
from pq_sweep.core.sentences import without_password
from pq_sweep.sweep.current import CURRENT, check_folder
from pq_sweep.sweep.explain import explain
from pq_sweep.sweep.grid import Grid, compose_grid, read_grid
from pq_sweep.sweep.quoting import in_quotes
from pq_sweep.sweep.search import check_search
from pq_sweep.tracking.tracker import Tracker
from pq_sweep.types import UserError

log = logging.getLogger(__name__)


class SweepCallback(Callback):
    """Hydra callback that refuses an impossible grid before its first job and writes `sweep.json`."""

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
        register_plugins(config)
        grid = read_grid(jobs)
        if config.get("search"):  # the grid is of what is searched for, not of jobs
            if config.hydra.mode == RunMode.RUN:
                raise UserError("search chooses the jobs of a sweep; leave out hydra.mode=RUN.")
            check_search(config.search, grid.announced)
            grid = Grid(unfollowed=grid.unfollowed)
        folder = SweepFolder(claim_folder(config))
        earlier = folder.read_manifest()
        check_folder(config, grid, folder, earlier.get("jobs") or [])
        CURRENT.unfollowed = bool(grid.unfollowed)
        for sentence in grid.unfollowed:
            log.warning("%s", sentence)
        tracker = instantiate(config.tracking)
        write_json(folder.manifest, manifest_of(config, grid, tracker, earlier))
        CURRENT.begin(folder.path, tracker, grid.announced)


def manifest_of(config: DictConfig, grid: Grid, tracker: Tracker, earlier: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a sweep before its first job; one that is started again keeps its identity."""
    return {
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


def register_plugins(config: DictConfig) -> None:
    """Make the chosen launcher and sweeper known to Hydra, which does not find those of an editable install itself."""
    for target in (config.hydra.launcher._target_, config.hydra.sweeper._target_):
        if target.startswith("hydra_plugins."):
            Plugins.instance().register(get_class(target))


def describe_tracking(config: DictConfig, tracker: Tracker) -> dict[str, Any]:
    """Return where results are logged, for whoever finishes the sweep from elsewhere; passwords are left out."""
    values: Any = OmegaConf.to_container(config, resolve=True)
    store = getattr(tracker, "store", None)
    if not store:
        return values
    return values | {"uri": without_password(store), "from_environment": values.get("uri") is None}


def claim_folder(config: DictConfig) -> Path:
    """Make the sweep's folder, for this sweep alone unless the user named one (to run a sweep again in its place).

    Two sweeps that start in the same second would share `multirun/<date>/<time>`: the later one gets a suffix.
    """
    take_run_folder(config)
    named = any(option_of(word) == "hydra.sweep.dir" for word in config.hydra.overrides.hydra)
    if not config.hydra.sweep.dir:
        raise UserError("hydra.sweep.dir is empty; give the folder that the sweep is to write.")
    wanted = Path(config.hydra.sweep.dir).expanduser()
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
    if str(folder) != config.hydra.sweep.dir:
        _name_folder(config, str(folder))
    return folder


def _name_folder(config: DictConfig, folder: str) -> None:
    """Make a folder that of the sweep, also in what its jobs are composed from."""
    kept = [word for word in config.hydra.overrides.hydra if option_of(word) not in FOLDER_OPTIONS]
    config.hydra.overrides.hydra = [*kept, f"hydra.sweep.dir={in_quotes(folder)}"]
    config.hydra.sweep.dir = folder


def take_run_folder(config: DictConfig) -> None:
    """Take hydra.run.dir as the sweep's folder where the user gave it: a single run is a sweep of one job.

    Raises:
        UserError: If hydra.sweep.dir names another folder.
    """
    options = [option_of(word) for word in config.hydra.overrides.hydra]
    if "hydra.run.dir" not in options:
        return
    run, sweep = str(config.hydra.run.dir), str(config.hydra.sweep.dir)
    if "hydra.sweep.dir" in options and Path(run) != Path(sweep):
        raise UserError(
            f"hydra.run.dir={run} and hydra.sweep.dir={sweep} both name the sweep's folder; leave out one of them."
        )
    config.hydra.run.dir = "${hydra.sweep.dir}/${hydra.sweep.subdir}"  # as it is in conf/config.yaml
    _name_folder(config, run)


def _or_exit(begin: Callable[[], None]) -> None:
    """Hydra turns errors in callbacks into warnings; a grid that cannot run has to end the program."""
    try:
        begin()
    except Exception as error:
        raise SystemExit(explain(error)) from error
