"""Recommends a model to ship: `python -m pq_sweep.recommend FOLDER... --max-accuracy-drop 1 --minimize latency`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pq_sweep.results.decision import Goal, decide
from pq_sweep.results.recommend import add_goal, answer, batch_size, candidates, export, limits, places, show
from pq_sweep.results.sweeps import find_sweeps, merge
from pq_sweep.types import UserError


def main() -> None:
    """Recommend the best model of the given sweeps within limits; exit with 1 if no job is within them."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.recommend", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="sweep folders, or folders that contain some")
    add_goal(parser)
    parser.add_argument("--json", action="store_true", help="print the answer for programs")
    parser.add_argument("--export", type=Path, metavar="DIR", help="copy the winner there, with a card and a script")
    arguments = parser.parse_args()
    try:
        sweep = candidates(merge(find_sweeps(arguments.folders)), places(arguments))
        goal = Goal(arguments.minimize, limits(arguments), batch_size(sweep.rows, arguments.batch))
        decision = decide(sweep.rows, goal)
        if arguments.export and decision.winner:
            export(decision, sweep, arguments.export)
    except (UserError, OSError) as error:
        sys.exit(str(error))
    if arguments.json:
        print(json.dumps(answer(decision, sweep), indent=1))
    else:
        from rich.console import Console

        show(decision, sweep, Console(highlight=False, width=None if sys.stdout.isatty() else 200))
    sys.exit(0 if decision.winner else 1)


if __name__ == "__main__":
    main()
