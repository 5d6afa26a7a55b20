"""The page: one file that needs no network, since it contains everything that it draws with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import ChoiceLoader, Environment, PackageLoader

from pq_sweep.core.environment import cache_home
from pq_sweep.core.files import write_text
from pq_sweep.core.folder import JobFolder, SweepFolder
from pq_sweep.core.result import Result
from pq_sweep.results.commands import baselines, command
from pq_sweep.results.decision import Goal, by_place, decide
from pq_sweep.results.recommend import facts, lines, none_feasible, wanted
from pq_sweep.results.report.charts import Figure, figures
from pq_sweep.results.report.frame import DETAILS, NAMES, comparison, rounded
from pq_sweep.results.report.views import View, views
from pq_sweep.results.rows import DONE, Row, batch_sizes
from pq_sweep.results.sweeps import Sweep
from pq_sweep.types import UserError

PAGES: tuple[list[int | str], ...] = ([25, 50, 100, -1], ["25", "50", "100", "all"])


@dataclass(frozen=True)
class Report:
    """All that is shown of the jobs: the table, the figures of each view, and a recommendation for each device."""

    sweep: Sweep
    objectives: list[str]
    minimize: str
    limits: dict[str, float]
    batch: int | None

    def frame(self) -> pd.DataFrame:
        """Return the comparison of all jobs."""
        return rounded(comparison(self.sweep, self.objectives))

    def views(self) -> list[View]:
        """Return the groups of jobs that are drawn together."""
        return views(self.sweep, self.objectives)

    def recommendations(self) -> Iterator[dict[str, Any]]:
        """Yield for each dataset and device which job to ship."""
        for (dataset, device), rows in by_place(self.sweep).items():
            place = Sweep(self.sweep.folder, rows, self.sweep.options)
            yield {"where": f"{dataset}, {device}"} | self._recommend(place)

    def _recommend(self, sweep: Sweep) -> dict[str, Any]:
        known = batch_sizes(sweep.rows)
        if not known:
            return {"none": "no latency was measured."}
        batch = self.batch if self.batch in known else known[0]
        goal = Goal(self.minimize, self.limits, batch)
        decision = decide(sweep.rows, goal)
        if decision.winner is None:
            return {"wanted": wanted(goal), "none": none_feasible(decision)}
        chosen = [row for row in (decision.winner, decision.runner_up) if row]
        return {
            "wanted": wanted(goal),
            "names": [f"job {row['job']}: {row['name']}" for row in chosen],
            "lines": list(lines([facts(row, self.sweep, goal) for row in chosen], goal)),
            "doubts": decision.doubts,
            "command": command(decision.winner),
        }

    def html(self) -> str:
        """Return the page."""
        drawn = [(view, list(figures(view))) for view in self.views()]
        return rendered(
            "report.html.j2",
            [drawings for _, drawings in drawn],
            title=_title(self.sweep),
            summary=self.sweep.summary,
            recommendations=list(self.recommendations()),
            baselines=baselines(self.sweep),
            table=_table(self.frame()),
            views=[{"name": view.name, "figures": drawings} for view, drawings in drawn],
            failed=[row for row in self.sweep.rows if row["status"] not in DONE],
            provenance=provenance(self.sweep),
        )


def rendered(template: str, drawn: list[list[Figure]], package: str = "pq_sweep.results", **content: Any) -> str:
    """Return a page of a package's templates with the figures of each of its views and what draws them."""
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("pq_sweep.results")])
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    specs = [[figure.spec for figure in drawings] for drawings in drawn]
    return environment.get_template(template).render(
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        specs=json.dumps(specs).replace("</", "<\\/"),
        vega=_vega(),
        **content,
    )


def _title(sweep: Sweep) -> str:
    models = list(dict.fromkeys(str(row["model"]) for row in sweep.rows if row.get("model")))
    return ", ".join(models[:4]) + (f" and {len(models) - 4} more" if len(models) > 4 else "") or "sweep"


def _vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, kept in the cache as making it takes seconds."""
    import vl_convert

    path = cache_home() / f"vega-{version('vl-convert-python')}.js"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, vl_convert.javascript_bundle())  # type: ignore[call-arg]
    return path.read_text()


def _table(frame: pd.DataFrame) -> str:
    """Return the table with its script and style; a column can be sorted, filtered, shown and hidden."""
    import itables

    shown = frame.astype(object).where(frame.notna(), "")
    same = [name for name in NAMES if name in frame and len(frame) > 1 and shown[name].nunique() == 1]
    hidden = [place for place, name in enumerate(frame.columns) if name in (*DETAILS, *same) or name.startswith("p99 ")]
    # Lists to choose a column's values from are slow to make, and no help where the values are figures.
    listed = [place for place, name in enumerate(frame.columns) if name in ("Pareto", *NAMES)]
    layout: dict[str, Any] = {"topStart": "buttons", "topEnd": "search", "bottomEnd": ["pageLength", "paging"]}
    html: str = itables.to_html_datatable(
        shown,
        connected=False,
        showIndex=False,
        maxBytes=0,
        classes="display compact nowrap",
        table_id="jobs",
        autoWidth=False,
        pageLength=25,
        lengthMenu=PAGES,
        buttons=[{"extend": "colvis", "text": "columns"}, "csvHtml5"],
        columnDefs=[
            {"targets": hidden, "visible": False},
            {"targets": listed, "columnControl": ["order", ["searchList", "search"]]},
        ],
        columnControl=["order", ["search"]],
        layout=layout | {"bottomStart": "info"},
        ordering={"indicators": False},
        display_logo_when_loading=False,
    )
    return itables.javascript.generate_init_offline_itables_html(itables.options.dt_bundle) + html


def provenance(sweep: Sweep) -> list[tuple[str, list[str]]]:
    """Return what ran, where and with which versions; if jobs differ, with all their answers."""
    found: dict[str, dict[str, None]] = {}
    folders = dict.fromkeys(Path(row["folder"]).parent for row in sweep.rows)
    for name, value in chain(*map(_started, folders), *map(_origin, sweep.rows)):
        found.setdefault(name, {})[str(value)] = None
    return [(name, list(values)) for name, values in found.items()]


def _started(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield where a sweep lies and what started it."""
    yield "sweep", folder
    given = SweepFolder(folder).read_manifest().get("command")
    if given:
        yield "command", given


def _origin(row: Row) -> Iterator[tuple[str, Any]]:
    result = Result.read(JobFolder(Path(row["folder"])).result)
    if not result:
        return
    environment, gpu = result.environment, result.environment["gpu"] or {}
    yield "device", environment["device"]
    yield "host", environment["host"]
    yield "protocol", result.config["measure"]["name"]
    yield "engine", result.session.engine
    yield "threads of the CPU", environment["cpu"]["threads"]
    for name in ("driver", "uuid", "compute_capability"):
        if gpu.get(name):
            yield f"GPU {name.replace('_', ' ')}", gpu[name]
    if environment["git"]:
        yield "git commit", environment["git"]["commit"] + (" (changed)" if environment["git"]["dirty"] else "")
    yield "system", environment["os"]
    yield "versions", ", ".join(f"{name} {version}" for name, version in environment["versions"].items())


def report(sweep: Sweep, minimize: str, limits: dict[str, float], batch: int | None, objectives: list[str]) -> Report:
    """Return the report of aggregated jobs; if no limit is given, accuracy may fall by one point, not by any amount."""
    if not sweep.rows:
        raise UserError("there is no job to report on.")
    return Report(sweep, objectives, minimize, limits or {"accuracy_drop": 1.0}, batch)
