"""The command line of the GPU check: `python -m pq_sweep.gpu_check`."""

from __future__ import annotations

import argparse
import fcntl
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from pq_sweep.doctor.children import first_line
from pq_sweep.doctor.gpu_check import BUDGET_S, ROOT, Check, Step
from pq_sweep.doctor.gpu_check.machine import look_at
from pq_sweep.doctor.gpu_check.report import FAILED, START_S, Report, draw, exit_code, problem
from pq_sweep.doctor.gpu_check.steps import STEPS
from pq_sweep.doctor.gpu_check.streams import open_streams, say

DEVICE = "cuda:0"
RESULTS = ROOT / "docs" / "results"
CHECKOUT = ("environment.yml", "conf", "launch.py", "tests/gpu")  # what is not installed with the package
CODES = "exit codes: 0 all that was tried passed, torch among it; 1 something failed; 2 nothing could be tried on a GPU"


class Parser(argparse.ArgumentParser):
    """Ends with 1 after a mistake on the command line: argparse's 2 says here that nothing could be tried."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(min(status, FAILED), message)


def main() -> None:
    """Run the GPU tests and a small sweep here step by step, draw a table, and write a report after every step."""
    parser = Parser(prog="python -m pq_sweep.gpu_check", description=main.__doc__, epilog=CODES)
    parser.add_argument("--output", type=path, default=RESULTS, help="folder of the report")
    parser.add_argument("--budget-s", type=budget, default=BUDGET_S, help="seconds that all may take")
    open_streams()
    arguments = parser.parse_args()
    if lacking := [name for name in CHECKOUT if not (ROOT / name).exists()]:
        parser.error(f"{ROOT} has no {lacking[0]}; run this in a checkout, as its tests and configs are not installed")
    with reserved(arguments.output, parser):
        heed_signals()
        sys.exit(check(DEVICE, arguments.output, arguments.budget_s))


def path(text: str) -> Path:
    """Read the folder of the report."""
    return Path(text).expanduser()


def budget(text: str) -> float:
    """Read the seconds that all may take, in which at least one step needs time."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not START_S <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not valid; give a number of seconds from {START_S:.0f} on")
    return value


@contextmanager
def reserved(folder: Path, parser: Parser) -> Iterator[None]:
    """Make the folder of the report, see that it can be written, and keep other checks out of it.

    Two checks at once would also spoil each other's times.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        parser.error(f"the folder {folder} cannot be written ({error.strerror}); give another by --output")
    try:
        _lock(descriptor, folder, parser)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, parser: Parser) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"another check is writing into {folder}; wait until it has ended")
    except OSError:
        pass  # some network file systems have no locks


def heed_signals() -> None:
    """End with what is written when stopped, but not before the processes that this one started have ended."""

    def stop(*_: object) -> NoReturn:
        sys.exit("the check was stopped")  # and with 1, which is FAILED

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP under nohup
            signal.signal(number, stop)


def check(device: str, output: Path, budget_s: float, steps: Sequence[Step] = STEPS) -> int:
    """Try the steps on a device in turn, keep the report in `output` up to date, and return the exit code."""
    start = time.monotonic()
    report = Report(output, look_at(device), steps, budget_s, start)
    report.checks += report.machine.checks
    report.write()
    say(f"report: {report.path}, written anew after every step")
    with tempfile.TemporaryDirectory() as scratch:
        for number, step in enumerate(steps):
            report.add(attempt(step, report, device, Path(scratch) / str(number)))
    draw(report.checks)
    for package in report.machine.lacking(steps):
        say(f"to bring: {package}")
    say(f"report: {report.path}")
    if wrong := "; ".join(filter(None, [problem(report.checks), report.machine.absent, report.unwritten])):
        say(wrong, error=True)
    return FAILED if report.unwritten else exit_code(report.checks)


def attempt(step: Step, report: Report, device: str, folder: Path) -> list[Check]:
    """Run a step in a folder of its own unless the machine or the time prevents it; whatever it raises is a failure."""
    if reason := report.prevents(step):
        return [step.not_tried(reason)]
    limit = report.limit(step)
    say(f"{step.part}: {step.name}, at most {limit.seconds:.0f} s")
    folder.mkdir()
    try:
        return step.run(device, folder, limit)
    except Exception as error:
        return [Check(step.part, step.name, "failed", f"{type(error).__name__}: {first_line(error)}")]


if __name__ == "__main__":
    main()
