"""Tell in README.md and docs/gpu.md what has run on a GPU: `python -m benchmarks.gpu_reports` reads docs/results."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "gpu.md"
WIDTH = 120
RUNTIMES = ("torch", "onnxruntime", "tensorrt", "tensorrt_native", "tensorrt_rtx")
# The packages that a runtime's versions are those of.
LIBRARIES = re.compile(r"torch|onnxruntime-gpu|tensorrt(-cu\d+)?|tensorrt-rtx.*")
TESTED = "Tests cover the CUDA and TensorRT paths as far as that needs no GPU"
HEADING = "## What has run\n\n"
Report = dict[str, Any]


def main() -> None:
    """Write the sentence of the README and the table of the page anew."""
    reports = read(RESULTS)
    README.write_text(in_readme(README.read_text(), reports))
    PAGE.write_text(in_page(PAGE.read_text(), reports))


def read(folder: Path) -> list[Report]:
    """Return the reports of machines on whose GPU something was tried, the newest first."""
    found = [json.loads(path.read_text()) | {"file": path.name} for path in sorted(folder.glob("*.json"))]
    tried = [report for report in found if report["device"] and set(report["counts"]) - {"not tried"}]
    return sorted(tried, key=lambda report: report["started"], reverse=True)


def ran(report: Report) -> list[str]:
    """Return the runtimes of which a job ran and gave right answers."""
    passed = [check for check in report["checks"] if (check["part"], check["verdict"]) == ("sweep", "passed")]
    return [name for name in RUNTIMES if name in {check["figures"].get("runtime") for check in passed}]


def versions(report: Report) -> str:
    """Return the versions of the libraries that run models."""
    found = report["environment"]["versions"]
    return ", ".join(f"{name} {found[name]}" for name in found if LIBRARIES.fullmatch(name))


def date(report: Report) -> str:
    """Return the day of a report."""
    return report["started"][:10]


def sentence(reports: Iterable[Report]) -> str:
    """Say which runtimes have run, each by the newest report with it, and which have not run on a GPU."""
    left, told = list(RUNTIMES), []
    for report in reports:
        if names := [name for name in ran(report) if name in left]:
            left = [name for name in left if name not in names]
            have = f"{quoted(names)} {'has' if len(names) == 1 else 'have'} run"
            told.append(f"{have} on {report['device']} ({date(report)}: {versions(report)})")
    if not told:
        return f"{TESTED}, but **they have not run on a GPU yet**."
    rest = f"; **not on a GPU yet: {quoted(left)}**" if left else ""
    return f"{TESTED}. {'; '.join(told)}{rest}."


def quoted(names: list[str]) -> str:
    """Return names of runtimes as a sentence lists them."""
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}" if first else last


def in_readme(text: str, reports: list[Report]) -> str:
    """Return the README with the paragraph that is the sentence."""
    told = textwrap.fill(sentence(reports), WIDTH, break_long_words=False, break_on_hyphens=False)
    return re.sub(rf"^{TESTED}.*?(?=\n\n)", lambda _: told, text, count=1, flags=re.MULTILINE | re.DOTALL)


def in_page(text: str, reports: list[Report]) -> str:
    """Return the page with the section that is the table."""
    told = f"{HEADING}{table(reports)}\n\n"
    return re.sub(rf"^{HEADING}.*?(?=^## )", lambda _: told, text, count=1, flags=re.MULTILINE | re.DOTALL)


def table(reports: list[Report]) -> str:
    """Return a row for each report, or say that there is none."""
    if not reports:
        return "`make gpu-check` has not run on a GPU yet, so nothing on this page has."
    columns = ("GPU", "date", "versions", "runtimes that ran", "passed", "failed", "not tried")
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *map(row, reports)])


def row(report: Report) -> str:
    """Return the row of a report."""
    counts = [str(report["counts"].get(verdict, 0)) for verdict in ("passed", "failed", "not tried")]
    gpu = f"[{report['device']}](results/{report['file']})"
    names = " ".join(f"`{name}`" for name in ran(report)) or "none"
    return f"| {' | '.join([gpu, date(report), versions(report), names, *counts])} |"


if __name__ == "__main__":
    main()
