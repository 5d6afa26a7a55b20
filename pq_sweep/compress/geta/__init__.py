"""Which channels leave and how many bits each layer keeps, learned in one training run: `recovery=geta`.

Qu et al., *Automatic Joint Structured Pruning and Quantization for Efficient Neural Network Training and Compression*
(GETA), CVPR 2025: learned quantizers (`quantizer`), channels that leave together (`groups`), and the optimizer
(`qasso`).
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from pq_sweep.compress.geta.groups import groups_of, take_out, zero
from pq_sweep.compress.geta.qasso import START_BITS, Course, Qasso, Rules, Wanted
from pq_sweep.compress.geta.quantizer import Inputs, Learnable
from pq_sweep.compress.lsq import answer, inputs_of, rounding_inputs, settle, told_of
from pq_sweep.compress.observing import Observe, unobserved
from pq_sweep.compress.recovery import reestimate
from pq_sweep.compress.training import NOT_KEPT, Checkpoint, Recipe, train
from pq_sweep.core.weights import prunable_by_name
from pq_sweep.types import Data, Model, Record, Stage

log = logging.getLogger(__name__)


def geta(
    model: Model, data: Data, *, amount: float, least_bits: int, bits: int, activations: int | None,
    projections: int, prunings: int, lr_quant: float, epochs: int, lr: float, batch_size: int = 64,
    optimizer: str = "adamw", weight_decay: float = 0.01, augment: list[str] | None = None,
    projection: bool = True, joint: bool = True, observe: Observe = unobserved, stage: Stage | None = None,
) -> Record:  # fmt: skip
    """Train until `amount` of the channels have left, exactly, and each weight has from `least_bits` to `bits` bits.

    With `activations`, what layers take is rounded too, to at most so many bits. Bits are lowered in `projections`
    periods, and channels leave in `prunings` periods. Without `projection` bits are lowered at once, and without
    `joint` channels are forgotten evenly and steps learned by gradients: both to see what the paper's rules give.
    Weights that are zero stay zero. The network is left smaller, with its rounded weights and BatchNorm's statistics
    measured anew; the history of the removal and what was learned for `quantizer=learned` are in the record. A stopped
    job goes on between epochs.
    """
    recipe = Recipe("recovery=geta", "recovery=lsq", epochs, lr, batch_size, optimizer, weight_decay, augment or [])
    course = Course(epochs * recipe.batches(recipe.images(model, data)), projections, prunings)
    wanted = Wanted(amount, least_bits, bits, activations or bits)
    groups, notes = groups_of(model)
    weights = {name: Learnable(weight, START_BITS) for name, weight in prunable_by_name(model.module).items()}
    inputs = _of_inputs(model, data, recipe) if activations else {}
    state = Qasso(model.module, groups, weights, inputs, course, wanted, Rules(projection, joint))
    call, others = partial(answer, model.module, weights), [torch.optim.Adam(state.learned(), lr=lr_quant)]
    with rounding_inputs(model.module, inputs):
        notes += train(model, data, recipe, after_step=state.after_step, call=call, others=others, observe=observe,
                       checkpoint=_checkpoint(state, stage, observe))  # fmt: skip
        settle(model.module, weights)
        zero(model.module, groups, state.gone)
        reestimate(model, data, recipe)
        observe(epochs + 1)
    for note in notes:
        log.warning(note)
    return {"notes": notes, **_smaller(model, state)}


def _of_inputs(model: Model, data: Data, recipe: Recipe) -> dict[str, Inputs]:
    """Return the quantizers of what layers take, by the names of their weights."""
    seen = inputs_of(model, recipe.images(model, data), recipe)
    return {name: Inputs(torch.cat([values for values, _ in parts]), START_BITS) for name, parts in seen.items()}


def _checkpoint(state: Qasso, stage: Stage | None, observe: Observe) -> Checkpoint:
    """Return where training goes on after a stop; a probe that looks at each epoch has to see all of them."""
    if stage is None or observe is not unobserved:
        return NOT_KEPT
    return Checkpoint(stage.folder / "training.kept.pt", state.state, state.restore)


def _smaller(model: Model, state: Qasso) -> Record:
    """Take the channels out, and return what the result records."""
    history = take_out(model, state.gone)
    told = {name: told_of(model.module, name, each, state.inputs.get(name)) for name, each in state.weights.items()}
    bits = [(told[name]["bits"], model.module.get_parameter(name).numel()) for name in told]
    record: dict[str, Any] = {
        "history": history,
        "learned": told,
        "channels": {group.root: [group.channels, group.channels - len(state.gone.get(group.root, ()))]
                     for group in state.groups},
        "mean_bits": sum(each * count for each, count in bits) / sum(count for _, count in bits),
    }  # fmt: skip
    return record
