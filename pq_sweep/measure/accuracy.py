"""Accuracy, counted image by image, with its interval."""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pq_sweep.core.result import Accuracy
from pq_sweep.core.threads import one_thread
from pq_sweep.measure.significance import Z95
from pq_sweep.types import Data, Session, Split, UserError


def accuracy(session: Session, data: Data, batch_size: int, advice: str = "") -> tuple[Accuracy, np.ndarray]:
    """Run the evaluation images once: top-1 and top-5 over samples, and the predicted class of each image (N,).

    Logits that are not finite are a UserError, which ends in `advice`.
    """
    hits1 = hits5 = 0
    predictions: list[np.ndarray] = []
    total = math.ceil(len(data.evaluation) / batch_size)
    batches = data.evaluation.batches(batch_size, session.device)
    bar = tqdm(batches, total=total, desc="accuracy", unit="batch", disable=None, leave=False)
    with nullcontext() if session.runtime == "torch" else one_thread():
        for images, labels in bar:
            logits = data.logits(session(images))
            _require_finite(logits, session, data.evaluation, sum(len(part) for part in predictions), advice)
            places = rank(logits, labels)
            hits1 += int((places < 1).sum())
            hits5 += int((places < 5).sum())
            predictions.append(logits.argmax(dim=1).cpu().numpy())
    samples = len(data.evaluation)
    found = Accuracy(
        samples=samples,
        batch_size=batch_size,
        top1=hits1 / samples,
        top1_ci95=wilson(hits1, samples),
        # With five classes or fewer every answer is among the first five.
        top5=hits5 / samples if len(data.classes) > 5 else None,
    )
    return found, np.concatenate(predictions)


def _require_finite(logits: Tensor, session: Session, split: Split, start: int, advice: str) -> None:
    """Raise a UserError that names the first image of a batch, which begins at `start`, with a logit not finite."""
    wrong = logits.isfinite().all(dim=1).logical_not()
    if wrong.any():
        index = start + int(wrong.nonzero()[0])
        raise UserError(
            f"{session.engine} answers evaluation image {split.names[index] if split.names else index} with logits that"
            f" are not finite; {advice or 'check the weights and this image'}."
        )


def rank(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many classes come before the true one (B,), in (B, classes) logits.

    Quantized logits are often equal; then the first class counts first, as for argmax. NaN never counts as a hit.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier) | logits.isnan()
    return before.sum(dim=1) + own.isnan()[:, 0] * logits.shape[1]


def wilson(hits: int, samples: int, z: float = Z95) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927)."""
    share = hits / samples
    centre = share + z * z / (2 * samples)
    spread = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    # At 0 and 1 the bounds are exact; rounding would leave a tiny rest.
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return (low if hits else 0.0), (high if hits < samples else 1.0)
