"""The procedure of PQ Bench, written anew from the thesis behind it: `python -m benchmarks.pq_bench --help`.

Schulze, *Benchmarking Pruning and Quantization Techniques*, master's thesis, 2024; Schulze et al., DEEM 2025. It serves
as the comparison in `benchmarks.against_pq_bench`. Section 4.1: the combinations of model, pruner, quantizer and batch
size run one after the other, as many times as there are iterations. Each loads, compresses, exports and calibrates for
itself, has a preparation time of its own, and is evaluated on all images, which a DataLoader reads from their files,
with PyTorch's profiler around each batch. Section 5: ten batches of warm-up come first.

ONNX Runtime on the CPU stands for TensorRT. The images and the layers to prune are chosen as pq_sweep chooses them, so
that both can come to the same answers. Where the thesis leaves open whether something is done again, the choice here is
the one that takes less time.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import get_model, get_model_weights

from pq_sweep.core.hardware import cpu_flags, multiplies_bytes
from pq_sweep.core.threads import use_threads
from pq_sweep.core.weights import prunable
from pq_sweep.inputs.classes import imagenet_wnids, stratified_order

MODELS = ("resnet18", "mobilenet_v2")
AMOUNTS = (0.0, 0.1, 0.5, 0.9)
QUANTIZERS = ("none", "int8")
BATCH_SIZES = (1, 8, 32)
WARM_UP = 10  # section 5
CALIBRATION, SEED = 64, 0  # pq_sweep's defaults
Row = dict[str, Any]


class Tally:
    """Seconds of each step, without those of the steps within it, and the number of images decoded."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.decoded = 0
        self.steps = ["rest"]
        self.since = time.perf_counter()

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        self.turn()
        self.steps.append(step)
        try:
            yield
        finally:
            self.turn()
            self.steps.pop()

    def turn(self) -> None:
        """Count the time since the last turn for the current step."""
        now = time.perf_counter()
        self.seconds[self.steps[-1]] += now - self.since
        self.since = now


@dataclass(frozen=True)
class Job:
    """A combination, the options of the command line, and the tally that all combinations share."""

    model: str
    amount: float
    quantizer: str
    batch_size: int
    options: argparse.Namespace
    tally: Tally

    @property
    def folder(self) -> Path:
        """Return the folder for the combination's graph."""
        folder: Path = self.options.folder / f"{self.model}-{self.amount}-{self.quantizer}-{self.batch_size}"
        return folder


@dataclass(frozen=True)
class Pictures:
    """Images that are decoded whenever they are taken, and the logits that belong to their classes."""

    evaluation: Subset[Any]
    calibration: Subset[Any]
    columns: list[int]


def main() -> None:
    """Run PQ Bench's procedure over a grid, and write results.json and the graphs into a folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pq_bench", description=main.__doc__)
    add_arguments(parser)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    tally = Tally()
    rows = []
    for _ in range(options.iterations):
        for combination in product(options.models, options.amounts, QUANTIZERS, BATCH_SIZES):
            rows.append(run(Job(*combination, options, tally)))
    tally.turn()
    found = {"images": image_names(options), "decoded": tally.decoded, "seconds": tally.seconds, "rows": rows}
    (options.folder / "results.json").write_text(json.dumps(found))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which grid to run, and on which images and weights."""
    parser.add_argument("--images", type=Path, required=True, help="folder with train/ and val/ with class folders")
    parser.add_argument("--weights", type=Path, required=True, help="folder with <model>.pth of trained weights")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--amounts", nargs="+", type=float, default=AMOUNTS, help="of l1_global; 0 prunes nothing")
    parser.add_argument("--evaluation", type=int, help="number of images to evaluate on, instead of all")
    parser.add_argument("--measure", default="quick", help="protocol by which pq_sweep times its jobs")
    parser.add_argument("--workers", type=int, default=0, help="of PQ Bench's DataLoader; the default is PyTorch's")
    parser.add_argument("--iterations", type=int, default=3, help="of PQ Bench; the thesis takes the median of three")


def run(job: Job) -> Row:
    """Compress a model and evaluate it at a batch size."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with job.tally("load"):
        network, transform = load_network(job)
        pictures = find_pictures(job.options, transform)
    original = saved_mb(job, network)
    start = time.perf_counter()
    graph = compress(job, network, pictures)
    with job.tally("build"):
        session = open_session(graph)
    return {
        "model": job.model,
        "amount": job.amount,
        "quantizer": job.quantizer,
        "batch_size": job.batch_size,
        "graph": str(graph.relative_to(job.options.folder)),
        "original_mb": original,
        "compressed_mb": graph.stat().st_size / 1e6,
        "prep_s": time.perf_counter() - start,
        **evaluate(job, session, pictures),
    }


def load_network(job: Job) -> tuple[nn.Module, Any]:
    """Return a trained network, and how torchvision prepares images for it."""
    network = get_model(job.model, weights=None)
    network.load_state_dict(torch.load(job.options.weights / f"{job.model}.pth", weights_only=True))
    return network.eval(), next(iter(get_model_weights(job.model))).transforms()


def find_pictures(options: argparse.Namespace, transform: Any = None) -> Pictures:
    """Return the images that pq_sweep takes: a stratified part of each folder, those to evaluate in order of path."""
    train, val = (ImageFolder(options.images / name, transform) for name in ("train", "val"))
    calibration = stratified_order(train.targets, seed=SEED)[:CALIBRATION].tolist()
    evaluation = sorted(stratified_order(val.targets, seed=SEED)[: options.evaluation].tolist())
    columns = [imagenet_wnids().index(name) for name in val.classes]
    return Pictures(Subset(val, evaluation), Subset(train, calibration), columns)


def image_names(options: argparse.Namespace) -> list[str]:
    """Name the images that were evaluated."""
    evaluation = find_pictures(options).evaluation
    files: list[tuple[str, int]] = evaluation.dataset.samples  # type: ignore[attr-defined]
    return [str(Path(files[index][0]).relative_to(options.images)) for index in evaluation.indices]


def saved_mb(job: Job, network: nn.Module) -> float:
    """Return the size in MB of the file that PyTorch saves."""
    path = job.folder / "model.pt"
    with job.tally("sizes"):
        torch.save(network.state_dict(), path)
        size = path.stat().st_size / 1e6
        path.unlink()
    return size


def compress(job: Job, network: nn.Module, pictures: Pictures) -> Path:
    """Prune and export a network and quantize its graph; return the graph to run."""
    with job.tally("prune"):
        prune(network, job.amount)
    exported, graph = job.folder / "export.onnx", job.folder / "model.onnx"
    with job.tally("export"):
        export(network, exported)
    if job.quantizer == "none":
        return exported
    with job.tally("quantize"):
        quantize(exported, graph, Calibration(pictures.calibration, job.tally))
    exported.unlink()
    return graph


def prune(network: nn.Module, amount: float) -> None:
    """Zero the smallest weights of all layers together by PyTorch's pruning module."""
    targets = prunable(network)
    torch_prune.global_unstructured(targets, pruning_method=torch_prune.L1Unstructured, amount=amount)
    for layer, name in targets:
        torch_prune.remove(layer, name)


def export(network: nn.Module, path: Path) -> None:
    """Write the network as an ONNX graph for any batch size."""
    torch.onnx.export(
        network,
        (random_images(2),),
        path,
        dynamo=True,
        verbose=False,
        input_names=["input"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
    )


class Calibration(CalibrationDataReader):
    """Calibration images one by one, each decoded when it is asked for."""

    def __init__(self, images: Subset[Any], tally: Tally) -> None:
        self.loader, self.tally = iter(DataLoader(images, 1)), tally

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, or None."""
        with self.tally("decode"):
            batch = next(self.loader, None)
        if batch is None:
            return None
        self.tally.decoded += 1
        return {"input": batch[0].numpy()}


def quantize(source: Path, target: Path, images: Calibration) -> None:
    """Calibrate on images and write the graph in 8 bit by ONNX Runtime's tool, at pq_sweep's options."""
    prepared = source.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        target,
        images,
        per_channel=True,
        reduce_range=not multiplies_bytes(cpu_flags()),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    prepared.unlink()


def open_session(graph: Path) -> Any:
    """Load a graph on as many threads as pq_sweep does."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = use_threads(None)
    settings.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, settings, providers=["CPUExecutionProvider"])


def evaluate(job: Job, session: Any, pictures: Pictures) -> Row:
    """Run all images from their files, each batch under the profiler, after a warm-up."""
    with job.tally("warm-up"):
        images = random_images(job.batch_size).numpy()
        for _ in range(WARM_UP):
            session.run(None, {"input": images})
    answers, right, times = [], [], []
    for batch, labels in batches(job, pictures.evaluation):
        logits, seconds = profiled(session, batch, job.tally)
        answers.append(logits[:, pictures.columns].argmax(dim=1))
        right.append(answers[-1] == labels)
        times.append(seconds)
    return {
        # As PQ Bench states it: the mean over batches, however small the last one is. The other entries are compared.
        "accuracy": float(torch.stack([part.float().mean() for part in right]).mean()),
        "correct": int(torch.cat(right).sum()),
        "predictions": torch.cat(answers).tolist(),
        "inference_ms": sum(times) / len(times) * 1e3,
        "batches": len(times),
    }


def random_images(count: int) -> Tensor:
    """Return images of noise, which need no decoding."""
    return torch.randn((count, 3, 224, 224), generator=torch.Generator().manual_seed(SEED))


def batches(job: Job, images: Subset[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images and labels from a DataLoader, and count the time spent waiting for them as decoding."""
    loader = DataLoader(images, job.batch_size, num_workers=job.options.workers)
    with job.tally("decode"):
        waiting = iter(loader)
    while True:
        with job.tally("decode"):
            batch = next(waiting, None)
        if batch is None:
            return
        job.tally.decoded += len(batch[0])
        yield batch[0], batch[1]


def profiled(session: Any, images: Tensor, tally: Tally) -> tuple[Tensor, float]:
    """Return the logits of a batch, and the seconds that the profiler saw it take."""
    with tally("profiler"):
        with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function("batch"), tally("inference"):
            logits = session.run(None, {"input": images.numpy()})[0]
        seen = next(event for event in profiler.key_averages() if event.key == "batch")
    return torch.from_numpy(logits), seen.cpu_time_total / 1e6


if __name__ == "__main__":
    main()
