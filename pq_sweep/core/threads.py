"""How many cores torch uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pq_sweep.types import UserError


def use_threads(threads: int | None) -> int:
    """Set torch's CPU threads, by default to the cores that this process may use, and return the number.

    More threads than cores are refused: they wait for each other, and latency would tell of that alone.
    """
    cores = len(os.sched_getaffinity(0))
    if (count := threads or cores) > cores:
        usable = f"1 to {cores}" if cores > 1 else "1"
        raise UserError(
            f"measure.threads={count} is more than the number of cores that this process may use; give {usable}, or"
            " null for all."
        )
    torch.set_num_threads(count)
    return count


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread while another library computes: its threads spin after a call, and torch would wait."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)
