"""One job, from its config to its `result.json`."""

from __future__ import annotations

import json
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

from pq_sweep.compress.order import ThenPruned
from pq_sweep.compress.quantizers import none
from pq_sweep.core.cache import open_cache
from pq_sweep.core.environment import device_name, resolve_device
from pq_sweep.core.files import write_json
from pq_sweep.core.fingerprint import digest, fingerprint, resolved
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.opened import noting, opened
from pq_sweep.core.options import spelled
from pq_sweep.core.result import Accuracy, Bits, Compared, Network, Result, Speed
from pq_sweep.core.threads import use_threads
from pq_sweep.inputs.own_data import accepted_data
from pq_sweep.inputs.own_model import accepted_change, accepted_model
from pq_sweep.inputs.plain import settled
from pq_sweep.inputs.usable import require_usable
from pq_sweep.job.baseline import Baseline, load_baseline
from pq_sweep.job.check import check, impossible, refuse, without_graph
from pq_sweep.job.describe import (
    describe,
    describe_images,
    describe_network,
    describe_notes,
    describe_session,
    describe_sizes,
    pruned_in_graph,
    unaccelerated,
)
from pq_sweep.job.learned import taught
from pq_sweep.job.order import quantizes_first
from pq_sweep.job.probing import is_probed, probe_of, takes, tell, untold, watched, with_original, without_probe
from pq_sweep.job.repeats import measure_apart, require_shareable, share_network
from pq_sweep.job.stages import Stages
from pq_sweep.job.steps import change_once, moved, origin_of
from pq_sweep.job.turns import Turns
from pq_sweep.measure.accuracy import accuracy
from pq_sweep.measure.bits import Holdings, by_layer, of_graph, of_network, with_rest
from pq_sweep.measure.graph import Graph
from pq_sweep.measure.latency import speed
from pq_sweep.measure.layers import compressed_layers
from pq_sweep.measure.memory import free_at_first
from pq_sweep.measure.sizes import storage_sizes
from pq_sweep.measure.timing import Protocol
from pq_sweep.runtimes import precision_of
from pq_sweep.types import Data, Model, Quantizer, Record, Runtime, RuntimeChoice, Session, UserError, Workspace

TOO_FAR = (
    "precision {} cannot hold its values, or compression went too far: choose another quantizer, leave layers out by"
    " quantizer.exclude, or prune less"
)

component = partial(instantiate, _partial_=True, _convert_="all")


@dataclass(frozen=True)
class Plan:
    """What a job's config means on this machine; `key` is its fingerprint."""

    cfg: DictConfig
    key: str
    protocol: Protocol
    quantizer: Quantizer
    runtime: Runtime
    work: Workspace


def run(cfg: DictConfig, folder: Path, label: str = "") -> Result:
    """Compress and measure one model as `cfg` says; leave the artifact and `result.json` in `folder`."""
    stage, cfg = Stages(folder, label), spelled(cfg)
    with stage.keeping_errors():
        check(cfg)
        plan = prepare(cfg, stage)
        model, data, baseline = load_with_baseline(plan, stage)
        pruning, recovery = compress(plan, model, data, stage)
        network, formats = look_at_network(model, data, baseline, stage)
        session = open_session(plan, model, data, recovery)
        network, pruning = pruned_in_graph(network, session.details) or (network, pruning)
        notes = describe_notes(model, data, network, pruning, recovery)
        ran = describe_session(session, precision_of(plan.quantizer), folder)
        bits = save_layers(session, ran.precision, model, network, baseline, stage.files)
        del model  # from here on only the session holds memory
        environment = describe(plan.work.device, plan.work.threads)
        accuracy, speed = measure(plan, session, data, baseline, stage, ran.sha256)
        result = Result(
            status="finished" if speed else "built",
            fingerprint=plan.key,
            started=stage.started,
            seconds=time.time() - stage.started,
            tries=stage.tries,
            accuracy=accuracy,
            speed=speed,
            network=network,
            images=describe_images(data),
            size_bytes=describe_sizes(session, baseline.result.size_bytes, formats),
            bits=bits,
            preparation=stage.preparation,
            baseline=baseline.result,
            session=ran,
            hardware=unaccelerated(ran, environment),
            notes=notes,
            config=resolved(cfg),
            environment=environment,
        )
        save(cfg, stage, result, pruning)
    return result


def load_with_baseline(plan: Plan, stage: Stages) -> tuple[Model, Data, Baseline]:
    """Load model and data, write which files their functions opened, and return what the uncompressed model reaches."""
    with stage("load"):
        model, data = load(plan.cfg, plan.work.device)
    note_files(plan.cfg, stage)
    with stage("baseline"):
        return model, data, load_baseline(plan.cfg, model, data, plan.work, plan.protocol)


def open_session(plan: Plan, model: Model, data: Data, recovery: Record | None) -> Session:
    """Have the runtime make the artifact and open it, and note which files that opens.

    The quantizer is handed what the recovery has learned about rounding.
    """
    pruner = [plan.cfg.pruner] if quantizes_first(plan.cfg) else []
    with noting(plan.cfg.quantizer, *pruner, plan.cfg.runtime):
        return plan.runtime.open(model, taught(plan.quantizer, recovery), data, plan.work)


def prepare(cfg: DictConfig, stage: Stages) -> Plan:
    """Seed the random numbers, choose device, threads and runtime, and take over what an earlier try kept.

    How much of a GPU's memory is free is looked up before anything takes some.
    """
    torch.manual_seed(cfg.seed)
    protocol: Protocol = instantiate(cfg.measure, _convert_="all")
    device, threads = resolve_device(cfg.device), use_threads(protocol.threads)
    if device != "cpu":
        torch.cuda.set_device(device)  # for what asks for no device in particular, such as the state of random numbers
        free_at_first(device)
    require_shareable(device, protocol.repeats)
    work = Workspace(stage.folder, device, threads, stage, protocol.paired, tuple(protocol.batch_sizes))
    quantizer = quantizer_of(cfg)
    runtime = possible_runtime(cfg, quantizer, device)
    stage.cache, stage.turns = open_cache(cfg), Turns(device)
    # What an earlier try kept is only of use on the same kind of device.
    stage.resume(digest([key := fingerprint(cfg), device_name(device)]))
    return Plan(cfg, key, protocol, quantizer, runtime, work)


def quantizer_of(cfg: DictConfig) -> Quantizer:
    """Return the quantizer, which with order=quantize_first has the graph pruned that it writes."""
    quantizer: Quantizer = component(cfg.quantizer)
    return ThenPruned(quantizer, component(cfg.pruner), cfg.seed) if quantizes_first(cfg) else quantizer


def possible_runtime(cfg: DictConfig, quantizer: Quantizer, device: str) -> Runtime:
    """Return the chosen runtime, or refuse it if it cannot run the precision or this machine cannot run it."""
    precision = precision_of(quantizer)
    choice: RuntimeChoice = instantiate(cfg.runtime, _convert_="all")
    runtime = choice.resolve(precision, device)
    refuse(impossible(runtime, precision, device) or without_graph(cfg, runtime))
    runtime.require(device)
    return runtime


def load(cfg: DictConfig, device: str) -> tuple[Model, Data]:
    """Return the model on its device and the data as the model takes it."""
    with noting(cfg.model):
        model = accepted_model(component(cfg.model)(), cfg.model._target_)
    with noting(cfg.dataset):
        data = accepted_data(component(cfg.dataset)(model), model, cfg.dataset._target_)
    model.module.to(device)
    return model, data


def note_files(cfg: DictConfig, stage: Stages) -> None:
    """Write which files the job's components opened, and let what the cache keeps rest on those of the model."""
    sweep = stage.files.sweep.path
    stage.note_opened(opened((options for options in cfg.values() if isinstance(options, DictConfig)), sweep))
    if stage.cache:
        stage.cache.rest_on({"opened": digest(opened([cfg.model], sweep))})


def compress(plan: Plan, model: Model, data: Data, stage: Stages) -> tuple[Record | None, Record | None]:
    """Prune and recover the network in place, and return the records of both."""
    recovery, probed = plan.cfg.recovery, is_probed(plan.cfg.recovery)
    kept = stage.has("prune") and stage.has("recover")  # by an earlier try, which looked
    elsewhere = plan.cfg.get("train_device")
    where = resolve_device(elsewhere, "train_device") if elsewhere else plan.work.device

    def change(name: str, group: str, config: DictConfig) -> Any:
        call = with_stage(component(config), stage)
        looks = probe if name == "recover" or takes(call) else None
        origin = with_original(origin_of(config, data, where), looks)
        with noting(config):
            step = partial(changed, watched(call, looks, stage), model, data, f"{group}={config._target_}")
            record = change_once(stage, name, model, step, origin)
        note_files(plan.cfg, stage)
        what = f"the network after {group}={config._target_}"
        return with_notes(record, accepted_change(model, what, f"change the options of {group}, or what it does"))

    with moved(model, where):
        probe = probe_of(recovery, model, data, stage) if probed and not kept else None
        pruned = None if quantizes_first(plan.cfg) else change("prune", "pruner", plan.cfg.pruner)
        recovered = change("recover", "recovery", without_probe(recovery))
    if probed:
        tell(stage, {"prune": pruned, "recover": recovered})
    if plan.protocol.repeats > 1:
        share_network(stage, model)
    return untold(pruned), untold(recovered)


def changed(step: Callable[..., Any], model: Model, data: Data, name: str) -> Record | None:
    """Change the network and return what the step reports, with notes on what it left for others to do."""
    record = step(model, data)
    if not isinstance(record, dict | None):
        raise UserError(
            f"{name} returns a {type(record).__name__}; change model.module in place, and return a dictionary or"
            " nothing."
        )
    try:
        json.dumps(record)
    except TypeError as error:
        raise UserError(
            f"{name} returns what JSON cannot hold ({error}); put plain numbers and texts into it."
        ) from error
    require_usable(model.module, f"the network after {name}")
    return with_notes(record, settled(model.module))


def with_notes(record: Record | None, notes: list[str]) -> Record | None:
    """Add sentences for the row to what a step reports."""
    return {**(record or {}), "notes": [*(record or {}).get("notes", ()), *notes]} if notes else record


def with_stage(call: partial[Any], stage: Stages) -> Callable[..., Any]:
    """Hand a component the stage if it takes one, so that it can share its intermediate results with other jobs."""
    return partial(call, stage=stage) if "stage" in signature(call.func).parameters else call


def measure(
    plan: Plan, session: Session, data: Data, baseline: Baseline, stage: Stages, artifact: str
) -> tuple[Compared | None, Speed | None]:
    """Measure accuracy and then speed, and close the session; of one that cannot be called here, there is neither."""
    if not getattr(session, "runs", True):
        session.close()
        return None, None
    accuracy, predictions = evaluate(plan, session, data, stage)
    compared = baseline.compare(accuracy, predictions, data.evaluation.labels.numpy())
    return compared, measure_speed(plan, session, data, stage, artifact)


def measure_speed(plan: Plan, session: Session, data: Data, stage: Stages, artifact: str) -> Speed:
    """Measure here, or in fresh processes if the protocol wants repeats; close the session and write `samples.npz`.

    `artifact` is the hash of what the session runs.
    """
    if plan.protocol.repeats > 1:
        session.close()
        config = resolved(plan.cfg) | {"cache": plan.cfg.cache}
        found, samples = measure_apart(stage, config, artifact, plan.protocol.repeats)
    else:
        found, samples = speed(session, data, plan.protocol, stage, partial(dense_session, plan))
        session.close()
    np.savez_compressed(stage.files.samples, **samples)
    return found


@contextmanager
def dense_session(plan: Plan) -> Iterator[Session]:
    """Open the uncompressed FP32 model in the job's runtime for a while."""
    folder = JobFolder(plan.work.folder).dense
    folder.mkdir(exist_ok=True)
    model, data = load(plan.cfg, plan.work.device)
    work = replace(plan.work, folder=folder, stage=Stages(folder, "uncompressed", plan.work.stage.cache))
    session = plan.runtime.open(model, none, data, work)
    try:
        yield session
    finally:
        session.close()
        shutil.rmtree(folder)


def look_at_network(model: Model, data: Data, baseline: Baseline, stage: Stages) -> tuple[Network, dict[str, int]]:
    """Return the description of the compressed network, and its bytes in each format of storage."""

    def looked() -> Any:
        return describe_network(model, data, baseline.result).plain(), storage_sizes(model, stage.folder)

    network, formats = stage.time_and_keep("sizes", looked)
    return Network.of(network), formats


def evaluate(plan: Plan, session: Session, data: Data, stage: Stages) -> tuple[Accuracy, np.ndarray]:
    """Return accuracy and the predicted class of every evaluation image (N,), which `predictions.npy` holds."""
    path = stage.files.predictions

    def measured() -> Record:
        size = plan.protocol.evaluation_batch(session.device)
        found, predictions = accuracy(session, data, size, TOO_FAR.format(precision_of(plan.quantizer)))
        np.save(path, predictions)
        return found.plain()

    return Accuracy.of(stage.time_and_keep("accuracy", measured, path)), np.load(path)


def save_layers(
    session: Session, precision: str, model: Model, network: Network, baseline: Baseline, files: JobFolder
) -> Bits | None:
    """Write what each layer was before compression and what the artifact holds of it, and return its bits in sum."""
    stored, held = look_at_artifact(session.artifact, files.model, precision, model)
    products = by_layer(with_rest(held.products, network)) if held else {}
    layers = compressed_layers(stored, baseline.layers)
    after = {name: layer | products.pop(name, {}) for name, layer in layers.items()}
    write_json(files.layers, {"before": baseline.layers, "after": after, "products": products})
    return held.summed(network, baseline.result) if held else None


def look_at_artifact(
    artifact: Path, graph: Path, precision: str, model: Model
) -> tuple[Graph | dict[str, torch.Tensor], Holdings | None]:
    """Return what holds the weights of an artifact, which an engine was built from, and the bits of its products.

    TensorRT may run each layer of an FP32 graph in BF16 if that was wanted, and does not have to.
    """
    if artifact.suffix == ".pt":
        state = torch.load(artifact, map_location="cpu", weights_only=True)
        return state, of_network(model, state)
    path = artifact if artifact.suffix == ".onnx" else graph
    if not path.exists():
        return {}, None
    found = Graph(path)
    return found, None if precision == "bf16" else of_graph(found)


def save(cfg: DictConfig, stage: Stages, result: Result, pruning: Record | None) -> None:
    """Write what a job opened and found; `result.json` comes last, as the sign that all is there."""
    note_files(cfg, stage)
    if pruning:
        write_json(stage.files.pruning, pruning)
    write_json(stage.files.result, result.plain())
    stage.files.forget_progress()
