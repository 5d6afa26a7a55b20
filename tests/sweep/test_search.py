"""Searching for the largest amount: against every amount, and as a sweep of real jobs."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, launch_in

from pq_sweep.sweep.search import LargestAmount
from pq_sweep.types import UserError


def searched(search: LargestAmount, drops: dict[float, float]) -> tuple[str, list[float]]:
    """Return what a search comes to where each amount loses what `drops` says, and the amounts that it tried."""
    steps, tried = search.steps(), list[float]()
    amount = next(steps)
    while True:
        tried.append(amount)
        try:
            amount = steps.send({"status": "finished", "accuracy_drop_points": drops[amount]})
        except StopIteration as settled:
            return str(settled.value), tried


@pytest.mark.parametrize("first_bad", range(21))
def test_the_largest_amount_within_the_limit_is_found_in_few_steps(first_bad: int) -> None:
    amounts = [round(0.05 * number, 6) for number in range(20)]
    drops = {amount: (0.1 * number if number < first_bad else 5.0 + number) for number, amount in enumerate(amounts)}
    said, tried = searched(LargestAmount(max_drop=2.0, low=0.0, high=0.95, step=0.05), drops)
    expected = bisect_right([drops[amount] for amount in amounts], 2.0) - 1

    assert len(tried) == len(set(tried)) <= math.ceil(math.log2(len(amounts) + 1))
    if expected < 0:
        assert said == "no pruner.amount from 0.0 on loses at most 2.0 points; 0.0 loses 5.00"
    else:
        assert said.startswith(f"pruner.amount={amounts[expected]} is the largest within 2.0 points, losing ")
        assert ("; " in said) == (expected < 19)


def test_a_job_that_fails_ends_the_search() -> None:
    steps = LargestAmount(max_drop=1.0, low=0.0, high=0.8, step=0.1).steps()
    amount = next(steps)
    with pytest.raises(StopIteration) as ended:
        steps.send({"status": "failed"})

    assert ended.value.value == f"the search ended at pruner.amount={amount}, where the job failed"


@pytest.mark.parametrize(("low", "high", "step"), [(0.5, 0.5, 0.1), (-0.1, 0.5, 0.1), (0, 1.0, 0.1), (0, 0.5, 0)])
def test_a_range_that_makes_no_sense_is_refused(low: float, high: float, step: float) -> None:
    with pytest.raises(UserError, match=r"does not fit|do not fit"):
        LargestAmount(1.0, low, high, step)


BAD = {
    "pruner=none": "search=constraint needs a pruner with an amount; give pruner=l1_global or such.",
    "pruner=l1_global pruner.amount=0.5": "pruner.amount is what search=constraint chooses; give search.low and search",
    "pruner=l1_global search.low=2": "search.low=2 and search.high=0.95 do not fit; 0 <= low < high < 1 does.",
    "pruner=l1_global hydra.mode=RUN": "search chooses the jobs of a sweep; leave out hydra.mode=RUN.",
}


@pytest.mark.slow
@pytest.mark.parametrize("given", BAD)
def test_what_cannot_be_searched_is_told_before_the_first_job(given: str, tmp_path: Path) -> None:
    done = launch_in(tmp_path, "search=constraint", *given.split())

    assert done.returncode != 0
    assert done.stderr.strip().startswith(BAD[given])
    assert not (tmp_path / "multirun").exists()


@pytest.mark.slow
def test_a_sweep_searches_for_every_combination_and_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = [
        "search=constraint", "pruner=l1_global,remove", "search.step=0.3", "search.high=0.9", "search.max_drop=10",
        "tracking=none", "runtime=torch", "hydra.sweep.dir=sweep", *SHORT,
    ]  # fmt: skip
    done = launch_in(tmp_path, *arguments)
    folders = sorted(path.parent for path in (tmp_path / "sweep").glob("*/result.json"))
    jobs: list[dict[str, Any]] = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    first = {folder: (folder / "result.json").read_bytes() for folder in folders}
    again = launch_in(tmp_path, *arguments)

    assert done.returncode == 0, done.stderr
    assert [job["choices"]["pruner"] for job in jobs[:3]] == ["none", "l1_global", "remove"]
    assert len(folders) == len(jobs) <= 1 + 2 * 3
    found = [line for line in done.stdout.splitlines() if "is the largest within 10" in line]
    assert [line.partition(":")[0].split()[0] for line in found] == ["pruner=l1_global", "pruner=remove"]
    assert [line for line in again.stdout.splitlines() if "is the largest within 10" in line] == found
    assert {folder: (folder / "result.json").read_bytes() for folder in folders} == first
