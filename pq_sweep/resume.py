"""Steps that change the network, which a job that is continued takes from disk instead of doing them again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pq_sweep.measure import structure
from pq_sweep.progress import Stages
from pq_sweep.types import Model

# What takes less is repeated from the seed: that is quicker than writing the weights of a large network.
WORTH_KEEPING_S = 1.0


def change_once(stage: Stages, name: str, model: Model, step: Callable[[], Any]) -> Any:
    """Run a step that changes the network in place and return its record, or restore what an earlier try kept."""
    path = stage.folder / f"{name}.kept.pt"
    if stage.has(name):
        record = stage.keep(name, step)
        _restore(model, path, record)
        return record
    before = structure(model)
    with stage(name):
        record = step()
    restorable = "history" in (record or {}) or structure(model) == before
    if restorable and stage.seconds[name] >= WORTH_KEEPING_S:
        stage.keep(name, partial(_save, model, path, record), path)
    return record


def _save(model: Model, path: Path, record: Any) -> Any:
    """Save weights and the state of the random numbers, so that a continued job goes on as this one would have."""
    state = {"network": model.module.state_dict(), "random": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["random_cuda"] = torch.cuda.get_rng_state()
    torch.save(state, path)
    return record


def _restore(model: Model, path: Path, record: Any) -> None:
    device = next(model.module.parameters()).device
    state = torch.load(path, map_location=device, weights_only=True)
    if "history" in (record or {}):  # channels were removed: the network has to get that shape first
        from pq_sweep.removal import replay  # takes seconds to import

        replay(model, record)
    model.module.load_state_dict(state["network"])
    torch.set_rng_state(state["random"].cpu())
    if "random_cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random_cuda"].cpu())
