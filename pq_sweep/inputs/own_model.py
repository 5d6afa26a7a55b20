"""What a function for a model returns, checked once when it is loaded.

What has one plain meaning, such as a network in training mode or a dictionary with one entry of logits, is put right,
and a note for the row says so. Everything else is refused in a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pq_sweep.core.weights import untouched
from pq_sweep.inputs.contract import class_names, described, require_type
from pq_sweep.inputs.finite import require_finite
from pq_sweep.inputs.parametrized import fold
from pq_sweep.types import Model, Preprocess, UserError

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")
# Answers to one image, alone and beside another, may differ by this share of the largest logit: sums run in another
# order. Dropout and statistics of the batch change them by far more.
SAME_ANSWER = 1e-2
UNWRAPPED = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}


def accepted_model(given: Any, target: str) -> Model:
    """Return the model that the function `target` made: in eval mode, in float32, with one tensor of logits."""
    model = require_type(given, Model, target, "Model(module, num_classes, preprocess)")
    names = None if model.classes is None else class_names(model.classes, target)
    model = replace(model, classes=names)
    _check_fields(model, target)
    model = replace(model, num_classes=int(model.num_classes), preprocess=_plain_preprocess(model.preprocess, target))
    module, notes = _unwrapped(model.module)
    _check_module(module, target)
    notes += _eval_mode(module) + settled(module)
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
    if not isinstance(count, int | np.integer) or isinstance(count, bool) or count < 1:
        raise UserError(f"{target} gives num_classes={count!r}; give a whole number from 1 on.")
    if model.classes is not None and len(model.classes) != count:
        raise UserError(
            f"{target} gives {len(model.classes)} names of classes and num_classes={count}; give one name per class, or"
            " none."
        )


def _plain_preprocess(preprocess: Preprocess, target: str) -> Preprocess:
    """Return a Preprocess of plain values, whatever numbers and names of torchvision's it was made of."""
    side, short = (_side(value) for value in (preprocess.size, preprocess.resize))
    channels = _side(preprocess.channels)
    name = str(getattr(preprocess.interpolation, "value", preprocess.interpolation))
    if side is None or short is None or not 1 <= side <= short:
        raise UserError(
            f"{target} gives size={preprocess.size} and resize={preprocess.resize}; give whole numbers of pixels,"
            " resize at least size."
        )
    if channels is None or channels < 1:
        raise UserError(f"{target} gives channels={preprocess.channels!r}; give 1 for grey or 3 for colours.")
    if name not in INTERPOLATIONS:
        raise UserError(f"{target} gives interpolation={name}; valid are: {', '.join(INTERPOLATIONS)}.")
    mean, std = (_per_channel(getattr(preprocess, key), channels, key, target) for key in ("mean", "std"))
    if any(value == 0 for value in std):
        raise UserError(f"{target} gives std={std}; give standard deviations other than 0.")
    preprocess = replace(preprocess, mean=mean, std=std, interpolation=name)
    return replace(preprocess, size=side, resize=short, channels=channels)


def _per_channel(given: Any, channels: int, key: str, target: str) -> tuple[float, ...]:
    """Return a value for each channel; one value, or the same several times, stands for all.

    The default is that of colours, which is as good as none for another number of channels.
    """
    try:
        values = tuple(np.atleast_1d(np.asarray(given, dtype=float)).ravel().tolist())
    except (TypeError, ValueError):
        values = ()
    if len({*values}) == 1 and np.isfinite(values[0]):
        return values[:1] * channels
    if len(values) != channels or not np.isfinite(values).all():
        example = f"{key}=({', '.join(['0.5'] * channels)}{',' if channels == 1 else ''})"
        raise UserError(
            f"{target} gives channels={channels} and {key}={given!r}; give the value of each channel that the network"
            f" was trained with, such as {example}."
        )
    return values


def _side(value: Any) -> int | None:
    """Return the side of a square in pixels, also if both sides are given; None if it is no such thing."""
    sides = {*value} if isinstance(value, tuple | list) else {value}
    only = sides.pop() if len(sides) == 1 else None
    return int(only) if isinstance(only, int | np.integer) and not isinstance(only, bool) else None


def _unwrapped(module: nn.Module) -> tuple[nn.Module, list[str]]:
    """Return the network itself instead of a wrapper that compiles it or spreads it over devices."""
    notes = []
    while (inner := UNWRAPPED.get(type(module).__name__)) and isinstance(getattr(module, inner, None), nn.Module):
        notes.append(f"The network was taken out of its {type(module).__name__}.")
        module = getattr(module, inner)
    return module, notes


def _check_module(module: nn.Module, target: str) -> None:
    """Refuse networks whose weights cannot be read or changed."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise UserError(
            f"{target} gives TorchScript, which can be neither pruned nor exported; return the Python network"
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
    if any(tensor.is_inference() for tensor in [*parameters.values(), *module.buffers()]):
        raise UserError(
            f"the network of {target} was made under torch.inference_mode(), where its weights cannot change; make it"
            " outside."
        )


def _eval_mode(module: nn.Module) -> list[str]:
    training = any(part.training for part in module.modules())
    module.eval()
    return ["The network came in training mode and was put in eval mode."] if training else []


def settled(module: nn.Module) -> list[str]:
    """Have a network hold plain float32 weights, and return a sentence for each thing that was done for that."""
    return _float32(module) + fold(module)


def _float32(module: nn.Module) -> list[str]:
    tensors = [*module.parameters(), *module.buffers()]
    others = sorted({str(one.dtype).removeprefix("torch.") for one in tensors if one.is_floating_point()} - {"float32"})
    if not others:
        return []
    module.float()
    return [f"The network's {' and '.join(others)} weights were converted to float32."]


def _one_output(model: Model, target: str) -> list[str]:
    """Have a network that returns several things return its logits alone, if it is plain which they are."""
    output = _run_alone(model, target)
    if isinstance(output, Tensor):
        return _float32_logits(model, output)
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


def _float32_logits(model: Model, output: Tensor) -> list[str]:
    """Have a network whose logits are of another type of numbers, as under autocast, return float32."""
    if not output.is_floating_point() or output.dtype == torch.float32:
        return []
    model.module.register_forward_hook(_as_float32)
    return [f"The network's {str(output.dtype).removeprefix('torch.')} logits were converted to float32."]


def _as_float32(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.float()


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


def require_logits(model: Model, what: str) -> None:
    """Raise a UserError if a network, called `what`, does not give a logit per class."""
    output = _run(model, model.sample(2), what)
    if not _are_logits(output, model):
        raise UserError(_wrong_output(output, model, what))


def _check_answers(model: Model, target: str) -> None:
    """Refuse a network whose answers are no logits, are not repeatable, or change the network."""
    images, before = model.sample(2), _state(model.module)
    both = _run(model, images, f"the network of {target}")
    if not _are_logits(both, model):
        raise UserError(_wrong_output(both, model, f"the network of {target}"))
    if not both.isfinite().all():
        raise UserError(
            f"the network of {target} answers random images with logits that are not finite; check its weights."
        )
    alone = _run(model, images[:1], f"the network of {target}")
    changed = next((name for name, state in _state(model.module).items() if state != before.get(name)), None)
    if changed:
        raise UserError(
            f"the network of {target} changes {changed} when it answers, even in eval mode; change it only if"
            " self.training."
        )
    limit = SAME_ANSWER * float(both.abs().max())
    if float((both[:1] - alone).abs().max()) > limit:
        again = _run(model, images, f"the network of {target}")
        raise UserError(_unrepeatable(float((both - again).abs().max()) > limit, target))


class Strangers(TorchFunctionMode):
    """Notes the Parameters that a pass uses and the network does not know, as layers in a plain list are."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.known = {id(parameter) for parameter in module.parameters()}
        self.found: list[nn.Parameter] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of a function before it is called."""
        values = [*args, *(kwargs or {}).values()]
        self.found += [value for value in values if isinstance(value, nn.Parameter) and id(value) not in self.known]
        return func(*args, **(kwargs or {}))


def _run_alone(model: Model, target: str) -> Any:
    """Return what the network gives for two images, or refuse one that uses weights it does not hold."""
    with Strangers(model.module) as strangers:
        output = _run(model, model.sample(2), f"the network of {target}")
    if strangers.found:
        raise UserError(
            f"the network of {target} uses weights that it does not hold itself, first of shape"
            f" {tuple(strangers.found[0].shape)}; keep layers in nn.ModuleList or nn.ModuleDict, not in a list or dict."
        )
    return output


def _wrong_output(output: Any, model: Model, what: str) -> str:
    """Say how an output differs from logits, and the likely cause."""
    expected = f"float32 logits (B, {model.num_classes})"
    start = f"{what} gives {described(output)} for two images where {expected} are expected"
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
def _run(model: Model, images: Tensor, what: str) -> Any:
    """Return what the network gives for images, or say that it does not take them."""
    try:
        return model.module(images)
    except Exception as error:
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(
            f"{what} fails on float32 images {tuple(images.shape)}, which its Preprocess says that it"
            f" takes ({type(error).__name__}: {reason[:300]}); correct preprocess (size={model.preprocess.size},"
            f" channels={model.preprocess.channels}) or the network."
        ) from error


def _state(module: nn.Module) -> dict[str, Any]:
    """Return marks of all parameters and buffers that tell whether they were changed."""
    marks: dict[str, Any] = {name: (id(one), one._version) for name, one in module.named_parameters()}
    for name, buffer in module.named_buffers():
        marks[name] = buffer.cpu().numpy().tobytes() if buffer.numel() < 10_000 else (id(buffer), buffer._version)
    return marks
