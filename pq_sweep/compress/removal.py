"""Removal: channels leave the network with all that depends on them, and `replay` repeats that on a fresh network.

torch-pruning finds what depends on what (Fang et al., DepGraph, CVPR 2023); `pq_sweep.compress.blocks` helps it with
blocks that it does not know.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from tqdm import tqdm

from pq_sweep.compress.blocks import Score, refresh, rounding, shrinkers, stays, traceable
from pq_sweep.compress.choices import IMPORTANCES
from pq_sweep.compress.classifier import classifier
from pq_sweep.compress.gradients import followed
from pq_sweep.compress.pruners import require_parameters, told
from pq_sweep.compress.ranking import Pruner
from pq_sweep.compress.shared import shared_layers
from pq_sweep.core.environment import device_name
from pq_sweep.core.weights import LAYERS, network_state, parameters_once, prunable, untouched
from pq_sweep.types import About, Data, Model, Record, Stage, UserError, choose


def remove(
    model: Model,
    data: Data,
    *,
    amount: float,
    importance: str,
    p: int,
    global_ranking: bool,
    round_to: int | None,
    stage: Stage | None = None,
) -> Record:
    """Take the `amount` least important channels out of the network, with all that depends on them.

    Of each layer leaves the nearest number of channels. The classifier keeps its classes, and layers that share a
    parameter keep all channels. `p` is the norm of `importance=magnitude`; taylor and sensitivity take gradients on the
    calibration images, which jobs share by their `stage`. `round_to` keeps channel counts multiples of it. Returns the
    history from which `replay` repeats the removal, and what was asked beside what was reached.
    """
    module = model.module
    require_parameters(module, prunable(module))
    before, notes = _parameters(module), untouched(module)
    multiple = rounding(module, round_to)
    with trainable(module):
        score = _importance(model, data, importance, p, stage)
        with explained(model):
            options = {"pruning_ratio": float(amount), "global_pruning": global_ranking, "round_to": multiple}
            pruner = pruner_of(model, score, **options)
            pruner.step()
    module.zero_grad(set_to_none=True)
    refresh(module)
    with explained(model), torch.no_grad():
        module(model.sample())
    reached = {"channels": pruner.removed(), "parameters": 1 - _parameters(module) / before}
    if amount > 0:
        notes += _unlike_asked(pruner, importance, reached["parameters"] > 0)
    record = told(amount, reached, notes, f"channels are whole and kept in multiples of {multiple}")
    return {"history": pruner.pruning_history(), "round_to": multiple, **record}


def _unlike_asked(pruner: Pruner, importance: str, removed: bool) -> list[str]:
    """Say which layers kept their channels and that nothing left, or refuse a removal that cannot happen."""
    whole = [name for part, name in pruner.shared.items() if not part._modules or name in pruner.kept]
    names = ", ".join(whole) if pruner.kept else ""
    notes = (
        [f"pruner=remove kept the channels of {names}, which share parameters or run more than once."] if names else []
    )
    if removed:
        return notes
    if not pruner.channels:
        raise UserError(
            f"pruner=remove finds no channels that may leave ({_why_none(pruner, names)}); use a pruner that sets"
            " zeros, such as pruner=l1_global."
        )
    if pruner.nearest.wanted:
        raise UserError(
            f"pruner=remove with importance={importance} removed nothing at amount={pruner.pruning_ratio} and"
            f" round_to={pruner.round_to}; try a larger amount or a smaller round_to."
        )
    return [*notes, f"pruner=remove took nothing: pruner.amount={pruner.pruning_ratio} is less than half a channel."]


def _why_none(pruner: Pruner, shared: str) -> str:
    """Say why no layer has channels that may leave."""
    if shared:
        return f"{shared} share parameters or run more than once"
    none = "no convolution or linear layer comes before the classifier"
    layers = [part for part in pruner.model.modules() if isinstance(part, LAYERS)]
    return f"{none}, or none that can be followed to it, as through numpy" if len(layers) > 1 else none


def replay(model: Model, record: Record) -> None:
    """Repeat a removal on a freshly made network, so that the removed network's state_dict fits it."""
    module = model.module
    layers = dict(module.named_modules())  # the library's own replay splits names at their dots
    with trainable(module):
        graph = graph_of(module, model.sample())
        for name, outputs, channels in record["history"]:
            functions = graph.get_pruner_of_module(layers[name])
            function = functions.prune_out_channels if outputs else functions.prune_in_channels
            graph.get_pruning_group(layers[name], function, channels).prune(record_history=False)
    refresh(module)


def pruner_of(model: Model, score: Score, **options: Any) -> Pruner:
    """Return a pruner that keeps the classifier's outputs and the channels that pass a `Stay`."""
    with traceable(model.module):
        pruner = Pruner(
            model.module,
            model.sample(),
            importance=score,
            ignored_layers=[classifier(model)],
            shared=shared_layers(model),
            customized_pruners=shrinkers(model.module, score),
            # The library's defaults are dictionaries shared by all pruners of the process.
            in_channel_groups={},
            out_channel_groups={},
            num_heads={},
            **options,
        )
    pruner.ignored_layers += [step for step, node in pruner.DG.module2node.items() if stays(node.grad_fn)]
    return pruner


def graph_of(module: nn.Module, images: Tensor, run: Callable[..., Any] | None = None) -> tp.DependencyGraph:
    """Return what depends on what in the output of the network, or of `run`."""
    with traceable(module):
        custom = shrinkers(module, tp.importance.GroupMagnitudeImportance())
        return tp.DependencyGraph().build_dependency(module, images, run, customized_pruners=custom)


# --- importance ------------------------------------------------------------------------------------------------------


def _importance(model: Model, data: Data, name: str, p: int, stage: Stage | None) -> Score:
    """Return torch-pruning's importance of that name, with the gradients it needs in place.

    taylor is |sum w dL/dw| of a channel (Molchanov et al. 2019) with the gradient of the mean loss; sensitivity is
    the mean over images of |w dL/dw| (Mittal et al. 2018), so signs cannot cancel between images.
    """
    choose("pruner.importance", name, IMPORTANCES)
    if name == "bn_scale" and not any(
        isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.module.modules()
    ):
        raise UserError(
            "pruner.importance=bn_scale needs BatchNorm and this model has none; use magnitude, taylor or lamp."
        )
    if name in ("taylor", "sensitivity"):
        _set_gradients(model, data, stage, absolute=name == "sensitivity")
    makers: dict[str, Callable[[], Score]] = {
        "random": tp.importance.RandomImportance,
        "magnitude": partial(tp.importance.GroupMagnitudeImportance, p=p),
        "taylor": partial(tp.importance.GroupTaylorImportance, multivariable=True),
        "sensitivity": tp.importance.GroupTaylorImportance,
        "bn_scale": tp.importance.BNScaleImportance,
        "lamp": tp.importance.LAMPImportance,
    }
    return makers[name]()


def _set_gradients(model: Model, data: Data, stage: Stage | None, *, absolute: bool) -> None:
    """Put into `.grad` what `_gradients` finds, or found for another job with the same network and images."""
    make = partial(_gradients, model, data, absolute=absolute)
    found = make() if stage is None else _share_gradients(model, make, partial(_origin, model, data, absolute), stage)
    for parameter, gradient in zip(model.module.parameters(), found, strict=True):
        parameter.grad = gradient


def _share_gradients(model: Model, make: Callable[[], list[Tensor]], origin: About, stage: Stage) -> list[Tensor]:
    """Return gradients that one job made for all; the time that took counts as pruning time of each job."""
    path, made = stage.folder / "gradients.pt", list[float]()

    def save() -> float:
        start = time.perf_counter()
        torch.save(make(), path)
        made.append(time.perf_counter() - start)
        return made[0]

    seconds = stage.keep_in_cache("gradients", origin, save, path)
    if not made:
        stage.count_cached("prune", seconds)
    device = next(model.module.parameters()).device
    found: list[Tensor] = torch.load(path, map_location=device, weights_only=True)
    path.unlink()
    return found


def _origin(model: Model, data: Data, absolute: bool) -> dict[str, Any]:
    """Return what gradients depend on."""
    device = str(next(model.module.parameters()).device)
    where = {"device": device_name(device), "threads": torch.get_num_threads()}
    images = {"images": data.identity(data.calibrating())}
    return network_state(model) | images | where | {"absolute": absolute}


def _gradients(model: Model, data: Data, *, absolute: bool) -> list[Tensor]:
    """Return for each parameter the mean of dL/dw over the calibration images, or of |dL/dw| image by image."""
    parameters = list(model.module.parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters]
    images = data.calibrating().batches(1 if absolute else 64, parameters[0].device)
    for batch, labels in tqdm(images, desc="gradients", disable=None, leave=False):
        with followed():
            loss = nn.functional.cross_entropy(data.logits(model.module(batch)), labels, reduction="sum")
        for total, grad in zip(totals, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
            if grad is not None:
                total += grad.abs() if absolute else grad
    return [total / len(data.calibration) for total in totals]


# --- around a removal ------------------------------------------------------------------------------------------------


@contextmanager
def explained(model: Model, of: str = "pruner=remove") -> Iterator[None]:
    """Turn any error of torch-pruning, or of a network that it leaves broken, into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        where = " ".join(getattr(error, "__notes__", [])) or f"through {_culprit(model)}"
        reason = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".: ")
        raise UserError(
            f"{of} cannot follow the channels {where} ({reason}); use a pruner that sets zeros, such as"
            " pruner=l1_global, or give the class that it cannot follow a stand-in in"
            " pq_sweep.compress.blocks.STAND_INS."
        ) from error


def _culprit(model: Model) -> str:
    """Name the innermost part that does not run, or else the first whose channels cannot be traced to the input."""
    begun: list[nn.Module] = []
    ended: list[nn.Module] = []
    names = {part: name for name, part in model.module.named_modules()}
    hooks = [part.register_forward_pre_hook(lambda part, _: begun.append(part)) for part in names]
    hooks += [part.register_forward_hook(lambda part, *_: ended.append(part)) for part in names]
    with suppress(Exception), torch.no_grad():
        model.module(model.sample())
    for hook in hooks:
        hook.remove()
    broken = [part for part in begun if part not in ended]
    lost = bisect_left(ended[:-1], True, key=lambda part: not _traces(model, part))
    part = broken[-1] if broken else ended[lost]
    return f"{names[part] or 'the network'} ({type(part).__name__})"


def _traces(model: Model, part: nn.Module) -> bool:
    """Try to trace the network up to the output of `part`."""
    outputs: list[Any] = []
    hook = part.register_forward_hook(lambda part, _, output: outputs.append(output))
    try:
        with trainable(model.module):
            graph = graph_of(model.module, model.sample(), lambda module, images: (module(images), *outputs)[-1])
            list(graph.get_all_groups())
    except Exception:
        return False
    finally:
        hook.remove()
    return True


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in parameters_once(module))


@contextmanager
def trainable(module: nn.Module) -> Iterator[None]:
    """Let every parameter require gradients for a while: torch-pruning silently removes nothing otherwise."""
    flags = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for name, parameter in module.named_parameters():  # by name: removal makes new parameters
            parameter.requires_grad_(flags[name])
