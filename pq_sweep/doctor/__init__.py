"""Say what this machine can run, and how to mend what it cannot: `python -m pq_sweep.doctor`, for bug reports too.

First everything is looked at, side by side (`machine`, `accelerators`); what loads drivers or native libraries does so
in a process of its own (`children`). Then each section is judged from what was found, which is plain data (`judge`,
`precisions`), and told (`draw`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Facts = dict[str, Any]
Verdict = Literal["ok", "problem", "not here"]


@dataclass(frozen=True)
class Section:
    """What was found of one part of the machine; remedies are sentences, the more so for a problem."""

    name: str
    verdict: Verdict
    details: Facts
    remedies: list[str]
