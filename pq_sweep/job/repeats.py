"""Latency measured again in fresh processes, one after another.

Where memory lies, which kernels a library picks and how threads are placed is decided once per process. However long a
process measures, it may therefore be faster or slower than the next by more than its own samples show.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from pq_sweep.core.environment import gpu_uuid
from pq_sweep.core.files import tail
from pq_sweep.core.fingerprint import SEEN
from pq_sweep.core.result import Memory, Speed
from pq_sweep.core.sources import search_path
from pq_sweep.job.stages import Stages
from pq_sweep.measure.timing import middle
from pq_sweep.types import Record, UserError

if TYPE_CHECKING:
    from pq_sweep.measure.latency import Samples
    from pq_sweep.types import Model

Tell = Callable[[dict[str, Any]], None]


class RepeatFailed(RuntimeError):
    """A fresh process measured nothing; the end of what it wrote to stderr is in the notes."""


def require_shareable(device: str, repeats: int) -> None:
    """Refuse to measure in fresh processes on a GPU that lets a single process in, as this one is in already."""
    from pq_sweep.measure.monitor import identify

    if repeats == 1 or device == "cpu" or identify(gpu_uuid(device)).get("compute_mode") != "exclusive_process":
        return
    raise UserError(
        f"measure.repeats={repeats} needs fresh processes, and {device} is in compute mode EXCLUSIVE_PROCESS, which"
        " lets no other in beside this one; use measure.repeats=1, or set the GPU to DEFAULT (nvidia-smi -c 0)."
    )


def share_network(stage: Stages, model: Model) -> None:
    """Keep the compressed network for other processes, or load the one that was kept.

    Other processes would repeat quick steps from the seed, and a GPU that sums up in another order may then come to
    other weights.
    """
    import torch

    from pq_sweep.core.weights import load_state

    path = stage.files.kept("network")
    stage.keep_in_job("network", lambda: torch.save(model.module.state_dict(), path), path)
    device = next(model.module.parameters()).device
    load_state(model.module, torch.load(path, map_location=device, weights_only=True))


def measure_apart(stage: Stages, config: Record, artifact: str, count: int) -> tuple[Speed, Samples]:
    """Measure `count` times, each time in a process of its own; return the middle figures and all samples.

    `artifact` is the hash of what is measured. What an earlier try of the job measured is not measured again.
    """
    import torch

    from pq_sweep.measure.memory import release_memory

    release_memory()  # a GPU's memory too: each process is to find as much of it free as this one did
    stage.turns = None  # the processes take turns on the device themselves, and would wait for this one for ever
    found: list[Speed] = []
    samples: Samples = {}
    for number in range(1, count + 1):
        path = stage.files.kept(f"repeat-{number}")
        wanted = {
            "config": config,
            "folder": str(stage.folder),
            "artifact": artifact,
            "samples": path.name,
            "files": SEEN,
        }
        apart = partial(_measure, stage, wanted, f"repeat {number}/{count}")
        found.append(Speed.of(stage.keep_in_job(f"repeat {number}", apart, path)))
        taken = torch.load(path, weights_only=True)
        samples |= {f"repeat{number}_{name}": values.numpy() for name, values in taken.items()}
    return combine(found), samples


def combine(found: list[Speed]) -> Speed:
    """Return for each latency and ratio the repeat with the middle value, and the highest peaks of memory."""
    pairs = [one.paired for one in found if one.paired]
    memories = [vars(one.memory) for one in found if one.memory]
    return Speed(
        latency={size: middle([one.latency[size] for one in found], "p50_ms") for size in found[0].latency},
        peak_memory_mb=_highest([one.peak_memory_mb for one in found]),
        memory=Memory(**{name: _highest([one[name] for one in memories]) for name in memories[0]})
        if memories
        else None,
        paired={size: middle([one[size] for one in pairs], "speedup") for size in pairs[0]} if pairs else None,
    )


def _highest(values: list[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _measure(stage: Stages, wanted: Record, name: str) -> Record:
    """Return what a fresh process measures; that process ends with this one, however this one ends."""
    with NamedTemporaryFile() as errors, _fresh_process(errors) as process:
        with suppress(BrokenPipeError):  # it could not even start: its stderr says why
            process.stdin.write(json.dumps(wanted) + "\n")
            process.stdin.flush()
        said = _follow(process.stdout, stage, name)
        if "speed" not in said:
            raise _failure(name, said, process, Path(errors.name))
        return said["speed"]


@contextmanager
def _fresh_process(errors: Any) -> Iterator[Any]:
    """Start a process that finds the same modules as this one, and kill it in the end, when it has answered."""
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in search_path())
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pq_sweep.job.fresh"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _follow(lines: Iterable[str], stage: Stages, name: str) -> dict[str, Any]:
    """Enter each stage that a process reports, such as "latency repeat 2/3 b8"; return its last message."""
    said: dict[str, Any] = {}
    with ExitStack() as inside:
        inside.enter_context(stage(f"start {name}"))
        for line in lines:
            said = json.loads(line)
            if "stage" not in said:
                break
            what, _, which = said["stage"].partition(" ")
            inside.close()
            inside.enter_context(stage(f"{what} {name} {which}".rstrip()))
    return said


def _failure(name: str, said: dict[str, Any], process: subprocess.Popen[str], errors: Path) -> RepeatFailed:
    """Return the error that a process reported, or one that says how a process ended without an answer."""
    if "error" in said:
        failure = RepeatFailed(f"{name}: {said['error']}")
    else:
        code = process.wait()
        ending = f"signal {-code}" + (" (often: out of memory)" if code == -9 else "")
        failure = RepeatFailed(f"{name} ended without a result, {ending if code < 0 else f'exit code {code}'}.")
    for line in tail(errors):
        failure.add_note(line)
    return failure
