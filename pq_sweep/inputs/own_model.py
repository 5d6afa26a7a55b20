"""What a function for a model returns, checked once when it is loaded.

What has one plain meaning, such as a network in training mode or a dictionary with one entry of logits, is put right,
and a note for the row says so. Everything else is refused in a sentence.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from pq_sweep.core.sentences import reason
from pq_sweep.core.weights import untouched
from pq_sweep.inputs.answers import checked_answers, taken_logits
from pq_sweep.inputs.contract import class_names, require_type
from pq_sweep.inputs.finite import require_finite
from pq_sweep.inputs.plain import settled
from pq_sweep.inputs.state import forget
from pq_sweep.inputs.usable import require_usable
from pq_sweep.inputs.wrappers import unwrapped
from pq_sweep.types import CLASSIFICATION, Model, Preprocess, UserError

INTERPOLATIONS = ("nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos")


def accepted_model(given: Any, target: str) -> Model:
    """Return the model that the function `target` made: in eval mode, in float32, with one tensor of logits."""
    model = _given_model(given, target)
    if model.task != CLASSIFICATION:
        raise UserError(
            f"the network of {target} ({type(model.module).__name__}) is for {model.task}, and jobs take classifiers;"
            " python -m pq_sweep.study weights looks at its weights."
        )
    names = None if model.classes is None else class_names(model.classes, target)
    model = replace(model, classes=names)
    _check_fields(model, target)
    model = replace(model, num_classes=int(model.num_classes), preprocess=_plain_preprocess(model.preprocess, target))
    model = _sound(model, what := f"the network of {target}")
    notes = [*checked_answers(model, what), *untouched(model.module)]
    return replace(model, notes=(*model.notes, *notes))


def accepted_weights(given: Any, target: str) -> Model:
    """Return the model that the function `target` made, for its weights alone: in float32, whatever it is for."""
    return _sound(_given_model(given, target), f"the network of {target}")


def _given_model(given: Any, target: str) -> Model:
    model = require_type(given, Model, target, "Model(module, num_classes, preprocess)")
    require_type(model.module, nn.Module, f"module of {target}", "Model with a torch.nn.Module")
    return model


def _sound(model: Model, what: str) -> Model:
    """Return a model whose network is unwrapped, in eval mode and float32, with weights that are finite."""
    module, notes = unwrapped(model.module)
    require_usable(module, what)
    notes += _eval_mode(module, what) + settled(module)
    require_finite(module, what, "check its weights")
    return replace(model, module=module, notes=(*model.notes, *notes))


def accepted_change(model: Model, what: str, advice: str) -> list[str]:
    """Check the network, called `what`, after a step that changed it, and return notes on what was put right.

    The step may be a user's own. `advice` says what to do if it left values that are not finite, or no network that
    runs.
    """
    forget(model.module)  # and be in eval mode, whatever mode the step left it in
    require_finite(model.module, what, advice)
    return taken_logits(model, what, advice)[1]


def _check_fields(model: Model, target: str) -> None:
    """Refuse a Model whose fields cannot be what they are named."""
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


def _eval_mode(module: nn.Module, what: str) -> list[str]:
    training = any(part.training for part in module.modules())
    try:
        module.eval()
    except Exception as error:
        raise UserError(
            f"{what} cannot be put in eval mode ({type(error).__name__}: {reason(error).rstrip('.')}); let its eval()"
            " and train() change modes as those of nn.Module do."
        ) from error
    return ["The network came in training mode and was put in eval mode."] if training else []
