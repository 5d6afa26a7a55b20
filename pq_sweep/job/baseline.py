"""The uncompressed model as the reference of every job, measured once per sweep for each model, data and device."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from omegaconf import DictConfig

from pq_sweep.core.environment import device_name, versions
from pq_sweep.core.files import write_json
from pq_sweep.core.fingerprint import digest, files_state, resolved
from pq_sweep.core.weights import network_state
from pq_sweep.measure.accuracy import accuracy
from pq_sweep.measure.layers import Layers, dense_layers
from pq_sweep.measure.network import count
from pq_sweep.measure.significance import drop_interval, mcnemar
from pq_sweep.measure.timing import Protocol, Result
from pq_sweep.runtimes import CallSession, converting, inferring, use_tf32
from pq_sweep.types import Data, Model, Workspace


@dataclass(frozen=True)
class Baseline:
    """Figures of the uncompressed model and of its layers, and the class it predicts for every image (N,)."""

    result: Result
    predictions: np.ndarray
    layers: Layers

    def compare(self, accuracy: Result, predictions: np.ndarray, labels: np.ndarray) -> Result:
        """Return accuracy's drop in points and how sure it is, and the share of images that get the same answer."""
        before, after = self.predictions == labels, predictions == labels
        only_before, only_after = int((before & ~after).sum()), int((after & ~before).sum())
        low, high = drop_interval(only_before, only_after, len(labels))
        return {
            "drop_points": (self.result["top1"] - accuracy["top1"]) * 100,
            "drop_ci95_points": [low * 100, high * 100],
            "drop_p": mcnemar(only_before, only_after),
            "only_baseline_right": only_before,
            "only_this_right": only_after,
            "agreement": float((self.predictions == predictions).mean()),
        }


def load_baseline(cfg: DictConfig, model: Model, data: Data, work: Workspace, protocol: Protocol) -> Baseline:
    """Read the reference from the sweep's folder, or measure it first; jobs that run at once wait for one of them.

    Each kind of node and device has its own: a job is never compared with what another one measured.
    """
    options = resolved(cfg)
    parts = {name: options[name] for name in ("model", "dataset", "seed")}
    where = [options.get("node"), device_name(work.device)]
    folder = work.folder.parent / "baseline" / digest([parts, where, files_state(options), versions()])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "baseline.json").exists():
            _take_or_measure(model, data, work, protocol, folder, {"options": parts, "device": where[1]})
    figures, layers = (json.loads((folder / name).read_text()) for name in ("baseline.json", "layers.json"))
    return Baseline(figures, np.load(folder / "predictions.npy"), layers)


def _take_or_measure(
    model: Model, data: Data, work: Workspace, protocol: Protocol, folder: Path, about: dict[str, Any]
) -> None:
    """Take the figures that an earlier sweep measured on the same kind of device, or measure them."""

    def whole() -> dict[str, Any]:
        how = {"threads": work.threads, "batch_size": protocol.evaluation_batch(work.device)}
        return about | network_state(model) | {"images": data.identity(data.evaluation)} | how

    files = [folder / name for name in ("model.pt", "predictions.npy", "layers.json")]
    found = work.stage.shared("baseline", whole, lambda: _measure(model, data, work.device, protocol, folder), *files)
    _name_images(data, np.load(folder / "predictions.npy"), folder / "images.csv")
    write_json(folder / "baseline.json", found)


def _measure(model: Model, data: Data, device: str, protocol: Protocol, folder: Path) -> Result:
    """Evaluate the model in FP32 under torch, and save its state_dict for its size; return its figures."""
    artifact = folder / "model.pt"
    torch.save(model.module.state_dict(), artifact)
    use_tf32(False)
    network = inferring(converting(model.module, torch.float32, torch.preserve_format))
    session = CallSession(network, "torch", f"torch {torch.__version__} eager", device, artifact, {})
    found, predictions = accuracy(session, data, protocol.evaluation_batch(device))
    np.save(folder / "predictions.npy", predictions)
    write_json(folder / "layers.json", dense_layers(model))
    return found | count(model) | {"size_bytes": artifact.stat().st_size}


def _name_images(data: Data, predictions: np.ndarray, path: Path) -> None:
    """Write which image each prediction of the sweep's jobs belongs to, with its class and the reference's answer."""
    classes = dict(enumerate(data.classes))  # a data set of one's own may name fewer than the model has
    names = data.evaluation.names or [str(index) for index in range(len(data.evaluation))]
    with path.open("w", newline="", errors="backslashreplace") as file:
        table = csv.writer(file)
        table.writerow(["image", "class", "baseline"])
        for name, label, answer in zip(names, data.evaluation.labels.tolist(), predictions, strict=True):
            table.writerow([name, classes.get(label, label), classes.get(int(answer), answer)])
