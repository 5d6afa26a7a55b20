"""MLflow's table of runs as it is to open: the jobs of all sweeps as rows with their figures, the newest first.

It is a view that MLflow shares by an address, and that it keeps as a tag of the experiment: plain JSON, of which each
version takes what it knows. Without it the table lists sweeps, whose jobs are folded away, and shows no figures.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

KEY = "pq_sweep"
TAG = f"mlflow.sharedViewState.{KEY}"
JOBS = "tags.`pq_sweep.job` != ''"  # which jobs had from the first version on, and sweeps never
# The server knows the start of a run by this name as well. Where MLflow's page sorts by its own name for it, it folds
# the jobs into their sweeps.
NEWEST = "attributes.`Created`"
NAME = "attributes.`Run Name`"
FIXED = (NAME, "runDateAndNestInfo")  # the columns that stay at the left
PARAMETERS = ("pruner", "pruner.amount", "quantizer")
# Pixels that whole headings and names take; MLflow's own widths cut them.
WIDTHS = {"accuracy": 90, "accuracy_drop_points": 175, "engine_size_mb": 130}
LATENCY_WIDTH = 125
NAME_WIDTHS = (190, 600)
MOST_SIZES = 16  # a tag holds 5000 characters


def address(server: str, experiment: str) -> str:
    """Return where a server shows the jobs of an experiment, without the password of its address."""
    parts = urlsplit(server)
    root = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"
    return f"{root}/#/experiments/{experiment}/runs?viewStateShareKey={KEY}"


def save(client: MlflowClient, experiment: str, sizes: Collection[int], names: Collection[str]) -> None:
    """Save the view with columns for these batch sizes and room for these names, and for those it had before."""
    before = client.get_experiment(experiment).tags.get(TAG, "")
    known = {int(size) for size in re.findall(r"latency_ms/b(\d+)", before)}
    least, most = NAME_WIDTHS
    wanted = max((50 + 7 * len(name) for name in names), default=least)
    width = min(max(least, wanted, _name_width(before)), most)
    text = json.dumps(_state(sorted({*sizes, *known})[:MOST_SIZES], width))
    if text != before:
        client.set_experiment_tag(experiment, TAG, text)


def _name_width(saved: str) -> int:
    """Return how wide names are in a saved view; earlier versions did not say."""
    try:
        return int(json.loads(saved)["columnWidths"][NAME])
    except (ValueError, KeyError, TypeError):
        return 0


def _state(sizes: list[int], name_width: int) -> dict[str, Any]:
    """Return the view in MLflow's form; accuracy and the first latency also have room in a narrow window."""
    latencies = [f"latency_ms/b{size}" for size in sizes]
    metrics = ["accuracy", *latencies[:1], "accuracy_drop_points", *latencies[1:], "engine_size_mb"]
    columns = [*(f"metrics.`{name}`" for name in metrics), *(f"params.`{name}`" for name in PARAMETERS)]
    widths = {f"metrics.`{name}`": WIDTHS.get(name, LATENCY_WIDTH) for name in metrics}
    return {
        "searchFilter": JOBS,
        "orderByKey": NEWEST,
        "orderByAsc": False,
        "selectedColumns": columns,
        "columnOrder": [*FIXED, *columns, "duration"],
        "columnWidths": {NAME: name_width} | widths,
    }
