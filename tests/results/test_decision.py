"""The decision against brute force over random sweeps, and what is said of those that lost."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest

from pq_sweep.results.decision import FIGURES, Goal, decide, front
from pq_sweep.types import UserError

BATCH = 8
COLUMNS = {name: column.format(batch=BATCH) for name, (column, _) in FIGURES.items()}
Rows = list[dict[str, Any]]


def job(number: int, **figures: float | None) -> dict[str, Any]:
    """Return a finished job with the figures given by name."""
    columns = {COLUMNS[name]: value for name, value in figures.items() if value is not None}
    return {"job": str(number), "status": "finished", **columns}


def random_sweep(seed: int) -> tuple[Rows, Goal]:
    """Return a sweep with ties, failures, absent and undefined figures, and a goal for it."""
    chance = random.Random(seed)
    rows = []
    for number in range(chance.choice([1, 2, 5, 20])):
        row = job(number, **{name: chance.choice([1.0, 2.0, 3.0, chance.uniform(0, 4)]) for name in COLUMNS})
        if chance.random() < 0.2:
            row["status"] = chance.choice(["failed", "running", "missing"])
        if chance.random() < 0.2:
            del row[chance.choice(list(COLUMNS.values()))]
        if chance.random() < 0.1:
            row[chance.choice(list(COLUMNS.values()))] = math.nan
        rows.append(row)
    minimize, *limited = chance.sample(list(COLUMNS), chance.randint(1, 4))
    return rows, Goal(minimize, {name: chance.uniform(0.5, 4) for name in limited}, BATCH)


def feasible(row: dict[str, Any], goal: Goal, limits: dict[str, float]) -> bool:
    values = [row.get(COLUMNS[name], math.nan) for name in (goal.minimize, *goal.limits)]
    within = all(row.get(COLUMNS[name], math.nan) <= limit for name, limit in limits.items())
    return row["status"] == "finished" and not any(map(math.isnan, values)) and within


@pytest.mark.parametrize("seed", range(200))
def test_no_feasible_job_is_better_than_the_winner(seed: int) -> None:
    rows, goal = random_sweep(seed)
    decision = decide(rows, goal)
    possible = [row for row in rows if feasible(row, goal, goal.limits)]
    best = sorted(row[COLUMNS[goal.minimize]] for row in possible)

    assert (decision.winner is None) == (not possible)
    assert (decision.runner_up is None) == (len(possible) < 2)
    for chosen, value in zip((decision.winner, decision.runner_up), best, strict=False):
        assert chosen is not None
        assert chosen in possible
        assert chosen[COLUMNS[goal.minimize]] == value
    # Each job is the winner, or there is a line that says why it is not.
    told = [row["job"] for row, why in decision.lost if why]
    assert sorted([*told, *([decision.winner["job"]] if decision.winner else [])]) == sorted(row["job"] for row in rows)


@pytest.mark.parametrize("seed", range(200))
def test_a_relaxed_limit_admits_its_job_and_nothing_less_does(seed: int) -> None:
    rows, goal = random_sweep(seed)
    decision = decide(rows, goal)
    if decision.winner:
        assert decision.relaxations == []
        return
    found = {name: (limit, row) for name, limit, row in decision.relaxations}
    for name in goal.limits:
        others = {key: value for key, value in goal.limits.items() if key != name}
        needed = [row[COLUMNS[name]] for row in rows if feasible(row, goal, others)]
        assert (name in found) == bool(needed)
        if needed:
            limit, row = found[name]
            assert limit == min(needed) > goal.limits[name]
            assert decide(rows, Goal(goal.minimize, others | {name: limit}, BATCH)).winner is not None
            assert feasible(row, goal, others | {name: limit})
    stretched = [limit / goal.limits[name] for name, limit, _ in decision.relaxations]
    assert stretched == sorted(stretched)


@pytest.mark.parametrize("seed", range(200))
def test_the_front_is_what_nothing_dominates(seed: int) -> None:
    rows, goal = random_sweep(seed)
    names = [goal.minimize, *goal.limits]

    def dominated(row: dict[str, Any]) -> bool:
        for other in rows:
            if not feasible(other, goal, {}):
                continue
            pairs = [(other[COLUMNS[name]], row[COLUMNS[name]]) for name in names]
            if all(its <= own for its, own in pairs) and any(its < own for its, own in pairs):
                return True
        return False

    expected = [feasible(row, goal, {}) and not dominated(row) for row in rows]
    assert front(rows, names, BATCH) == expected


def test_ties_are_broken_by_accuracy_then_latency_then_size_then_name() -> None:
    rows = [
        job(4, memory=1, accuracy_drop=2, latency=1, size=1),
        job(3, memory=1, accuracy_drop=1, latency=2, size=1),
        job(2, memory=1, accuracy_drop=1, latency=1, size=2),
        job(1, memory=1, accuracy_drop=1, latency=1, size=1),
        job(0, memory=1, accuracy_drop=1, latency=1, size=1),
    ]
    goal = Goal("memory", {}, BATCH)
    order = []
    while rows:
        winner = decide(rows, goal).winner
        assert winner
        order.append(int(winner["job"]))
        rows.remove(winner)

    assert order == [0, 1, 2, 3, 4]
    assert all(one < other for one, other in pairwise(order))


def test_those_that_lost_are_told_why() -> None:
    rows = [
        job(0, latency=1, accuracy_drop=3, size=30),
        job(1, latency=2, accuracy_drop=0.5, size=10),
        job(2, latency=5, accuracy_drop=0.2, size=10),
        job(3, accuracy_drop=0.2, size=10),
        job(4) | {"status": "failed"},
    ]
    decision = decide(rows, Goal("latency", {"accuracy_drop": 1, "size": 20}, BATCH))

    assert decision.winner
    assert decision.winner["job"] == "1"
    assert {row["job"]: why for row, why in decision.lost} == {
        "0": "accuracy_drop 3 points is over 1 points; size 30 MB is over 20 MB",
        "2": "latency 5 ms is more than 2 ms, 2.5 times as much",
        "3": "has no latency_ms/b8",
        "4": "is failed",
    }


def test_without_a_winner_it_says_what_each_limit_would_have_to_be() -> None:
    rows = [job(0, latency=1, accuracy_drop=3, size=10), job(1, latency=2, accuracy_drop=0.5, size=22)]
    decision = decide(rows, Goal("latency", {"accuracy_drop": 1, "size": 20}, BATCH))

    assert decision.winner is None
    assert [(name, limit, row["job"]) for name, limit, row in decision.relaxations] == [
        ("size", 22, "1"),
        ("accuracy_drop", 3, "0"),
    ]


def test_doubts_are_a_wide_interval_a_close_rival_and_an_unsettled_latency() -> None:
    winner = job(0, latency=1, accuracy_drop=0.5) | {
        "accuracy_drop_ci95_low_points": -0.3,
        "accuracy_drop_ci95_high_points": 1.4,
        "latency_ci95_high_ms/b8": 1.2,
        "unstable": "b8 drift",
    }
    rival = job(1, latency=1.1, accuracy_drop=0.5) | {"latency_ci95_low_ms/b8": 1.15}
    decision = decide([winner, rival], Goal("latency", {"accuracy_drop": 1}, BATCH))

    assert [doubt.partition(":")[0] for doubt in decision.doubts] == [
        "the true drop may be up to 1.40 points (95 % interval -0.30 to 1.40), over the limit of 1",
        "the latency of job 1 is within the noise of the winner's",
        "its latency is not settled (b8 drift)",
    ]
    settled = winner | {"unstable": "", "latency_ci95_high_ms/b8": 1.05, "accuracy_drop_ci95_high_points": 0.9}
    assert decide([settled, rival], Goal("latency", {"accuracy_drop": 1}, BATCH)).doubts == []


@pytest.mark.parametrize(("minimize", "limits"), [("speed", {}), ("latency", {"colour": 1.0})])
def test_an_unknown_figure_is_refused(minimize: str, limits: dict[str, float]) -> None:
    with pytest.raises(UserError, match="is no figure to decide by; valid are: accuracy_drop, error, latency, size, "):
        Goal(minimize, limits, BATCH)
