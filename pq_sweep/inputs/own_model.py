"""What a function for a model returns, checked once when it is loaded.

What has one plain meaning, such as a network in training mode or a dictionary with one entry of logits, is put right,
and a note for the row says so. Everything else is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pq_sweep.core.weights import untouched
from pq_sweep.inputs.contract import described, require_type
from pq_sweep.inputs.finite import require_finite
from pq_sweep.inputs.parametrized import fold
from pq_sweep.types import Model, Preprocess, UserError

# Answers to one image, alone and beside another, may differ by this share of the largest logit: sums run in another
# order. Dropout and statistics of the batch change them by far more.
SAME_ANSWER = 1e-2
UNWRAPPED = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}


def accepted_model(given: Any, target: str) -> Model:
    """Return the model that the function `target` made: in eval mode, in float32, with one tensor of logits."""
    model = require_type(given, Model, target, "Model(module, num_classes, preprocess)")
    _check_fields(model, target)
    module, notes = _unwrapped(model.module)
    _check_module(module, target)
    notes += _eval_mode(module) + _float32(module) + fold(module)
    require_finite(module, f"the network of {target}", "check its weights")
    model = replace(model, module=module)
    notes += _one_output(model, target)
    _check_answers(model, target)
    notes += untouched(module)
    return replace(model, notes=(*model.notes, *notes))


def _check_fields(model: Model, target: str) -> None:
    """Refuse a Model whose fields cannot be what they are named."""
    require_type(model.module, nn.Module, f"module of {target}", "Model with a torch.nn.Module")
    require_type(model.preprocess, Preprocess, f"preprocess of {target}", "Preprocess")
    count = model.num_classes
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{target} gives num_classes={count!r}; give a whole number from 1 on.")
    if model.classes is not None and len(model.classes) != count:
        raise UserError(
            f"{target} gives {len(model.classes)} names of classes and num_classes={count}; give one name per class, or"
            " none."
        )


def _unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the network itself instead of a wrapper that compiles it or spreads it over devices."""
    notes = []
    while (inner := UNWRAPPED.get(type(module).__name__)) and isinstance(getattr(module, inner, None), nn.Module):
        notes.append(f"The network was taken out of its {type(module).__name__}.")
        module = getattr(module, inner)
    return module, notes


def _check_module(module: nn.Module, target: str) -> None:
    """Refuse networks whose weights cannot be read or changed."""
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError(
            f"{target} gives a TorchScript network, which can be neither pruned nor exported; return the Python network"
            " that it was made from, with its state_dict loaded."
        )
    parameters = dict(module.named_parameters())
    if not parameters:
        raise UserError(
            f"the network of {target} has no parameters (an already quantized network hides them); return the FP32"
            " network."
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, nn.UninitializedParameter) or parameter.is_meta:
            raise UserError(f"{name} of the network of {target} has no values yet; load weights before it is returned.")


def _eval_mode(module: nn.Module) -> list[str]:
    training = any(part.training for part in module.modules())
    module.eval()
    return ["The network came in training mode and was put in eval mode."] if training else []


def _float32(module: nn.Module) -> list[str]:
    tensors = [*module.parameters(), *module.buffers()]
    others = sorted({str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point()} - {"float32"})
    if not others:
        return []
    module.float()
    return [f"The network's {' and '.join(others)} weights were converted to float32."]


def _one_output(model: Model, target: str) -> list[str]:
    """Have a network that returns several things return its logits alone, if it is plain which they are."""
    output = _run(model, model.sample(2), target)
    if isinstance(output, Tensor):
        return []
    entries = _entries(output)
    logits = {key: value for key, value in entries.items() if _are_logits(value, model)}
    if "logits" in logits:
        logits = {"logits": logits["logits"]}
    if len(logits) != 1:
        held = ", ".join(f"{key}: {described(value)}" for key, value in entries.items())
        raise UserError(
            f"the network of {target} gives {type(output).__name__} ({held or 'nothing'}) where one tensor"
            f" (B, {model.num_classes}) is expected; wrap it in a module whose forward returns the logits alone."
        )
    (key,) = logits
    model.module.register_forward_hook(partial(_entry, key=key))
    return [f"Of what the network gives, {key if isinstance(key, str) else f'entry {key}'} was taken as its logits."]


def _entries(output: Any) -> dict[Any, Any]:
    """Return the entries of a dictionary, named tuple, tuple, list or dataclass by key."""
    if isinstance(output, Mapping):
        return dict(output)
    if hasattr(output, "_asdict"):
        return dict(output._asdict())
    if isinstance(output, tuple | list):
        return dict(enumerate(output))
    return dict(vars(output)) if hasattr(output, "__dataclass_fields__") else {}


def _entry(module: nn.Module, inputs: Any, output: Any, *, key: Any) -> Any:
    """Return one entry of an output; a forward hook."""
    return getattr(output, key) if isinstance(key, str) and not isinstance(output, Mapping) else output[key]


def _are_logits(value: Any, model: Model) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and tuple(value.shape) == (2, model.num_classes)


def _check_answers(model: Model, target: str) -> None:
    """Refuse a network whose answers are no logits, are not repeatable, or change the network."""
    images, before = model.sample(2), _state(model.module)
    both = _run(model, images, target)
    if not _are_logits(both, model):
        raise UserError(_wrong_output(both, model, target))
    if not both.isfinite().all():
        raise UserError(
            f"the network of {target} answers random images with logits that are not finite; check its weights."
        )
    alone = _run(model, images[:1], target)
    changed = next((name for name, state in _state(model.module).items() if state != before.get(name)), None)
    if changed:
        raise UserError(
            f"the network of {target} changes {changed} when it answers, even in eval mode; change it only if"
            " self.training."
        )
    limit = SAME_ANSWER * float(both.abs().max())
    if float((both[:1] - alone).abs().max()) > limit:
        again = _run(model, images, target)
        raise UserError(_unrepeatable(float((both - again).abs().max()) > limit, target))


def _wrong_output(output: Any, model: Model, target: str) -> str:
    """Say how an output differs from logits, and the likely cause."""
    expected = f"float32 logits (B, {model.num_classes})"
    start = f"the network of {target} gives {described(output)} for two images where {expected} are expected"
    if isinstance(output, Tensor) and output.dim() == 2 and output.is_floating_point():
        return f"{start}; give num_classes={output.shape[1]}, or a network with another head."
    if isinstance(output, Tensor) and not output.is_floating_point():
        return f"{start}; return the logits, not the class numbers."
    return f"{start}; flatten or select them in forward."


def _unrepeatable(random: bool, target: str) -> str:
    if random:
        return (
            f"the network of {target} answers the same images differently each time, even in eval mode; give dropout"
            " and noise training=self.training."
        )
    return (
        f"the network of {target} answers an image differently beside other images; normalise with stored statistics"
        " (track_running_stats=True), as accuracy would depend on the batch size."
    )


@torch.no_grad()
def _run(model: Model, images: Tensor, target: str) -> Any:
    """Return what the network gives for images, or say that it does not take them."""
    try:
        return model.module(images)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            f"the network of {target} fails on float32 images {tuple(images.shape)}, which its Preprocess says that it"
            f" takes ({type(error).__name__}: {reason[:300]}); correct preprocess (size={model.preprocess.size},"
            f" channels={model.preprocess.channels}) or the network."
        ) from error


def _state(module: nn.Module) -> dict[str, Any]:
    """Return marks of all parameters and buffers that tell whether they were changed."""
    marks: dict[str, Any] = {name: (id(one), one._version) for name, one in module.named_parameters()}
    for name, buffer in module.named_buffers():
        marks[name] = buffer.cpu().numpy().tobytes() if buffer.numel() < 10_000 else (id(buffer), buffer._version)
    return marks
