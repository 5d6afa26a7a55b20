"""Say what this machine can run, and how to mend what it cannot: `python -m pq_sweep.doctor`, for bug reports too.

First it looks at everything, side by side (`machine`, `accelerators`); code that loads drivers or native libraries runs
in a process of its own (`children`). Then it judges each section from what was found, which is plain data (`judge`,
`precisions`), and shows it (`draw`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Facts = dict[str, Any]
Verdict = Literal["ok", "problem", "not here"]


@dataclass(frozen=True)
class Section:
    """What was found about one part of the machine; remedies are sentences, and a problem has at least one."""

    name: str
    verdict: Verdict
    details: Facts
    remedies: list[str]
