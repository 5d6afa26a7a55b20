"""Mixed precision: which layers stay out of 8 bit, chosen by how much accuracy 8 bit costs."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.compress.qdq import MATRIX_OPERATORS, Calibrated, halved, layer_weights, sharing
from pq_sweep.types import Data

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

log = logging.getLogger(__name__)

# A few images suffice to see the noise of one layer; the accuracy of a choice needs all of them.
SENSITIVITY_IMAGES = 16
# Stands for "no noise at all", which has no decibel.
SILENT_DB = 200.0


@dataclass(frozen=True)
class Layer:
    """A layer with weights, and the signal-to-noise ratio (dB) of the logits when it alone is in 8 bit."""

    node: str
    name: str
    snr_db: float


@dataclass(frozen=True)
class Plan:
    """The layers in the network's order, those that stay in `keep`, and the drops (points) seen on the way."""

    graph: Calibrated
    layers: list[Layer]
    kept: list[Layer]
    keep: str
    drops: dict[int, float]

    def model(self) -> onnx.ModelProto:
        """Return the graph in mixed precision; if no layer is left in 8 bit, nothing else is either."""
        import onnx

        nodes = [node.name for node in self.graph.model.graph.node]
        kept = sharing(self.graph.model, [layer.node for layer in self.kept])
        everything = len(self.kept) == len(self.layers)
        model = self.graph.quantized(exclude=nodes if everything else kept)
        if self.keep == "fp16" and kept:
            others = [] if everything else [node.name for node in model.graph.node if node.name not in kept]
            model = halved(model, others)
        assert isinstance(model, onnx.ModelProto)
        return model

    def write(self, target: Path) -> None:
        """Write the graph in mixed precision."""
        import onnx

        onnx.save(self.model(), target)

    @property
    def record(self) -> dict[str, Any]:
        """Return which layer got which precision and why."""
        precisions = {layer.name: self.keep if layer in self.kept else "int8" for layer in self.layers}
        return {
            "layers": [{"name": x.name, "snr_db": x.snr_db, "precision": precisions[x.name]} for x in self.layers],
            "kept_layers": len(self.kept),
            "calibration_drop_points": self.drops[len(self.kept)],
            "drop_points_by_kept_layers": {str(count): drop for count, drop in sorted(self.drops.items())},
        }

    def draw(self, path: Path) -> None:
        """Draw the noise of each layer, coloured by its precision."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 1.5 + 0.18 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        for precision, colour in (("int8", "tab:blue"), (self.keep, "tab:orange")):
            chosen = [layer for layer in self.layers if (layer in self.kept) == (precision == self.keep)]
            places = [self.layers.index(layer) for layer in chosen]
            axes.barh(places, [layer.snr_db for layer in chosen], color=colour, label=f"{precision}: {len(chosen)}")
        axes.set_yticks(range(len(self.layers)), [layer.name for layer in self.layers], fontsize=6)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_xlabel("signal-to-noise ratio of the logits with this layer alone in INT8 (dB)")
        axes.set_title(f"drop on calibration images: {self.drops[len(self.kept)]:.2f} points")
        axes.legend()
        figure.savefig(path)


def plan_precisions(graph: Calibrated, data: Data, *, max_drop: float, keep: str) -> Plan:
    """Find by bisection how few of the worst layers have to stay in `keep` for a drop of at most `max_drop` points."""
    layers = rank_layers(graph, data)
    worst_first = sorted(layers, key=lambda layer: layer.snr_db)
    reference = _top1(graph.model, data)
    # With every layer kept the graph is the reference: nothing is lost.
    plan = Plan(graph, layers, worst_first, keep, {len(layers): 0.0})
    low, high, count = 0, len(layers), 0
    while low < high:
        trial = replace(plan, kept=worst_first[:count])
        plan.drops[count] = (reference - _top1(trial.model(), data)) * 100
        low, high = (low, count) if plan.drops[count] <= max_drop else (count + 1, high)
        count = (low + high) // 2
    plan = replace(plan, kept=worst_first[:high])
    names = ", ".join(layer.name for layer in plan.kept) or "none"
    log.info("%d of %d layers stay in %s: %s", len(plan.kept), len(layers), keep, names)
    return plan


def rank_layers(graph: Calibrated, data: Data) -> list[Layer]:
    """Measure for each layer how much noise it adds to the logits when it alone is in 8 bit.

    Nodes that share their weight are one layer.
    """
    from tqdm import tqdm

    images = data.calibrating().take(SENSITIVITY_IMAGES)
    (inputs, _) = next(images.batches(len(images)))
    reference = data.logits(_session(graph.model)(inputs))
    layers = []
    operators = {node.name: node.op_type for node in graph.model.graph.node}
    weights: dict[tuple[str, ...], str] = {}
    for node, found in layer_weights(graph.model).items():
        if operators[node] in MATRIX_OPERATORS:
            weights.setdefault(tuple(found), node)
    for names, node in tqdm(weights.items(), desc="sensitivity", unit="layer", disable=None, leave=False):
        logits = data.logits(_session(graph.quantized(only=[node]))(inputs))
        layers.append(Layer(node, names[0], snr_db(reference, logits)))
    return layers


def snr_db(signal: Tensor, noisy: Tensor) -> float:
    """Return the ratio of the power of a signal to that of the noise added to it, in decibel, from -200 to 200."""
    noise = float((noisy - signal).double().square().sum())
    power = float(signal.double().square().sum())
    if noise == 0 or power == 0:
        return SILENT_DB if noise == 0 else -SILENT_DB
    return min(SILENT_DB, 10 * math.log10(power / noise))


def _top1(model: onnx.ModelProto, data: Data) -> float:
    """Return the share of the calibration images that a graph gets right."""
    from pq_sweep.measure.accuracy import accuracy

    found, _ = accuracy(_session(model), replace(data, evaluation=data.calibration), 64)
    return found.top1


def _session(model: onnx.ModelProto) -> Any:
    """Open a graph on the CPU, where QDQ computes the same as on any device."""
    import onnxruntime
    import torch

    from pq_sweep.runtimes import CallSession
    from pq_sweep.runtimes.ort import CPU, Unbound, engine

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=[CPU])
    return CallSession(Unbound(session), "onnxruntime", engine(CPU), "cpu", Path(), {})
