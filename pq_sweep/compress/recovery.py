"""Recovery after pruning: each changes the network in place; its time counts as prep time.

A recovery may return a record; its `notes` are sentences for the row. One that takes `observe` calls it before its
first epoch, when all is compressed and nothing is recovered yet, and after each. `pq_sweep.compress.lsq` has the one
that trains with the rounding of weights.
"""

from __future__ import annotations

import logging

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from pq_sweep.compress.observing import Observe, unobserved
from pq_sweep.compress.training import Recipe, apply, enough_values, finite, led, train, zeros_of
from pq_sweep.types import Data, Model, Record, UserError

log = logging.getLogger(__name__)

# Training images from which BatchNorm's statistics are measured at the end of a training that ends with that.
REESTIMATED = 1024


def none(model: Model, data: Data, *, observe: Observe = unobserved) -> None:
    """Leave the network as the pruner left it."""
    observe(0)


def bn_reestimate(model: Model, data: Data, *, images: int, batch_size: int, observe: Observe = unobserved) -> None:
    """Measure BatchNorm's means and variances anew on up to `images` training images, without labels or training.

    Uses the calibration images if there are no training images. Only BatchNorm runs in training mode: dropout and
    stochastic depth would distort what it sees. A last, smaller batch is left out, since all batches count equally.
    """
    if not _normalising(model):
        raise UserError("recovery=bn_reestimate needs BatchNorm layers and this model has none; use none or finetune.")
    observe(0)
    _measure(model, data, images, batch_size, of="recovery=bn_reestimate", instead="recovery=none")
    observe(1)


def finetune(
    model: Model,
    data: Data,
    *,
    epochs: int,
    lr: float,
    batch_size: int = 64,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    augment: list[str] | None = None,
    observe: Observe = unobserved,
) -> Record:
    """Train all weights for `epochs` with a one-cycle schedule up to `lr`; weights that are zero stay zero.

    Weights that do not require gradients are left as they are, which a note says.
    """
    recipe = Recipe(
        "recovery=finetune", "recovery=none", epochs, lr, batch_size, optimizer, weight_decay, augment or []
    )
    recipe.images(model, data)
    masks = zeros_of(model.module)
    notes = train(model, data, recipe, after_step=lambda step, steps: apply(masks), observe=observe)
    for note in notes:
        log.warning(note)
    return {"notes": notes}


def reestimate(model: Model, data: Data, recipe: Recipe) -> None:
    """Measure BatchNorm's statistics anew after a training, if the network has any."""
    _measure(model, data, REESTIMATED, recipe.batch_size, of=recipe.of, instead=recipe.instead)


def _normalising(model: Model) -> list[_BatchNorm]:
    """Return the BatchNorm layers that have statistics."""
    layers = [part for part in model.module.modules() if isinstance(part, _BatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None]


def _measure(model: Model, data: Data, images: int, batch_size: int, *, of: str, instead: str) -> None:
    """Do as `bn_reestimate` for the component `of`; networks without statistics stay as they are."""
    if not (layers := _normalising(model)):
        return
    source = (data.train or data.calibrating()).take(images)
    size = min(batch_size, len(source))
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
        layer.train()
    device = next(model.module.parameters()).device
    full = source.take(len(source) // size * size)
    with torch.no_grad(), enough_values(model.module, of, instead, size):
        for batch, _ in tqdm(full.batches(size, device), desc="BatchNorm", disable=None, leave=False):
            with led(of, instead):
                model.module(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    _refuse_infinite(model, of, instead)


def _refuse_infinite(model: Model, of: str, instead: str) -> None:
    for name, layer in model.module.named_modules():
        if isinstance(layer, _BatchNorm) and not finite(layer.buffers()):
            raise UserError(
                f"{of} found statistics that are not finite in {name or 'the network'}; look for"
                f" non-finite weights or images, or use {instead}."
            )
