"""The end of a sweep: its table, its CSV, and its place in the store."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from pq_sweep.results.rows import DONE
from pq_sweep.results.spreadsheet import write_csv
from pq_sweep.results.sweeps import Sweep
from pq_sweep.results.terminal import show


def conclude(sweep: Sweep, log: Callable[[Path], str], found: Iterable[str] = ()) -> bool:
    """Draw results, write the CSV and bring the store up to date; say whether every job did what it was to.

    `log` logs what is missing and says where to look at it; `found` are the sentences in which a search ends.
    """
    tell(sweep)
    print(log(sweep.folder))
    for line in found:
        print(line)
    if sweep.count("pending", "running"):
        print(f"jobs go on; watch them by: python -m pq_sweep.results {shlex.quote(str(sweep.folder))} --watch")
    return sweep.count(*DONE) == len(sweep.rows)


def tell(sweep: Sweep) -> None:
    """Draw the table of a sweep, and write it as CSV."""
    show(sweep)
    print(f"CSV: {write_csv(sweep)}")
