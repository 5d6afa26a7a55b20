"""Recovery after pruning: each changes the network in place; its time counts as prep time.

A recovery may return a record; its `notes` are sentences for the row. One that takes `observe` calls it before its
first epoch, when all is compressed and nothing is recovered yet, and after each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from pq_sweep.compress.idle import left_out, misfits
from pq_sweep.compress.observing import Observe, unobserved
from pq_sweep.core.outputs import entries, holds_logits, named, training_key
from pq_sweep.core.sentences import listed, reason
from pq_sweep.core.weights import parameters_once, prunable
from pq_sweep.types import Data, Model, Record, UserError

log = logging.getLogger(__name__)


def none(model: Model, data: Data, *, observe: Observe = unobserved) -> None:
    """Leave the network as the pruner left it."""
    observe(0)


def bn_reestimate(model: Model, data: Data, *, images: int, batch_size: int, observe: Observe = unobserved) -> None:
    """Measure BatchNorm's means and variances anew on up to `images` training images, without labels or training.

    Uses the calibration images if there are no training images. Only BatchNorm runs in training mode: dropout and
    stochastic depth would distort what it sees. A last, smaller batch is left out, since all batches count equally.
    """
    norms = {name: part for name, part in model.module.named_modules() if isinstance(part, _BatchNorm)}
    layers = [part for part in norms.values() if part.running_mean is not None]
    if not layers:
        raise UserError("recovery=bn_reestimate needs BatchNorm layers and this model has none; use none or finetune.")
    source = (data.train or data.calibrating()).take(images)
    size = min(batch_size, len(source))
    observe(0)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
        layer.train()
    device = next(model.module.parameters()).device
    full = source.take(len(source) // size * size)
    with torch.no_grad(), _enough_values(model.module, "bn_reestimate", size):
        for batch, _ in tqdm(full.batches(size, device), desc="BatchNorm", disable=None, leave=False):
            with _led("bn_reestimate"):
                model.module(batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        layer.eval()
    for name, layer in norms.items():
        if not _finite(layer.buffers()):
            raise UserError(
                f"recovery=bn_reestimate found statistics that are not finite in {name or 'the network'}; look for"
                " non-finite weights or images, or use recovery=none."
            )
    observe(1)


def finetune(
    model: Model, data: Data, *, epochs: int, lr: float, batch_size: int = 64, observe: Observe = unobserved
) -> Record:
    """Train all weights for `epochs` with AdamW and a one-cycle schedule; weights that are zero stay zero.

    Weights that do not require gradients are left as they are, which a note says.
    """
    split = data.training()
    if not len(split):
        raise UserError("recovery=finetune needs training images and the data has none; give some, or recovery=none.")
    module = model.module
    parameters = _trainable(module)
    pruned = [getattr(part, name) for part, name in prunable(module, every_weight=True)]
    masks = [(weight, weight != 0) for weight in pruned if (weight == 0).any()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    unfit = misfits(model)
    taken = dict.fromkeys(_left_out(unfit))
    steps = max(1, len(split) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs=epochs, steps_per_epoch=steps)
    observe(0)
    with _led("finetune"):
        module.train()
    size = min(batch_size, len(split))
    with _enough_values(module, "finetune", size), left_out(unfit):
        for epoch in tqdm(range(1, epochs + 1), desc="fine-tuning", unit="epoch", disable=None, leave=False):
            # A last, smaller batch is left out, since BatchNorm could not train on a single image.
            order = torch.randperm(len(split)).tolist()[: steps * batch_size]
            losses: list[Tensor] = []
            for images, labels in split.batches(batch_size, parameters[0].device, order):
                optimizer.zero_grad()
                with _led("finetune"):
                    logits = _training_logits(module(images), len(images), model.num_classes, taken)
                    loss = _backward(data.logits(logits), labels)
                optimizer.step()
                schedule.step()
                _apply(masks)
                losses.append(loss.detach())
            _refuse_divergence(module, losses, epoch, epochs, lr)
            observe(epoch)
    module.eval()
    notes = [*taken, *_untrained(module)]
    for note in notes:
        log.warning(note)
    return {"notes": notes}


def _left_out(parts: dict[str, nn.Module]) -> list[str]:
    names = listed(list(parts))
    sentence = f"recovery=finetune left out {names}, which runs in training mode alone and no longer fits the others."
    return [sentence] if parts else []


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require gradients, or refuse a network of which none does."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(
            "recovery=finetune finds no parameter that may change, as all have requires_grad=False; call"
            " requires_grad_(True) on the network, or use recovery=none."
        )
    return parameters


def _training_logits(output: Any, images: int, classes: int, notes: dict[str, None]) -> Tensor:
    """Return the logits among what a network gives in training mode, where auxiliary classifiers may answer too.

    Adds to `notes` which entry was taken.
    """
    found = output
    if not isinstance(output, Tensor) and (key := training_key(output, images, classes)) is not None:
        found = entries(output)[key]
        notes[f"recovery=finetune trained {named(key)} alone of what the network gives in training mode."] = None
    if not holds_logits(found, images, classes):
        keys = ", ".join(str(key) for key in entries(output))
        kind = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__} ({keys})"
        raise UserError(
            f"recovery=finetune needs logits ({images}, {classes}) and the network gives {kind} in training mode; let"
            " it give its logits alone, first, or by the name logits, or use recovery=none."
        )
    return found.float().reshape(images, classes)


def _backward(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute gradients of the loss, which is returned, or refuse a network that hides its parameters from training."""
    loss = nn.functional.cross_entropy(logits, labels)
    if not loss.requires_grad:
        raise UserError(
            "recovery=finetune cannot train this network, whose logits have no gradient (look for no_grad,"
            " inference_mode or detach in its forward); take that out, or use recovery=none."
        )
    loss.backward()
    return loss


def _refuse_divergence(module: nn.Module, losses: list[Tensor], epoch: int, of: int, lr: float) -> None:
    """Stop a training whose loss or weights are no numbers any more; called once an epoch, as it waits for the GPU."""
    statistics = [buffer for buffer in module.buffers() if not buffer.isinf().any()]  # masks are infinite on purpose
    if _finite([*losses, *module.parameters(), *statistics]):
        return
    if epoch == 1 and not _finite(losses[:1]):
        raise UserError(
            "the loss is not finite before recovery=finetune has changed anything; look for non-finite weights or"
            " training images, or use recovery=none."
        )
    raise UserError(
        f"fine-tuning diverged in epoch {epoch} of {of} (loss or weights are not finite); lower recovery.lr={lr:g}."
    )


def _finite(tensors: Iterable[Tensor]) -> bool:
    """Say whether all values are finite; asks the device once."""
    found = [tensor.detach().isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not found or bool(torch.stack(found).all())


def _untrained(module: nn.Module) -> list[str]:
    """Say how many parameters the last step of training did not change, and why."""
    whole = parameters_once(module)
    frozen = sum(parameter.numel() for parameter in whole if not parameter.requires_grad)
    unused = sum(parameter.numel() for parameter in whole if parameter.requires_grad and parameter.grad is None)
    if not frozen and not unused:
        return []
    total = sum(parameter.numel() for parameter in whole)
    return [
        f"recovery=finetune trained {total - frozen - unused} of {total} parameters: {frozen} are frozen"
        f" (requires_grad=False) and {unused} get no gradient."
    ]


@contextmanager
def _enough_values(module: nn.Module, name: str, size: int) -> Iterator[None]:
    """Refuse batches of which a BatchNorm in training mode sees one value per channel."""
    names: dict[nn.Module, str] = {part: path for path, part in module.named_modules() if isinstance(part, _BatchNorm)}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training and inputs and inputs[0].dim() > 1 and inputs[0].numel() == inputs[0].shape[1]:
            raise UserError(
                f"recovery={name} gives the BatchNorm {names[layer]} one value per channel with batches of {size};"
                " give recovery.batch_size=2 or more and as many training images, or recovery=none."
            )

    hooks = [part.register_forward_pre_hook(look) for part in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _led(name: str) -> Iterator[None]:
    """Lead any error that the network raises while it is trained by a sentence of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        inference = "nference tensor" in str(error)
        advice = "take inference_mode out of its forward" if inference else "use another recovery.batch_size"
        raise UserError(
            f"recovery={name} cannot run this network in training mode ({type(error).__name__}: {reason(error)});"
            f" {advice}, or recovery=none."
        ) from error


@torch.no_grad()
def _apply(masks: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, mask in masks:
        parameter.mul_(mask)
