"""Which method keeps more of a layer's output whatever the algorithm, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pq_sweep.study.layers.effects import METHODS, correlation
from pq_sweep.study.layers.gather import Network
from pq_sweep.study.layers.slices import Found

QUANTIZE, PRUNE, OPEN = "quantize", "prune", "open"


def better(found: Found) -> str:
    """Return what keeps more whatever the algorithm: `quantize`, `prune`, or `open` if that is not known.

    Quantization is better if what the heuristic reaches is ahead of pruning with the best weights, where these are
    proven. Pruning is better if what it reaches is ahead of the bound that holds for every quantization.
    """
    if found.is_proven and found.heuristic < found.exact:
        return QUANTIZE
    return PRUNE if found.exact < found.bound else OPEN


def summary(found: list[Found]) -> str:
    """Return a sentence on all slices of a network at each bit width."""
    widths = sorted({each.bits for each in found})
    return "; ".join(_at(bits, [each for each in found if each.bits == bits]) for bits in widths) + "."


def _at(bits: int, found: list[Found]) -> str:
    kinds = [better(each) for each in found]
    told = {QUANTIZE: "quantization keeps more of {}", PRUNE: "pruning keeps more of {}", OPEN: "{} stay undecided"}
    parts = [
        told[kind].format(f"{kinds.count(kind)} of {len(kinds)} slices")
        for kind in (QUANTIZE, PRUNE, OPEN)
        if kind in kinds
    ]
    return f"at {bits} bits " + " and ".join(parts) + ", whatever the algorithm" * (kinds.count(OPEN) < len(kinds))


def effect(network: Network) -> Iterator[str]:
    """Yield a sentence on how a layer's noise and the loss of accuracy go together, if that was looked at."""
    drops = list(network.drops())
    for method in METHODS:
        own = [(each.noise, drop) for each, drop in drops if each.method == method]
        if own:
            found, most = correlation(*zip(*own, strict=True)), max(drop for _, drop in own)
            told = "is not defined, as one of both never changes" if found is None else f"is {found:.2f}"
            counts = f"{len(own)} cases, {drops[0][0].images} images, at most {most:.1f} points lost"
            yield (
                f"with one layer {method} at a time, the rank correlation of its output's noise and the accuracy lost"
                f" {told} ({counts})."
            )


def advice(layer: list[Found]) -> str:
    """Return a sentence on the slices of one layer."""
    parts = [
        f"{verb} at {_numbers(widths)} bits"
        for verb, kind in (("quantize", QUANTIZE), ("prune", PRUNE), ("undecided", OPEN))
        if (widths := [bits for bits in sorted({each.bits for each in layer}) if _kind(layer, bits) == kind])
    ]
    return ", ".join(parts) + "."


def _kind(layer: list[Found], bits: int) -> str:
    """Return what is better for all slices of a layer at a bit width."""
    kinds = {better(each) for each in layer if each.bits == bits}
    return kinds.pop() if len(kinds) == 1 else OPEN


def _numbers(widths: Iterable[int]) -> str:
    *first, last = map(str, widths)
    return f"{', '.join(first)} and {last}" if first else last
