"""The outcome of all checks together: a verdict, a table and a file."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from typing import Any

from pq_sweep.doctor.gpu_check import Check

COLOURS = {"passed": "green", "failed": "red", "skipped": "yellow"}
PRIVATE = ("host", "command", "slurm")  # left out, as reports are published
WIDTH = 118  # of a table that does not go to a terminal


def slug(name: str) -> str:
    """Turn a device's name into a file's: "NVIDIA H100 80GB HBM3" becomes nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def environment(device: str) -> dict[str, Any]:
    """Return the device and the versions that figures depend on. To be called in a child."""
    import torch

    from pq_sweep.job.describe import describe

    found = describe(device, torch.get_num_threads())
    return {key: value for key, value in found.items() if key not in PRIVATE}


def problem(checks: list[Check]) -> str:
    """Say what is wrong, or return "" if nothing failed and torch passed both in the tests and in the sweep."""
    failed = sum(check.verdict == "failed" for check in checks)
    if failed:
        return f"{failed} of {len(checks)} checks failed"
    done = {check.part for check in checks if check.verdict == "passed" and "torch" in re.split("[^a-z]", check.name)}
    missing = [part for part in ("tests", "sweep") if part not in done]
    return f"nothing of torch was checked by the {' or the '.join(missing)}" if missing else ""


def assemble(about: dict[str, Any], checks: list[Check], started: str, seconds: float) -> dict[str, Any]:
    """Return the report as plain values, with what was not checked before the checks."""
    return {
        "device": about["device"],
        "started": started,
        "seconds": round(seconds, 1),
        "problem": problem(checks) or None,
        "counts": dict(Counter(check.verdict for check in checks)),
        "not_checked": {f"{check.part}: {check.name}": check.reason for check in checks if check.verdict == "skipped"},
        "environment": about,
        "checks": [asdict(check) for check in checks],
    }


def draw(checks: list[Check]) -> None:
    """Print a table of all checks, with figures, or the reason for what did not pass."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("part", "check", "verdict", "s", "figure or reason", header_style="bold")
    for check in checks:
        seconds = "" if check.seconds is None else f"{check.seconds:.1f}"
        told = ": ".join(filter(None, [check.reason, check.short]))
        texts = (check.part, check.name, Text(check.verdict, COLOURS[check.verdict]), seconds, Text(told))
        table.add_row(*texts)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=WIDTH)).print(table)
