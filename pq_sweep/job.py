"""One job, from its config to its `result.json`."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig

from pq_sweep import measure
from pq_sweep.baseline import load_baseline
from pq_sweep.check import check, impossible, refuse
from pq_sweep.environment import describe, device_name, resolve_device
from pq_sweep.fingerprint import digest, fingerprint, resolved
from pq_sweep.progress import Stages, write_json
from pq_sweep.quantizers import none
from pq_sweep.resume import change_once
from pq_sweep.runtimes import precision_of
from pq_sweep.sizes import compressed_size, storage_sizes
from pq_sweep.timing import Protocol, Result
from pq_sweep.types import Data, Model, Runtime, Session, Workspace

component = partial(instantiate, _partial_=True, _convert_="all")


def run(cfg: DictConfig, folder: Path, label: str = "") -> Result:
    """Compress and measure one model as `cfg` says; leave the artifact and `result.json` in `folder`."""
    stage = Stages(folder, label)
    with stage.keeping_errors():
        check(cfg)
        torch.manual_seed(cfg.seed)
        protocol: Protocol = instantiate(cfg.measure, _convert_="all")
        device, threads = resolve_device(cfg.device), measure.use_threads(protocol.threads)
        work = Workspace(folder, device, threads, stage, protocol.paired)
        quantizer = component(cfg.quantizer)
        runtime = possible_runtime(cfg, quantizer, device)
        # What an earlier try kept is of use on the same kind of device only.
        stage.resume(digest([key := fingerprint(cfg), device_name(device)]))
        with stage("load"):
            model, data = load(cfg, device)
        with stage("baseline"):
            baseline = load_baseline(cfg, model, data, work, protocol)
        pruning = change_once(stage, "prune", model, partial(component(cfg.pruner), model, data))
        change_once(stage, "recover", model, partial(component(cfg.recovery), model, data))
        network, formats = stage.once("sizes", partial(describe_network, model, baseline.result, folder))
        session = runtime.open(model, quantizer, data, work)
        del model  # from here on only the session holds memory
        accuracy, predictions = evaluate(session, data, protocol, stage)
        speed = measure.speed(session, data, protocol, stage, partial(dense_session, cfg, runtime, work))
        result = {
            "status": "finished",
            "fingerprint": key,
            "started": stage.started,
            "seconds": time.time() - stage.started,
            "tries": stage.tries,
            "accuracy": accuracy | baseline.compare(accuracy, predictions),
            **speed,
            "network": network,
            "images": describe_images(data),
            "size_bytes": describe_sizes(session, baseline.result["size_bytes"], formats),
            "prep_s": stage.prep,
            "stage_s": stage.seconds,
            "baseline": baseline.result,
            "session": describe_session(session, quantizer, folder),
            "config": resolved(cfg),
            "environment": describe(work.device, work.threads),
        }
        session.close()
        save(stage, result, pruning)
    return result


def possible_runtime(cfg: DictConfig, quantizer: Callable[..., Any], device: str) -> Runtime:
    """Return the runtime that is meant, or refuse what it or this machine cannot run."""
    precision = precision_of(quantizer)
    runtime: Runtime = instantiate(cfg.runtime).resolve(precision, device)
    refuse(impossible(runtime, precision, device))
    runtime.require(device)
    return runtime


def load(cfg: DictConfig, device: str) -> tuple[Model, Data]:
    """Return the model on its device and the data as the model takes it."""
    model: Model = component(cfg.model)()
    data: Data = component(cfg.dataset)(model)
    model.module.to(device)
    return model, data


@contextmanager
def dense_session(cfg: DictConfig, runtime: Runtime, work: Workspace) -> Iterator[Session]:
    """Open the uncompressed FP32 model in the job's runtime for a while."""
    folder = work.folder / "dense"
    folder.mkdir(exist_ok=True)
    model, data = load(cfg, work.device)
    session = runtime.open(model, none, data, replace(work, folder=folder, stage=Stages(folder, "uncompressed")))
    try:
        yield session
    finally:
        session.close()
        shutil.rmtree(folder)


def evaluate(session: Session, data: Data, protocol: Protocol, stage: Stages) -> tuple[Result, np.ndarray]:
    """Return accuracy and the predicted class of every evaluation image (N,), which `predictions.npy` holds."""
    path = stage.folder / "predictions.npy"

    def measured() -> Result:
        accuracy, predictions = measure.accuracy(session, data, protocol.eval_batch_size)
        np.save(path, predictions)
        return accuracy

    return stage.once("accuracy", measured, path), np.load(path)


def save(stage: Stages, result: Result, pruning: Result | None) -> None:
    """Write what a job found; `result.json` comes last, as the sign that all is there."""
    if pruning:
        write_json(stage.folder / "pruning.json", pruning)
    write_json(stage.folder / "result.json", result)
    stage.finish()


def describe_network(model: Model, dense: Result, folder: Path) -> tuple[Result, dict[str, int]]:
    """Return what the network takes, its terms of use and its figures; and its bytes in each format of storage."""
    shape = [model.preprocess.channels, model.preprocess.size, model.preprocess.size]
    about = {"input": shape, "classes": model.num_classes, "licence": model.licence}
    return about | measure.network(model, dense), storage_sizes(model, folder)


def describe_images(data: Data) -> Result:
    """Return how many images there were for what, and where they came from."""
    parts = {"evaluation": data.evaluation, "calibration": data.calibration, "train": data.train}
    return {name: len(part) if part else 0 for name, part in parts.items()} | data.record()


def describe_sizes(session: Session, original: int, formats: dict[str, int]) -> Result:
    """Return the bytes of the original, of the file to deploy, and of the pruned FP32 network in each format."""
    compressed = session.artifact.stat().st_size
    return {
        "original": original,
        "compressed": compressed,
        "compressed_zstd": compressed_size(session.artifact),
        "formats": formats,
        "smallest_format": min(formats, key=lambda name: formats[name]),
    }


def describe_session(session: Session, quantizer: Callable[..., Any], folder: Path) -> Result:
    """Return what really ran."""
    return {
        "runtime": session.runtime,
        "device": session.device,
        "engine": session.engine,
        "precision": precision_of(quantizer),
        "artifact": str(session.artifact.relative_to(folder)),
        **session.details,
    }
