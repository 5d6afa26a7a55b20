"""Images as a user's data set gives them: PIL images, arrays and tensors of bytes become a model's inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pq_sweep.inputs.image_cache import fit, normalise
from pq_sweep.types import Preprocess

Prepare = Callable[[Any], Any]
PREPARED = "and were resized, cropped and normalised as the model's Preprocess says"


def preparing(first: Any, preprocess: Preprocess) -> tuple[Prepare | None, str]:
    """Return what makes an input of an image such as the first one, and how to call that; None if it is one already.

    Bytes are pictures that nobody has prepared yet; numbers of other types were, and only change their type.
    """
    if isinstance(first, Image.Image):
        return partial(_of_picture, preprocess=preprocess), f"PIL images {PREPARED}"
    if isinstance(first, np.ndarray | Tensor) and first.dtype in (np.uint8, torch.uint8):
        return partial(_of_bytes, preprocess=preprocess), f"uint8 values {PREPARED}"
    if isinstance(first, np.ndarray) and np.issubdtype(first.dtype, np.floating):
        return _of_floats, f"{first.dtype} numpy arrays and were taken as float32 tensors"
    if isinstance(first, Tensor) and first.is_floating_point() and first.dtype != torch.float32:
        return _of_floats, f"{str(first.dtype).removeprefix('torch.')} and were converted to float32"
    return None, ""


def _of_picture(image: Image.Image, preprocess: Preprocess) -> Tensor:
    return normalise(torch.from_numpy(np.array(fit(image, preprocess).pixels))[None], preprocess)[0]


def _of_bytes(image: np.ndarray | Tensor, preprocess: Preprocess) -> Tensor:
    """Prepare (H, W), (H, W, C) or (C, H, W) bytes; channels come first if the last dimension cannot be channels."""
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    return _of_picture(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array), preprocess)


def _of_floats(image: np.ndarray | Tensor) -> Tensor:
    return torch.as_tensor(np.array(image) if isinstance(image, np.ndarray) else image).to(torch.float32)
