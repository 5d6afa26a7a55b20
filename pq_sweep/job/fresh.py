"""A fresh process that measures once more what a job has compressed: `python -m pq_sweep.job.fresh`."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from pq_sweep.core.files import read_json
from pq_sweep.core.fingerprint import file_hash
from pq_sweep.core.result import Speed
from pq_sweep.job.repeats import RepeatFailed, Tell
from pq_sweep.job.stages import Stages
from pq_sweep.types import Record

if TYPE_CHECKING:
    from pq_sweep.measure.latency import Samples


class KeptStages(Stages):
    """What a job has kept, read by another process, which tells of its stages and writes down nothing of its own."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        super().__init__(folder, "")
        self.tell = tell

    @contextmanager
    def __call__(self, name: str, *, alone: bool = False) -> Iterator[None]:
        self.tell({"stage": name})
        self.seconds[name] = 0.0  # nothing that is done here is worth keeping
        with self.turns.take(alone) if self.turns else nullcontext():
            yield

    def resume(self, key: str) -> None:
        """Take over what the job has kept; raise RepeatFailed if it was with other code, files or devices."""
        progress = read_json(self.files.progress) or {}
        if progress.get("key") != key:
            raise RepeatFailed(
                "the code, a version, a file of the model or data, or the device changed since the job started; start"
                " it again."
            )
        self.kept = progress["kept"]

    def _write(self) -> None:
        """Leave `progress.json` to the job."""


def check_artifact(path: Path, expected: str) -> None:
    """Raise RepeatFailed unless a session runs the very file that the job's accuracy was measured with."""
    if file_hash(path) != expected:
        raise RepeatFailed(
            f"{path.name} is not what the job's accuracy was measured with, as it was made anew and came out different;"
            " use measure.repeats=1."
        )


def main() -> None:
    """Measure what a job has compressed, as its process asks on standard input, and tell it on standard output."""
    # Who stops a job signals all of its processes; this one ends with the job's, which alone can say why.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    wanted = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_job, daemon=True).start()

    def tell(what: dict[str, Any]) -> None:
        output.write(json.dumps(what, allow_nan=False) + "\n")
        output.flush()

    try:
        tell({"speed": _answer(wanted, tell)})
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        tell({"error": " ".join(str(error).split()) or type(error).__name__})


def _end_with_job() -> None:
    """Wait for the end of standard input, which is that of the job's process, and end this one."""
    os.read(0, 1)
    os._exit(1)


def _answer(wanted: dict[str, Any], tell: Tell) -> Record:
    """Return the figures; the samples are in the file that is wanted."""
    import torch
    from omegaconf import OmegaConf

    folder = Path(wanted["folder"])
    stage = KeptStages(folder, tell)
    found, samples = measure_again(OmegaConf.create(wanted["config"]), stage, wanted["artifact"])
    torch.save({name: torch.from_numpy(values) for name, values in samples.items()}, folder / wanted["samples"])
    return found.plain()


def measure_again(cfg: DictConfig, stage: Stages, artifact: str) -> tuple[Speed, Samples]:
    """Open once more what a job has compressed, and measure its speed; `artifact` is the hash of the job's artifact."""
    from pq_sweep.job.run import compress, dense_session, load, prepare
    from pq_sweep.measure.latency import speed

    plan = prepare(cfg, stage)
    with stage("load"):
        model, data = load(cfg, plan.work.device)
    compress(plan, model, data, stage)
    session = plan.runtime.open(model, plan.quantizer, data, plan.work)
    del model
    check_artifact(session.artifact, artifact)
    return speed(session, data, plan.protocol, stage, partial(dense_session, plan))


if __name__ == "__main__":
    main()
