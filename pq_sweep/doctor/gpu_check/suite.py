"""The tests that need a GPU, and how each ended."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from pq_sweep.core.sentences import without_password
from pq_sweep.doctor.gpu_check import ROOT, Check, Verdict
from pq_sweep.doctor.gpu_check.children import run_python

ENDED = (0, 1)  # pytest's exit codes: all tests passed, some failed
TEST_S = 150  # for one test, where pytest-timeout is installed
KINDS: dict[str, Verdict] = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def run_tests(tests: Path, folder: Path, seconds: float) -> list[Check]:
    """Run the tests marked gpu in `tests`, show what pytest prints, and return how each ended."""
    outcomes = folder / "junit.xml"
    options = ["-m", "gpu", "-p", "no:cacheprovider", "-o", f"timeout={TEST_S}", f"--junitxml={outcomes}"]
    code = run_python(["-m", "pytest", *options, str(tests)], ROOT, seconds)
    checks = list(read_junit(outcomes)) if outcomes.exists() else []
    if code is None:
        checks.append(Check("tests", "pytest", "failed", f"the tests did not end within {seconds:.0f} s", seconds))
    elif code not in ENDED:
        checks.append(Check("tests", "pytest", "failed", f"pytest ended with exit code {code}, see what it printed"))
    return checks


def read_junit(path: Path) -> Iterator[Check]:
    """Yield how each test in pytest's JUnit file ended; what a test recorded as a property is a figure."""
    for case in ElementTree.parse(path).iter("testcase"):
        module = case.get("classname", "").rpartition(".")[2]
        name = "::".join(filter(None, [module, case.get("name")]))
        figures = {entry.attrib["name"]: entry.attrib["value"] for entry in case.iter("property")}
        short = ", ".join(f"{key} {value}" for key, value in figures.items())
        yield Check("tests", name, *_outcome(case), float(case.get("time", 0)), short, figures)


def _outcome(case: ElementTree.Element) -> tuple[Verdict, str]:
    for kind, verdict in KINDS.items():
        if (found := case.find(kind)) is not None:
            lines = (found.get("message") or "").strip().splitlines() or [kind]
            return verdict, without_password(lines[0])
    return "passed", ""
