"""What users put around a network or its parts to compile it, to spread it over devices, or to average its weights."""

from __future__ import annotations

from inspect import getattr_static
from types import FunctionType
from typing import Any

from torch import nn

from pq_sweep.core.sentences import listed

INNER = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
# Where torch.compile keeps the function that it was given, and what it marks instead not to compile it.
ORIGINAL, EXEMPT = "_torchdynamo_orig_callable", "_torchdynamo_disable"
# What every network has, apart from its own forward.
COMMON = frozenset(dir(nn.Module)) - {"forward"}


def unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the network itself, in which no part is wrapped or compiled, and a sentence for each thing taken off."""
    module, kinds = _taken_out(module)
    notes = [f"The network was taken out of its {kind}." for kind in kinds]
    off: dict[str, list[str]] = {}
    for path, part in list(module.named_modules()):
        for name, child in part._modules.items():
            inner, kinds = _taken_out(child)
            for kind in kinds:
                part._modules[name] = inner
                off.setdefault(kind, []).append(f"{path}.{name}".lstrip("."))
    notes += [f"{listed(names)} of the network was taken out of its {kind}." for kind, names in off.items()]
    compiled = [path or "the network" for path, part in module.named_modules() if _not_compiled(part)]
    return module, notes + ([f"torch.compile was taken off {listed(compiled)}."] if compiled else [])


def _taken_out(module: Any) -> tuple[Any, list[str]]:
    """Return what is within wrappers, and the kinds of these."""
    kinds = []
    while (inner := INNER.get(type(module).__name__)) and isinstance(getattr(module, inner, None), nn.Module):
        kinds.append(type(module).__name__)
        module = getattr(module, inner)
    return module, kinds


def _not_compiled(part: nn.Module) -> bool:
    """Have a part run its own forward and functions as they were written; say whether any was compiled."""
    found = vars(part).pop("_compiled_call_impl", None) is not None
    for name, value in list(vars(part).items()):
        if (original := _original(value)) is not None:
            vars(part)[name], found = original, True
    for name in [name for name in dir(type(part)) if name not in COMMON and name not in vars(part)]:
        if (original := _original(getattr_static(type(part), name))) is not None:
            vars(part)[name], found = original.__get__(part), True
    return found


def _original(value: Any) -> Any:
    """Return the function of which torch.compile made this one, or None."""
    compiled = isinstance(value, FunctionType) and not getattr(value, EXEMPT, False)
    return getattr(value, ORIGINAL, None) if compiled else None
