"""One job, from its config to its `result.json`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from pq_sweep.compress.quantizers import none
from pq_sweep.core.cache import open_cache
from pq_sweep.core.environment import device_name, resolve_device
from pq_sweep.core.files import write_json
from pq_sweep.core.fingerprint import digest, fingerprint, resolved
from pq_sweep.core.threads import use_threads
from pq_sweep.job.baseline import Baseline, load_baseline
from pq_sweep.job.check import check, impossible, refuse
from pq_sweep.job.describe import (
    describe,
    describe_images,
    describe_network,
    describe_session,
    describe_sizes,
    unaccelerated,
)
from pq_sweep.job.repeats import measure_apart, share_network
from pq_sweep.job.stages import Stages
from pq_sweep.job.steps import change_once, origin_of
from pq_sweep.job.turns import Turns
from pq_sweep.measure.accuracy import accuracy
from pq_sweep.measure.latency import speed
from pq_sweep.measure.layers import compressed_layers
from pq_sweep.measure.timing import Protocol, Result
from pq_sweep.runtimes import precision_of
from pq_sweep.types import Data, Model, Runtime, Session, Workspace

component = partial(instantiate, _partial_=True, _convert_="all")


@dataclass(frozen=True)
class Plan:
    """What a job's config means on this machine; `key` is its fingerprint."""

    cfg: DictConfig
    key: str
    protocol: Protocol
    quantizer: Callable[..., Any]
    runtime: Runtime
    work: Workspace


def run(cfg: DictConfig, folder: Path, label: str = "") -> Result:
    """Compress and measure one model as `cfg` says; leave the artifact and `result.json` in `folder`."""
    stage = Stages(folder, label)
    with stage.keeping_errors():
        check(cfg)
        plan = prepare(cfg, stage)
        with stage("load"):
            model, data = load(cfg, plan.work.device)
        with stage("baseline"):
            baseline = load_baseline(cfg, model, data, plan.work, plan.protocol)
        pruning = compress(plan, model, data, stage)
        network, formats = stage.once("sizes", partial(describe_network, model, data, baseline.result, folder))
        session = plan.runtime.open(model, plan.quantizer, data, plan.work)
        del model  # from here on only the session holds memory
        save_layers(session, baseline, folder)
        accuracy, predictions = evaluate(session, data, plan.protocol, stage)
        ran, environment = (
            describe_session(session, precision_of(plan.quantizer), folder),
            describe(plan.work.device, plan.work.threads),
        )
        sizes = describe_sizes(session, baseline.result["size_bytes"], formats)
        speed = measure_speed(plan, session, data, stage, ran["sha256"])
        result = {
            "status": "finished",
            "fingerprint": plan.key,
            "started": stage.started,
            "seconds": time.time() - stage.started,
            "tries": stage.tries,
            "accuracy": accuracy | baseline.compare(accuracy, predictions, data.evaluation.labels.numpy()),
            **speed,
            "network": network,
            "images": describe_images(data),
            "size_bytes": sizes,
            "prep_s": stage.prep,
            "from_cache": stage.from_cache,
            "stage_s": stage.seconds,
            "baseline": baseline.result,
            "session": ran,
            "hardware": unaccelerated(ran, environment),
            "config": resolved(cfg),
            "environment": environment,
        }
        save(stage, result, pruning)
    return result


def prepare(cfg: DictConfig, stage: Stages) -> Plan:
    """Start the random numbers, choose device, threads and runtime, and take over what an earlier try kept."""
    torch.manual_seed(cfg.seed)
    protocol: Protocol = instantiate(cfg.measure, _convert_="all")
    device, threads = resolve_device(cfg.device), use_threads(protocol.threads)
    work = Workspace(stage.folder, device, threads, stage, protocol.paired, tuple(protocol.batch_sizes))
    quantizer = component(cfg.quantizer)
    runtime = possible_runtime(cfg, quantizer, device)
    stage.cache, stage.turns = open_cache(cfg), Turns(device)
    # What an earlier try kept is of use on the same kind of device only.
    stage.resume(digest([key := fingerprint(cfg), device_name(device)]))
    return Plan(cfg, key, protocol, quantizer, runtime, work)


def possible_runtime(cfg: DictConfig, quantizer: Callable[..., Any], device: str) -> Runtime:
    """Return the runtime that is meant, or refuse what it or this machine cannot run."""
    precision = precision_of(quantizer)
    runtime: Runtime = instantiate(cfg.runtime, _convert_="all").resolve(precision, device)
    refuse(impossible(runtime, precision, device))
    runtime.require(device)
    return runtime


def load(cfg: DictConfig, device: str) -> tuple[Model, Data]:
    """Return the model on its device and the data as the model takes it."""
    model: Model = component(cfg.model)()
    data: Data = component(cfg.dataset)(model)
    model.module.to(device)
    return model, data


def compress(plan: Plan, model: Model, data: Data, stage: Stages) -> Result | None:
    """Prune and recover the network in place, and return the pruner's record."""

    def change(name: str, config: DictConfig) -> Any:
        origin = origin_of(config, data, plan.work.device)
        return change_once(stage, name, model, partial(with_stage(component(config), stage), model, data), origin)

    pruning: Result | None = change("prune", plan.cfg.pruner)
    change("recover", plan.cfg.recovery)
    if plan.protocol.repeats > 1:
        share_network(stage, model)
    return pruning


def with_stage(call: partial[Any], stage: Stages) -> Callable[..., Any]:
    """Hand a component the stage if it takes one, to share with other jobs what it works out on the way."""
    return partial(call, stage=stage) if "stage" in signature(call.func).parameters else call


def measure_speed(plan: Plan, session: Session, data: Data, stage: Stages, artifact: str) -> Result:
    """Measure here, or in fresh processes if the protocol wants repeats; close the session and write `samples.npz`.

    `artifact` is the hash of what the session runs.
    """
    if plan.protocol.repeats > 1:
        session.close()
        config = resolved(plan.cfg) | {"cache": plan.cfg.cache}
        result, samples = measure_apart(stage, config, artifact, plan.protocol.repeats)
    else:
        result, samples = speed(session, data, plan.protocol, stage, partial(dense_session, plan))
        session.close()
    np.savez_compressed(stage.folder / "samples.npz", **samples)
    return result


@contextmanager
def dense_session(plan: Plan) -> Iterator[Session]:
    """Open the uncompressed FP32 model in the job's runtime for a while."""
    folder = plan.work.folder / "dense"
    folder.mkdir(exist_ok=True)
    model, data = load(plan.cfg, plan.work.device)
    work = replace(plan.work, folder=folder, stage=Stages(folder, "uncompressed", plan.work.stage.cache))
    session = plan.runtime.open(model, none, data, work)
    try:
        yield session
    finally:
        session.close()
        shutil.rmtree(folder)


def evaluate(session: Session, data: Data, protocol: Protocol, stage: Stages) -> tuple[Result, np.ndarray]:
    """Return accuracy and the predicted class of every evaluation image (N,), which `predictions.npy` holds."""
    path = stage.folder / "predictions.npy"

    def measured() -> Result:
        found, predictions = accuracy(session, data, protocol.evaluation_batch(session.device))
        np.save(path, predictions)
        return found

    return stage.once("accuracy", measured, path), np.load(path)


def save_layers(session: Session, baseline: Baseline, folder: Path) -> None:
    """Write how the weights of each layer spread before and after compression."""
    after = compressed_layers(session.artifact, baseline.layers)
    write_json(folder / "layers.json", {"before": baseline.layers, "after": after})


def save(stage: Stages, result: Result, pruning: Result | None) -> None:
    """Write what a job found; `result.json` comes last, as the sign that all is there."""
    if pruning:
        write_json(stage.folder / "pruning.json", pruning)
    write_json(stage.folder / "result.json", result)
    stage.finish()
