"""Benchmarks are run by hand and seldom: what they take from the package is there, as it was when they were written."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from benchmarks import timing
from pq_sweep.measure.latency import latency
from pq_sweep.runtimes import CallSession


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmarks_find_all_that_they_import(name: str) -> None:
    assert import_module(f"benchmarks.{name}").__doc__


def test_our_median_is_compared_by_the_protocol_of_today(tmp_path: Path) -> None:
    session = CallSession(torch.relu, "torch", "torch", "cpu", tmp_path, {})
    found, samples = latency(session, torch.ones(2, 3), timing.protocol(0.01))
    assert found.iterations == len(samples["host"]) >= 5
