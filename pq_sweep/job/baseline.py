"""The uncompressed model as the reference of every job, measured once per sweep for each model, data and device."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig

from pq_sweep.core.environment import device_name, versions
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.fingerprint import code, digest, files_state, resolved, unfollowed
from pq_sweep.core.folder import BaselineFolder, JobFolder
from pq_sweep.core.opened import opened
from pq_sweep.core.result import Accuracy, Compared, Reference
from pq_sweep.core.weights import network_state
from pq_sweep.inputs.state import same_answers
from pq_sweep.measure.accuracy import accuracy
from pq_sweep.measure.layers import Layers, dense_layers
from pq_sweep.measure.network import count
from pq_sweep.measure.significance import drop_interval, mcnemar
from pq_sweep.measure.timing import Protocol
from pq_sweep.runtimes import CallSession, converting, inferring, use_tf32
from pq_sweep.types import Data, Model, Record, Workspace


@dataclass(frozen=True)
class Baseline:
    """Figures of the uncompressed model and of its layers, and the class it predicts for every image (N,)."""

    result: Reference
    predictions: np.ndarray
    layers: Layers

    def compare(self, accuracy: Accuracy, predictions: np.ndarray, labels: np.ndarray) -> Compared:
        """Add to accuracy its drop in points, how sure that is, and the share of images that get the same answer."""
        before, after = self.predictions == labels, predictions == labels
        only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
        low, high = drop_interval(only_before, only_after, len(labels))
        return Compared(
            **vars(accuracy),
            drop_points=(self.result.top1 - accuracy.top1) * 100,
            drop_ci95_points=(low * 100, high * 100),
            drop_p=mcnemar(only_before, only_after),
            only_baseline_right=only_before,
            only_this_right=only_after,
            agreement=float((self.predictions == predictions).mean()),
        )


def load_baseline(cfg: DictConfig, model: Model, data: Data, work: Workspace, protocol: Protocol) -> Baseline:
    """Read the reference from the sweep's folder, or measure it first; of jobs that run at once, only one measures.

    Each kind of node and device has a reference of its own: a job is never compared with that of another device.
    """
    options = resolved(cfg)
    parts = {name: options[name] for name in ("model", "dataset", "seed")}
    where = [options.get("node"), device_name(work.device)]
    sweep = JobFolder(work.folder).sweep
    # Code that cannot be followed may be another each time that the sweep is started.
    start = sweep.read_manifest().get("started") if unfollowed(parts) else None
    weights = network_state(model)  # a function may take them from where no option and no code that is read says
    files = [files_state(parts), opened([cfg.model, cfg.dataset], sweep.path)]
    whole = digest([parts, where, code(parts), files, versions(), start, weights])
    folder = BaselineFolder(sweep.baselines / whole)
    folder.path.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.lock):
        if not _is_whole(folder):
            _take_or_measure(model, data, work, protocol, folder, {"options": parts, "device": where[1]})
    figures, layers = read_json(folder.figures), read_json(folder.layers)
    return Baseline(Reference.of(figures), np.load(folder.predictions), layers)


def _is_whole(files: BaselineFolder) -> bool:
    """Say whether the reference is there, and no file of it was cut short."""
    try:
        return (
            bool(read_json(files.figures))
            and read_json(files.layers) is not None
            and np.load(files.predictions).ndim == 1
        )
    except (OSError, ValueError, EOFError):
        return False


def _take_or_measure(
    model: Model, data: Data, work: Workspace, protocol: Protocol, folder: BaselineFolder, about: dict[str, Any]
) -> None:
    """Take the figures that an earlier sweep measured on the same kind of device, or measure them."""

    def whole() -> dict[str, Any]:
        how = {"threads": work.threads, "batch_size": protocol.evaluation_batch(work.device)}
        return about | network_state(model) | {"images": data.identity(data.evaluation)} | how

    def measured() -> Record:
        return _measure(model, data, work.device, protocol, folder).plain()

    made = (folder.weights, folder.predictions, folder.layers)
    found = work.stage.keep_in_cache("baseline", whole, measured, *made)
    _name_images(data, np.load(folder.predictions), folder.images)
    write_json(folder.figures, found)


def _measure(model: Model, data: Data, device: str, protocol: Protocol, folder: BaselineFolder) -> Reference:
    """Evaluate the model in FP32 under torch, and save its state_dict for its size; return its figures."""
    torch.save(model.module.state_dict(), folder.weights)
    use_tf32(False, device)
    network = inferring(converting(model.module, torch.float32, torch.preserve_format))
    session = CallSession(network, "torch", f"torch {torch.__version__} eager", device, folder.weights, {})
    with same_answers(partial(session, model.sample(2)), "the network"):
        found, predictions = accuracy(session, data, protocol.evaluation_batch(device))
    np.save(folder.predictions, predictions)
    write_json(folder.layers, dense_layers(model))
    return Reference(**vars(found), **vars(count(model)), size_bytes=folder.weights.stat().st_size)


def _name_images(data: Data, predictions: np.ndarray, path: Path) -> None:
    """Write which image each prediction of the sweep's jobs belongs to, with its class and the reference's answer."""
    classes = dict(enumerate(data.classes))  # a user's own data set may name fewer classes than the model has
    names = data.evaluation.names or [str(index) for index in range(len(data.evaluation))]
    with path.open("w", newline="", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["image", "class", "baseline"])
        for name, label, answer in zip(names, data.evaluation.labels.tolist(), predictions, strict=True):
            table.writerow([name, classes.get(label, label), classes.get(int(answer), answer)])
