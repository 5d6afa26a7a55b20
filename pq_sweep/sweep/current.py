"""The sweep of this process: what its callback began, for the launcher, the search and the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from pq_sweep.core.files import write_json
from pq_sweep.core.folder import SweepFolder
from pq_sweep.results.conclude import conclude
from pq_sweep.results.standing import Watch
from pq_sweep.sweep.grid import Grid, compose_job, read_grid
from pq_sweep.sweep.prefetch import prefetch
from pq_sweep.tracking.tracker import Tracker


@dataclass
class Current:
    """One sweep, from its announcement to its end; without a folder, no sweep has begun.

    `log` logs a job, if the store can be used. `announced` are the jobs that are known so far; `found` has a sentence
    for each result of a search; `unfollowed` says whether code of theirs may change without being noticed.
    """

    folder: Path | None = None
    tracker: Tracker | None = None
    log: Callable[[Path], bool] | None = None
    announced: list[dict[str, Any]] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    unfollowed: bool = False

    def begin(self, folder: Path, tracker: Tracker, announced: list[dict[str, Any]]) -> None:
        """Take up a sweep whose `sweep.json` is written."""
        self.folder, self.tracker, self.announced = folder, tracker, announced
        self.log = tracker.log if tracker.begin(folder) else None

    def announce(self, config: DictConfig, jobs: list[list[str]], first: int) -> list[dict[str, Any]]:
        """Check and announce more jobs of a sweep that chooses them as it goes; `first` is the first one's number."""
        folder = SweepFolder(Path(config.hydra.sweep.dir))
        grid = read_grid(compose_job(config, job, number) for number, job in enumerate(jobs, first))
        manifest = folder.read_manifest()
        check_folder(config, grid, folder, manifest["jobs"])
        self.announced = [*self.announced[:first], *grid.announced]
        later = manifest["jobs"][len(self.announced) :]  # of an earlier start of this search
        write_json(folder.manifest, manifest | {"jobs": [*self.announced, *later]})
        return grid.announced

    def finish(self) -> bool:
        """Draw the results; say whether every job finished."""
        if self.folder is None or self.tracker is None:
            return True
        return conclude(Watch(self.folder).look(), self.tracker.finish, self.found)


def check_folder(config: DictConfig, grid: Grid, folder: SweepFolder, earlier: list[dict[str, Any]]) -> None:
    """Refuse a grid whose jobs would replace others in the folder, or cannot load what they need."""
    if config.resume:
        grid.refuse_other(folder, earlier)
    if config.hydra.launcher.get("prefetch"):
        prefetch(grid, folder)


# Hydra makes callback, sweeper and launcher by themselves, so they meet here.
CURRENT = Current()
