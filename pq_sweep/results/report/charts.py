"""The figures as Vega-Lite: the page in a browser and the files of `--figures` are drawn from the same description.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; shapes and dashes repeat what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import altair as alt

from pq_sweep.results.report.views import View, variant

COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442"]
HEIGHT = 320
LOG = alt.Scale(type="log", nice=False, padding=16)
LEGEND = alt.LegendConfig(orient="bottom", columns=4, labelLimit=200)
BAR = 22
ACCURACY = "top-1 accuracy, %"
# With more jobs than this, only those on the front have bars: the bars of all would hide everything else.
MANY = 100

Values = list[dict[str, Any]]
Spec = dict[str, Any]


TIP = [
    alt.Tooltip("name:N", title="job"),
    alt.Tooltip("accuracy:Q", format=".2f", title="top-1 %"),
    alt.Tooltip("drop:Q", format=".2f", title="drop, points"),
    alt.Tooltip("latency:Q", format=".4g", title="ms"),
    alt.Tooltip("speedup:Q", format=".2f", title="speed-up"),
    alt.Tooltip("size:Q", format=".4g", title="MB"),
    alt.Tooltip("prep:Q", format=".3g", title="prep s"),
]


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows: `name` is the name of its file, `spec` its Vega-Lite specification."""

    name: str
    title: str
    caption: str
    spec: Spec


Drawn = tuple[alt.TopLevelMixin | None, str]  # the chart, if there is one, and its caption
NOTHING: Drawn = (None, "")


def figures(view: View, only: str | None = None) -> Iterator[Figure]:
    """Yield every figure for which a view has the data, or only the figure of a given name."""
    for name, title, draw in FIGURES:
        if only not in (None, name):
            continue
        chart, caption = draw(view)
        if chart is not None:
            yield figure(name, title, chart, caption)


def figure(name: str, title: str, drawn: alt.TopLevelMixin, caption: str) -> Figure:
    """Return a drawing as a figure in the colours of all."""
    spec = drawn.configure(background="transparent", range=alt.RangeConfig(category=COLOURS), legend=LEGEND).to_dict()
    return Figure(name, title, caption, spec)


def _chart(values: Values, height: Any = HEIGHT) -> alt.Chart:
    chart = alt.Chart(alt.InlineData(values=values), width="container", height=height)
    if isinstance(height, alt.Step):  # a step gives no height to fit into
        chart.autosize = alt.AutoSizeParams(type="fit-x", contains="padding")
    return chart


def pareto(view: View) -> Drawn:
    """Accuracy over latency: jobs further up and to the left are better."""
    values = [point for row in view.finished for point in view.points(row)]
    if not values:
        return NOTHING
    batches = sorted({point["batch"] for point in values})
    batch = alt.param(name="batch", value=batches[0], bind=alt.binding_select(options=batches, name="batch size "))
    zoom = alt.selection_interval(bind="scales", zoom="wheel![event.shiftKey]", name="zoom")
    base = _chart(values).transform_filter("datum.batch == batch")
    x = alt.X("latency:Q", title="median latency, ms", scale=LOG)
    y = alt.Y("accuracy:Q", title=ACCURACY, scale=alt.Scale(zero=False))
    line = (
        base.transform_filter("datum.front")
        .mark_line(interpolate="step-after", color="#999999", strokeDash=[4, 3])
        .encode(x=x, y=y, order="latency:Q")
    )
    crowded = len(view.finished) > MANY
    spread = base.transform_filter("datum.best") if crowded else base
    bars = spread.mark_rule(opacity=0.35).encode(x=x, y=alt.Y("low:Q", title=ACCURACY), y2="high:Q", color=view.colour)
    points = (
        base.mark_point(filled=True)
        .encode(
            x=x,
            y=y,
            color=view.colour,
            shape=alt.Shape("quantizer:N"),
            opacity=alt.condition("datum.best", alt.value(1), alt.value(0.5)),
            size=alt.condition("datum.best", alt.value(220), alt.value(60)),
            tooltip=TIP,
        )
        .add_params(zoom)
    )
    caption = (
        f"Each point is a job, bars are the 95 % interval of its accuracy{', on the front' if crowded else ''}. Large:"
        f" on the Pareto front of {', '.join(view.objectives)}. The line joins what no job beats in accuracy and"
        " latency together. Drag to move, shift and wheel to zoom, double-click to reset."
    )
    return alt.layer(bars, line, points).add_params(batch), caption


def accuracy_by_amount(view: View) -> Drawn:
    """Accuracy over the amount pruned, with a line for each way of pruning."""
    pruned = [row for row in view.finished if row.get("pruner") != "none" and row.get("amount") is not None]
    values = [point | {"variant": variant(row, view.options)} for row in pruned for point in view.points(row)[:1]]
    if len({point["amount"] for point in values}) < 2:
        return NOTHING
    x = alt.X("amount:Q", title="amount", scale=alt.Scale(domainMax=1))
    y = alt.Y("accuracy:Q", title=ACCURACY, scale=alt.Scale(zero=False))
    base = _chart(values).encode(x=x, color=view.colour, detail="variant:N")
    lines = base.mark_line().encode(y=y, strokeDash=alt.StrokeDash("quantizer:N"))
    points = base.mark_point(filled=True).encode(y=y, shape="quantizer:N", tooltip=TIP)
    bars = base.mark_rule(opacity=0.35).encode(y=alt.Y("low:Q", title=ACCURACY), y2="high:Q")
    dense = [{"accuracy": accuracy, "name": "uncompressed"} for accuracy in view.dense_accuracies]
    rule = _chart(dense).mark_rule(strokeDash=[6, 4], color="#999999").encode(y=y, tooltip=["name:N", "accuracy:Q"])
    caption = "Bars are 95 % intervals, or the range of repeated runs; the dashed line is the uncompressed model."
    return alt.layer(rule, bars, lines, points), caption


def latency_by_batch(view: View) -> Drawn:
    """Latency over batch size, with a line for each job."""
    values = [point for row in view.shown for point in view.points(row)]
    if len({point["batch"] for point in values}) < 2:
        return NOTHING
    base = _chart(values).encode(
        x=alt.X("batch:Q", title="batch size", scale=alt.Scale(type="log", base=2, nice=False)),
        y=alt.Y("latency:Q", title="median latency, ms", scale=LOG),
        color=view.colour,
        detail="id:N",
        tooltip=[*TIP, alt.Tooltip("batch:Q")],
    )
    lines = base.mark_line().encode(strokeDash=alt.StrokeDash("quantizer:N"))
    return alt.layer(lines, base.mark_point(filled=True).encode(shape="quantizer:N")), view.selection


def preparation(view: View) -> Drawn:
    """How long each stage of the preparation took."""
    values = [
        {"name": view.label(row), "stage": key.removeprefix("prep_time_s/"), "seconds": seconds}
        for row in view.shown
        for key, seconds in row.items()
        if key.startswith("prep_time_s/")
    ]
    return _bars(values, "stage", "seconds", "preparation, s", stacked=True), view.selection


def storage(view: View) -> Drawn:
    """How large the network is in each format, and the file to deploy."""
    values = [
        {"name": view.label(row), "format": name, "mb": size}
        for row in view.shown
        for name, size in {
            "to deploy": row.get("engine_size_mb"),
            "packed": row["packed_bytes"] / 1e6 if "packed_bytes" in row else None,
            **{key.removeprefix("size_mb/"): value for key, value in row.items() if key.startswith("size_mb/")},
        }.items()
        if size is not None
    ]
    caption = (
        "The file to deploy, its tensors if each weight took just its bits (packed), and the pruned FP32 network in"
        " each format of storage. " + view.selection
    )
    return _bars(values, "format", "mb", "size, MB", stacked=False), caption


def _bars(values: Values, part: str, figure: str, title: str, *, stacked: bool) -> alt.Chart | None:
    """Return horizontal bars, one for each job, with its parts one after or one below the other."""
    if not values:
        return None
    parts = list(dict.fromkeys(value[part] for value in values))
    offset = {} if stacked else {"yOffset": alt.YOffset(f"{part}:N", sort=parts)}
    height = alt.Step(BAR if stacked else 8)
    return (
        _chart(values, height)
        .mark_bar()
        .encode(
            y=alt.Y("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=260)),
            x=alt.X(f"{figure}:Q", title=title, stack="zero" if stacked else None),
            color=alt.Color(f"{part}:N", sort=parts),
            tooltip=["name:N", f"{part}:N", alt.Tooltip(f"{figure}:Q", format=".4g")],
            **offset,
        )
    )


def layer_sparsity(view: View) -> Drawn:
    """The share of each layer's weights that is gone, with a row for each job."""
    values = [
        {
            "name": view.label(row),
            "layer": name.removesuffix(".weight"),
            "gone": (1 - now["nonzero"] / view.layers_of(row)["before"][name]["weights"]) * 100,
        }
        for row in view.shown
        for name, now in view.layers_of(row).get("after", {}).items()
    ]
    if not values:
        return NOTHING
    order = list(dict.fromkeys(value["layer"] for value in values))
    chart = (
        _chart(values, alt.Step(BAR))
        .mark_rect()
        .encode(
            x=alt.X("layer:N", sort=order, title="layer", axis=alt.Axis(labelOverlap=True)),
            y=alt.Y("name:N", sort=None, title=None, axis=alt.Axis(labelLimit=260)),
            color=alt.Color("gone:Q", title="gone, %", scale=alt.Scale(scheme="cividis", domain=[0, 100])),
            tooltip=["name:N", "layer:N", alt.Tooltip("gone:Q", format=".1f", title="gone, %")],
        )
    )
    return chart, "Weights of each layer that are zero or were removed, in the order of the network. " + view.selection


def histograms(view: View) -> Drawn:
    """How the weights of one layer spread before and after."""
    values = [
        {"job": view.label(row), "layer": name.removesuffix(".weight"), **_spread(layers["before"][name], after)}
        for row, layers in view.spreads
        for name, after in layers["after"].items()
    ]
    if not values:
        return NOTHING
    base = (
        _of_one_layer(values)
        .transform_flatten(["before", "after", "place"])
        .transform_calculate(
            value="datum.place * datum.step - datum.limit", end="(datum.place + 1) * datum.step - datum.limit"
        )
        .transform_fold(["before", "after"], as_=["when", "weights"])
    )
    chart = base.mark_bar(opacity=0.6).encode(
        x=alt.X("value:Q", title="weight", axis=alt.Axis(format=".2g")),
        x2="end:Q",
        y2=alt.datum(0),
        y=alt.Y("weights:Q", stack=None, title="number of weights", scale=alt.Scale(type="symlog")),
        color=alt.Color("when:N", title=None, sort=["before", "after"]),
        tooltip=["when:N", alt.Tooltip("weights:Q"), alt.Tooltip("value:Q", format=".3g")],
    )
    caption = "After: what the file to deploy holds; 8-bit weights as the numbers that they stand for. Logarithmic."
    return chart, caption


def _of_one_layer(values: Values) -> alt.Chart:
    """Return a chart of the layer of a job that a reader chooses, whose numbers lie in lists.

    With the numbers written out row by row, the page would be ten times as large.
    """
    jobs, layers = (list(dict.fromkeys(value[key] for value in values)) for key in ("job", "layer"))
    job, layer = (
        alt.param(name=name, value=options[-1], bind=alt.binding_select(options=options, name=f"{name} "))
        for name, options in (("job", jobs), ("layer", layers))
    )
    return (
        _chart(values)
        .add_params(job, layer)
        .transform_filter("datum.job == job && datum.layer == layer")
        .transform_calculate(place="sequence(length(datum.before))")
    )


def codes(view: View) -> Drawn:
    """How often each integer of a layer's weights is there, beside the same network before its graph was pruned."""
    values = [
        {"job": view.label(row), "layer": name.removesuffix(".weight"), **_integers(after["codes"], unpruned.get(name))}
        for row, layers in view.spreads
        for unpruned in [view.codes_before(row)]
        for name, after in layers["after"].items()
        if "codes" in after
    ]
    if not values:
        return NOTHING
    chart = (
        _of_one_layer(values)
        .transform_flatten(["before", "after", "place"])
        .transform_calculate(integer="datum.place + datum.lowest")
        .transform_fold(["before", "after"], as_=["when", "weights"])
        .transform_filter("isValid(datum.weights)")
        .mark_bar(opacity=0.6)
        .encode(
            x=alt.X("integer:Q", title="integer in the file"),
            y=alt.Y("weights:Q", stack=None, title="number of weights", scale=alt.Scale(type="symlog")),
            color=alt.Color("when:N", title=None, sort=["before", "after"]),
            tooltip=["when:N", "integer:Q", "weights:Q"],
        )
    )
    caption = (
        "Integers of the weights in the file to deploy. Before: the same job without pruning, if the sweep has it."
    )
    return chart, f"{caption} Logarithmic."


def representations(view: View) -> Drawn:
    """How near a layer's outputs are to the original's after so many epochs of recovery, with a line for each job."""
    values = [{"name": view.label(row), **layer} for row in view.shown for layer in view.representations_of(row)]
    if not values:
        return NOTHING
    layers = list(dict.fromkeys(value["layer"] for value in values))
    last = max(value["epoch"][-1] for value in values)
    ticks = list(range(0, last + 1, 1 + last // 12))
    layer, figure = (
        alt.param(name=name, value=options[-1], bind=alt.binding_select(options=options, name=f"{name} "))
        for name, options in (("layer", layers), ("figure", ["SNR", "CKA"]))
    )
    base = (
        _chart(values)
        .add_params(layer, figure)
        .transform_filter("datum.layer == layer")
        .transform_flatten(["epoch", "SNR", "CKA"])
        .transform_calculate(value="datum[figure]")
        .transform_filter("isValid(datum.value)")
    )
    chart = base.mark_line(point=True).encode(
        x=alt.X("epoch:Q", title="epochs of recovery (0: after compression)", axis=alt.Axis(values=ticks, format="d")),
        y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
        color=alt.Color("name:N", sort=None, title=None),
        strokeDash=alt.StrokeDash("name:N", sort=None, title=None),
        tooltip=["name:N", "layer:N", "epoch:Q", alt.Tooltip("value:Q", format=".4g")],
    )
    caption = (
        "What a layer gives, beside what the original network's gives for the same images. There is no SNR where"
        " nothing differs, or where channels were removed. "
    )
    title = alt.Title(alt.ExprRef("(figure == 'SNR' ? 'SNR in dB' : 'CKA') + ' of ' + layer"), anchor="start")
    return chart.properties(title=title), caption + view.selection


def _integers(after: dict[str, Any], before: dict[str, Any] | None) -> dict[str, Any]:
    """Return how often each integer is there before and after, over the integers of both."""
    both = [after, *([before] if before else [])]
    lowest = min(each["lowest"] for each in both)
    length = max(each["lowest"] + len(each["counts"]) for each in both) - lowest
    return {"lowest": lowest, "after": _laid(after, lowest, length), "before": _laid(before, lowest, length)}


def _laid(found: dict[str, Any] | None, lowest: int, length: int) -> list[int | None]:
    if found is None:
        return [None] * length
    start = found["lowest"] - lowest
    return [*([0] * start), *found["counts"], *([0] * (length - start - len(found["counts"])))]


def _spread(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    bins = len(before["counts"])
    return {
        "before": before["counts"],
        "after": after["counts"],
        "limit": before["limit"],
        "step": 2 * before["limit"] / bins,
    }


FIGURES: tuple[tuple[str, str, Callable[[View], Drawn]], ...] = (
    ("pareto", "Accuracy against latency", pareto),
    ("accuracy_by_amount", "Accuracy against the amount pruned", accuracy_by_amount),
    ("latency_by_batch", "Latency against batch size", latency_by_batch),
    ("preparation", "Time of preparation", preparation),
    ("storage", "Size by format", storage),
    ("layer_sparsity", "Sparsity of each layer", layer_sparsity),
    ("histograms", "Weights before and after", histograms),
    ("codes", "Integers of the weights", codes),
    ("representations", "Representations while the network is recovered", representations),
)
