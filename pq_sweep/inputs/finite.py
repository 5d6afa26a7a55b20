"""Weights that are numbers: what is not finite is named before it spoils a figure."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from pq_sweep.types import UserError


def require_finite(module: nn.Module, what: str, advice: str) -> None:
    """Raise a UserError that names the first weight or statistic of a network that has a NaN or an infinite value."""
    wrong = [name for name, tensor, infinite in _tensors(module) if not _sound(tensor, infinite)]
    if wrong:
        others = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{what} has values that are not finite, in {wrong[0]}{others}; {advice}.")


def is_finite(tensor: Tensor) -> bool:
    """Say whether all values are finite; their sum says so in a fraction of the time, unless it overflows."""
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.sum().isfinite():
        return True
    return bool(tensor.isfinite().all())


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield parameters and buffers, and whether infinity is allowed: masks of attention hold it on purpose."""
    for name, parameter in module.named_parameters():
        yield name, parameter.detach(), False
    for name, buffer in module.named_buffers():
        yield name, buffer, not name.endswith(("running_mean", "running_var"))


def _sound(tensor: Tensor, infinite: bool) -> bool:
    return is_finite(tensor) or (infinite and not bool(tensor.isnan().any()))
