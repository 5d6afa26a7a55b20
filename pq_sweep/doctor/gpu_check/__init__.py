"""Try everything that needs a GPU on this machine and write down what was found: `make gpu-check`.

The tests of tests/gpu (`suite`) and a small sweep (`jobs`, judged by `outcomes`) are steps in the order of their value
(`steps`), each in a process of its own with a time limit of its own (`children`). The main process stays off the GPU,
which may be set to allow a single process. Nothing is installed or downloaded. What cannot be tried here is listed with
the reason (`machine`) and the package that it needs (`packages`). The report is written after every step (`report`).

What this package and the steps import is in Python itself, so that a report is written wherever Python runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

Figures = dict[str, Any]
Verdict = Literal["passed", "failed", "not tried"]
Ending = tuple[Verdict, str]

ROOT = Path(__file__).resolve().parents[3]
BUDGET_S = 480.0  # for which the limits of the steps are given
NO_TIME = "no time was left; give a larger --budget-s"


@dataclass(frozen=True)
class Check:
    """What was checked, in which part, and how it ended; `short` are the figures that the table shows."""

    part: str
    name: str
    verdict: Verdict
    reason: str = ""
    seconds: float | None = None
    short: str = ""
    figures: Figures = field(default_factory=dict)


@dataclass(frozen=True)
class Limit:
    """How many seconds a step may take; `cut` says that they are fewer than its own, as the whole time is nearly up."""

    seconds: float
    cut: bool = False

    @property
    def ending(self) -> Ending:
        """Say what a step counts as that did not end in time."""
        return ("not tried", NO_TIME) if self.cut else ("failed", f"not finished within {self.seconds:.0f} s")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Checks that run together in a process, for at most `seconds` within `BUDGET_S`; `needs` are packages."""

    name: str
    seconds: float
    needs: tuple[str, ...] = ()

    part: ClassVar[str]

    def run(self, device: str, folder: Path, limit: Limit) -> list[Check]:
        """Check on a device, with files in a folder of its own, and return how each check ended."""
        raise NotImplementedError

    def not_tried(self, reason: str) -> Check:
        """Return the check that stands for a step that is left out."""
        return Check(self.part, self.name, "not tried", reason)
