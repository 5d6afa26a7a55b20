"""The command line of the doctor: `python -m pq_sweep.doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from pq_sweep.doctor.draw import draw, summary
from pq_sweep.doctor.examine import examine

WIDTH = 118  # of a report that is not read in a terminal


def main() -> None:
    """Say what this machine can run, each problem with its remedy; exit 1 if what is installed does not work."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.doctor", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    from rich.console import Console

    with Console(stderr=True).status("looking at this machine"):
        sections = examine()
    console = Console(highlight=False)
    if arguments.json:
        report = {"summary": summary(sections), "sections": [asdict(section) for section in sections]}
        print(json.dumps(report, indent=1))
    else:
        draw(sections, console if console.is_terminal else Console(highlight=False, width=WIDTH))
    sys.exit(1 if any(section.verdict == "problem" for section in sections) else 0)


if __name__ == "__main__":
    main()
