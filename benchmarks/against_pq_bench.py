"""pq_sweep and PQ Bench's procedure on one grid: `python -m benchmarks.against_pq_bench --images DIR --weights DIR`.

Both run by their own command, one after the other, with nothing kept from before: first pq_sweep at its defaults
(except runtime=onnxruntime and an empty cache), then `benchmarks.pq_bench`, which therefore finds the files in the
system's memory. This prints, in Markdown, what both took, where the time went, and whether they came to the same
answers, image by image. It has to run alone on its machine.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.pq_bench import BATCH_SIZES, QUANTIZERS, add_arguments
from pq_sweep.core.environment import device_name, versions

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = {"fp32": "none", "int8": "int8"}
NAMES = ("PQ Bench's procedure", "pq_sweep")
# What each step is in the one and in the other; a step not named here counts as `rest`.
STEPS = {
    "load": "load weights, find images; pq_sweep: decode them, once",
    "decode": "decode images, again in every pass",
    "baseline": "evaluate the uncompressed model under torch, once per model",
    "prune": "prune",
    "sizes": "sizes; pq_sweep: in every format",
    "export": "export to ONNX",
    "check_export": "prove the export",
    "quantize": "calibrate and quantize",
    "build": "open the session",
    "accuracy": "run all images for accuracy",
    "inference": "run all images for accuracy and latency, once per batch size",
    "profiler": "start, stop and read the profiler",
    "warm-up": "warm up, ten batches of each size",
    "latency": "warm up and time calls of each batch size",
    "rest": "start, imports, records, tables; pq_sweep: MLflow",
}
Key = tuple[str, float, str]


@dataclass(frozen=True)
class Cost:
    """Seconds by the clock and of the CPUs, and how many cores other processes kept busy meanwhile."""

    wall_s: float
    cpu_s: float
    others: float


@dataclass(frozen=True)
class Outcome:
    """What one of the two took, and what it found for each combination."""

    cost: Cost
    decoded: int
    seconds: dict[str, float]
    images: list[str]
    jobs: dict[Key, Job]

    @property
    def steps(self) -> dict[str, float]:
        """Return the seconds of each step, and all others as `rest`."""
        known = {step: self.seconds.get(step, 0.0) for step in STEPS if step != "rest"}
        return known | {"rest": self.cost.wall_s - sum(known.values())}


@dataclass(frozen=True)
class Job:
    """A combination: right answers and each image's answer (N,), of every pass; calls and ms of each batch size."""

    correct: list[int]
    answers: list[list[int]]
    graph: Path
    calls: dict[int, int]
    latency_ms: dict[int, float]


def main() -> None:
    """Run one grid with pq_sweep and by PQ Bench's procedure, and compare time and answers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_pq_bench", description=main.__doc__)
    add_arguments(parser)
    options = parser.parse_args()
    options.images, options.weights = options.images.resolve(), options.weights.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        ours = run_ours(options, Path(scratch))
        theirs = run_theirs(options, Path(scratch))
        lines = [*heading(options, theirs), *costs(theirs, ours), *steps(theirs, ours), *answers(theirs, ours)]
        print("\n".join(lines))


def run_ours(options: argparse.Namespace, scratch: Path) -> Outcome:
    """Sweep over the grid by pq_sweep's command line."""
    folder = scratch / "sweep"
    cost = timed([ROOT / "launch.py", "-m", *overrides(options), f"hydra.sweep.dir={quoted(folder)}"], scratch)
    results = {path.parent: json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))}
    with next(folder.glob("baseline/*/images.csv")).open(newline="") as file:
        images = [line["image"] for line in csv.DictReader(file)]
    decoded = sum(result["images"]["decoded"] for result in results.values())
    jobs = {key_of(result): our_job(result, path) for path, result in results.items()}
    return Outcome(cost, decoded, spent(results.values()), images, jobs)


def spent(results: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds that all jobs of pq_sweep spent on each step."""
    seconds: dict[str, float] = defaultdict(float)
    for result in results:
        for stage, taken in result["stage_s"].items():
            name = stage.partition(" ")[0]  # "latency b8"
            if stage not in result["from_cache"]:  # else another job has spent these seconds
                seconds[{"calibrate": "quantize", "trace": "export"}.get(name, name)] += taken
    return seconds


def overrides(options: argparse.Namespace) -> list[str]:
    """Return the grid as pq_sweep's command line takes it; apart from it, only the runtime is changed."""
    return [
        f"model={','.join(options.models)}",
        f"model.weights={quoted(options.weights / '${model.name}.pth')}",
        "dataset=image_folder",
        f"dataset.root={quoted(options.images)}",
        f"dataset.evaluation={options.evaluation or 'null'}",
        "pruner=l1_global",
        f"pruner.amount={','.join(map(str, options.amounts))}",
        f"quantizer={','.join(QUANTIZERS)}",
        f"measure={options.measure}",
        f"measure.batch_sizes={list(BATCH_SIZES)}",
        "runtime=onnxruntime",
        "device=cpu",
    ]


def quoted(path: Path) -> str:
    """Return a path as a value of Hydra's command line."""
    return "'" + str(path).replace("'", "\\'") + "'"


def key_of(result: dict[str, Any]) -> Key:
    """Say which combination a result of pq_sweep belongs to."""
    config = result["config"]
    return config["model"]["name"], float(config["pruner"]["amount"]), PRECISIONS[result["session"]["precision"]]


def our_job(result: dict[str, Any], folder: Path) -> Job:
    """Return a combination as pq_sweep measured it."""
    accuracy, latency = result["accuracy"], result["latency"]
    return Job(
        correct=[round(accuracy["top1"] * accuracy["samples"])],
        answers=[np.load(folder / "predictions.npy").tolist()],
        graph=folder / result["session"]["artifact"],
        calls={int(size): timed["iterations"] for size, timed in latency.items()},
        latency_ms={int(size): timed["p50_ms"] for size, timed in latency.items()},
    )


def run_theirs(options: argparse.Namespace, scratch: Path) -> Outcome:
    """Run the grid by PQ Bench's procedure."""
    folder = scratch / "pq_bench"
    given = ["--images", options.images, "--weights", options.weights, "--workers", options.workers]
    given += ["--models", *options.models, "--amounts", *options.amounts, "--iterations", options.iterations]
    given += ["--evaluation", options.evaluation] if options.evaluation else []
    cost = timed(["-m", "benchmarks.pq_bench", folder, *given], scratch)
    found = json.loads((folder / "results.json").read_text())
    passes: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    for one in found["rows"]:
        passes[one["model"], one["amount"], one["quantizer"]].append(one)
    jobs = {key: their_job(each, folder) for key, each in passes.items()}
    return Outcome(cost, found["decoded"], found["seconds"], found["images"], jobs)


def their_job(passes: list[dict[str, Any]], folder: Path) -> Job:
    """Return a combination as PQ Bench's procedure measured it, with a run for each batch size and iteration."""
    return Job(
        correct=[one["correct"] for one in passes],
        answers=[one["predictions"] for one in passes],
        graph=folder / passes[0]["graph"],
        calls={one["batch_size"]: one["batches"] for one in passes},
        latency_ms={one["batch_size"]: one["inference_ms"] for one in passes},
    )


def timed(command: list[Any], folder: Path) -> Cost:
    """Run a command of this Python in a folder, with nothing in pq_sweep's cache, and return what it took."""
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"}
    environment |= {"PQ_SWEEP_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    before, start = (children_cpu(), machine_cpu()), time.perf_counter()
    # Their output goes to standard error, so that it does not mix with the table.
    subprocess.run([sys.executable, *map(str, command)], cwd=folder, env=environment, stdout=sys.stderr, check=True)
    wall, cpu, machine = time.perf_counter() - start, children_cpu() - before[0], machine_cpu() - before[1]
    return Cost(wall, cpu, max(0.0, machine - cpu) / wall)


def children_cpu() -> float:
    """Return the CPU seconds of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def machine_cpu() -> float:
    """Return the CPU seconds used on this machine since it started, by all processes."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def heading(options: argparse.Namespace, outcome: Outcome) -> list[str]:
    """Say what ran, and on which machine."""
    grid = f"{', '.join(options.models)}; l1_global {', '.join(map(str, options.amounts))}; {', '.join(QUANTIZERS)}"
    size = f"{len(outcome.jobs)} jobs at batch sizes {', '.join(map(str, BATCH_SIZES))}, {len(outcome.images)} images"
    return [f"{size} ({grid}); {machine()}; {options.workers} workers of the DataLoader.", ""]


def machine() -> str:
    """Name the machine and the versions that ran on it."""
    known, cores = versions(), len(os.sched_getaffinity(0))
    return f"{cores} cores of {device_name('cpu')}, torch {known['torch']}, onnxruntime {known['onnxruntime']}"


def costs(theirs: Outcome, ours: Outcome) -> list[str]:
    """Compare what both took, and how often latency was timed for it."""
    lines = table("", *NAMES, "ratio")
    figures = {
        "wall time, s": (theirs.cost.wall_s, ours.cost.wall_s),
        "CPU time, s": (theirs.cost.cpu_s, ours.cost.cpu_s),
        "cores that others kept busy": (theirs.cost.others, ours.cost.others),
        "image files decoded": (theirs.decoded, ours.decoded),
        **{f"timed calls of a job, b{size}": (calls(theirs, size), calls(ours, size)) for size in BATCH_SIZES},
        **{f"latency b{size}, ms": (latency(theirs, size), latency(ours, size)) for size in BATCH_SIZES},
    }
    for name, (one, other) in figures.items():
        lines.append(row(name, number(one), number(other), f"{one / other:.2f}" if other else "-"))
    return [*lines, "", "Calls and latency are the median over all jobs, of a mean there and of a median here.", ""]


def number(value: float) -> str:
    """Return a number with only as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"


def calls(outcome: Outcome, size: int) -> float:
    """Return how many calls were timed at a batch size, in the median over all jobs."""
    return statistics.median(job.calls[size] for job in outcome.jobs.values())


def latency(outcome: Outcome, size: int) -> float:
    """Return what a call took at a batch size in ms, in the median over all jobs."""
    return statistics.median(job.latency_ms[size] for job in outcome.jobs.values())


def steps(theirs: Outcome, ours: Outcome) -> list[str]:
    """Show where the time of both went, in seconds."""
    lines = table("step, s", *NAMES)
    for name, about in STEPS.items():
        taken = theirs.steps[name], ours.steps[name]
        if max(taken) >= 0.05:
            lines.append(row(about, *(f"{seconds:.1f}" if seconds >= 0.05 else "-" for seconds in taken)))
    return [*lines, ""]


def answers(theirs: Outcome, ours: Outcome) -> list[str]:
    """Show the number of right answers of each job, and say which jobs differ, and in what."""
    total = len(ours.images)
    lines = table("job", *(f"correct of {total}, {name}" for name in NAMES), "differs in")
    found = {key: differences(job, ours.jobs[key]) for key, job in theirs.jobs.items()}
    for key, wrong in found.items():
        counts = (" ".join(map(str, outcome.jobs[key].correct)) for outcome in (theirs, ours))
        lines.append(row(" ".join(map(str, key)), *counts, "; ".join(wrong) or "nothing"))
    different = [" ".join(map(str, key)) for key, wrong in found.items() if wrong]
    same = "All jobs agree at every batch size: right answers, the answer to each image, all numbers of the graph."
    verdict = f"**{len(different)} of {len(found)} jobs differ:** {', '.join(different)}." if different else same
    if theirs.images != ours.images:
        verdict = f"**Not the same images were evaluated.** {verdict}"
    return [*lines, "", verdict]


def differences(theirs: Job, ours: Job) -> list[str]:
    """Say in what the two outcomes of a job differ."""
    wrong = []
    if set(theirs.correct) != set(ours.correct):
        wrong.append("right answers")
    others = max(sum(a != b for a, b in zip_longest(one, ours.answers[0])) for one in theirs.answers)
    if others:
        wrong.append(f"answers to {others} images")
    if numbers(theirs.graph) != numbers(ours.graph):
        wrong.append("numbers of the graph")
    return wrong


def numbers(graph: Path) -> list[str]:
    """Return a hash of each weight, scale and zero point of a graph, whatever their names and order."""
    arrays = (numpy_helper.to_array(item) for item in onnx.load(graph).graph.initializer)
    # Zeros of both signs count as the same weight.
    return sorted(hashlib.sha256((array + array.dtype.type(0)).tobytes()).hexdigest() for array in arrays)


def table(*names: str) -> list[str]:
    """Return the first lines of a table of Markdown."""
    return [row(*names), row(*("---" for _ in names))]


def row(*cells: str) -> str:
    """Return a line of a table of Markdown."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
