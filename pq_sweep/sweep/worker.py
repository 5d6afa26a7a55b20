"""One job of a sweep, in the process and folder that Hydra gave it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from pq_sweep.core.fingerprint import fingerprint, look_again, resolved, unfollowed
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.imports import quick_imports
from pq_sweep.job.stages import is_leaving, sentence
from pq_sweep.results.standing import is_logged
from pq_sweep.types import Stopped

log = logging.getLogger(__name__)


def run_job(cfg: DictConfig) -> None:
    """Run one job in the folder that Hydra gave it and log it.

    A failing job does not raise: Hydra would leave out the batches after it. `error.json` and `job.log` say what went
    wrong, and `finish` takes it into account for the exit code.
    """
    folder = JobFolder(Path(HydraConfig.get().runtime.output_dir))
    label = label_of(folder)
    look_again()  # files may have changed since the sweep was announced
    unknown = unfollowed(resolved(cfg))
    anew = not cfg.resume or (cfg.cache == "off" and unknown)
    if anew and int(os.environ.get("SLURM_RESTART_COUNT", 0)) == 0:
        folder.progress.unlink(missing_ok=True)
    elif folder.finished(fingerprint(cfg)):
        log.info("%s | reused: finished earlier", label)
        return
    for why in unknown:
        log.debug("%s", why)  # the launcher has shown it
    try:
        with quick_imports("torch"):
            from pq_sweep.job.run import run
        with clean_stop():
            run(cfg, folder.path, label)
    except (Exception, SystemExit) as error:
        if is_leaving(error):
            raise
        told = folder.read_error()
        log.error("job %s failed: %s", folder.name, told["message"] if told else sentence(error, "start"))
        log.debug("traceback", exc_info=True)
    if not is_logged(folder):
        instantiate(cfg.tracking).log(folder.path)


def label_of(folder: JobFolder) -> str:
    """Say which job of how many this is, and its name: "job 2 of 9: digits_cnn none fp16 onnxruntime"."""
    jobs = folder.sweep.announced()
    place = next((number for number, job in enumerate(jobs, 1) if job["folder"] == folder.name), 1)
    return f"job {place} of {max(len(jobs), 1)}: {jobs[place - 1]['name'] if jobs else folder.name}"


@contextmanager
def clean_stop() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that a job that is stopped can write down why it ended."""

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough; the rest is clearing up
        raise Stopped("the job was stopped by SIGTERM, as by scancel or preemption; start the sweep again to continue.")

    if threading.current_thread() is not threading.main_thread():
        yield  # signals can only be handled in the main thread
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
