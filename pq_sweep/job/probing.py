"""Looks at a network's representations while it is recovered: `recovery.probe=true`."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, flag_override

from pq_sweep.compress.mixed import SILENT_DB
from pq_sweep.compress.observing import unobserved
from pq_sweep.compress.representations import Probe, images_to_probe
from pq_sweep.core.files import write_table
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


def takes(component: Callable[..., Any]) -> bool:
    """Say whether a component tells how far it is."""
    return "observe" in signature(getattr(component, "func", component)).parameters


def with_original(origin: Origin, probe: Probe | None) -> Origin:
    """Return what the outcome of a step depends on: if it is looked at, the looks and the original network too."""
    if probe is None:
        return origin
    looks = {"layers": probe.most, "images": len(probe.images)}
    return replace(origin, about=origin.about | {"probe": looks, "original": probe.identity})


def watched(change: Callable[..., Any], probe: Probe | None, stage: Stages) -> Callable[..., Any]:
    """Return a step that is looked at before it, or when it says so, and after each epoch; its record tells of it.

    One that does not take `observe` counts as one epoch. The looks are timed apart from it. Without a probe nobody
    looks.
    """
    if probe is None:
        return partial(change, observe=unobserved) if takes(change) else change

    def run(model: Model, data: Data) -> Any:
        rows, looked_s = len(probe.rows), probe.looked_s
        record = _observed(change, probe)(model, data)
        seconds = probe.looked_s - looked_s
        stage.leave_out(seconds)
        told = {KEY: {"rows": probe.rows[rows:], "seconds": seconds, "before_s": probe.before_s}}
        return {**(record or {}), **told} if isinstance(record, dict | None) else record

    return run


def _observed(change: Callable[..., Any], probe: Probe) -> Callable[[Model, Data], Any]:
    if takes(change):
        return partial(change, observe=probe.look)

    def before_and_after(model: Model, data: Data) -> Any:
        probe.look(0)
        record = change(model, data)
        probe.look(1)
        return record

    return before_and_after


def tell(stage: Stages, records: dict[str, Record | None]) -> None:
    """Write what was seen in the steps of these names, and count the time that it took when it was."""
    seen = {name: record[KEY] for name, record in records.items() if record and KEY in record}
    seconds = max(found["before_s"] for found in seen.values()) + sum(found["seconds"] for found in seen.values())
    stage.set_seconds("probe", seconds, cached=set(seen) <= set(stage.from_cache))
    rows: list[Record] = []
    for found in seen.values():
        rows += _following(rows, found["rows"])
    write_table(stage.files.representations, [{name: _cell(row[name]) for name in row} for row in rows], COLUMNS)
    draw(rows, stage.files.representations_drawn)


def _following(before: list[Record], rows: list[Record]) -> list[Record]:
    """Return the rows of a step with its epochs after those of the step before, without what is there already."""
    done = before[-1]["epoch"] if before else 0
    return [row for each in rows if (row := each | {"epoch": each["epoch"] + done}) not in before]


def untold(record: Record | None) -> Record | None:
    """Return what else a record has."""
    return record and {name: value for name, value in record.items() if name != KEY}


def _cell(value: Any) -> Any:
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else value


def draw(rows: list[Record], path: Path) -> None:
    """Draw SNR and CKA over the epochs, with a line for each layer, dark for the first and light for the last.

    SNR has no place where nothing differs.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(row["layer"] for row in rows))
    with mpl.rc_context({"svg.hashsalt": "pq_sweep"}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 2), (("snr_db", "SNR, dB"), ("cka", "CKA")), strict=True):
            for place, layer in enumerate(layers):
                of = [row for row in rows if row["layer"] == layer and row[key] not in (None, SILENT_DB)]
                colour = mpl.colormaps["viridis"](place / max(1, len(layers)))
                axes.plot([row["epoch"] for row in of], [row[key] for row in of], "o-", color=colour, label=layer)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("epochs of recovery (0: after compression)")
            axes.set_ylabel(f"{title} against the original's outputs")
        if len(layers) <= LABELS:
            figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)
        figure.savefig(path, metadata={"Date": None})
