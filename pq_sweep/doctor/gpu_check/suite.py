"""The tests that need a GPU, in steps, and how each ended."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

from pq_sweep.core.sentences import without_password
from pq_sweep.doctor.gpu_check import ROOT, Check, Limit, Step, Verdict
from pq_sweep.doctor.gpu_check.children import run_python

TESTS = ROOT / "tests" / "gpu"
ENDED = (0, 1)  # pytest's exit codes: all tests passed, some failed
KINDS: dict[str, Verdict] = {"failure": "failed", "error": "failed", "skipped": "not tried"}


@dataclass(frozen=True, kw_only=True)
class Suite(Step):
    """Tests of files or functions below `tests`, of those the ones that match `keyword`, as pytest's -k has it."""

    selected: tuple[str, ...]
    keyword: str = ""
    tests: Path = TESTS

    part: ClassVar[str] = "tests"

    @property
    def selection(self) -> list[str]:
        """Return pytest's options that select these tests."""
        return ["-m", "gpu", "-k", self.keyword, *(str(self.tests / one) for one in self.selected)]

    def run(self, device: str, folder: Path, limit: Limit) -> list[Check]:
        """Run the tests, show what pytest prints, and return how each ended."""
        outcomes = folder / "junit.xml"
        options = ["-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={outcomes}"]
        code = run_python([*options, *self.selection], ROOT, limit.seconds)
        checks = list(read_junit(outcomes)) if outcomes.exists() else []
        if code is None:
            checks.append(Check(self.part, self.name, *limit.ending, limit.seconds))
        elif code not in ENDED:
            reason = f"pytest ended with exit code {code}, see what it printed"
            checks.append(Check(self.part, self.name, "failed", reason))
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
