"""Many small jobs: none is lost, none is logged twice, and the store is up to it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from stored_runs import parent_and_jobs

from cluster.conftest import Many
from cluster.site import done, read

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_24_jobs_eight_at_a_time(many: Many, record_property: Callable[[str, object], None]) -> None:
    ended = done(many.launcher)
    assert ended.returncode == 0, ended.stderr
    folder = many.site.folder / "many"
    results = [read(path) for path in folder.glob("*/result.json")]
    _, children = parent_and_jobs(many.store, "many")
    assert len(results) == len(children) == 24
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    assert "cannot be used" not in ended.stderr
    assert not [path for path in folder.glob(".submitit/*/*.err") if "cannot be used" in path.read_text()]
    first, last = min(result["started"] for result in results), max(map(ended_at, results))
    record_property("seconds_per_job", (last - first) / 24)


def ended_at(result: dict[str, float]) -> float:
    return result["started"] + result["seconds"]
