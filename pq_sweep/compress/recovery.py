"""Recovery after pruning: each changes the network in place; its time counts as prep time."""

from __future__ import annotations

import torch
from torch import nn
from tqdm import tqdm

from pq_sweep.core.weights import prunable
from pq_sweep.types import Data, Model, UserError


def none(model: Model, data: Data) -> None:
    """Leave the network as the pruner left it."""


def bn_reestimate(model: Model, data: Data, *, images: int, batch_size: int) -> None:
    """Measure BatchNorm's means and variances anew on up to `images` training images, without labels or training.

    Uses the calibration images if there are no training images. Only BatchNorm runs in training mode: dropout and
    stochastic depth would distort what it sees. A last, smaller batch is left out, since all batches count equally.
    """
    layers = [part for part in model.module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        raise UserError("recovery=bn_reestimate needs BatchNorm layers and this model has none; use none or finetune.")
    source = (data.train or data.calibrating()).take(images)
    size = min(batch_size, len(source))
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
        layer.train()
    device = next(model.module.parameters()).device
    full = source.take(len(source) // size * size)
    with torch.no_grad():
        for batch, _ in tqdm(full.batches(size, device), desc="BatchNorm", disable=None, leave=False):
            model.module(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()


def finetune(model: Model, data: Data, *, epochs: int, lr: float, batch_size: int = 64) -> None:
    """Train all weights for `epochs` with AdamW and a one-cycle schedule; weights that are zero stay zero."""
    split = data.training()
    module = model.module
    parameters = list(module.parameters())
    pruned = [getattr(part, name) for part, name in prunable(module, every_weight=True)]
    masks = [(weight, weight != 0) for weight in pruned if (weight == 0).any()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    steps = max(1, len(split) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=steps)
    module.train()
    for _ in tqdm(range(epochs), desc="fine-tuning", unit="epoch", disable=None, leave=False):
        # A last, smaller batch is left out, since BatchNorm could not train on a single image.
        order = torch.randperm(len(split)).tolist()[: steps * batch_size]
        for images, labels in split.batches(batch_size, parameters[0].device, order):
            optimizer.zero_grad()
            nn.functional.cross_entropy(data.logits(module(images)), labels).backward()
            optimizer.step()
            schedule.step()
            _apply(masks)
    module.eval()


@torch.no_grad()
def _apply(masks: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, mask in masks:
        parameter.mul_(mask)
