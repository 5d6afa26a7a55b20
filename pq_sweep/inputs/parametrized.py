"""Weights that are computed at each call: parametrizations, weight norms and masks are folded into plain weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from pq_sweep.core.sentences import listed
from pq_sweep.types import UserError


@dataclass(frozen=True)
class Computed:
    """A tensor of a layer that is computed from `sources` at each call, by what, and how to stop that."""

    part: nn.Module
    path: str
    tensor: str
    by: str
    sources: tuple[Tensor, ...]
    compute: Callable[[], Tensor]
    stop: Callable[[], Any]


def fold(module: nn.Module) -> list[str]:
    """Replace computed weights by their values, in place, and return a sentence for each kind of computation.

    Answers stay the same. Layers whose weights come from the same tensors in the same way go on sharing them.
    """
    found = [item for path, part in module.named_modules() for item in _computed(part, path)]
    values = [_value(item) for item in found]  # before any is replaced, since one may come from another's sources
    made: list[tuple[Computed, Tensor]] = []
    for item, value in reversed([*zip(found, values, strict=True)]):  # what was put on last is taken off first
        twin = next((tensor for other, tensor in made if _same(item, other) and torch.equal(tensor, value)), value)
        made.append((item, _replace(item, twin)))
    kinds: dict[str, list[str]] = {}
    for item in found:
        kinds.setdefault(item.by, []).append(f"{item.path}.{item.tensor}".lstrip("."))
    return [f"{by} was folded into {listed(names)}, with the same answers." for by, names in kinds.items()]


def _computed(part: nn.Module, path: str) -> Iterator[Computed]:
    """Yield what a layer computes at each call."""
    if parametrize.is_parametrized(part):
        for tensor, steps in list(part.parametrizations.items()):  # type: ignore[operator, union-attr]
            yield _parametrized(part, path, tensor, steps)
    for hook in list(part._forward_pre_hooks.values()):
        yield from _hooked(part, path, hook)


def _parametrized(part: nn.Module, path: str, tensor: str, steps: Any) -> Computed:
    steps.eval()  # spectral_norm goes on estimating while it trains
    by = " and ".join(type(step).__name__.lstrip("_") for step in steps)
    sources = tuple(steps.parameters()) or tuple(steps.buffers())
    # A tensor that was made from several has no original to go back to; its present value is replaced either way.
    stop = partial(parametrize.remove_parametrizations, part, tensor, leave_parametrized=not steps.is_tensor)
    return Computed(part, path, tensor, f"the parametrization {by}", sources, steps, stop)


def _hooked(part: nn.Module, path: str, hook: Any) -> Iterator[Computed]:
    """Yield what one of torch's older hooks computes."""
    if isinstance(hook, WeightNorm):
        sources = tuple(getattr(part, f"{hook.name}_{end}") for end in "gv")
        compute, stop = partial(hook.compute_weight, part), partial(remove_weight_norm, part, hook.name)
        yield Computed(part, path, hook.name, "weight_norm", sources, compute, stop)
    elif isinstance(hook, SpectralNorm):
        sources = tuple(getattr(part, f"{hook.name}_{end}") for end in ("orig", "u"))
        compute = partial(hook.compute_weight, part, do_power_iteration=False)
        yield Computed(
            part, path, hook.name, "spectral_norm", sources, compute, partial(remove_spectral_norm, part, hook.name)
        )
    elif isinstance(hook, prune.BasePruningMethod):
        name = hook._tensor_name
        hook(part, ())  # a weight norm may read what this mask leaves
        sources = tuple(getattr(part, f"{name}_{end}") for end in ("orig", "mask"))
        yield Computed(
            part, path, name, "a pruning mask", sources, partial(hook.apply_mask, part), partial(_drop_mask, part, name)
        )


def _drop_mask(part: nn.Module, name: str) -> None:
    """Take a mask away and leave the unmasked weight, which another layer may use, as it is."""
    hooks = part._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "_tensor_name", None) == name]:
        del hooks[key]
    delattr(part, name)
    del part._buffers[f"{name}_mask"]
    setattr(part, name, part._parameters.pop(f"{name}_orig"))


def _value(item: Computed) -> Tensor:
    """Compute a weight, or refuse one that cannot be computed or is another each time."""
    where = f"the {item.tensor} of {item.path or 'the network'} ({item.by})"
    try:
        with torch.no_grad():
            first, second = item.compute().detach().clone(), item.compute().detach()
    except Exception as error:
        raise UserError(
            f"{where} cannot be computed ({type(error).__name__}: {' '.join(str(error).split())}); replace it by a"
            " plain Parameter before the network is returned."
        ) from error
    if first.shape != second.shape or not torch.equal(first.nan_to_num(), second.nan_to_num()):
        raise UserError(
            f"{where} is another at each call, so no two answers are alike; replace it by a plain Parameter before the"
            " network is returned."
        )
    return first


def _same(item: Computed, other: Computed) -> bool:
    """Say whether two weights come from the same tensors."""
    return [id(source) for source in item.sources] == [id(source) for source in other.sources]


def _replace(item: Computed, value: Tensor) -> Tensor:
    """Put a value in place of a computation, as a Parameter if it came from one, and return it."""
    trained = [source for source in item.sources if isinstance(source, nn.Parameter)]
    item.stop()
    item.part._parameters.pop(item.tensor, None)
    item.part._buffers.pop(item.tensor, None)
    if not trained:
        item.part.register_buffer(item.tensor, value)
        return value
    grown = any(source.requires_grad for source in trained)
    kept = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=grown)
    setattr(item.part, item.tensor, kept)  # recurrent layers note their weights when they are set
    return kept
