"""Sentences: what to do with a tensor, and with a network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pq_sweep.study.weights.errors import FULL_BITS
from pq_sweep.study.weights.networks import Choice, Network, Tensor


def advice(tensor: Tensor) -> str:
    """Say whether to quantize or to prune a tensor, and from which bit width on."""
    if tensor.zeros == 1:
        return "all weights are zero, so nothing is lost either way."
    quantized, pruned, either = (tensor.where(choice) for choice in _CHOICES)
    bits = [width.bits for width in tensor.widths]
    parts = []
    if quantized:
        parts.append(f"quantize {_widths(quantized, bits)}")
    if pruned:
        parts.append(f"prune {_widths(pruned, bits)}, which keeps {_shares(pruned)} of the weights")
    if either:
        parts.append(f"take either {_widths(either, bits)}, as both lose the same")
    return "; ".join(parts) + "."


_CHOICES: tuple[Choice, ...] = ("quantize", "prune", "either")


def summary(network: Network) -> str:
    """Say from which bit width on a network is better quantized, and how many tensors are better pruned below."""
    bits, count = network.bits, len(network.tensors)
    pruned = {each: network.pruned(each) for each in bits}
    clear = [each for each in bits if not any(pruned[other] for other in bits if other >= each)]
    kept = "its only tensor keeps" if count == 1 else f"each of its {count} tensors keeps"
    first = "no width suits all tensors"
    if clear:
        first = f"quantize {_widths(clear, bits)}, where {kept} at least as much as after pruning to the same size"
    counts = _counts(network, {each: found for each, found in pruned.items() if found})
    return f"{network.name}: {'; '.join([first, *counts])}."


def _counts(network: Network, pruned: dict[int, list[Tensor]]) -> Iterator[str]:
    """Say how many tensors are better pruned at each bit width."""
    for number, (bits, found) in enumerate(pruned.items()):
        share = f"({_percent(sum(tensor.weights for tensor in found) / network.weights())} of the weights)"
        better = f"of {len(network.tensors)} tensors {share} {'is' if len(found) == 1 else 'are'} better pruned"
        yield f"at {bits} bits {len(found)} {better if not number else share}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _widths(some: list[int], bits: list[int]) -> str:
    """Name bit widths: all, those from one on, or each."""
    if some == [*range(2, 9)]:
        return "at every width from 2 to 8 bits"
    if 1 < len(some) < len(bits) and some == bits[-len(some) :]:
        return f"from {some[0]} bits on"
    return f"at {_listed(some, some)} bits"


def _shares(bits: list[int]) -> str:
    return f"{_listed([each / FULL_BITS * 100 for each in bits], bits)} %"


def _listed(values: Sequence[float], bits: list[int]) -> str:
    """List a value for each bit width; of many widths in a row only the first and the last."""
    words = [f"{value:g}" for value in values]
    if len(bits) > 2 and bits == [*range(bits[0], bits[-1] + 1)]:
        return f"{words[0]} to {words[-1]}"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
