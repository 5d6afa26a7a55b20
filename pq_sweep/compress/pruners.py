"""Pruners that set weights to zero and keep the shapes: each changes the network in place, one while it trains it.

The pruner that takes channels out of the network is in `pq_sweep.compress.removal`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from tqdm import tqdm

from pq_sweep.compress.classifier import classifier
from pq_sweep.compress.moments import layer_moments
from pq_sweep.compress.obs import without
from pq_sweep.compress.observing import Observe, unobserved
from pq_sweep.compress.recovery import reestimate
from pq_sweep.compress.training import Recipe, apply, train
from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import LAYERS as LAYERS  # users' own pruners import both from here
from pq_sweep.core.weights import Target, memory, prunable, prunable_by_name, untouched
from pq_sweep.types import Data, Model, Record, UserError

log = logging.getLogger(__name__)

# NVIDIA's sparse tensor cores, which came with Ampere, compute faster with zeros in this pattern.
SPARSE_TENSOR_CORES = {"pattern": "2:4", "min_compute_capability": "8.0"}

# Gradual pruning reaches its amount after this share of all steps, and ranks the weights anew so many times until then.
RAMP = 0.75
RANKINGS = 100

# What is pruned together, and how much of it.
Group = tuple[list[Target], float]


def none(model: Model, data: Data, *, amount: float = 0.0, amount_last: float | None = None) -> None:
    """Leave the network as it is; the amounts are ignored, so that one grid can hold the baseline too."""


def random(
    model: Model, data: Data, *, amount: float, amount_last: float | None = None, every_weight: bool = False
) -> Record:
    """Zero a random `amount` of each layer's weights, and `amount_last` of the classifier's if that is given."""
    groups = _with_last(model, _targets(model, every_weight), amount, amount_last)
    return _each(model, groups, torch_prune.random_unstructured)


def l1(
    model: Model, data: Data, *, amount: float, amount_last: float | None = None, every_weight: bool = False
) -> Record:
    """Zero the `amount` smallest |w| of each layer (Han et al. 2015), or `amount_last` of the classifier."""
    groups = _with_last(model, _targets(model, every_weight), amount, amount_last)
    return _each(model, groups, torch_prune.l1_unstructured)


def l1_global(
    model: Model, data: Data, *, amount: float, amount_last: float | None = None, every_weight: bool = False
) -> Record:
    """Zero the `amount` smallest |w| over all layers together, or with `amount_last` over all but the classifier.

    Of the classifier then go the `amount_last` smallest.
    """
    targets, notes = _targets(model, every_weight), untouched(model.module)
    groups = _with_last(model, targets, amount, amount_last)
    for together, share in groups:
        torch_prune.global_unstructured(together, pruning_method=torch_prune.L1Unstructured, amount=share)
    _make_permanent(targets)
    reached = {"weights": _zeros(targets) / _size(targets)}
    return told(_asked(groups), reached, [*notes, *_emptied(model, targets)])


def obs(model: Model, data: Data, *, amount: float, amount_last: float | None = None, images: int) -> Record:
    """Zero the `amount` of each layer's weights whose loss changes its output least, and let the others make up for it.

    This is Optimal Brain Surgeon on each layer by itself (OBC, Frantar and Alistarh 2022), with what the layer is given
    on the first `images` calibration images. `amount_last` is the share of the classifier, if that is given.
    """
    groups = _with_last(model, _targets(model), amount, amount_last)
    counts = {target: round(_share(share) * _size([target])) for targets, share in groups for target in targets}
    notes, targets = untouched(model.module), list(counts)
    names = {part: name for name, part in model.module.named_modules()}
    if any(counts.values()):
        seen = layer_moments(model, targets, data.calibrating().take(images))
        if blind := [f"{names[part]}.{name}" for part, name in targets if (part, name) not in seen]:
            notes.append(f"pruner=obs cannot see the inputs of {listed(blind)}, and took the smallest weights there.")
        for part, name in tqdm(targets, desc="layers", disable=None, leave=False):
            weight = getattr(part, name)
            weight.data.copy_(without(weight, seen.pop((part, name), None), counts[part, name], names[part]))
    return told(_asked(groups), {"weights": _zeros(targets) / _size(targets)}, [*notes, *_emptied(model, targets)])


def _share(amount: float) -> float:
    """Return an amount, or refuse what is no share."""
    if not 0 <= amount <= 1:
        raise UserError(f"pruner.amount={amount} is out of range; give the share to prune, 0 <= amount < 1.")
    return float(amount)


def ln_structured(model: Model, data: Data, *, amount: float, n: float, dim: int, every_weight: bool = False) -> Record:
    """Zero the `amount` slices with the smallest Ln norm of each layer: dim 0 neurons, dim 1 their inputs."""
    targets = _sliced(_targets(model, every_weight), dim)
    return _each(model, [(targets, float(amount))], torch_prune.ln_structured, n=n, dim=dim)


def random_structured(model: Model, data: Data, *, amount: float, dim: int, every_weight: bool = False) -> Record:
    """Zero a random `amount` of each layer's slices: dim 0 neurons, dim 1 their inputs."""
    targets = _sliced(_targets(model, every_weight), dim)
    return _each(model, [(targets, float(amount))], torch_prune.random_structured, dim=dim)


def nm_sparsity(model: Model, data: Data, *, n: int, m: int) -> Record:
    """Keep the `n` largest |w| of every `m` consecutive input channels of each layer, at each place of its kernel.

    n=2, m=4 is the pattern of NVIDIA's sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378). Layers whose input
    channels, within a group of a grouped convolution, are no multiple of `m` cannot have it and stay dense, as do
    transposed convolutions. Returns how much became sparse, and what stayed dense and why.
    """
    names = {memory(weight): name for name, weight in prunable_by_name(model.module).items()}
    targets, notes = _targets(model), untouched(model.module)
    weights: dict[Target, nn.Parameter] = {(part, name): getattr(part, name) for part, name in targets}
    why_dense = {(part, name): why for (part, name), weight in weights.items() if (why := _why_dense(part, weight, m))}
    sparse = [target for target in weights if target not in why_dense]
    if not sparse:
        inputs = ", ".join(str(count) for count in sorted({weight.shape[1] for weight in weights.values()}))
        raise UserError(f"pruner.m={m} divides no layer's input channels, which are {inputs}; give an m that does.")
    for part, name in sparse:
        torch_prune.custom_from_mask(part, name, _largest(weights[part, name], n, m))
    _make_permanent(sparse)
    dense = [target for target in targets if target in why_dense]
    return {
        "pattern": f"{n}:{m}",
        "sparse": {"layers": len(sparse), "weights": _size(sparse)},
        "dense": {"layers": len(dense), "weights": _size(dense)},
        "why_dense": {names[memory(weights[target])]: why for target, why in why_dense.items()},
        "sparse_tensor_cores": SPARSE_TENSOR_CORES,
        "asked": {"weights": 1 - n / m},
        "reached": {"weights": _zeros(targets) / _size(targets)},
        "notes": notes,
    }


def gradual(
    model: Model,
    data: Data,
    *,
    amount: float,
    epochs: int,
    lr: float,
    batch_size: int = 64,
    optimizer: str = "adamw",
    weight_decay: float = 0.01,
    augment: list[str] | None = None,
    observe: Observe = unobserved,
) -> Record:
    """Train the network, and zero more and more of the smallest |w| over all layers until `amount` are.

    The share rises by a cubic schedule (Zhu and Gupta, To Prune, or Not to Prune, 2017) until three quarters of the
    steps, and the rest trains what stays. BatchNorm's statistics are measured anew at the end. amount=0 trains alike
    and prunes nothing.
    """
    recipe = Recipe(
        "pruner=gradual", "pruner=l1_global", epochs, lr, batch_size, optimizer, weight_decay, augment or []
    )
    recipe.images(model, data)
    targets, notes = _targets(model), untouched(model.module)
    weights = [getattr(part, name) for part, name in targets]
    notes += (missed := train(model, data, recipe, after_step=_Gradually(weights, float(amount)), observe=observe))
    for note in missed:
        log.warning(note)
    reestimate(model, data, recipe)
    observe(epochs + 1)
    with torch.no_grad():
        for weight in weights:
            weight.add_(0.0)  # masks leave zeros of both signs, which compress worse
    return told(amount, {"weights": _zeros(targets) / _size(targets)}, [*notes, *_emptied(model, targets)])


class _Gradually:
    """Keeps the smallest weights at zero, after each step of training a share of all that the schedule says."""

    def __init__(self, weights: list[nn.Parameter], amount: float) -> None:
        self.weights, self.amount = weights, amount
        self.masks: list[tuple[Tensor, Tensor]] = []

    def __call__(self, step: int, steps: int) -> None:
        ramp = max(1, round(RAMP * steps))
        if step == ramp or (step < ramp and step % max(1, ramp // RANKINGS) == 0):
            total = sum(weight.numel() for weight in self.weights)
            self.masks = _without_smallest(self.weights, round(cubic(self.amount, step / ramp) * total))
        apply(self.masks)


def cubic(amount: float, time: float) -> float:
    """Return the share that is pruned at a `time` from 0 to 1 (Zhu and Gupta 2017, equation 1)."""
    return amount * (1 - (1 - min(time, 1.0)) ** 3)


@torch.no_grad()
def _without_smallest(weights: list[nn.Parameter], count: int) -> list[tuple[Tensor, Tensor]]:
    """Return each weight with a mask that leaves out what is among the `count` smallest of all together."""
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    mask = torch.ones_like(magnitudes)
    mask[magnitudes.topk(count, largest=False).indices] = 0
    parts = mask.split([weight.numel() for weight in weights])
    return [(weight, part.view(weight.shape)) for weight, part in zip(weights, parts, strict=True)]


def _targets(model: Model, every_weight: bool = False) -> list[Target]:
    """Return what is pruned, laid out as torch's pruning needs it, or refuse a network that has nothing of the kind."""
    targets = prunable(model.module, every_weight)
    names = require_parameters(model.module, targets)
    for part, name in targets:
        weight = getattr(part, name)
        if not weight.is_contiguous():
            _refuse_shared(model.module, weight, names[part])
        weight.data = weight.data.contiguous()  # which a channels_last weight is not
    if not targets:
        raise UserError(
            "the network has no weights that can be set to zero (convolutions, linear layers, attention projections);"
            " use pruner=none."
        )
    return targets


def require_parameters(module: nn.Module, targets: list[Target]) -> dict[nn.Module, str]:
    """Return the names of a network's parts, or refuse weights that a hook or other code computes at each call."""
    names = {part: name for name, part in module.named_modules()}
    for part, name in targets:
        if not isinstance(getattr(part, name), nn.Parameter):
            raise UserError(
                f"the {name} of {names[part] or 'the network'} is no Parameter but computed by a hook or by code, so no"
                " pruner can change it; give the layer a Parameter of that name, or use pruner=none."
            )
    return names


def _refuse_shared(module: nn.Module, weight: nn.Parameter, name: str) -> None:
    """Refuse a weight whose memory another Parameter holds in another order: laying it out anew would part the two."""
    memory = weight.untyped_storage().data_ptr()
    others = [key for key, other in module.named_parameters() if other is not weight
              and other.untyped_storage().data_ptr() == memory]  # fmt: skip
    if others:
        raise UserError(
            f"the weight of {name or 'the network'} shares its memory with {others[0]} in another order, so no pruner"
            " can set them to zero together; share one Parameter and transpose it in forward, or use pruner=none."
        )


def _sliced(targets: list[Target], dim: int) -> list[Target]:
    """Leave out tensors with fewer dimensions than slices along `dim` need."""
    kept = [(part, name) for part, name in targets if getattr(part, name).dim() > max(dim, 1)]
    if not kept:
        raise UserError(f"no weight of the network has slices along pruner.dim={dim}; use pruner=l1 or pruner=none.")
    return kept


def _with_last(model: Model, targets: list[Target], amount: float, amount_last: float | None) -> list[Group]:
    """Return what is pruned and how much of it, with the classifier by itself if it has an amount of its own."""
    if amount_last is None:
        return [(targets, float(amount))]
    last = classifier(model)
    others = [target for target in targets if target[0] is not last]
    groups = [(others, float(amount)), ([target for target in targets if target[0] is last], float(amount_last))]
    return [group for group in groups if group[0]]


def _asked(groups: list[Group]) -> float:
    """Return the share of all weights that the amounts of groups make."""
    if len(groups) == 1:
        return groups[0][1]
    sizes = [_size(targets) for targets, _ in groups]
    return sum(size * amount for size, (_, amount) in zip(sizes, groups, strict=True)) / sum(sizes)


def _each(model: Model, groups: list[Group], method: Callable[..., Any], **options: Any) -> Record:
    """Prune each target by itself, and return what was asked beside what was reached."""
    notes = untouched(model.module)
    for part, name, amount in [(*target, amount) for together, amount in groups for target in together]:
        method(part, name, amount=amount, **options)
    targets = [target for together, _ in groups for target in together]
    _make_permanent(targets)
    slices = {"slices": _zero_slices(targets, options["dim"])} if "dim" in options else {}
    reached = slices | {"weights": _zeros(targets) / _size(targets)}
    return told(_asked(groups), reached, [*notes, *_emptied(model, targets)])


def told(amount: float, reached: dict[str, float], notes: list[str], why: str = "taken in whole numbers") -> Record:
    """Return what was asked for beside what was reached, with a note where they are more than a point apart.

    `reached` are shares, first of what `amount` counts.
    """
    unit, share = next(iter(reached.items()))
    apart = f"pruner.amount={amount:g} asked for {amount:.3%} of the {unit}, and {share:.3%} went ({why})."
    notes = [*notes, *([apart] if abs(share - amount) > 0.01 else [])]
    return {"asked": {unit: amount}, "reached": reached, "notes": notes}


def _emptied(model: Model, targets: list[Target]) -> list[str]:
    """Name the layers whose weights are all zero, as those of small layers are for large amounts."""
    names = {part: name for name, part in model.module.named_modules()}
    empty = [names[part] or "the network" for part, name in targets if not getattr(part, name).any()]
    return [f"all weights of {listed(empty)} are zero, so that nothing passes there."] if empty else []


def _zero_slices(targets: list[Target], dim: int) -> float:
    """Return the share of slices that are all zero."""
    slices = [getattr(part, name).detach().movedim(dim, 0).flatten(1) for part, name in targets]
    return sum(int(tensor.eq(0).all(1).sum()) for tensor in slices) / sum(len(tensor) for tensor in slices)


def _size(targets: list[Target]) -> int:
    return sum(getattr(part, name).numel() for part, name in targets)


def _zeros(targets: list[Target]) -> int:
    return _size(targets) - sum(int(getattr(part, name).count_nonzero()) for part, name in targets)


def _make_permanent(targets: list[Target]) -> None:
    """Drop the masks; the values change in place, for layers that hold the same memory in Parameters of their own."""
    for part, name in targets:
        values = getattr(part, f"{name}_orig").data
        torch_prune.remove(part, name)
        weight = getattr(part, name)
        # The mask left zeros of both signs, which compress worse.
        weight.data = values.copy_(weight.data).add_(0.0)


def _why_dense(part: nn.Module, weight: Tensor, m: int) -> str | None:
    """Say why the input channels (dimension 1) cannot be split into groups of `m`, or return None if they can."""
    if isinstance(part, nn.ConvTranspose2d):
        return "transposed convolution"
    if weight.shape[1] % m:
        share = " of a group" if getattr(part, "groups", 1) > 1 else ""
        return f"input channels{share}: {weight.shape[1]}, no multiple of {m}"
    return None


def _largest(weight: Tensor, n: int, m: int) -> Tensor:
    """Return a mask of the `n` largest |w| of every `m` along dimension 1; of equal ones the first is kept."""
    magnitudes = weight.detach().abs().unflatten(1, (-1, m))
    order = magnitudes.argsort(dim=2, descending=True, stable=True)
    return torch.zeros_like(magnitudes).scatter_(2, order[:, :, :n], 1).flatten(1, 2)
