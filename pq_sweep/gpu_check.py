"""The command line of the GPU check: `python -m pq_sweep.gpu_check`."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from pq_sweep.doctor.children import first_line
from pq_sweep.doctor.gpu_check import BUDGET_S, NO_TIME, ROOT, Check, Step
from pq_sweep.doctor.gpu_check.machine import look_at
from pq_sweep.doctor.gpu_check.report import FAILED, Report, draw, exit_code, problem
from pq_sweep.doctor.gpu_check.steps import STEPS

DEVICE = "cuda:0"
RESULTS = ROOT / "docs" / "results"
START_S = 20.0  # with less time left no further step is started
CODES = "exit codes: 0 all that was tried passed, torch among it; 1 something failed; 2 nothing could be tried on a GPU"


class Parser(argparse.ArgumentParser):
    """Ends with 1 after a mistake on the command line: argparse's 2 says here that nothing could be tried."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(min(status, FAILED), message)


def main() -> None:
    """Run the GPU tests and a small sweep here step by step, draw a table, and write a report after every step."""
    parser = Parser(prog="python -m pq_sweep.gpu_check", description=main.__doc__, epilog=CODES)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the report")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds that all may take")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(FAILED))  # not before the processes that it started have ended
    sys.exit(check(DEVICE, arguments.output, arguments.budget_s))


def check(device: str, output: Path, budget_s: float, steps: Sequence[Step] = STEPS) -> int:
    """Try the steps on a device in turn, keep the report in `output` up to date, and return the exit code."""
    start = time.monotonic()
    report = Report(output, look_at(device), steps, budget_s, start)
    report.checks += report.machine.checks
    report.write()
    with tempfile.TemporaryDirectory() as scratch:
        for number, step in enumerate(steps):
            report.add(attempt(step, report, device, Path(scratch) / str(number)))
    draw(report.checks)
    for package in report.machine.lacking(steps):
        print(f"to bring: {package}")
    print(f"report: {report.path}", flush=True)
    if wrong := problem(report.checks):
        print("; ".join(filter(None, [wrong, report.machine.absent])), file=sys.stderr)
    return exit_code(report.checks)


def attempt(step: Step, report: Report, device: str, folder: Path) -> list[Check]:
    """Run a step in a folder of its own unless the machine or the time prevents it; whatever it raises is a failure."""
    limit = report.limit(step)
    if reason := report.machine.prevents(step) or (NO_TIME if limit.cut and limit.seconds < START_S else ""):
        return [step.not_tried(reason)]
    print(f"{step.part}: {step.name}, at most {limit.seconds:.0f} s", flush=True)
    folder.mkdir()
    try:
        return step.run(device, folder, limit)
    except Exception as error:
        return [Check(step.part, step.name, "failed", f"{type(error).__name__}: {first_line(error)}")]


if __name__ == "__main__":
    main()
