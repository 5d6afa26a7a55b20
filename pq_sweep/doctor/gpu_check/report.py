"""The outcome of all steps together: a file that is whole after every step, a table, and an exit code."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pq_sweep.core.files import write_json
from pq_sweep.doctor.gpu_check import BUDGET_S, NO_TIME, Check, Limit, Step
from pq_sweep.doctor.gpu_check.machine import Machine
from pq_sweep.doctor.gpu_check.streams import say

COLOURS = {"passed": "green", "failed": "red", "not tried": "yellow"}
START_S = 20.0  # with less time left no further step is started
WIDTH = 118  # of a table that does not go to a terminal
NO_GPU = "no-gpu"
NOT_TRIED = "-not-tried"  # in the name of a report that must not replace one of the same device
BEGUN = "it had begun when the check was stopped"
NOT_REACHED = "the check was stopped before it"

PASSED, FAILED, NOTHING_TRIED = 0, 1, 2  # exit codes


@dataclass
class Report:
    """The checks of the steps that are done, written into a file in `folder` together with all that are not."""

    folder: Path
    machine: Machine
    steps: Sequence[Step]
    budget_s: float
    start: float  # by time.monotonic()
    checks: list[Check] = field(default_factory=list)
    done: int = 0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    unwritten: str = ""  # why the file is not that of the last step

    @cached_property
    def path(self) -> Path:
        """Return the file, which is not that of a device unless something can be tried on it from the beginning."""
        device = self.machine.about["device"]
        hopeless = bool(self.steps) and all(map(self.prevents, self.steps))
        return self.folder / f"{slug(device) + NOT_TRIED * hopeless if device else NO_GPU}.json"

    def prevents(self, step: Step) -> str:
        """Say why a step cannot be tried now, or return "" if it can."""
        limit = self.limit(step)
        return self.machine.prevents(step) or (NO_TIME if limit.cut and limit.seconds < START_S else "")

    def limit(self, step: Step) -> Limit:
        """Return how long a step may take now: a larger budget makes limits longer, a smaller one leaves out steps."""
        left = self.start + self.budget_s - time.monotonic()
        own = step.seconds * max(1.0, self.budget_s / BUDGET_S)
        return Limit(min(own, left), cut=left < own)

    def add(self, checks: Sequence[Check]) -> None:
        """Add how the next step ended, and write the file."""
        self.checks += checks
        self.done += 1
        self.write()

    def write(self) -> None:
        """Write the file, in which every step that has not ended counts as not tried."""
        ahead = [step.not_tried(NOT_REACHED if number else BEGUN) for number, step in enumerate(self.ahead)]
        seconds = round(time.monotonic() - self.start, 1)
        about = {"started": self.started, "seconds": seconds, "budget_s": self.budget_s, "complete": not ahead}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.path, about | assemble(self.machine, self.steps, [*self.checks, *ahead]))
            self.unwritten = ""
        except OSError as error:  # the disk is full: what is found from now on can still be shown
            self.unwritten = f"{self.path} cannot be written ({error.strerror})"

    @property
    def ahead(self) -> Sequence[Step]:
        """Return the steps that have not ended."""
        return self.steps[self.done :]


def slug(name: str) -> str:
    """Turn a device's name into a file's: "NVIDIA H100 80GB HBM3" becomes nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def assemble(machine: Machine, steps: Sequence[Step], checks: Sequence[Check]) -> dict[str, Any]:
    """Return what a report says of the machine and the checks as plain values, first what was not tried and why."""
    return {
        "device": machine.about["device"],
        "problem": problem(checks) or None,
        "counts": dict(Counter(check.verdict for check in checks)),
        "to_bring": machine.lacking(steps),
        "not_tried": {f"{check.part}: {check.name}": check.reason for check in checks if check.verdict == "not tried"},
        "environment": machine.about,
        "checks": [asdict(check) for check in checks],
    }


def problem(checks: Sequence[Check]) -> str:
    """Say what is wrong, or return "" if nothing failed and torch passed both in the tests and in the sweep."""
    if failed := sum(check.verdict == "failed" for check in checks):
        return f"{failed} of {len(checks)} checks failed"
    if nothing_tried(checks):
        return "nothing could be tried on a GPU"
    done = {check.part for check in checks if check.verdict == "passed" and "torch" in re.split("[^a-z]", check.name)}
    missing = [part for part in ("tests", "sweep") if part not in done]
    return f"nothing of torch was checked by the {' or the '.join(missing)}" if missing else ""


def nothing_tried(checks: Sequence[Check]) -> bool:
    """Say whether no check passed or failed."""
    return all(check.verdict == "not tried" for check in checks)


def exit_code(checks: Sequence[Check]) -> int:
    """Return 0 if nothing is wrong, 2 if nothing could be tried, else 1."""
    return NOTHING_TRIED if nothing_tried(checks) else FAILED if problem(checks) else PASSED


def draw(checks: Sequence[Check]) -> None:
    """Print a table of all checks, with figures, or the reason for what did not pass."""
    if find_spec("rich") is None:
        for check in checks:
            say(f"{check.part}: {check.name}: {check.verdict} {told(check)}".rstrip())
    else:
        _draw_table(checks)


def told(check: Check) -> str:
    """Return the reason and the figures of a check."""
    return ": ".join(filter(None, [check.reason, check.short]))


def _draw_table(checks: Sequence[Check]) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    table = Table("part", Column("check", overflow="fold"), "verdict", "s", "figure or reason", header_style="bold")
    for check in checks:
        seconds = "" if check.seconds is None else f"{check.seconds:.1f}"
        verdict = Text(check.verdict, COLOURS[check.verdict])
        table.add_row(check.part, check.name, verdict, seconds, Text(told(check)))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get().rstrip())
