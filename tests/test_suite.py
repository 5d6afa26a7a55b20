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
    cases = {case.get("name"): list(case) for case in ElementTree.parse(report).iter("testcase")}
    reasons = [part.get("message", "") for parts in cases.values() for part in parts]
    assert cases["test_without_slurm_the_packages_are_named"] == []  # as of a test that passed
    assert all("apt-get install" in reason for reason in reasons)
    for package in ("slurm-wlm", "postgresql", "chromium"):
        assert any(package in reason for reason in reasons)
