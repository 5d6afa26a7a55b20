"""Steps that change the network; a job reads their outcome from disk where it or another job did them before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn import Module

from pq_sweep.core.environment import device_name
from pq_sweep.core.randomness import random_states, restore_random
from pq_sweep.core.weights import load_state, network_state, network_structure
from pq_sweep.job.stages import Stages
from pq_sweep.types import Cache, Data, Model, Record

# A step that takes less is repeated from the seed: that is quicker than writing the weights of a large network.
WORTH_KEEPING_S = 0.3


@dataclass(frozen=True)
class Origin:
    """What a step's outcome depends on beside the network: plain values, and images, which take time to identify."""

    about: dict[str, Any]
    images: Callable[[], Any]


def origin_of(component: DictConfig, data: Data, device: str) -> Origin:
    """Return what a component's outcome depends on, the present state of the random numbers included."""
    options = OmegaConf.to_container(component, resolve=True)
    random = [hashlib.sha256(state.numpy().tobytes()).hexdigest() for state in random_states().values()]
    where = {"device": device_name(device), "threads": torch.get_num_threads()}
    return Origin({"component": options, "random": random} | where, lambda: data.identity(data.calibration, data.train))


def change_once(stage: Stages, name: str, model: Model, step: Callable[[], Any], origin: Origin | None = None) -> Any:
    """Run a step that changes the network in place and return its record, or restore what an earlier run of it kept.

    That was an earlier try of the same job or, with an `origin`, any other job for which the same step was slow.
    """
    path = stage.files.kept(name)
    if stage.has(name):
        record = stage.keep_in_job(name, step)
        _restore(model, path, record)
        return record
    if origin and stage.cache:
        return _share(stage, stage.cache, name, model, step, origin)
    return _change(stage, name, model, step)


@contextmanager
def moved(model: Model, device: str) -> Iterator[None]:
    """Have a network on another device for a while."""
    home = next(model.module.parameters()).device
    model.module.to(device)
    try:
        yield
    finally:
        model.module.to(home)


def _share(stage: Stages, cache: Cache, name: str, model: Model, step: Callable[[], Any], origin: Origin) -> Any:
    """Change the network, or take over what another job made of it.

    Most steps are quicker than hashing their images, so the images are hashed only if the step was slow before.
    """
    about = {"network": network_state(model), **origin.about}
    with cache.alone(name, about):
        if found := _made_before(stage, cache, name, about, origin):
            stage.count_cached(name, found["seconds"])
            path, record = stage.files.kept(name), found["value"]
            stage.keep_in_job(name, lambda: record, path)
            _restore(model, path, record)
            return record
        record = _change(stage, name, model, step)
        if stage.has(name):  # it was slow
            _share_slow(stage, cache, name, about | {"images": origin.images()}, record)
            cache.put("slow", {"step": name, **about}, stage.folder, {}, [])
        return record


def _made_before(stage: Stages, cache: Cache, name: str, about: Record, origin: Origin) -> Record | None:
    """Take what a job made of the same network and images, if the step is known to be slow."""
    if cache.take("slow", {"step": name, **about}, stage.folder) is None:
        return None
    return cache.take(name, about | {"images": origin.images()}, stage.folder)


def _share_slow(stage: Stages, cache: Cache, name: str, about: Record, record: Any) -> None:
    """Put into the cache what a slow step made and the job has kept."""
    made = {"value": record, "seconds": stage.seconds[name]}
    cache.put(name, about, stage.folder, made, [stage.files.kept(name).name])


def _change(stage: Stages, name: str, model: Model, step: Callable[[], Any]) -> Any:
    """Run a step and keep what it made of the network if that took long and can be restored."""
    path, before = stage.files.kept(name), _beside_weights(model)
    order = {part: [*part._parameters] for part in model.module.modules()}
    with stage(name):
        record = step()
    _reorder(order)
    restorable = "history" in (record or {}) or _beside_weights(model) == before
    if restorable and stage.seconds[name] >= WORTH_KEEPING_S:
        stage.keep_in_job(name, partial(_save, model, path, record), path)
    return record


def _beside_weights(model: Model) -> Any:
    """Return what a network is beside its state_dict, which alone is saved: a step may have changed its code too."""
    parts = list(model.module.modules())
    hooks = [[*part._forward_hooks.values(), *part._forward_pre_hooks.values()] for part in parts]
    return network_structure(model), hooks, [type(part).forward for part in parts]


def _reorder(names: dict[Module, list[str]]) -> None:
    """Put the parameters of layers back in their former order, which torch's pruning changes and graphs follow."""
    for part, order in names.items():
        if part._parameters.keys() == set(order):
            part._parameters.update({name: part._parameters.pop(name) for name in order})


def _save(model: Model, path: Path, record: Any) -> Any:
    """Save weights and the state of the random numbers, so that a continued job goes on as this one would have."""
    torch.save({"network": model.module.state_dict(), **random_states()}, path)
    return record


def _restore(model: Model, path: Path, record: Any) -> None:
    device = next(model.module.parameters()).device
    state = torch.load(path, map_location=device, weights_only=True)
    if "history" in (record or {}):  # channels were removed: the network has to get that shape first
        from pq_sweep.compress.removal import replay

        replay(model, record)
    load_state(model.module, state["network"])
    restore_random(state)
