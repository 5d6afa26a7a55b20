"""Is our median right? `python -m benchmarks.timing` times in turn with other people's tools.

It compares with torch.utils.benchmark for torch, and with a bare loop of `session.run` for ONNX Runtime, on the CPU.
Each model and batch size is measured in rounds, by us and by them in turn in one process, and the two alternate in
going first. Each round gives the ratio of the two medians; the median of these ratios should be within 3 % of 1.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

from benchmarks.support import component
from pq_sweep.compress import quantizers
from pq_sweep.core.environment import device_name, versions
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn, torchvision_model
from pq_sweep.job.stages import Stages
from pq_sweep.measure.latency import latency
from pq_sweep.measure.timing import Protocol
from pq_sweep.types import Session, Workspace

MODELS = ("resnet18", "mobilenet_v2")
BATCH_SIZES = (1, 8)


def protocol(seconds: float) -> Protocol:
    """Return a protocol that samples for some seconds."""
    warmup = {"warmup_iterations": 3, "warmup_s": 0.05, "window": None, "agreement": 0.0, "warmup_max_s": 0.0}
    sampling = {"min_iterations": 5, "iterations": 5, "min_s": seconds, "max_s": seconds, "interval": 0.0}
    rest = {"name": "benchmark", "batch_sizes": [], "eval_batch_size": 1, "threads": None, "paired": False}
    return Protocol(**warmup, **sampling, **rest, repeats=1, retries=0)


def theirs_torch(session: Session, images: torch.Tensor, seconds: float) -> float:
    """Return torch.utils.benchmark's median in ms."""
    timer = Timer(
        "session(images)", globals={"session": session, "images": images}, num_threads=torch.get_num_threads()
    )
    return timer.blocked_autorange(min_run_time=seconds).median * 1e3


def theirs_onnxruntime(session: Any, images: torch.Tensor, seconds: float) -> float:
    """Return the median of a bare loop in ms."""
    run, feed, taken = session.call.session.run, {"input": images.numpy()}, []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter_ns()
        run(None, feed)
        taken.append(time.perf_counter_ns() - start)
    return statistics.median(taken) / 1e6


THEIRS: dict[str, Callable[[Any, torch.Tensor, float], float]] = {
    "torch": theirs_torch,
    "onnxruntime": theirs_onnxruntime,
}


def ratios(session: Session, images: torch.Tensor, theirs: Any, rounds: int, seconds: float) -> Iterator[float]:
    """Yield our median over theirs, round by round."""
    for number in range(rounds):
        steps: list[Callable[[], float]] = [
            lambda: latency(session, images, protocol(seconds))[0].p50_ms,
            lambda: theirs(session, images, seconds),
        ]
        order = steps if number % 2 == 0 else steps[::-1]
        found = {step: step() for step in order}
        yield found[steps[0]] / found[steps[1]]


def main() -> None:
    """Print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each measurement")
    arguments = parser.parse_args()
    table = Table(title=f"ours / theirs on {device_name('cpu')}, torch {versions()['torch']}", title_justify="left")
    for name in ("model", "runtime", "batch", "median ratio", "smallest", "largest"):
        table.add_column(name)
    data = digits(digits_cnn(weights=None), calibration=8)
    for model_name in MODELS:
        for runtime_name, theirs in THEIRS.items():
            with tempfile.TemporaryDirectory() as folder:
                work = Workspace(Path(folder), "cpu", torch.get_num_threads(), Stages(Path(folder), ""))
                model = torchvision_model(name=model_name, weights=None)
                session = component("runtime", runtime_name)().open(model, quantizers.none, data, work)
                for batch_size in BATCH_SIZES:
                    found = list(ratios(session, model.sample(batch_size), theirs, arguments.rounds, arguments.seconds))
                    cells = (statistics.median(found), min(found), max(found))
                    table.add_row(model_name, runtime_name, str(batch_size), *(f"{cell:.3f}" for cell in cells))
                session.close()
    Console().print(table)


if __name__ == "__main__":
    main()
