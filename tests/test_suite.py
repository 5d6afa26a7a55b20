"""The tests themselves on a machine that has nothing but Python and git."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import ROOT, new_user, python


@pytest.mark.slow
def test_what_is_not_installed_is_skipped_and_named(tmp_path: Path) -> None:
    git = shutil.which("git")
    assert git
    programs, report = tmp_path / "bin", tmp_path / "report.xml"
    programs.mkdir()
    (programs / "git").symlink_to(git)
    options = ["-p", "no:cacheprovider", f"--junitxml={report}", "-m", "slurm or chromium"]
    done = python(["-m", "pytest", *options], ROOT, new_user() | {"PATH": str(programs)}, timeout=600)

    assert done.returncode == 0, done.stdout
    reasons = {test.get("name"): [part.get("message", "") for part in test] for test in tests_in(report)}
    assert reasons.pop("test_without_slurm_the_packages_are_named") == []
    for package in ("slurm-wlm", "postgresql", "chromium"):
        assert any(package in reason for (reason,) in reasons.values())
    assert all("apt-get install" in reason for (reason,) in reasons.values())


def tests_in(report: Path) -> list[ElementTree.Element]:
    return list(ElementTree.parse(report).iter("testcase"))
