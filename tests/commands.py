"""The command line for fixtures that several tests share, and a look at what a process imported."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from conftest import ROOT, new_user, python

LAUNCH = str(ROOT / "launch.py")
HEAVY = frozenset({"torch", "torchvision", "mlflow", "onnxruntime", "sklearn"})
# Threads that wait for each other take many times longer on a busy machine.
SHORT = (
    "measure.batch_sizes=[1]",
    "measure.threads=1",
    "measure.iterations=5",
    "measure.warmup_s=0",
    "measure.min_s=0",
    "measure.max_s=0",
)

Done = subprocess.CompletedProcess[str]


def launch_in(folder: Path, *overrides: str, timeout: float = 300, home: Path | None = None) -> Done:
    own = {"HOME": str(home)} if home else {}
    return python([LAUNCH, *overrides], folder, new_user() | own, timeout)


def imported(stderr: str) -> set[str]:
    """Return the top-level packages that a process run with `-X importtime` imported."""
    return set(re.findall(r"^import time: +\d+ \| +\d+ \| +(\w+)", stderr, re.MULTILINE))


def said(stderr: str) -> list[str]:
    """Return the lines that are not `-X importtime`'s."""
    return [line for line in stderr.splitlines() if line.strip() and not line.startswith("import time:")]
