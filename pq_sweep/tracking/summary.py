"""What MLflow's page of a sweep shows: a table, the Pareto figure, the best figures, and which job to ship."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
import vl_convert

from pq_sweep.results.comparison import aggregate
from pq_sweep.results.decision import OBJECTIVES
from pq_sweep.results.report.charts import figures
from pq_sweep.results.report.files import SCALE, on_paper
from pq_sweep.results.report.frame import DETAILS
from pq_sweep.results.report.page import Report, report
from pq_sweep.results.rows import Row, batch_sizes
from pq_sweep.results.sweeps import Sweep

# MLflow keeps a note as a tag, whose length it limits.
LONGEST_NOTE = 4000


@dataclass(frozen=True)
class Summary:
    """`table` has columns and data as MLflow's tables, `figures` are PNG by file name, `note` is Markdown."""

    table: dict[str, Any]
    metrics: dict[str, float]
    figures: dict[str, bytes]
    note: str


def summary(sweep: Sweep) -> Summary:
    """Sum up the finished jobs of a sweep, of which there is at least one."""
    whole = report(aggregate(sweep), "latency", {}, None, OBJECTIVES)
    frame = whole.frame()
    shown = frame.astype(object).where(frame.notna(), None)
    table = {"columns": list(shown.columns), "data": shown.values.tolist()}
    return Summary(table, dict(_best(whole.sweep.rows)), dict(_pareto(whole)), _note(whole, frame))


def _best(rows: list[Row]) -> Iterator[tuple[str, float]]:
    """Yield the best value that any job has of the figures that matter."""
    wanted = {"accuracy": max, "accuracy_drop_points": min, "engine_size_mb": min}
    wanted |= {f"latency_ms/b{size}": min for size in batch_sizes(rows)}
    for column, best in wanted.items():
        timed = column.startswith("latency_ms/")
        values = [row[column] for row in rows if column in row and not (timed and row.get("simulated"))]
        if values:
            yield f"best/{column}", float(best(values))


def _pareto(whole: Report) -> Iterator[tuple[str, bytes]]:
    for number, view in enumerate(whole.views()):
        for figure in figures(view, only="pareto"):
            yield f"pareto{number or ''}.png", vl_convert.vegalite_to_png(on_paper(figure.spec), scale=SCALE)


def _note(whole: Report, frame: pd.DataFrame) -> str:
    """Return the recommendation of each device, and the table as far as there is room."""
    text = "\n\n".join(_recommended(one) for one in whole.recommendations())
    names = [name for name in frame.columns if name not in DETAILS and not name.startswith("p99 ")]
    table: str = frame[names].astype(object).fillna("").to_markdown(index=False, disable_numparse=True, tablefmt="pipe")
    return text if len(text) + len(table) > LONGEST_NOTE else f"{text}\n\n{table}"


def _recommended(one: dict[str, Any]) -> str:
    heading = f"**{one['where']}**: {one.get('wanted', '')}"
    if "none" in one:
        return f"{heading}\n\n{one['none']}"
    figures_of = [f"- {heading}: {cells[0]}" for heading, cells in one["lines"]]
    doubts = [f"- not sure: {doubt}" for doubt in one["doubts"]]
    return "\n".join([f"{heading}\n\n{one['names'][0]}\n", *figures_of, *doubts, f"\n    {one['command']}"])
