"""The sweeper: it hands out jobs that were composed and checked before, or that a search chooses round by round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from pq_sweep.sweep.grid import by_stage
from pq_sweep.sweep.quoting import quoted
from pq_sweep.sweep.search import Rounds


class CheckedSweeper(BasicSweeper):
    """Hydra's basic sweeper for jobs that were all composed and checked before; doing so again would take minutes.

    If a `search` is chosen, the sweeper asks it for the next jobs until there are none.
    """

    rounds: Any = None

    @staticmethod
    def split_arguments(overrides: list[Any], max_batch_size: int | None) -> list[list[list[str]]]:
        """Return the overrides of each job as they were given, in batches; jobs that share a stage are neighbours."""
        given = [override.get_key_element() for override in overrides]
        batches = BasicSweeper.split_arguments(by_stage(overrides), max_batch_size)
        return [[sorted(job, key=lambda word: given.index(word.partition("=")[0])) for job in jobs] for jobs in batches]

    def _parse_config(self) -> list[str]:
        """Return the grid of an experiment's file as overrides that can be read."""
        return [quoted(word) for word in super()._parse_config()]

    def is_done(self) -> bool:
        """Say whether no job is left."""
        assert self.config is not None
        if not self.config.get("search"):
            return bool(super().is_done())
        if self.rounds is None:
            self.rounds = Rounds(self.config, [list(job) for batch in self.overrides or () for job in batch])
        return bool(self.rounds.is_done())

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        """Return the jobs to run next."""
        jobs: Sequence[Sequence[str]] = super().get_job_batch() if self.rounds is None else self.rounds.next()
        return jobs

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Check nothing: `pq_sweep.sweep.grid.read_grid` has done so."""
