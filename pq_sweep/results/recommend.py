"""The model to ship, among the jobs of one device and data set: in words, as plain values, and as a folder."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.core.files import read_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.results.commands import baselines, command
from pq_sweep.results.comparison import aggregate, drop, payback, reference, speedup
from pq_sweep.results.decision import FIGURES, Decision, Goal
from pq_sweep.results.rows import Row, batch_sizes
from pq_sweep.results.shipping import ship
from pq_sweep.results.sweeps import Sweep
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from rich.console import Console


# What jobs must share to be compared, by option: the column of the rows.
PLACES = {"device": "device_name", "dataset": "dataset"}


def candidates(sweep: Sweep, parts: dict[str, str | None]) -> Sweep:
    """Return the jobs of one device and one dataset, repeated runs as one; `parts` are parts of their names, or None.

    Latencies on two devices do not compare two models, nor do drops in accuracy on two datasets.
    """
    rows = sweep.rows
    for what, part in parts.items():
        rows = _only(rows, what, part)
    return aggregate(replace(sweep, rows=rows))


def places(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Return which device and dataset were asked for."""
    return {what: getattr(arguments, what) for what in PLACES}


def _only(rows: list[Row], what: str, wanted: str | None) -> list[Row]:
    """Return the rows with the one value that is meant, and the rows of jobs that ended before they had a value."""
    column = PLACES[what]
    found = {str(row.get(column)) for row in rows if row["status"] == "finished"}
    if not found:
        raise UserError(nothing_finished(rows))
    meant = {name for name in found if wanted is None or wanted.casefold() in name.casefold()}
    meant = {wanted} if wanted in meant else meant  # not also longer names that contain it
    if len(meant) != 1:
        given = f"--{what} {wanted} is" if wanted else "the jobs are"
        why = f"{given} of {len(meant)} {what}s" if meant else f"{given} of no {what} on which a job finished"
        raise UserError(f"{why}; give --{what} as part of one of: {', '.join(sorted(found))}.")
    return [row for row in rows if row.get(column) in {*meant, None}]


def nothing_finished(rows: list[Row]) -> str:
    """Return the sentence for jobs among which none can be recommended, whatever is asked."""
    built = sum(row["status"] == "built" for row in rows)
    why = f" ({built} of {len(rows)} were only built, for another machine)" if built else ""
    return f"no job has finished{why}, so there is nothing to recommend; see python -m pq_sweep.results."


def batch_size(rows: list[Row], wanted: int | None) -> int:
    """Return the batch size to decide for, by default the smallest that was measured."""
    known = batch_sizes(rows)
    if not known:
        raise UserError(nothing_finished(rows))
    if wanted is not None and wanted not in known:
        raise UserError(f"--batch {wanted} was not measured; valid are: {', '.join(map(str, known))}.")
    return known[0] if wanted is None else wanted


def answer(decision: Decision, sweep: Sweep) -> dict[str, Any]:
    """Return a decision as plain values."""
    goal = decision.goal
    told: dict[str, Any] = {"minimize": goal.minimize, "limits": goal.limits, "batch": goal.batch}
    for place, chosen in (("winner", decision.winner), ("runner_up", decision.runner_up)):
        told[place] = chosen and facts(chosen, sweep, goal)
    told["doubts"] = decision.doubts
    told["others"] = {row["job"]: why for row, why in decision.lost}
    told["relaxations"] = [
        {"limit": name, "needed": needed, "job": row["job"]} for name, needed, row in decision.relaxations
    ]
    return told


def facts(row: Row, sweep: Sweep, goal: Goal) -> dict[str, Any]:
    """Return the figures of a job, and how it compares with the uncompressed model."""
    other = reference(row, sweep)
    faster, lost = speedup(row, other, goal.batch), drop(row)
    return {
        "job": row["job"],
        "name": row["name"],
        "folder": row["folder"],
        "runs": len(row["runs"]),
        **{name: goal.value(row, name) for name in FIGURES},
        "accuracy": row.get("accuracy"),
        "accuracy_drop_ci95": lost and lost.interval,
        "speedup": faster and faster.value,
        "speedup_ci95": faster and faster.interval,
        "payback_images": _finite(payback(row, other, goal.batch)),
        "hardware": row["hardware"],
        "simulated": row.get("simulated", ""),
        "notes": row.get("notes", []),
        "command": command(row),
    }


def _finite(count: float | None) -> float | str | None:
    """Return a count as JSON knows it: infinity becomes "never"."""
    return "never" if count == math.inf else count


def show(decision: Decision, sweep: Sweep, console: Console) -> None:
    """Draw the winner beside the runner-up, then say how sure it is, what else there was, and how to make it again."""
    from rich.table import Table

    told = answer(decision, sweep)
    if decision.winner is None:
        console.print(none_feasible(decision), soft_wrap=True)
    else:
        chosen = [told[place] for place in ("winner", "runner_up") if told[place]]
        table = Table(title=f"{wanted(decision.goal)}: job {told['winner']['job']}, {told['winner']['name']}")
        for heading in ("", *(f"job {one['job']}\n{one['name']}" for one in chosen)):
            table.add_column(heading, overflow="fold")
        for heading, cells in lines(chosen, decision.goal):
            table.add_row(heading, *cells)
        console.print(table)
        for doubt in told["doubts"]:
            console.print(f"not sure: {doubt}", soft_wrap=True, markup=False)
    for row, why in decision.lost:
        console.print(f"job {row['job']} ({row['name']}) {why}", soft_wrap=True, markup=False)
    for line in baselines(sweep):
        console.print(f"for speed-ups, run the uncompressed model too: {line}", soft_wrap=True, markup=False)
    if decision.winner is not None:
        console.print(f"to make it again: {told['winner']['command']}", soft_wrap=True, markup=False)


def export(decision: Decision, sweep: Sweep, target: Path) -> None:
    """Write the winner into a folder to ship."""
    assert decision.winner
    told = facts(decision.winner, sweep, decision.goal) | {"batch": decision.goal.batch}
    folder = JobFolder(Path(told["folder"]))
    told["pruning"] = read_json(folder.pruning)
    card = [(heading, cells[0]) for heading, cells in lines([told], decision.goal)]
    ship(folder, target, told, card, decision.doubts)


def wanted(goal: Goal) -> str:
    """Say in words what the goal is."""
    limits = ", ".join(f"{name} at most {goal.shown(name, limit)}" for name, limit in goal.limits.items())
    return f"least {goal.minimize} at batch {goal.batch}" + (f" with {limits}" if limits else "")


def lines(chosen: list[dict[str, Any]], goal: Goal) -> Iterator[tuple[str, list[str]]]:
    """Yield the lines of the table: a heading, and a cell for each job."""
    yield "accuracy", ["-" if one["accuracy"] is None else f"{one['accuracy']:.2%}" for one in chosen]
    yield (
        "accuracy drop",
        [_estimate(one["accuracy_drop"], one["accuracy_drop_ci95"], " points") for one in chosen],
    )
    for name in ("latency", "size", "packed", "bops", "memory", "energy", "prep_time"):
        if any(one[name] is not None for one in chosen):
            yield name.replace("_", " "), ["-" if one[name] is None else goal.shown(name, one[name]) for one in chosen]
    yield (
        "speed-up",
        [_estimate(one["speedup"], one["speedup_ci95"], "") for one in chosen],
    )
    yield "earned back after", [_images(one["payback_images"]) for one in chosen]


def _estimate(value: float | None, interval: tuple[float, float] | None, unit: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}{unit}" + (" ({:.2f} to {:.2f})".format(*interval) if interval else "")


def _images(count: float | str | None) -> str:
    return f"{count:,.0f} images" if isinstance(count, float) else count or "-"


def none_feasible(decision: Decision) -> str:
    """Say in one sentence that no job is within the limits, and how far each would have to go."""
    goal = decision.goal
    ways = [f"{name} {goal.shown(name, needed)} (job {row['job']})" for name, needed, row in decision.relaxations]
    how = f"it would take {', or '.join(ways)}" if ways else "no single limit would admit one if it were any larger"
    return f"no job has {wanted(goal).removeprefix('least ')}; {how}."


def add_goal(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is wanted."""
    for name, (_, unit) in FIGURES.items():
        end = {"points": "", "of FP32": "", "%": "-percent"}.get(unit, f"-{unit.lower()}")
        metavar = {"of FP32": "SHARE", "%": "PERCENT"}.get(unit, unit.upper())
        flag = f"--max-{name.replace('_', '-')}{end}"
        parser.add_argument(flag, dest=f"max_{name}", type=float, metavar=metavar)
    parser.add_argument("--minimize", default="latency", choices=FIGURES, help="default: latency")
    parser.add_argument("--batch", type=int, help="default: the smallest that was measured")
    parser.add_argument("--device", help="part of a device's name, where jobs ran on several")
    parser.add_argument("--dataset", help="part of a dataset's name, where there are several")


def limits(arguments: argparse.Namespace) -> dict[str, float]:
    """Return the limits that were given, by name of the figure."""
    found = {name: getattr(arguments, f"max_{name}") for name in FIGURES}
    return {name: limit for name, limit in found.items() if limit is not None}
