"""Figures 1 to 3 of the paper: of the normal distribution, of Student's t by kurtosis, and of the tensors of networks.

The first two are computed from closed forms, for the bit widths of the study.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import altair as alt
import numpy as np

from pq_sweep.results.report.charts import HEIGHT, Figure, figure
from pq_sweep.study.weights.distributions import KURTOSES, Normal, density, overtaking_kurtosis, t_of_kurtosis
from pq_sweep.study.weights.errors import FULL_BITS, Floats, best_step, codes, pruning_db, quantization_db
from pq_sweep.study.weights.networks import Network

Values = list[dict[str, Any]]

SHOWN_BITS = 4  # of the first figure's distribution and error, as in the paper
REACH, POINTS = 4.0, 401  # of the normal distribution
CURVE = 60  # kurtoses at which the t is computed
CELLS = 80  # kurtoses at which the tensors of networks are compared
NARROWEST = 0.05  # decades of kurtosis over which a tensor counts at least
NEARBY = 0.02  # share of the greatest density of tensors below which nothing is said of a kurtosis

METHODS = alt.Color("method:N", title=None, sort=["quantized", "pruned"])
KURTOSIS = alt.X("kurtosis:Q", title="kurtosis", scale=alt.Scale(type="log", nice=False))
BITS = alt.Color("bits:O", title="bits", scale=alt.Scale(scheme="viridis"))
RATIO = alt.Tooltip("db:Q", title="dB", format=".2f")


def figures(networks: list[Network]) -> Iterator[Figure]:
    """Yield all figures; those of networks cover all tensors that have a kurtosis and finite ratios."""
    bits = networks[0].bits
    yield from _normal(bits)
    yield from _student(bits)
    values = _values(networks)
    yield _scatter(values, _left_out(networks, values))
    yield _regions_of_tensors(values)


def _chart(values: Values, height: Any = HEIGHT) -> alt.Chart:
    return alt.Chart(alt.InlineData(values=values), width="container", height=height)


def _kept(bits: int) -> str:
    return f"{bits / FULL_BITS:.4g}"


# --- figure 1: a normal distribution ---------------------------------------------------------------------------------


def _normal(bits: list[int]) -> Iterator[Figure]:
    weights, step = np.linspace(-REACH, REACH, POINTS), best_step(Normal(), SHOWN_BITS)
    limit = Normal().limit(1 - SHOWN_BITS / FULL_BITS)
    pruned = np.where(np.abs(weights) > limit, weights, 0.0)
    integers = codes(SHOWN_BITS)
    quantized = step * np.clip(np.rint(weights / step), integers[0], integers[-1])
    yield _distributions(weights, pruned, step)
    yield _errors(weights, {"quantized": quantized, "pruned": pruned})
    yield _ratios(bits)


def _distributions(weights: Floats, pruned: Floats, step: float) -> Figure:
    """The normal density, what is left of it after pruning, and how often each level of quantization is taken."""
    x, y = alt.X("weight:Q", title="weight"), alt.Y("density:Q", title="density")
    rows = zip(weights, density(weights), pruned, strict=True)
    curve = [{"weight": w, "density": p, "left": p if kept else 0.0} for w, p, kept in rows]
    base = _chart(curve)
    bars = (
        _chart(_levels(step))
        .mark_bar(opacity=0.5)
        .encode(x=alt.X("low:Q", title="weight"), x2="high:Q", y=y, y2=alt.datum(0), color=METHODS)
    )
    left = (
        base.transform_calculate(method="'pruned'")
        .mark_area(opacity=0.5)
        .encode(x=x, y=alt.Y("left:Q", title="density"), color=METHODS)
    )
    caption = (
        f"A standard normal distribution (line), quantized to {SHOWN_BITS} bits (the probability of each level over its"
        f" width) and pruned to {SHOWN_BITS}/{FULL_BITS} of the weights; the others are 0, which is not drawn."
    )
    drawn = alt.layer(bars, left, base.mark_line(color="#999999").encode(x=x, y=y))
    return figure("figure1_distributions", "Normal weights: what is left", drawn, caption)


def _levels(step: float) -> Values:
    """Return the levels of quantization with their probabilities over the width of a level."""
    integers = codes(SHOWN_BITS)
    below, _ = Normal().below(step * (integers[1:] - 0.5))
    found = zip(integers, np.diff(below, prepend=0.0, append=1.0) / step, strict=True)
    return [
        {"low": (code - 0.5) * step, "high": (code + 0.5) * step, "density": height, "method": "quantized"}
        for code, height in found
    ]


def _errors(weights: Floats, changed: dict[str, Floats]) -> Figure:
    """The squared error of each weight times its density."""
    values = [
        {"weight": weight, "error": error, "method": method}
        for method, now in changed.items()
        for weight, error in zip(weights, (weights - now) ** 2 * density(weights), strict=True)
    ]
    drawn = (
        _chart(values)
        .mark_line(clip=True)
        .encode(
            x=alt.X("weight:Q", title="weight"),
            y=alt.Y("error:Q", title="squared error times density"),
            color=METHODS,
            strokeDash=alt.StrokeDash("method:N", sort=["quantized", "pruned"], legend=None),
        )
    )
    caption = f"The area below each line is its mean squared error, at {SHOWN_BITS} bits and {SHOWN_BITS}/{FULL_BITS}."
    return figure("figure1_error", "Normal weights: where the error is", drawn, caption)


def _ratios(bits: list[int]) -> Figure:
    """The signal-to-noise ratio of both methods over the bit width."""
    weights = Normal()
    values = [
        {"bits": each, "db": db(weights, each), "method": method, "kept": _kept(each)}
        for method, db in (("quantized", quantization_db), ("pruned", pruning_db))
        for each in bits
    ]
    drawn = (
        _chart(values)
        .mark_line(point=True)
        .encode(
            x=alt.X("bits:O", title="bits; pruning keeps bits/16 of the weights", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("db:Q", title="signal to noise, dB"),
            color=METHODS,
            strokeDash=alt.StrokeDash("method:N", sort=["quantized", "pruned"], legend=None),
            tooltip=["method:N", "bits:O", alt.Tooltip("kept:N", title="share kept if pruned"), RATIO],
        )
    )
    caption = "Both at the same size relative to FP16. A higher ratio of signal to noise is better."
    return figure("figure1_snr", "Normal weights: signal to noise", drawn, caption)


# --- figure 2: a distribution with heavy tails -----------------------------------------------------------------------


def _student(bits: list[int]) -> Iterator[Figure]:
    kurtoses = np.geomspace(*KURTOSES, CURVE)
    distributions = [(float(kurtosis), t_of_kurtosis(float(kurtosis))) for kurtosis in kurtoses]
    for name, what, db in (("pruning", "pruned", pruning_db), ("quantization", "quantized", quantization_db)):
        values = [
            {"kurtosis": kurtosis, "bits": each, "db": db(weights, each), "kept": _kept(each)}
            for kurtosis, weights in distributions
            for each in bits
        ]
        drawn = (
            _chart(values)
            .mark_line()
            .encode(
                x=KURTOSIS,
                y=alt.Y("db:Q", title="signal to noise, dB"),
                color=BITS,
                tooltip=["bits:O", alt.Tooltip("kurtosis:Q", format=".1f"), RATIO],
            )
        )
        caption = f"Student's t with two degrees of freedom, cut at both ends so that it has this kurtosis, and {what}."
        yield figure(f"figure2_{name}", f"Heavy tails: {what}", drawn, caption)
    yield _regions(bits)


def _regions(bits: list[int]) -> Figure:
    """Which method keeps more at each kurtosis, with the kurtosis from which on it is pruning."""
    low, high = KURTOSES
    limits = {each: overtaking_kurtosis(each) for each in bits}
    values = [
        {"bits": each, "from": start, "to": end, "method": method, "limit": limit}
        for each, limit in limits.items()
        for start, end, method in ((low, limit, "quantized"), (limit, high, "pruned"))
    ]
    drawn = (
        _chart(values)
        .mark_bar()
        .encode(
            x=alt.X("from:Q", title="kurtosis", scale=alt.Scale(type="log", nice=False, domain=[low, high])),
            x2="to:Q",
            y=alt.Y("bits:O", title="bits"),
            color=alt.Color("method:N", title="keeps more if", sort=["quantized", "pruned"]),
            tooltip=["bits:O", alt.Tooltip("limit:Q", title="pruning keeps more from a kurtosis of", format=".2f")],
        )
    )
    told = ", ".join(f"{limit:.1f} at {each} bits" for each, limit in limits.items())
    caption = f"Pruning keeps more of this distribution from a kurtosis of {told} on."
    return figure("figure2_regions", "Heavy tails: which keeps more", drawn, caption)


# --- figure 3: the tensors of networks -------------------------------------------------------------------------------


def _values(networks: list[Network]) -> Values:
    """Return each tensor at each bit width, where it has a kurtosis and both ratios are finite."""
    return [
        {
            "network": network.name,
            "tensor": tensor.name,
            "kurtosis": tensor.kurtosis,
            "bits": width.bits,
            "quantization": round(width.quantization_db, 3),
            "pruning": round(width.pruning_db, 3),
            "pruned": width.better == "prune",
        }
        for network in networks
        for tensor in network.tensors
        for width in tensor.widths
        if tensor.kurtosis is not None
        if width.quantization_db is not None and math.isfinite(width.quantization_db)
        if width.pruning_db is not None and math.isfinite(width.pruning_db)
    ]


def _left_out(networks: list[Network], values: Values) -> str:
    every = sum(len(network.tensors) * len(network.bits) for network in networks)
    lost = every - len(values)
    return f" {lost} of {every} points have no finite place and are left out." if lost else ""


TIP = [
    "network:N",
    "tensor:N",
    "bits:O",
    alt.Tooltip("kurtosis:Q", format=".1f"),
    alt.Tooltip("quantization:Q", title="quantized, dB", format=".2f"),
    alt.Tooltip("pruning:Q", title="pruned, dB", format=".2f"),
]


def _scatter(values: Values, left_out: str) -> Figure:
    """Every tensor at every bit width: its ratio after pruning over that after quantization."""
    ratios = [value[key] for value in values for key in ("quantization", "pruning")]
    ends = [{"at": end} for end in (min(ratios, default=0.0), max(ratios, default=1.0))]
    x = alt.X("quantization:Q", title="signal to noise, quantized, dB")
    points = (
        _chart(values)
        .mark_point(filled=True, opacity=0.7, size=30)
        .encode(x=x, y=alt.Y("pruning:Q", title="signal to noise, pruned, dB"), color=BITS, tooltip=TIP)
    )
    line = _chart(ends).mark_line(strokeDash=[6, 4], color="#999999").encode(x="at:Q", y="at:Q")
    caption = "Each point is a weight tensor at a bit width; above the dashed line, pruning keeps more." + left_out
    return figure("figure3_tensors", "Every weight tensor", alt.layer(line, points), caption)


def _regions_of_tensors(values: Values) -> Figure:
    """For each bit width the share of tensors for which pruning keeps more, over their kurtosis."""
    logs = np.log10([value["kurtosis"] for value in values]) if values else np.zeros(0)
    each = _chart(values, alt.Step(34))
    y = alt.Y("bits:O", title="bits")
    cells = (
        _chart(list(_cells(values, logs)), alt.Step(34))
        .mark_rect(opacity=0.6)
        .encode(
            x=alt.X("from:Q", title="kurtosis", scale=alt.Scale(type="log", nice=False)),
            x2="to:Q",
            y=y,
            color=alt.Color("share:Q", title="better pruned, %", scale=alt.Scale(scheme="blueorange", domain=[0, 100])),
            tooltip=["bits:O", alt.Tooltip("share:Q", title="better pruned, %", format=".0f")],
        )
    )
    ticks = each.mark_tick(color="black", thickness=1, height=12).encode(
        x=KURTOSIS, y=y, opacity=alt.condition("datum.pruned", alt.value(0.9), alt.value(0.25)), tooltip=TIP
    )
    limits = [{"kurtosis": overtaking_kurtosis(bits), "bits": bits} for bits in sorted({it["bits"] for it in values})]
    high = max((value["kurtosis"] for value in values), default=0.0)
    reached = [limit for limit in limits if limit["kurtosis"] <= high]
    marks = (
        _chart(reached, alt.Step(34))
        .mark_point(shape="diamond", filled=True, size=110, color="#D55E00", stroke="white")
        .encode(x=KURTOSIS, y=y, tooltip=["bits:O", alt.Tooltip("kurtosis:Q", format=".2f")])
    )
    drawn = alt.layer(cells, ticks, marks)
    drawn.autosize = alt.AutoSizeParams(type="fit-x", contains="padding")
    caption = (
        "Each tick is a tensor, dark if pruning keeps more of it. Coloured is the density of such tensors over that of"
        " all, smoothed over the logarithm of the kurtosis, where there are tensors. Diamonds: where pruning overtakes"
        " for Student's t."
    )
    return figure("figure3_kurtosis", "Where pruning keeps more", drawn, caption)


def _cells(values: Values, logs: Floats) -> Iterator[dict[str, float]]:
    """Yield, for each bit width and stretch of kurtosis, the density of tensors better pruned over that of all, in %.

    Both densities are sums of normal curves of one width, Scott's rule for all tensors of the bit width.
    """
    widths = np.array([value["bits"] for value in values])
    for bits in sorted({*widths.tolist()}):
        here = widths == bits
        pruned = np.array([value["pruned"] for value in values])[here]
        spread = max(float(logs[here].std()) * here.sum() ** -0.2, NARROWEST)
        edges = np.linspace(logs[here].min() - spread, logs[here].max() + spread, CELLS + 1)
        near = np.exp(-((((edges[1:] + edges[:-1]) / 2)[:, None] - logs[here]) ** 2) / (2 * spread**2))
        every = near.sum(axis=1)
        for start, end, part, whole in zip(10 ** edges[:-1], 10 ** edges[1:], near @ pruned, every, strict=True):
            if whole > NEARBY * every.max():
                yield {"bits": bits, "from": start, "to": end, "share": 100 * part / whole}
