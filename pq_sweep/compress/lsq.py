"""Training with the rounding of weights, and of activations: the scales of their integers are learned too.

Esser et al., Learned Step Size Quantization, ICLR 2020, as paper 003 (Kuzmin et al., Pruning vs Quantization: Which is
Better?, NeurIPS 2023, section 5) compares it with pruning.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pq_sweep.compress.learned import BYTE
from pq_sweep.compress.observing import Observe, unobserved
from pq_sweep.compress.recovery import reestimate
from pq_sweep.compress.training import AfterStep, Recipe, apply, led, train, zeros_of
from pq_sweep.compress.weight_only import Grid, fitted
from pq_sweep.core.weights import memory, prunable_by_name
from pq_sweep.types import Data, Model, Record, Split, UserError

log = logging.getLogger(__name__)

# A scale stays above this share of what it began with, so that it is never negative and never divides to infinity.
LEAST = 1e-3
# Values of an activation, and images, from which its first scale is found.
VALUES, IMAGES = 1 << 16, 64


class Rounding(Protocol):
    """How a tensor is rounded: the step `value` of the integers of a grid."""

    @property
    def value(self) -> Tensor: ...

    @property
    def grid(self) -> Grid: ...

    def rounded(self, values: Tensor) -> Tensor: ...

    def codes(self, values: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Scale:
    """A learned scale, one number or one for each output channel, and the integers that it is the step of.

    `gradient` is what its gradients are multiplied with.
    """

    value: nn.Parameter
    grid: Grid
    gradient: float

    @classmethod
    def of(cls, start: Tensor, grid: Grid, values: float) -> Scale:
        """Return a scale that begins at `start` and is shared by so many `values` in the mean."""
        return cls(nn.Parameter(start.clone()), grid, 1 / sqrt(max(1.0, values) * grid.limits[1]))

    def rounded(self, values: Tensor) -> Tensor:
        """Return the values as multiples of the scale; gradients pass the rounding, and stop where it clips.

        The gradient of the scale is that of equation 3, times `gradient`.
        """
        scale = self.value * self.gradient + (self.value * (1 - self.gradient)).detach()
        parts = (values / scale).clamp(*self.grid.limits)
        return (parts + (parts.round() - parts).detach()) * scale

    @torch.no_grad()
    def codes(self, values: Tensor) -> Tensor:
        """Return the integers that the values are rounded to."""
        return (values / self.value).clamp(*self.grid.limits).round()


def lsq(
    model: Model,
    data: Data,
    *,
    bits: int,
    per_channel: bool,
    activations: int | None,
    lr_scale: float,
    epochs: int,
    lr: float,
    batch_size: int = 64,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    augment: list[str] | None = None,
    observe: Observe = unobserved,
) -> Record:
    """Train as `finetune` does while weights are rounded to `bits`, and learn the scales by Adam at `lr_scale`.

    Scales begin where the squared error is least. There is one for each tensor or, with `per_channel`, each output
    channel. With `activations`, what convolutions and linear layers take is rounded to so many bits too. The network is
    left with its rounded weights, and BatchNorm's statistics measured anew with them; what was learned is in the
    record, for `quantizer=learned`. Weights that are zero stay zero.
    """
    recipe = Recipe("recovery=lsq", "recovery=none", epochs, lr, batch_size, optimizer, weight_decay, augment or [])
    split, grid = recipe.images(model, data), _grid(bits, activations)
    weights = {name: _scale_of(model.module, name, grid, per_channel) for name in prunable_by_name(model.module)}
    seen = inputs_of(model, split, recipe) if activations else {}
    taken = {name: _scale_of_activation(parts, activations or bits) for name, parts in seen.items()}
    scales = [scale.value for scale in (*weights.values(), *taken.values())]
    others = [torch.optim.Adam(scales, lr=lr_scale)] if scales else []
    call, after_step = partial(answer, model.module, weights), _bounded(scales, zeros_of(model.module))
    with rounding_inputs(model.module, taken):
        notes = train(model, data, recipe, after_step=after_step, call=call, others=others, observe=observe)
        settle(model.module, weights)
        learned = {name: told_of(model.module, name, scale, taken.get(name)) for name, scale in weights.items()}
        reestimate(model, data, recipe)
        observe(epochs + 1)
    for note in notes:
        log.warning(note)
    return {"notes": notes, "learned": learned}


def _grid(bits: int, activations: int | None) -> Grid:
    """Return the integers of weights; channels may be turned by a negative factor, and bytes that multiply lack 128."""
    return Grid(bits, narrow=bool(activations) and bits == BYTE)


def answer(module: nn.Module, weights: Mapping[str, Rounding], images: Tensor) -> Any:
    """Return what a network gives with its weights rounded."""
    return functional_call(module, _rounded(module, weights), (images,), tie_weights=False)


def _bounded(scales: list[nn.Parameter], masks: list[tuple[nn.Parameter, Tensor]]) -> AfterStep:
    """Return what is done after each step: zeros stay zero, and no scale gets near to it."""
    floors = [(scale, LEAST * scale.detach().clone()) for scale in scales]

    @torch.no_grad()
    def after_step(step: int, steps: int) -> None:
        apply(masks)
        for scale, floor in floors:
            scale.clamp_(min=floor)

    return after_step


def _scale_of(module: nn.Module, name: str, grid: Grid, per_channel: bool) -> Scale:
    """Return the scale of a weight, where its squared error is least."""
    weight = module.get_parameter(name).detach()
    outputs = _outputs(module, name)
    rows = weight.movedim(outputs, 0).flatten(1) if per_channel else weight.reshape(1, -1)
    start = torch.from_numpy(fitted(rows.float().cpu().numpy(), grid)[1]).to(weight.device)
    shape = [-1 if place == outputs else 1 for place in range(weight.dim())] if per_channel else []
    return Scale.of(start.reshape(shape), grid, weight.numel() / len(start))


def _outputs(module: nn.Module, name: str) -> int:
    """Return the axis of the output channels of a weight, which is another one in transposed convolutions."""
    return int(getattr(module.get_submodule(name.rpartition(".")[0]), "transposed", False))


def _same(module: nn.Module, name: str) -> list[str]:
    """Return the names of a weight in all layers that share it, of which one that runs twice has one."""
    place = memory(module.get_parameter(name))
    layers = [(path, part._parameters) for path, part in module.named_modules()]
    named = [(f"{path}.{key}".lstrip("."), each) for path, own in layers for key, each in own.items()]
    return [other for other, each in named if each is not None and memory(each) == place]


def _rounded(module: nn.Module, weights: Mapping[str, Rounding]) -> dict[str, Tensor]:
    """Return all rounded weights, by all names that they have in a network."""
    found: dict[str, Tensor] = {}
    for name, scale in weights.items():
        found |= dict.fromkeys(_same(module, name), scale.rounded(module.get_parameter(name)))
    return found


@torch.no_grad()
def settle(module: nn.Module, weights: Mapping[str, Rounding]) -> None:
    """Leave a network with its rounded weights; there is one kind of zero."""
    for name, scale in weights.items():
        weight = module.get_parameter(name)
        weight.copy_(scale.codes(weight) * scale.value + 0.0)


def told_of(module: nn.Module, name: str, scale: Rounding, taken: Rounding | None) -> Record:
    """Return what was learned of a weight as plain values, with the largest integer of each output channel.

    What makes a graph may multiply each channel by a number, as BatchNorm does; that integer tells by which.
    """
    codes = (module.get_parameter(name).detach() / scale.value).round()  # of a network that is settled
    largest = codes.movedim(_outputs(module, name), 0).flatten(1).abs().amax(1)
    found: Record = {"bits": scale.grid.bits, "scale": scale.value.detach().flatten().tolist()}
    found["largest"] = largest.int().tolist()
    if taken:
        activation = {"bits": taken.grid.bits, "signed": taken.grid.signed, "scale": taken.value.item()}
        found["activation"] = activation
    return found


# --- Activations -----------------------------------------------------------------------------------------------------


@contextmanager
def rounding_inputs(module: nn.Module, scales: Mapping[str, Rounding]) -> Iterator[None]:
    """Round what the layers of these weights take."""
    layers = _layers(module, list(scales))

    def enter(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (scales[layers[layer]].rounded(inputs[0]), *inputs[1:])

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(enter).remove)
        yield


def _layers(module: nn.Module, names: list[str]) -> dict[nn.Module, str]:
    """Return the layers that hold these weights, each with the first name of its weight."""
    found: dict[nn.Module, str] = {}
    for name in names:
        for each in _same(module, name):
            found[module.get_submodule(each.rpartition(".")[0])] = name
    return found


Seen = list[tuple[Tensor, float]]  # values that a layer takes, and how many an image has


def inputs_of(model: Model, split: Split, recipe: Recipe) -> dict[str, Seen]:
    """Return some of what each convolution and linear layer takes, by the name of its weight.

    Layers that are never called, such as those of attention that one function computes, have nothing.
    """
    seen: dict[str, Seen] = {}
    layers = _layers(model.module, list(prunable_by_name(model.module)))

    def look(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and not isinstance(layer, nn.MultiheadAttention):
            flat, images = inputs[0].detach().float().flatten(), max(1, len(inputs[0]))
            seen.setdefault(layers[layer], []).append((flat[:: -(-len(flat) // VALUES)], len(flat) / images))

    images, _ = next(split.batches(min(IMAGES, len(split)), next(model.module.parameters()).device))
    with ExitStack() as hooks, torch.no_grad(), led(recipe.of, recipe.instead):
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        model.module.eval()
        model.module(images)
    if not seen:
        raise UserError(
            "recovery.activations finds no convolution or linear layer that the network calls; give"
            " recovery.activations=null."
        )
    return seen


def _scale_of_activation(parts: Seen, bits: int) -> Scale:
    values = torch.cat([flat for flat, _ in parts])
    grid = Grid(bits, signed=bool((values < 0).any()))
    start = torch.from_numpy(fitted(values[None].cpu().numpy(), grid)[1]).to(values.device)
    return Scale.of(start.reshape(()), grid, sum(size for _, size in parts) / len(parts))
