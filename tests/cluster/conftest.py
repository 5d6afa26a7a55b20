"""The cluster and the store that all tests of a session share."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from typing import TypeVar

import pytest

from cluster.services import Postgres, Server, mlflow_server, postgres
from cluster.site import ON_V100, Site, site_in
from cluster.slurm import Cluster, Unavailable, cluster, short_folder

T = TypeVar("T")


def until_the_end(stack: ExitStack, service: AbstractContextManager[T]) -> T:
    """Start what runs until the stack is closed; tests that need it are skipped where it is not installed."""
    try:
        return stack.enter_context(service)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM of three nodes with accounting."""
    with ExitStack() as stack:
        yield until_the_end(stack, cluster(stack.enter_context(short_folder())))


@pytest.fixture
def forgetful() -> Iterator[Cluster]:
    """A SLURM without accounting, whose arrays have one job or two."""
    with ExitStack() as stack:
        yield until_the_end(stack, cluster(stack.enter_context(short_folder()), accounting=False, max_array_size=2))


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    with ExitStack() as stack:
        yield until_the_end(stack, postgres(tmp_path_factory.mktemp("postgres")))


@pytest.fixture(scope="session")
def server(database: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An MLflow server on PostgreSQL."""
    with mlflow_server(tmp_path_factory.mktemp("server"), database.new_database("served")) as running:
        yield running


@dataclass
class Many:
    """A sweep of 24 small jobs, eight at a time, on a cluster and a database of its own."""

    site: Site
    store: str
    launcher: subprocess.Popen[str]


# Linux divides cores among sessions, whatever the priorities of their processes, unless told here. At 10 eight jobs
# weigh as much as the tests beside them; at 19 they would get nothing where all cores are busy.
STEP_BACK = """\
#!/bin/sh
renice -n 10 $PPID >/dev/null 2>&1
echo 10 2>/dev/null >/proc/self/autogroup
exit 0
"""


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Many]:
    folder = tmp_path_factory.mktemp("many")
    (folder / "step_back").write_text(STEP_BACK)
    (folder / "step_back").chmod(0o755)
    with ExitStack() as stack:
        slurm = until_the_end(stack, cluster(stack.enter_context(short_folder())))
        store = until_the_end(stack, postgres(folder)).uri
        site = site_in(folder, slurm, store)
        amounts = ",".join(str(number / 50) for number in range(24))
        step_back = f"srun_args=['--task-prolog={folder}/step_back']"
        size = ("array_parallelism=8", "gpus_per_node=0", "cpus_per_task=1", step_back)
        grid = ("pruner=l1_global", f"pruner.amount={amounts}", *(f"hydra.launcher.{option}" for option in size))
        launcher = site.launch("many", ON_V100, *grid, "tracking.experiment=many")
        stack.callback(launcher.kill)
        yield Many(site, store, launcher)


@pytest.fixture(scope="session", autouse=True)
def many_in_the_background(request: pytest.FixtureRequest) -> None:
    """Start what takes longest before everything else."""
    if any("many" in getattr(item, "fixturenames", ()) for item in request.session.items):
        with suppress(pytest.skip.Exception):
            request.getfixturevalue("many")
