"""Figure 4 of the paper: for each slice and bit width, between what quantization and pruning can reach."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import altair as alt

from pq_sweep.results.report.charts import HEIGHT, Figure, figure
from pq_sweep.study.layers.gather import Network
from pq_sweep.study.layers.slices import Found
from pq_sweep.study.layers.verdict import better

NAMES = ("nearest", "heuristic", "bound", "magnitude", "obs", "exact")
NEAR_ZERO = alt.Scale(type="symlog", constant=0.01)  # which shows the small ones apart, and zero
TIP: list[Any] = [
    "network:N",
    "layer:N",
    "bits:O",
    *(alt.Tooltip(f"{name}:Q", title=f"{name}, dB", format=".2f") for name in NAMES),
    alt.Tooltip("proven:N", title="rows proven"),
    alt.Tooltip("better:N", title="better, whatever the algorithm"),
]


def boxes(networks: list[Network]) -> Figure:
    """Draw a box for each slice and bit width: its width is what quantization leaves open, its height pruning."""
    values = [value for network in networks for found in network.found if (value := _value(network.name, found))]
    ratios = [value[name] for value in values for name in ("heuristic", "bound", "magnitude", "exact")]
    ends = [{"at": end} for end in (min(ratios, default=0.0), max(ratios, default=1.0))]
    base = alt.Chart(alt.InlineData(values=values), width="container", height=HEIGHT).encode(
        x=alt.X("heuristic:Q", title="quantized, from the heuristic to the bound, dB"),
        y=alt.Y("magnitude:Q", title="pruned, from magnitude to the best weights, dB"),
        color=alt.Color("bits:O", title="bits", scale=alt.Scale(scheme="viridis")),
        tooltip=TIP,
    )
    drawn = base.mark_rect(opacity=0.6, stroke="black", strokeWidth=0.5).encode(x2="bound:Q", y2="exact:Q")
    corners = base.mark_point(filled=True, size=22, opacity=0.9)  # of boxes that are too small to be seen
    line = alt.Chart(alt.InlineData(values=ends), width="container", height=HEIGHT)
    line = line.mark_line(strokeDash=[6, 4], color="#999999").encode(x="at:Q", y="at:Q")
    total = sum(len(network.found) for network in networks)
    left = f" {total - len(values)} of {total} have no finite place and are left out." if len(values) < total else ""
    caption = (
        "Each box is a slice of a layer at a bit width. Below the dashed line quantization keeps more, whatever the"
        " algorithm, if the whole box is there." + left
    )
    return figure("figure4", "Layers: what can be reached", alt.layer(line, drawn, corners), caption)


def effects(networks: list[Network]) -> Figure | None:
    """Draw what the noise of a single layer costs in accuracy, if that was looked at."""
    values = [value for network in networks for value in _effects(network)]
    if not values:
        return None
    base = alt.Chart(alt.InlineData(values=values), width="container", height=HEIGHT)
    drawn = base.mark_point(filled=True, size=45, opacity=0.75).encode(
        x=alt.X("noise:Q", title="noise of the layer's output over its signal", scale=NEAR_ZERO),
        y=alt.Y("drop:Q", title="accuracy lost, points"),
        color=alt.Color("method:N", title=None),
        shape=alt.Shape("network:N", title=None),
        tooltip=["network:N", "layer:N", "bits:O", "method:N", alt.Tooltip("noise:Q", format=".4f"), "drop:Q"],
    )  # fmt: skip
    caption = (
        "Each point is a network of which one layer alone is quantized or pruned, at the same size. Noise is the"
        " squared error of the layer's output on the calibration images; accuracy is that of"
        f" {values[0]['images']} evaluation images."
    )
    return figure("figure6", "What a layer's noise costs in accuracy", drawn, caption)


def _effects(network: Network) -> Iterator[dict[str, Any]]:
    """Yield the points of a network."""
    for each, drop in network.drops():
        yield {
            "network": network.name,
            "layer": each.layer,
            "bits": each.bits,
            "method": each.method,
            "noise": round(each.noise, 6),
            "drop": round(drop, 3),
            "images": each.images,
        }


def _value(network: str, found: Found) -> dict[str, Any] | None:
    """Return a slice as the figure draws it, or None if a ratio is not finite."""
    ratios = {name: found.db(name) for name in NAMES}
    finite = {name: round(db, 3) for name, db in ratios.items() if db is not None and math.isfinite(db)}
    if len(finite) < len(NAMES):
        return None
    proven = f"{found.proven} of {found.rows}"
    return {
        "network": network,
        "layer": found.layer,
        "bits": found.bits,
        "proven": proven,
        "better": better(found),
    } | finite
