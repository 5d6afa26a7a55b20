"""A fresh process that measures a job's compressed model once more: `python -m pq_sweep.job.fresh`."""

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
from pq_sweep.core.fingerprint import SEEN, file_hash
from pq_sweep.core.opened import Opened
from pq_sweep.core.result import Speed
from pq_sweep.core.sources import fix_search_path
from pq_sweep.job.repeats import RepeatFailed, Tell
from pq_sweep.job.stages import Stages, sentence
from pq_sweep.types import Record

if TYPE_CHECKING:
    from pq_sweep.measure.latency import Samples


class KeptStages(Stages):
    """The parts that a job has kept, read by another process, which reports its stages and writes nothing itself."""

    def __init__(self, folder: Path, tell: Tell) -> None:
        super().__init__(folder, "")
        self.tell = tell

    @contextmanager
    def __call__(self, name: str, *, alone: bool = False) -> Iterator[None]:
        self.tell({"stage": name})
        self.seconds[name] = 0.0  # too short for any step to be kept: this process keeps nothing
        with self.turns.take(alone) if self.turns else nullcontext():
            yield

    def resume(self, key: str) -> None:
        """Take over what the job has kept; raise RepeatFailed if the job ran with other code, files or devices."""
        progress = read_json(self.files.progress) or {}
        if progress.get("key") != key:
            raise RepeatFailed(
                "the code, a version, a file of the model or data, or the device changed since the job started; start"
                " it again."
            )
        self.kept = progress["kept"]

    def _write(self) -> None:
        """Leave `progress.json` to the job."""

    def note_opened(self, found: Opened) -> None:
        """Leave `opened.json` to the job."""


def check_artifact(path: Path, expected: str) -> None:
    """Raise RepeatFailed unless a session runs the very file that the job's accuracy was measured with."""
    if file_hash(path) != expected:
        raise RepeatFailed(
            f"{path.name} is not what the job's accuracy was measured with, as it was made anew and came out different;"
            " use measure.repeats=1."
        )


def main() -> None:
    """Measure a job's compressed model: read the request on standard input, and answer on standard output."""
    # Whatever stops a job signals all of its processes. This one ends with the job's own, which alone can say why.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get into the answer
    wanted = json.loads(sys.stdin.readline())
    fix_search_path()
    SEEN.update(wanted["files"])
    threading.Thread(target=_end_with_job, daemon=True).start()

    def tell(what: dict[str, Any]) -> None:
        output.write(json.dumps(what, allow_nan=False) + "\n")
        output.flush()

    try:
        tell({"speed": _answer(wanted, tell)})
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        tell({"error": sentence(error, "repeat")})


def _end_with_job() -> None:
    """End this process when standard input ends, as it does with the job's process."""
    os.read(0, 1)
    os._exit(1)


def _answer(wanted: dict[str, Any], tell: Tell) -> Record:
    """Return the figures, and write the samples to the file that the request names."""
    import torch
    from omegaconf import OmegaConf

    folder = Path(wanted["folder"])
    stage = KeptStages(folder, tell)
    found, samples = measure_again(OmegaConf.create(wanted["config"]), stage, wanted["artifact"])
    torch.save({name: torch.from_numpy(values) for name, values in samples.items()}, folder / wanted["samples"])
    return found.plain()


def measure_again(cfg: DictConfig, stage: Stages, artifact: str) -> tuple[Speed, Samples]:
    """Open a job's compressed model once more and measure its speed; `artifact` is the hash of the job's artifact."""
    from pq_sweep.job.learned import taught
    from pq_sweep.job.run import compress, dense_session, load, prepare
    from pq_sweep.measure.latency import speed

    plan = prepare(cfg, stage)
    with stage("load"):
        model, data = load(cfg, plan.work.device)
    _, recovery = compress(plan, model, data, stage)
    session = plan.runtime.open(model, taught(plan.quantizer, recovery), data, plan.work)
    del model
    check_artifact(session.artifact, artifact)
    return speed(session, data, plan.protocol, stage, partial(dense_session, plan))


if __name__ == "__main__":
    main()
