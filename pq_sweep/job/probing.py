"""Looks at a network's representations while it is recovered: `recovery.probe=true`."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, flag_override

from pq_sweep.compress.representations import Probe, images_to_probe
from pq_sweep.core.files import write_text
from pq_sweep.core.options import PROBE
from pq_sweep.job.stages import Stages
from pq_sweep.job.steps import Origin
from pq_sweep.types import Data, Model, Record

KEY = "representations"  # in the record of a recovery, which is kept and shared with what it made of the network
COLUMNS = ("epoch", "layer", "snr_db", "cka", "images", "positions", "all_positions", "note")
DIGITS = 6
LABELS = 24  # layers that a picture can name


def is_probed(recovery: DictConfig) -> bool:
    """Say whether the network is to be looked at; configs of earlier versions do not have the option."""
    return bool(recovery.get("probe", False))


def without_probe(recovery: DictConfig) -> DictConfig:
    """Return the recovery's own options."""
    own = copy(recovery)
    with flag_override(own, ["struct", "readonly"], False):
        for name in PROBE:
            own.pop(name, None)
    return own


def probe_of(recovery: DictConfig, model: Model, data: Data, stage: Stages) -> Probe:
    """Pass images through the original network, which is not there any more once it is pruned."""
    with stage("probe"):
        return Probe(model, images_to_probe(data, recovery.probe_images), list(recovery.probe_layers or ()))


def with_original(origin: Origin, probe: Probe | None) -> Origin:
    """Return what the outcome of a recovery depends on: if it is looked at, the looks and the original network too."""
    if probe is None:
        return origin
    looks = {"layers": probe.most, "images": len(probe.images)}
    return replace(origin, about=origin.about | {"probe": looks, "original": probe.identity})


def watched(recover: Callable[..., Any], probe: Probe | None, stage: Stages) -> Callable[..., Any]:
    """Return a recovery that is looked at after compression and after each epoch, and whose record tells of it.

    One that does not take `observe` counts as one epoch. The looks are timed apart from it. Without a probe the
    recovery is returned as it is.
    """
    if probe is None:
        return recover

    def run(model: Model, data: Data) -> Any:
        record = _observed(recover, probe)(model, data)
        stage.leave_out(probe.looked_s)
        told = {KEY: {"rows": probe.rows, "seconds": probe.seconds}}
        return {**(record or {}), **told} if isinstance(record, dict | None) else record

    return run


def _observed(recover: Callable[..., Any], probe: Probe) -> Callable[[Model, Data], Any]:
    if "observe" in signature(recover).parameters:
        return partial(recover, observe=probe.look)

    def before_and_after(model: Model, data: Data) -> Any:
        probe.look(0)
        record = recover(model, data)
        probe.look(1)
        return record

    return before_and_after


def tell(stage: Stages, record: Record) -> None:
    """Write what was seen, and count the time that it took when it was."""
    found = record[KEY]
    stage.set_seconds("probe", found["seconds"], cached="recover" in stage.from_cache)
    write_text(stage.files.representations, _table(found["rows"]))
    draw(found["rows"], stage.files.representations_drawn)


def _table(rows: list[Record]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else value


def draw(rows: list[Record], path: Path) -> None:
    """Draw SNR and CKA over the epochs, with a line for each layer, dark for the first and light for the last."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    with mpl.rc_context({"svg.hashsalt": "pq_sweep"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 2), (("snr_db", "SNR, dB"), ("cka", "CKA")), strict=True):
            for place, layer in enumerate(layers):
                of = [row for row in rows if row["layer"] == layer and row[key] is not None]
                colour = mpl.colormaps["viridis"](place / max(1, len(layers)))
                axes.plot([row["epoch"] for row in of], [row[key] for row in of], "o-", color=colour, label=layer)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("epochs of recovery (0: after compression)")
            axes.set_ylabel(f"{title} against the original's outputs")
        if len(layers) <= LABELS:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        figure.savefig(path, metadata={"Date": None})
