"""What does a sweep take beyond its work? `python -m benchmarks.overhead --images DIR --weights DIR`.

It runs the grid of `benchmarks.against_pq_bench` by pq_sweep's command line with an empty cache. Then it runs all that
cannot be left out, one part after the other, each timed alone: decoding each image once; for each model the answers of
the uncompressed network and the graph of its operations; for each amount pruning, and filling the weights into that
graph; for each job quantization with its calibration, a session, one pass over all images, and as many calls of each
batch size as were measured. What the sweep takes beyond the sum of these parts is its overhead: start and imports,
checks, records, sizes, tables, MLflow. Each round is such a pair; the ratio is the median over all rounds. It has to
run alone on its machine.

It measures by the `standard` protocol, as a sweep with reliable latencies does. With `--measure quick`, which looks at
each batch size for under a second, the overhead takes as many seconds and is therefore a larger share.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnxruntime.quantization import CalibrationDataReader
from tqdm import tqdm

from benchmarks.against_pq_bench import Key, Outcome, key_of, machine, row, run_ours, table
from benchmarks.pq_bench import (
    QUANTIZERS,
    Job,
    Tally,
    add_arguments,
    find_pictures,
    load_network,
    open_session,
    prune,
    quantize,
)
from pq_sweep.core.threads import use_threads
from pq_sweep.runtimes.export import fill, trace
from pq_sweep.types import Model, Preprocess

LIMIT = 1.15
# The parts that take time, by name in `benchmarks.against_pq_bench.STEPS`; those that cannot be left out come first.
PARTS = {
    "load": "read weights, decode each image once",
    "baseline": "answers of the uncompressed models",
    "prune": "prune",
    "export": "trace each model once, export",
    "quantize": "calibrate and quantize",
    "build": "open sessions",
    "accuracy": "one pass of all images per job",
    "latency": "calls for latency, as many as were measured",
    "sizes": "sizes in every format",
    "check_export": "proof of each export",
    "rest": "start, imports, checks, records, tables, MLflow",
}
PHOTOGRAPH = Preprocess(size=224, resize=256, channels=3)


@dataclass(frozen=True)
class Measured:
    """How a sweep ran its jobs: images at once for accuracy, and calls for latency by job and batch size."""

    at_once: int
    calls: dict[Key, dict[int, int]]


@dataclass(frozen=True)
class Round:
    """A sweep, and the seconds of its parts alone."""

    sweep: Outcome
    alone: dict[str, float]

    @property
    def ratio(self) -> float:
        """Return how many times as long as its parts the sweep takes."""
        return self.sweep.cost.wall_s / sum(self.alone.values())


@dataclass(frozen=True)
class Photographs:
    """Decoded images (N, 3, 224, 224) to evaluate and to calibrate with."""

    evaluation: torch.Tensor
    calibration: torch.Tensor


class Reader(CalibrationDataReader):
    """Decoded calibration images one by one."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input, or None."""
        image = next(self.images, None)
        return None if image is None else {"input": image[None].numpy()}


def main() -> None:
    """Run the grid and its parts in turn and print what each took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=main.__doc__)
    add_arguments(parser)
    parser.set_defaults(measure="standard")
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    options.images, options.weights = options.images.resolve(), options.weights.resolve()
    rounds = list[Round]()
    for _ in tqdm(range(options.rounds), unit="round", disable=None, leave=False):
        with tempfile.TemporaryDirectory() as scratch:
            sweep = run_ours(options, Path(scratch))
            options.folder = Path(scratch)
            rounds.append(Round(sweep, parts(options, counted(Path(scratch)))))
    print("\n".join(report(rounds)))


def counted(scratch: Path) -> Measured:
    """Return how a sweep ran its jobs; the calls of the warm-up count as well."""
    results = [json.loads(path.read_text()) for path in scratch.glob("sweep/*/result.json")]
    (at_once,) = {result["accuracy"]["batch_size"] for result in results}
    calls = {
        key_of(result): {
            int(size): (timed["warmup"]["iterations"] + timed["iterations"]) * len(timed["loads"])
            for size, timed in result["latency"].items()
        }
        for result in results
    }
    return Measured(at_once, calls)


def parts(options: argparse.Namespace, measured: Measured) -> dict[str, float]:
    """Run what cannot be left out, each part alone, and return the seconds of each."""
    tally = Tally()
    use_threads(None)
    for number, name in enumerate(options.models):
        with tally("load"):
            network, transform = load_network(Job(name, 0.0, "none", 1, options, tally))
        if number == 0:  # all models of the grid take their images in the same way
            with tally("load"):
                images = decode(options, transform)
        with tally("baseline"), torch.inference_mode():
            evaluate(network, images.evaluation, measured.at_once)
        with tally("export"):
            trace(Model(network, 1000, PHOTOGRAPH), options.folder / "traced.onnx")
        for amount in options.amounts:
            compressed(options, network, (name, amount), images, measured, tally)
    tally.turn()
    return {step: seconds for step, seconds in tally.seconds.items() if step != "rest"}


def decode(options: argparse.Namespace, transform: Any) -> Photographs:
    """Decode all images, on all cores."""
    pictures = find_pictures(options, transform)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def taken(images: Any) -> torch.Tensor:
            return torch.stack([image for image, _ in pool.map(images.__getitem__, range(len(images)))])

        return Photographs(taken(pictures.evaluation), taken(pictures.calibration))


def evaluate(network: Any, images: torch.Tensor, at_once: int) -> None:
    """Run all images once."""
    for batch in images.split(at_once):
        network(batch)


def compressed(
    options: argparse.Namespace,
    network: Any,
    which: tuple[str, float],
    images: Photographs,
    measured: Measured,
    tally: Tally,
) -> None:
    """Compress a network by an amount, and run each of its jobs."""
    exported, quantized = options.folder / "export.onnx", options.folder / "model.onnx"
    changed = copy.deepcopy(network)
    with tally("prune"):
        prune(changed, which[1])
    with tally("export"):
        fill(Model(changed, 1000, PHOTOGRAPH), options.folder / "traced.onnx", exported)
    for quantizer in QUANTIZERS:
        with tally("quantize"):
            if quantizer == "int8":
                quantize(exported, quantized, Reader(images.calibration))
        with tally("build"):
            session = open_session(quantized if quantizer == "int8" else exported)
        with tally("accuracy"):
            evaluate(partial(answer, session), images.evaluation, measured.at_once)
        for size, count in measured.calls[(*which, quantizer)].items():
            batch = images.evaluation[torch.arange(size) % len(images.evaluation)]
            with tally("latency"):
                for _ in range(count):
                    answer(session, batch)


def answer(session: Any, images: torch.Tensor) -> None:
    """Run a batch."""
    session.run(None, {"input": images.numpy()})


def report(rounds: list[Round]) -> Iterable[str]:
    """Draw what was measured."""
    sweep = rounds[0].sweep
    size = f"{len(sweep.jobs)} jobs, {len(sweep.images)} images, {len(rounds)} rounds"
    yield from (f"{size}; {machine()}.", "", *table("part", "alone, s", "in the sweep, s"))
    for step, about in PARTS.items():
        alone = [one.alone[step] for one in rounds if step in one.alone]
        yield row(about, middle(alone) if alone else "-", middle([one.sweep.steps[step] for one in rounds]))
    sums, walls = [sum(one.alone.values()) for one in rounds], [one.sweep.cost.wall_s for one in rounds]
    yield row("sum", middle(sums), middle(walls))
    ratio = statistics.median(one.ratio for one in rounds)
    verdict = "within" if ratio <= LIMIT else "**above**"
    each = ", ".join(f"{one.ratio:.3f}" for one in rounds)
    yield from ("", f"Ratio {ratio:.3f} ({each}), {verdict} the limit of {LIMIT}.")


def middle(seconds: list[float]) -> str:
    """Return the median."""
    return f"{statistics.median(seconds):.1f}"


if __name__ == "__main__":
    main()
