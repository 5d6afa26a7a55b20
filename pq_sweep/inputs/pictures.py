"""Images as a user's data set gives them: PIL images, arrays and tensors of bytes become a model's inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pq_sweep.inputs.contract import described
from pq_sweep.inputs.image_cache import fit, normalise
from pq_sweep.types import Preprocess, UserError

Prepare = Callable[[Any], Any]
# Where the channels of prepared values may be, and how a note says so.
ORDERS = {"last": "with channels last and were turned to channels first", "none": "without channels and were given one"}
PREPARED = "and were resized, cropped and normalised as the model's Preprocess says"


def preparing(first: Any, preprocess: Preprocess) -> tuple[Prepare | None, list[str]]:
    """Return what makes an input of an image such as the first one, and phrases for a note; None if it is one already.

    Bytes are pictures that nobody has prepared yet; numbers of other types were, and only change their type, and their
    order if that is plain.
    """
    if isinstance(first, Image.Image):
        return partial(_of_picture, preprocess=preprocess), [f"images came as PIL images {PREPARED}"]
    if isinstance(first, np.ndarray | Tensor) and first.dtype in (np.uint8, torch.uint8):
        return partial(_of_bytes, preprocess=preprocess), [f"images came as uint8 values {PREPARED}"]
    if isinstance(first, np.ndarray) and np.issubdtype(first.dtype, np.floating):
        notes = [f"images came as {first.dtype} numpy arrays and were taken as float32 tensors"]
    elif isinstance(first, Tensor) and first.is_floating_point():
        kind = str(first.dtype).removeprefix("torch.")
        notes = [] if kind == "float32" else [f"images came as {kind} and were converted to float32"]
    else:
        return None, []
    order = _order(tuple(first.shape), preprocess)
    notes += [f"images came {ORDERS[order]}"] if order else []
    return partial(_of_floats, order=order) if notes else None, notes


def _of_picture(image: Image.Image, preprocess: Preprocess) -> Tensor:
    return normalise(torch.from_numpy(np.array(fit(image, preprocess).pixels))[None], preprocess)[0]


def _of_bytes(image: np.ndarray | Tensor, preprocess: Preprocess) -> Tensor:
    """Prepare (H, W), (H, W, C) or (C, H, W) bytes."""
    array = np.asarray(image)
    first, last = (array.ndim == 3 and array.shape[place] in (1, 3, 4) for place in (0, 2))
    if array.ndim != 2 and first == last:
        why = "of which the channels may be first or last" if first else "which are no (H, W), (H, W, 3) or (3, H, W)"
        raise UserError(f"an image comes as {described(image)}, {why}; give PIL images, or (H, W, 3).")
    if first:
        array = array.transpose(1, 2, 0)
    return _of_picture(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array), preprocess)


def _order(shape: tuple[int, ...], preprocess: Preprocess) -> str:
    """Return where the channels of an image of prepared values are, if they are plainly elsewhere than first."""
    side, channels = preprocess.size, preprocess.channels
    if shape == (side, side, channels) and channels in (1, 3) and side != channels:
        return "last"
    return "none" if shape == (side, side) and channels == 1 else ""


def _of_floats(image: np.ndarray | Tensor, *, order: str) -> Tensor:
    values = torch.as_tensor(np.array(image) if isinstance(image, np.ndarray) else image).to(torch.float32)
    if order == "last" and values.dim() == 3:
        return values.permute(2, 0, 1)
    return values[None] if order == "none" and values.dim() == 2 else values
