"""Networks as jobs load them, one after another: memory holds one of them."""

from __future__ import annotations

from functools import partial

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from pq_sweep.core.options import spelled
from pq_sweep.inputs.own_model import accepted_weights
from pq_sweep.job.stages import sentence
from pq_sweep.study import Case
from pq_sweep.study.weights.networks import Network, look_at
from pq_sweep.types import UserError

RANDOM = "Its weights are random ones (model.weights=null)."
component = partial(instantiate, _partial_=True, _convert_="all")


def looked_at(cases: dict[str, Case], bits: list[int]) -> tuple[list[Network], dict[str, str]]:
    """Look at each network by name, and return them with a sentence for each that could not be looked at.

    Raises:
        UserError: If there is none that could be.
    """
    found, failed = list[Network](), dict[str, str]()
    for name, case in cases.items():
        try:
            found.append(_looked_at(name, spelled(case.cfg).model, bits))
        except Exception as error:
            failed[name] = sentence(error, "load")
    if not found:
        raise UserError("\n".join(dict.fromkeys(failed.values())))
    return found, failed


def _looked_at(name: str, options: DictConfig, bits: list[int]) -> Network:
    torch.manual_seed(0)  # for weights that are random
    model = accepted_weights(component(options)(), options._target_)
    random = (RANDOM,) if "weights" in options and options.weights is None else ()
    return look_at(name, model.module, bits, (*random, *model.notes))
