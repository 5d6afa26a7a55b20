"""Training as recoveries and pruners share it: the same images, steps, optimizers and refusals for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from pq_sweep.compress.choices import AUGMENTATIONS, OPTIMIZERS
from pq_sweep.compress.idle import left_out, misfits
from pq_sweep.compress.observing import Observe, unobserved
from pq_sweep.core.outputs import entries, holds_logits, named, training_key
from pq_sweep.core.randomness import random_states, restore_random
from pq_sweep.core.sentences import listed, reason
from pq_sweep.core.weights import parameters_once, prunable
from pq_sweep.types import Data, Model, Record, Split, UserError, choose

# What is done after each step of an optimizer; it is told the number of the step, from 1 on, and how many there are.
AfterStep = Callable[[int, int], None]

MOMENTUM = 0.9  # of SGD
# Images are moved by up to this share of their size, as the 4 of 32 pixels that are usual for CIFAR.
SHIFT = 1 / 8


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. `of` is the component that trains, as in recovery=finetune, and `instead` another one.

    The learning rate `lr` is the highest of a one-cycle schedule. `augment` may have flip and shift.
    """

    of: str
    instead: str
    epochs: int
    lr: float
    batch_size: int
    optimizer: str
    weight_decay: float
    augment: list[str]

    def __post_init__(self) -> None:
        choose(f"{self.group}.optimizer", self.optimizer, OPTIMIZERS)
        for each in self.augment:
            choose(f"{self.group}.augment", each, AUGMENTATIONS)

    @property
    def group(self) -> str:
        """Return the group of options that the recipe is from."""
        return self.of.partition("=")[0]

    def optimizing(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters."""
        kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adamw": torch.optim.AdamW,
            "adam": torch.optim.Adam,
            "sgd": partial(torch.optim.SGD, momentum=MOMENTUM),
        }
        return kinds[self.optimizer](parameters, lr=self.lr, weight_decay=self.weight_decay)

    def images(self, model: Model, data: Data) -> Split:
        """Return the training images, or refuse data without any."""
        split = data.training()
        if not len(split):
            raise UserError(f"{self.of} needs training images and the data has none; give some, or {self.instead}.")
        return split

    def batches(self, split: Split) -> int:
        """Return the steps of an epoch."""
        return max(1, len(split) // self.batch_size)

    def order(self, split: Split) -> list[int]:
        """Draw the order of images of an epoch; a last, smaller batch is left out, as of one image BatchNorm fails."""
        return torch.randperm(len(split)).tolist()[: self.batches(split) * self.batch_size]


@dataclass(frozen=True)
class Checkpoint:
    """A file with which a training that was stopped goes on behind its last whole epoch, and ends as it would have.

    `state` gives what a component keeps beside the network, as tensors and plain values, and `restore` takes it back.
    """

    path: Path | None
    state: Callable[[], Record] = dict
    restore: Callable[[Record], object] = dict

    def save(self, epoch: int, parts: dict[int, Any], notes: Iterable[str]) -> None:
        """Write all that the next epoch depends on: `parts` have a state_dict."""
        if self.path is None:
            return
        states = {place: part.state_dict() for place, part in parts.items()}
        aside = self.path.with_name(f".{self.path.name}")
        torch.save({"epoch": epoch, "notes": [*notes], "own": self.state(), "parts": states, **random_states()}, aside)
        aside.rename(self.path)

    def load(self, parts: dict[int, Any], notes: dict[str, None]) -> int:
        """Restore what was saved, and return the epoch behind which that was: 0 if there is nothing."""
        if self.path is None or not self.path.exists():
            return 0
        saved: Record = torch.load(self.path, map_location="cpu", weights_only=True)
        for place, part in parts.items():
            part.load_state_dict(saved["parts"][place])
        self.restore(saved["own"])
        restore_random(saved)
        notes |= dict.fromkeys(saved["notes"])
        return int(saved["epoch"])


NOT_KEPT = Checkpoint(None)


def train(
    model: Model,
    data: Data,
    recipe: Recipe,
    *,
    after_step: AfterStep,
    call: Callable[[Tensor], Any] | None = None,
    others: Iterable[torch.optim.Optimizer] = (),
    observe: Observe = unobserved,
    checkpoint: Checkpoint = NOT_KEPT,
) -> list[str]:
    """Train all weights in place and return notes on what was not trained; weights that are zero may not stay so.

    `call` maps images to what the network gives, if that is not the network itself. No schedule changes the rate of the
    optimizers of `others`. Weights without gradients stay, which a note says. A `checkpoint` lets training go on.
    """
    split, module, others = recipe.images(model, data), model.module, list(others)
    optimizer = recipe.optimizing(parameters := _trainable(module, recipe))
    beside = [each for other in others for group in other.param_groups for each in group["params"]]
    taken = dict.fromkeys(_left_out(unfit := misfits(model), recipe))
    steps = recipe.epochs * recipe.batches(split)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps)
    observe(0, call)
    with led(recipe.of, recipe.instead):
        module.train()
    done = checkpoint.load(parts := dict(enumerate([module, optimizer, schedule, *others])), taken)
    size, step = min(recipe.batch_size, len(split)), done * recipe.batches(split)
    with enough_values(module, recipe.of, recipe.instead, size), left_out(unfit):
        for epoch in _epochs(done, recipe.epochs):
            losses: list[Tensor] = []
            for images, labels in split.batches(recipe.batch_size, parameters[0].device, recipe.order(split)):
                loss = partial(_loss, call or module, images, labels, model, data, recipe, taken)
                losses.append(_step([optimizer, *others], loss))
                schedule.step()
                after_step(step := step + 1, steps)
            _refuse_divergence(module, [*losses, *beside], epoch, recipe)
            observe(epoch, call)
            checkpoint.save(epoch, parts, taken)
    module.eval()
    return [*taken, *_untrained(module, recipe)]


def _epochs(done: int, epochs: int) -> Iterable[int]:
    """Return the numbers of the epochs that are left, behind a bar."""
    left = range(done + 1, epochs + 1)
    return tqdm(left, "fine-tuning", epochs, initial=done, unit="epoch", disable=None, leave=False)


def _step(optimizers: list[torch.optim.Optimizer], loss: Callable[[], Tensor]) -> Tensor:
    """Go a step down a loss, which computes gradients and is returned."""
    for each in optimizers:
        each.zero_grad()
    found = loss()
    for each in optimizers:
        each.step()
    return found


def _loss(
    network: Callable[[Tensor], Any],
    images: Tensor,
    labels: Tensor,
    model: Model,
    data: Data,
    recipe: Recipe,
    notes: dict[str, None],
) -> Tensor:
    """Compute gradients of the loss of a batch, which is returned; adds to `notes` what was trained."""
    with led(recipe.of, recipe.instead):
        output = network(augmented(images, recipe.augment))
        logits = _training_logits(output, len(images), model.num_classes, notes, recipe)
        return _backward(data.logits(logits), labels, recipe)


def augmented(images: Tensor, how: list[str]) -> Tensor:
    """Flip half of the images (B, C, H, W) from left to right, and move each by up to an eighth, as `how` says.

    What comes in from outside is zero: the mean of normalised pixels.
    """
    if "flip" in how:
        flip = (torch.rand(len(images)) < 0.5).to(images.device)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    return _moved(images) if "shift" in how else images


def _moved(images: Tensor) -> Tensor:
    count, _, height, width = images.shape
    most = max(1, round(SHIFT * height)), max(1, round(SHIFT * width))
    wide = nn.functional.pad(images, (most[1], most[1], most[0], most[0]))
    starts = [torch.randint(0, 2 * reach + 1, (count, 1)) for reach in most]
    rows, columns = starts[0] + torch.arange(height), starts[1] + torch.arange(width)
    places = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    return wide.permute(0, 2, 3, 1)[tuple(each.to(images.device) for each in places)].permute(0, 3, 1, 2)


def zeros_of(module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the weights of a network that have zeros, each with a mask of those that are none."""
    pruned = [getattr(part, name) for part, name in prunable(module, every_weight=True)]
    return [(weight, weight != 0) for weight in pruned if (weight == 0).any()]


@torch.no_grad()
def apply(masks: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Set to zero what masks leave out."""
    for parameter, mask in masks:
        parameter.mul_(mask)


def _left_out(parts: dict[str, nn.Module], recipe: Recipe) -> list[str]:
    names = listed(list(parts))
    sentence = f"{recipe.of} left out {names}, which runs in training mode alone and no longer fits the others."
    return [sentence] if parts else []


def _trainable(module: nn.Module, recipe: Recipe) -> list[nn.Parameter]:
    """Return the parameters that require gradients, or refuse a network of which none does."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        raise UserError(
            f"{recipe.of} finds no parameter that may change, as all have requires_grad=False; call"
            f" requires_grad_(True) on the network, or use {recipe.instead}."
        )
    return parameters


def _training_logits(output: Any, images: int, classes: int, notes: dict[str, None], recipe: Recipe) -> Tensor:
    """Return the logits among what a network gives in training mode, where auxiliary classifiers may answer too.

    Adds to `notes` which entry was taken.
    """
    found = output
    if not isinstance(output, Tensor) and (key := training_key(output, images, classes)) is not None:
        found = entries(output)[key]
        notes[f"{recipe.of} trained {named(key)} alone of what the network gives in training mode."] = None
    if not holds_logits(found, images, classes):
        keys = ", ".join(str(key) for key in entries(output))
        kind = f"a tensor {tuple(found.shape)}" if isinstance(found, Tensor) else f"{type(found).__name__} ({keys})"
        raise UserError(
            f"{recipe.of} needs logits ({images}, {classes}) and the network gives {kind} in training mode; let"
            f" it give its logits alone, first, or by the name logits, or use {recipe.instead}."
        )
    return found.float().reshape(images, classes)


def _backward(logits: Tensor, labels: Tensor, recipe: Recipe) -> Tensor:
    """Compute gradients of the loss, which is returned, or refuse a network that hides its parameters from training."""
    loss = nn.functional.cross_entropy(logits, labels)
    if not loss.requires_grad:
        raise UserError(
            f"{recipe.of} cannot train this network, whose logits have no gradient (look for no_grad,"
            f" inference_mode or detach in its forward); take that out, or use {recipe.instead}."
        )
    loss.backward()
    return loss.detach()


def _refuse_divergence(module: nn.Module, trained: list[Tensor], epoch: int, recipe: Recipe) -> None:
    """Stop a training whose loss or weights are no numbers any more; called once an epoch, as it waits for the GPU."""
    statistics = [buffer for buffer in module.buffers() if not buffer.isinf().any()]  # masks are infinite on purpose
    if finite([*trained, *module.parameters(), *statistics]):
        return
    if epoch == 1 and not finite(trained[:1]):
        raise UserError(
            f"the loss is not finite before {recipe.of} has changed anything; look for non-finite weights or"
            f" training images, or use {recipe.instead}."
        )
    raise UserError(
        f"fine-tuning diverged in epoch {epoch} of {recipe.epochs} (loss or weights are not finite); lower"
        f" {recipe.group}.lr={recipe.lr:g}."
    )


def finite(tensors: Iterable[Tensor]) -> bool:
    """Say whether all values are finite; asks the device once."""
    found = [tensor.detach().isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return not found or bool(torch.stack(found).all())


def _untrained(module: nn.Module, recipe: Recipe) -> list[str]:
    """Say how many parameters the last step of training did not change, and why."""
    whole = parameters_once(module)
    frozen = sum(parameter.numel() for parameter in whole if not parameter.requires_grad)
    unused = sum(parameter.numel() for parameter in whole if parameter.requires_grad and parameter.grad is None)
    if not frozen and not unused:
        return []
    total = sum(parameter.numel() for parameter in whole)
    return [
        f"{recipe.of} trained {total - frozen - unused} of {total} parameters: {frozen} are frozen"
        f" (requires_grad=False) and {unused} get no gradient."
    ]


@contextmanager
def enough_values(module: nn.Module, of: str, instead: str, size: int) -> Iterator[None]:
    """Refuse batches of which a BatchNorm in training mode sees one value per channel."""
    names: dict[nn.Module, str] = {part: path for path, part in module.named_modules() if isinstance(part, _BatchNorm)}

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer.training and inputs and inputs[0].dim() > 1 and inputs[0].numel() == inputs[0].shape[1]:
            raise UserError(
                f"{of} gives the BatchNorm {names[layer]} one value per channel with batches of {size};"
                f" give {of.partition('=')[0]}.batch_size=2 or more and as many training images, or {instead}."
            )

    hooks = [part.register_forward_pre_hook(look) for part in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def led(of: str, instead: str) -> Iterator[None]:
    """Lead any error that the network raises while it is trained by a sentence of ours."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        inference = "nference tensor" in str(error)
        other = f"use another {of.partition('=')[0]}.batch_size"
        advice = "take inference_mode out of its forward" if inference else other
        raise UserError(
            f"{of} cannot run this network in training mode ({type(error).__name__}: {reason(error)});"
            f" {advice}, or {instead}."
        ) from error
