"""Sweeps that choose their next jobs by what the last ones found: `python launch.py search=constraint ...`.

This bisects without a library: hydra-optuna-sweeper needs an Optuna from before SQLAlchemy 2, which MLflow uses, and a
sampler that does not know that the drop grows with the amount would take more jobs than halving.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from pq_sweep.core.groups import COMPRESSING, group_of, option_of
from pq_sweep.results.rows import Row
from pq_sweep.results.sweeps import read_job
from pq_sweep.sweep.current import CURRENT
from pq_sweep.types import UserError

PARAMETER = "pruner.amount"

# Yields an amount to try, takes the row of that job, and in the end returns a sentence that says what was found.
Steps = Generator[float, Row, str]


@dataclass(frozen=True)
class LargestAmount:
    """Find the largest amount among low, low + step, ... high that loses at most `max_drop` points of accuracy.

    The drop is assumed to grow with the amount. Where it does not, the amount that is found is within the limit and
    the next larger one is not.
    """

    max_drop: float
    low: float
    high: float
    step: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"search.{name}={value} is no number; give one such as 0.5.")
        if self.max_drop < 0:
            raise UserError(f"search.max_drop={self.max_drop} is out of range; give the points that may be lost.")
        if not 0 <= self.low < self.high < 1:
            raise UserError(f"search.low={self.low} and search.high={self.high} do not fit; 0 <= low < high < 1 does.")
        if not 0 < self.step <= self.high - self.low:
            raise UserError(f"search.step={self.step} does not fit between low and high; give 0.01 or such.")

    def steps(self) -> Steps:
        """Halve the range that is left until an amount within the limit is next to one beyond it."""
        amounts = [
            round(self.low + k * self.step, 6) for k in range(int((self.high - self.low) / self.step + 1e-9) + 1)
        ]
        good, bad, drops = -1, len(amounts), dict[int, float]()
        while bad - good > 1:
            middle = (good + bad) // 2
            row = yield amounts[middle]
            if row["status"] != "finished":
                how = "was only built" if row["status"] == "built" else row["status"]
                return f"the search ended at {PARAMETER}={amounts[middle]}, where the job {how}"
            drops[middle] = row["accuracy_drop_points"]
            good, bad = (middle, bad) if drops[middle] <= self.max_drop else (good, middle)
        worse = f"; {amounts[bad]} loses {drops[bad]:.2f}" if bad in drops else ""
        if good < 0:
            return f"no {PARAMETER} from {self.low} on loses at most {self.max_drop} points{worse}"
        return (
            f"{PARAMETER}={amounts[good]} is the largest within {self.max_drop} points, losing {drops[good]:.2f}{worse}"
        )


def check_search(search: DictConfig, combinations: list[dict[str, Any]]) -> None:
    """Raise a UserError if a combination, as announced, has no amount to search for, or a given one."""
    instantiate(search)
    for combination in combinations:
        if any(option_of(word) == PARAMETER for word in combination["overrides"]):
            raise UserError(f"{PARAMETER} is what search=constraint chooses; give search.low and search.high.")
        if combination["choices"]["pruner"] == "none" or combination["choices"]["amount"] is None:
            raise UserError("search=constraint needs a pruner with an amount; give pruner=l1_global or such.")


class Rounds:
    """The jobs of a search, round by round: one for each combination that is not settled yet."""

    def __init__(self, config: DictConfig, combinations: list[list[str]]) -> None:
        self.config, self.combinations = config, combinations
        search: LargestAmount = instantiate(config.search)
        self.steps = [search.steps() for _ in combinations]
        self.asked = {number: next(steps) for number, steps in enumerate(self.steps)}
        self.found: dict[int, str] = {}
        self.folders: dict[int, Path] = {}
        self.started = 0

    def is_done(self) -> bool:
        """Take in what the last round found, and say whether nothing is left to try."""
        for number, folder in self.folders.items():
            try:
                self.asked[number] = self.steps[number].send(read_job(folder))
            except StopIteration as settled:
                del self.asked[number]
                words = (word for word in self.combinations[number] if not word.startswith("search"))
                self.found[number] = f"{' '.join(words)}: {settled.value}"
        self.folders = {}
        CURRENT.found = [self.found[number] for number in sorted(self.found)]
        return not self.asked

    def next(self) -> list[list[str]]:
        """Announce and return the jobs of the next round; the uncompressed models run before all others."""
        first = [] if self.started else list(self._uncompressed())
        jobs = [[*self.combinations[number], f"{PARAMETER}={amount}"] for number, amount in self.asked.items()]
        announced = CURRENT.announce(self.config, [*first, *jobs], self.started)
        names = [Path(self.config.hydra.sweep.dir) / job["folder"] for job in announced[len(first) :]]
        self.folders = dict(zip(self.asked, names, strict=True))
        self.started += len(first) + len(jobs)
        return [*first, *jobs]

    def _uncompressed(self) -> Iterator[list[str]]:
        """Yield the jobs whose speed all others are compared with."""
        kept = (tuple(word for word in words if group_of(word) not in COMPRESSING) for words in self.combinations)
        for words in dict.fromkeys(kept):
            yield [*words, *(f"{group}=none" for group in COMPRESSING)]
