"""Loading the models and data sets of a grid once, before any of its jobs starts."""

from __future__ import annotations

from collections import Counter

from omegaconf import DictConfig

from pq_sweep.core.folder import SweepFolder
from pq_sweep.core.imports import quick_imports
from pq_sweep.sweep.explain import explain
from pq_sweep.sweep.grid import Grid, refuse_all


def prefetch(grid: Grid, sweep: SweepFolder) -> None:
    """Load every model and dataset once, so that downloads are done, and raise a UserError if some cannot load.

    Hundreds of jobs would otherwise download the same file at once, or find out one by one that it does not load.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    missing = {job["loads"] for job in grid.announced if not sweep.job(job["folder"]).finished(job["fingerprint"])}
    if not missing:
        return
    # In a process of its own, so that a launcher that waits for days does not hold torch's memory.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        told = list(pool.map(try_to_load, (grid.loads[key] for key in sorted(missing))))
    refuse_all(Counter(filter(None, told)), len(missing))


def try_to_load(job: DictConfig) -> str | None:
    """Load a job's model and dataset; return None, or a sentence that says why they cannot be loaded."""
    with quick_imports("torch"):
        from pq_sweep.job.run import load

    try:
        load(job, "cpu")
    except Exception as error:
        return explain(error)
    return None
