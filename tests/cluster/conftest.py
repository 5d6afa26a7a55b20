"""The cluster that all tests of a session share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from cluster.slurm import Cluster, Unavailable, cluster, short_folder


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A SLURM of three nodes with accounting; tests that need it are skipped where it is not installed."""
    with ExitStack() as stack:
        try:
            running = stack.enter_context(cluster(stack.enter_context(short_folder())))
        except Unavailable as error:
            pytest.skip(str(error))
        yield running
