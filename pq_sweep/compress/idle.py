"""Parts that run in training mode alone, such as auxiliary classifiers: removal follows an answer and misses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pq_sweep.types import Model


def idle_parts(model: Model) -> dict[str, nn.Module]:
    """Return the outermost parts with parameters of which nothing runs in eval mode, in which the network is left."""
    ran: set[nn.Module] = set()
    model.module.eval()
    hooks = [part.register_forward_pre_hook(lambda part, _: ran.add(part)) for part in model.module.modules()]
    try:
        with torch.no_grad():
            model.module(model.sample())
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, nn.Module] = {}
    for name, part in model.module.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in found)
        if not within and ran.isdisjoint(part.modules()) and next(part.parameters(), None) is not None:
            found[name] = part
    return found


def misfits(model: Model) -> dict[str, nn.Module]:
    """Return the idle parts if the network fails in training mode, where they run."""
    idle, buffers = idle_parts(model), {one: one.clone() for one in model.module.buffers()}
    if not idle:
        return {}
    try:
        model.module.train()
        with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad():
            model.module(model.sample())
    except Exception:
        return idle
    finally:
        for buffer, values in buffers.items():
            buffer.copy_(values)
    return {}


@contextmanager
def left_out(parts: dict[str, nn.Module]) -> Iterator[None]:
    """Have parts give None instead of running."""
    before = {part: vars(part).get("forward") for part in parts.values()}
    for part in before:
        vars(part)["forward"] = _nothing
    try:
        yield
    finally:
        for part, own in before.items():
            vars(part).pop("forward")
            if own is not None:
                vars(part)["forward"] = own


def _nothing(*_: Any, **__: Any) -> None:
    """Stand for a part that is left out."""
