"""The command line of the report: `python -m pq_sweep.report FOLDER...`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from pq_sweep.results.decision import FIGURES, OBJECTIVES
from pq_sweep.results.recommend import add_goal, candidates, limits, places
from pq_sweep.tracking.fetch import collect
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from pq_sweep.results.report.page import Report

DEFAULT = "report.html"


def main() -> None:
    """Compare the jobs of sweeps: a page (report.html), and if wanted figures and tables."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.report", description=main.__doc__)
    parser.add_argument(
        "sources",
        nargs="+",
        help="sweep folders, or folders that contain some; MLflow experiments; or URIs of MLflow stores",
    )
    parser.add_argument("--experiment", default="pq_sweep", help="what to read in a store given by URI")
    parser.add_argument("--output", type=Path, help=f"the page; default: {DEFAULT} in a single folder, else here")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="write every figure there as PNG and SVG")
    parser.add_argument("--tables", type=Path, metavar="DIR", help="write the table there as Markdown, LaTeX and CSV")
    parser.add_argument("--objectives", default=",".join(OBJECTIVES), help="of the Pareto front; default: %(default)s")
    add_goal(parser)
    arguments = parser.parse_args()
    try:
        with TemporaryDirectory() as scratch:
            _write(_read(arguments, Path(scratch)), arguments)
    except (UserError, OSError) as error:
        sys.exit(str(error))


def _read(arguments: argparse.Namespace, scratch: Path) -> Report:
    from pq_sweep.results.report.page import report

    objectives = arguments.objectives.split(",")
    for name in objectives:
        if name not in FIGURES:
            raise UserError(f"--objectives {name} is not known; valid are: {', '.join(FIGURES)}.")
    sweep = collect(arguments.sources, arguments.experiment, scratch)
    sweep = candidates(sweep, {what: part for what, part in places(arguments).items() if part})
    return report(sweep, arguments.minimize, limits(arguments), arguments.batch, objectives)


def _write(report: Report, arguments: argparse.Namespace) -> None:
    from pq_sweep.core.files import write_text
    from pq_sweep.results.report.files import write_figures, write_tables

    page = arguments.output or _default(arguments.sources)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_text(page, report.html())
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{page} cannot be written ({reason}); give --output=FILE that can be.") from error
    print(f"report: {page}")
    if arguments.figures:
        print(f"figures: {write_figures(report, arguments.figures)} in {arguments.figures}")
    if arguments.tables:
        write_tables(report, arguments.tables)
        print(f"tables: {arguments.tables}")


def _default(sources: list[str]) -> Path:
    alone = len(sources) == 1 and Path(sources[0]).is_dir()
    return Path(sources[0]) / DEFAULT if alone else Path(DEFAULT)


if __name__ == "__main__":
    main()
