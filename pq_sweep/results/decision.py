"""Which model to ship: the best one within limits, what it beat and why, and what the limits cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pq_sweep.results.comparison import drop
from pq_sweep.results.rows import Row
from pq_sweep.results.sweeps import Sweep
from pq_sweep.types import UserError

# What can be limited or made small, by name: the column of the rows, and its unit.
FIGURES = {
    "accuracy_drop": ("accuracy_drop_points", "points"),
    "error": ("error_percent", "%"),
    "latency": ("latency_ms/b{batch}", "ms"),
    "size": ("engine_size_mb", "MB"),
    "packed": ("packed_bytes", "bytes"),
    "bops": ("rel_bops", "of FP32"),
    "memory": ("peak_memory_mb", "MB"),
    "energy": ("energy_per_image_j/b{batch}", "J"),
    "prep_time": ("prep_time_s", "s"),
}
MANY = 1e4  # from here on, numbers are written out
# What a job tells about its precision only if it computes in that precision.
OF_DEVICE = ("latency", "memory", "energy")
# The figures of the Pareto front, unless others are asked for.
OBJECTIVES = ["error", "latency", "size"]
# Among jobs that are equally good, those that are better in these figures come first.
TIE_BREAKERS = ("accuracy_drop", "latency", "size")


@dataclass(frozen=True)
class Goal:
    """The figure to make as small as possible at a batch size, and upper limits of others, by names of FIGURES."""

    minimize: str
    limits: dict[str, float]
    batch: int

    def __post_init__(self) -> None:
        for name in (self.minimize, *self.limits):
            if name not in FIGURES:
                raise UserError(f"{name} is no figure to decide by; valid are: {', '.join(FIGURES)}.")

    def column(self, name: str) -> str:
        """Return the column of a figure."""
        return FIGURES[name][0].format(batch=self.batch)

    def value(self, row: Row, name: str) -> float | None:
        """Return a figure of a job, or None if it has none; NaN means that it was not measured.

        A job that simulates its precision has no figures of speed that count.
        """
        if row.get("simulated") and name in OF_DEVICE:
            return None
        value = row.get(self.column(name))
        return None if value is None or math.isnan(value) else value

    def shown(self, name: str, value: float) -> str:
        """Return a value with its unit."""
        return f"{value:{',.0f' if value >= MANY else '.4g'}} {FIGURES[name][1]}"


@dataclass(frozen=True)
class Decision:
    """The job to ship and the next best, if any; and for every other job one line that says why not."""

    goal: Goal
    winner: Row | None
    runner_up: Row | None
    lost: list[tuple[Row, str]]
    # If there is no winner: what each limit would have to be, with all others kept, and the job that it would admit.
    relaxations: list[tuple[str, float, Row]]

    @property
    def doubts(self) -> list[str]:
        """Say what speaks against the winner: an uncertain drop, a rival within the noise, an unsettled latency."""
        return [] if self.winner is None else [*_doubts(self.goal, self.winner, self.runner_up)]


def decide(rows: list[Row], goal: Goal) -> Decision:
    """Choose among the finished jobs that have every figure of the goal."""
    whys = [(row, refusal(row, goal)) for row in rows]
    possible = sorted((row for row, why in whys if not why), key=lambda row: _order(row, goal))
    winner, runner_up = [*possible, None, None][:2]
    lost = [(row, why) for row, why in whys if why]
    lost += [(row, _behind(row, winner, goal)) for row in possible[1:] if winner]
    return Decision(goal, winner, runner_up, lost, [] if winner else relaxations(rows, goal))


def refusal(row: Row, goal: Goal) -> str:
    """Say why a job cannot be the winner, or return ""."""
    if row["status"] != "finished":
        return "was built and not run" if row["status"] == "built" else f"is {row['status']}"
    for name in dict.fromkeys([goal.minimize, *goal.limits]):
        if goal.value(row, name) is None:
            simulated = row.get("simulated") and name in OF_DEVICE
            return f"is a simulation, whose {name} does not count" if simulated else f"has no {goal.column(name)}"
    over = [name for name, limit in goal.limits.items() if _figure(row, goal, name) > limit]
    return "; ".join(
        f"{name} {goal.shown(name, _figure(row, goal, name))} is over {goal.shown(name, goal.limits[name])}"
        for name in over
    )


def _figure(row: Row, goal: Goal, name: str) -> float:
    """Return a figure that the job is known to have."""
    value = goal.value(row, name)
    assert value is not None
    return value


def _order(row: Row, goal: Goal) -> tuple[float | str, ...]:
    """Return what jobs are ordered by: the figure to minimize, then the tie-breakers, then the job's name."""
    figures = [goal.value(row, name) for name in (goal.minimize, *TIE_BREAKERS)]
    return (*(math.inf if figure is None else figure for figure in figures), str(row["job"]))


def _behind(row: Row, winner: Row, goal: Goal) -> str:
    """Say by how much a job that is within all limits is worse."""
    own, best = _figure(row, goal, goal.minimize), _figure(winner, goal, goal.minimize)
    if own == best:
        return f"has the same {goal.minimize}, and is no better otherwise"
    more = f", {own / best:.3g} times as much" if best > 0 else ""
    return f"{goal.minimize} {goal.shown(goal.minimize, own)} is more than {goal.shown(goal.minimize, best)}{more}"


def relaxations(rows: list[Row], goal: Goal) -> list[tuple[str, float, Row]]:
    """Return the value at which each limit, with all others kept, would admit a job, and the job; nearest first."""
    found = []
    for name in goal.limits:
        others = Goal(goal.minimize, {key: value for key, value in goal.limits.items() if key != name}, goal.batch)
        admitted = [row for row in rows if not refusal(row, others) and goal.value(row, name) is not None]
        if admitted:
            best = min(admitted, key=lambda row: (_figure(row, goal, name), _order(row, goal)))
            found.append((name, _figure(best, goal, name), best))
    return sorted(found, key=lambda item: _stretch(goal.limits[item[0]], item[1]))


def _stretch(limit: float, needed: float) -> float:
    """Return by which share of itself a limit has to be raised."""
    return (needed - limit) / abs(limit) if limit else math.inf


def front(rows: list[Row], names: list[str], batch: int) -> list[bool]:
    """Say for each job whether it is on the Pareto front: no other is as good in all figures and better in one.

    A job that lacks one of the figures is not on the front. Equal jobs are on it together.
    """
    import numpy as np

    goal = Goal(names[0], dict.fromkeys(names[1:], math.inf), batch)
    unknown = [math.nan] * len(names)
    points = np.array([unknown if refusal(row, goal) else [_figure(row, goal, name) for name in names] for row in rows])
    return [
        not np.isnan(point).any() and not ((points <= point).all(axis=1) & (points < point).any(axis=1)).any()
        for point in points
    ]


def on_front(sweep: Sweep, objectives: list[str], batch: int) -> set[str]:
    """Return the jobs on the Pareto front; every dataset and every device has a front of its own."""
    return {
        row["job"]
        for rows in by_place(sweep).values()
        for row, chosen in zip(rows, front(rows, objectives, batch), strict=True)
        if chosen
    }


def by_place(sweep: Sweep) -> dict[tuple[str, str], list[Row]]:
    """Return the finished jobs by dataset and device, since only jobs that share both can be compared."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in sweep.rows:
        if row["status"] == "finished":
            groups.setdefault((str(row.get("dataset")), row["device_name"]), []).append(row)
    return groups


def _doubts(goal: Goal, winner: Row, runner_up: Row | None) -> list[str]:
    doubts = [winner["simulated"]] if winner.get("simulated") else []
    limit, lost = goal.limits.get("accuracy_drop"), drop(winner)
    if lost is None:
        doubts.append("what it lost in accuracy is not known")
    elif limit is None and goal.minimize != "accuracy_drop" and lost.interval and lost.interval[0] > 0:
        doubts.append(f"it lost {lost.value:.2f} points of accuracy, for which no limit was given: set one")
    elif limit is not None and lost.interval and lost.interval[1] > limit:
        doubts.append(
            f"the true drop may be up to {lost.interval[1]:.2f} points (95 % interval {lost.interval[0]:.2f} to"
            f" {lost.interval[1]:.2f}), over the limit of {limit:g}: evaluate on more images"
        )
    if runner_up is not None and _overlap(goal, winner, runner_up):
        doubts.append(f"the latency of job {runner_up['job']} is within the noise of the winner's: measure longer")
    if winner.get("unstable"):
        doubts.append(f"its latency is not settled ({winner['unstable']}): measure again, alone on the machine")
    return doubts


def _overlap(goal: Goal, winner: Row, runner_up: Row) -> bool:
    """Say whether latency decides and the intervals of the two latencies overlap."""
    if goal.minimize != "latency":
        return False
    high, low = (row.get(f"latency_ci95_{end}_ms/b{goal.batch}") for row, end in ((winner, "high"), (runner_up, "low")))
    return high is not None and low is not None and high >= low
