"""Descriptions of the network, the images, the session and the machine for a result."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pq_sweep.core.environment import command_line, device_name, git_state, gpu_uuid, slurm, versions
from pq_sweep.core.fingerprint import file_hash
from pq_sweep.core.hardware import Cpu, Gpu, capability, cpu_flags, cpu_name, lacks
from pq_sweep.core.result import Counts, Network, Ran, Sizes
from pq_sweep.core.sentences import listed
from pq_sweep.measure.network import count
from pq_sweep.measure.sizes import compressed_size
from pq_sweep.types import Data, Model, Record, Session


def describe(device: str, threads: int) -> dict[str, Any]:
    """Return the environment of this process as plain values."""
    return {
        "host": socket.gethostname(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "git": git_state(),
        "command": command_line(),
        "cpu": {"name": cpu_name(), "cores_usable": len(os.sched_getaffinity(0)), "threads": threads},
        "device": device_name(device),
        "gpu": _gpu(device),
        "slurm": slurm(),
    }


def _gpu(device: str) -> dict[str, Any] | None:
    if device == "cpu":
        return None
    import torch

    from pq_sweep.measure.monitor import identify

    properties, uuid = torch.cuda.get_device_properties(device), gpu_uuid(device)
    return {
        "name": properties.name,
        "uuid": uuid,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_mb": properties.total_memory / 1e6,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvml": identify(uuid),
    }


def describe_network(model: Model, data: Data, dense: Counts) -> Network:
    """Return the network's input, classes, licence and figures.

    `labels` are the classes of the logits in order, if the model or the data names them.
    """
    labels = model.classes or (data.classes if data.columns is None else None)
    return Network(
        **vars(count(model, dense)),
        input=[model.preprocess.channels, model.preprocess.size, model.preprocess.size],
        preprocess=asdict(model.preprocess),
        classes=model.num_classes,
        labels=list(labels) if labels else None,
        licence=model.licence,
    )


def pruned_in_graph(network: Network, details: Record) -> tuple[Network, Record] | None:
    """Return the network with the zeros of its graph, if that was pruned, and the record of that."""
    pruning = (details.get("quantizer") or {}).get("pruning")
    if pruning is None:
        return None
    zeros, weights = pruning["zeros"], pruning["weights"]
    return replace(network, sparsity=zeros / weights, nonzero_params=network.params - zeros), pruning


def describe_images(data: Data) -> Record:
    """Return how many images each part of the data has, and what the data set records about them."""
    parts = {"evaluation": data.evaluation, "calibration": data.calibration, "train": data.train}
    return {name: len(part) if part else 0 for name, part in parts.items()} | data.record()


def describe_notes(model: Model, data: Data, network: Network, *records: Record | None) -> list[str]:
    """Return a sentence for each thing that was done to what the user brought, or that came out unlike what was asked.

    Pruner and recovery add to them by the `notes` of their records.
    """
    found = [note for record in records for note in (record or {}).get("notes", ())]
    if network.uncounted:
        found.append(f"Multiply-accumulates leave out what the network computes by {listed(network.uncounted)}.")
    return list(dict.fromkeys([*model.notes, *data.notes, *found]))


def describe_sizes(session: Session, original: int, formats: dict[str, int]) -> Sizes:
    """Return the bytes of the original, of the file to deploy, and of the pruned FP32 network in each format."""
    return Sizes(
        original=original,
        compressed=session.artifact.stat().st_size,
        compressed_zstd=compressed_size(session.artifact),
        formats=formats,
        smallest_format=min(formats, key=lambda name: formats[name]),
    )


def describe_session(session: Session, precision: str, folder: Path) -> Ran:
    """Return what really ran."""
    return Ran(
        runtime=session.runtime,
        device=session.device,
        engine=session.engine,
        precision=precision,
        artifact=str(session.artifact.relative_to(folder)),
        sha256=file_hash(session.artifact),
        details=session.details,
    )


def unaccelerated(ran: Ran, environment: Record) -> list[str]:
    """Return one sentence for each thing that ran without fast units for it on the device."""
    gpu = environment["gpu"]
    if built_for := ran.details.get("compute_capability"):
        gpu = {"name": "the GPU that it is built for", "compute_capability": built_for}
    device = Gpu(gpu["name"], capability(gpu["compute_capability"])) if gpu else Cpu(environment["device"], cpu_flags())
    options = {"sparse": bool(ran.details.get("sparsity")), "tf32": bool(ran.details.get("tf32"))}
    return lacks(ran.precision, device, **options)
