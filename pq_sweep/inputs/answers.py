"""What a network answers: one tensor of logits, the same each time, whatever it answered before and beside it."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from pq_sweep.core.generators import left_alone
from pq_sweep.core.outputs import entries, holds_logits, logits_key, named, take_logits
from pq_sweep.inputs import random_numbers, state
from pq_sweep.inputs.contract import described
from pq_sweep.inputs.passes import Strangers, run
from pq_sweep.types import Model, UserError

# Answers to one image, alone and beside another, may differ by this share of the largest logit: sums run in another
# order. Dropout and statistics of the batch change them by far more.
SAME_ANSWER = 1e-2


def checked_answers(model: Model, what: str) -> list[str]:
    """Refuse a network whose answers are no logits, are not repeatable, or change it; return notes on what was done."""
    with left_alone():
        return _checked(model, what)


def _checked(model: Model, what: str) -> list[str]:
    images, kept = model.sample(2), state.Kept(model.module)
    first, notes = taken_logits(model, what)
    if not first.isfinite().all():
        raise UserError(f"{what} answers random images with logits that are not finite; check its weights.")
    alone, again = run(model, images[:1], what), run(model, images, what)
    if getattr(alone, "shape", None) != (1, model.num_classes):
        raise UserError(
            f"{what} gives {described(alone)} for one image where (1, {model.num_classes}) is expected; name the"
            " dimensions that squeeze or view may take away."
        )
    kept.require_same_tensors(what)
    notes += state.judged(kept, partial(run, model, images, what), what)
    if not state.alike(again, first, state.OTHER_WAY):
        raise UserError(
            f"{what} answers the same images differently each time, even in eval mode; give dropout and noise"
            " training=self.training."
        )
    if not state.alike(alone, first[:1], SAME_ANSWER):
        raise UserError(
            f"{what} answers an image differently beside other images; normalise with stored statistics"
            " (track_running_stats=True), as accuracy would depend on the batch size."
        )
    return notes


def taken_logits(model: Model, what: str, advice: str | None = None) -> tuple[Tensor, list[str]]:
    """Have a network that gives several things, or logits of another form, give logits (B, num_classes) alone.

    Return those of two images, and notes on what was done. `advice` says what to do if the network fails.
    """
    images = model.sample(2)
    with left_alone(), Strangers(model.module) as strangers, random_numbers.Draws() as draws:
        output = run(model, images, what, advice)
    strangers.refuse(what)
    logits, notes = _taken(model, output, what)
    return logits, notes + random_numbers.judged(model, draws, what)


def _taken(model: Model, output: Any, what: str) -> tuple[Tensor, list[str]]:
    """Return the logits among what a network gives for two images; a hook takes them from now on."""
    key, notes, found = None, list[str](), output
    if not isinstance(output, Tensor):
        key = logits_key(output, 2, model.num_classes)
        if key is None:
            raise UserError(_no_entry(model, output, what))
        found = entries(output)[key]
        notes.append(f"Of what the network gives, {named(key)} was taken as its logits.")
    if not holds_logits(found, 2, model.num_classes):
        raise UserError(_wrong_output(found, model, what))
    if kind := str(found.dtype).removeprefix("torch.").replace("float32", ""):
        notes.append(f"The network's {kind} logits were converted to float32.")
    if found.shape != (2, model.num_classes):
        notes.append(f"The network's logits {tuple(found.shape)} were brought to the shape (images, classes).")
    if notes:
        shape = None if found.shape == (2, model.num_classes) else (model.num_classes,)
        model.module.register_forward_hook(partial(take_logits, key=key, shape=shape))
    return found.float().reshape(2, model.num_classes), notes


def _no_entry(model: Model, output: Any, what: str) -> str:
    held = ", ".join(f"{key}: {described(value)}" for key, value in entries(output).items())
    return (
        f"{what} gives {type(output).__name__} ({held or 'nothing'}) where one tensor (B, {model.num_classes}) is"
        " expected; wrap it in a module whose forward returns the logits alone."
    )


def _wrong_output(output: Tensor, model: Model, what: str) -> str:
    """Say how an output differs from logits, and the likely cause."""
    expected = f"float32 logits (B, {model.num_classes})"
    start = f"{what} gives {described(output)} for two images where {expected} are expected"
    if output.dim() == 2 and len(output) == 2 and output.is_floating_point():
        return f"{start}; give num_classes={output.shape[1]}, or a network with another head."
    if not output.is_floating_point():
        return f"{start}; return the logits, not the class numbers."
    return f"{start}; flatten or select them in forward."
