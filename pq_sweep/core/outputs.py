"""What a network gives for images: its logits, or several things of which one is the logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def entries(output: Any) -> dict[Any, Any]:
    """Return the entries of a dictionary, named tuple, tuple, list or dataclass by key."""
    if isinstance(output, Mapping):
        return dict(output)
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return dict(vars(output)) if hasattr(output, "__dataclass_fields__") else {}


def holds_logits(value: Any, images: int, classes: int) -> bool:
    """Say whether a value has a logit per image and class, whatever dimensions of size one it has or lacks."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return [size for size in value.shape if size != 1] == [size for size in (images, classes) if size != 1]


def logits_key(output: Any, images: int, classes: int) -> Any:
    """Return the key of the entry that plainly is the logits, or None: that name, or the only one of their shape."""
    found = [key for key, value in entries(output).items() if holds_logits(value, images, classes)]
    if "logits" in found:
        return "logits"
    return found[0] if len(found) == 1 else None


def training_key(output: Any, images: int, classes: int) -> Any:
    """Return the key of the logits among what a network gives in training mode, or None.

    Networks with auxiliary classifiers give the logits first there.
    """
    key = logits_key(output, images, classes)
    first = next(iter(entries(output).values()), None)
    if key is None and isinstance(output, tuple | list) and holds_logits(first, images, classes):
        return next(iter(entries(output)))
    return key


def take_logits(
    module: nn.Module, inputs: tuple[Any, ...], output: Any, *, key: Any, shape: tuple[int, ...] | None
) -> Any:
    """Return of what a network gives the logits in float32, for each image in this shape; a forward hook.

    What has no such entry is left as it is: in training mode, a network may give something else.
    """
    found = output if isinstance(output, Tensor) else entries(output).get(key)
    if not isinstance(found, Tensor):
        return output
    return found.float() if shape is None else found.float().reshape(inputs[0].shape[0], *shape)


def named(key: Any) -> str:
    """Name an entry of an output."""
    return key if isinstance(key, str) else f"entry {key}"
