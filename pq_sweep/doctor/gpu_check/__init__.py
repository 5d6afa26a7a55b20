"""Try everything that needs a GPU on this machine and write down what was found: `make gpu-check`.

The tests of tests/gpu (`suite`) and a small sweep (`jobs`) run in processes of their own, one after another
(`children`). The main process stays off the GPU, which may be set to allow a single process. Nothing is installed or
downloaded. The report lists what cannot be checked here, with the reason (`report`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Figures = dict[str, Any]
Verdict = Literal["passed", "failed", "skipped"]

ROOT = Path(__file__).resolve().parents[3]


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
