"""The stages of a job: each is logged, written to `status.json`, timed, and not repeated when the job is continued."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pq_sweep.core.environment import slurm
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.opened import Opened, merged, unchanged
from pq_sweep.core.result import Preparation
from pq_sweep.core.sentences import own_line
from pq_sweep.types import About, Record, Stopped

if TYPE_CHECKING:
    from pq_sweep.job.turns import Turns
    from pq_sweep.types import Cache

log = logging.getLogger(__name__)

# The stages that make the compressed model.
PREP = ("prune", "recover", "probe", "trace", "export", "calibrate", "sensitivity", "quantize", "build")


# What to do about an error of a library's, by stage.
WITHOUT_GRAPH = "use runtime=torch, which needs no graph, or see in job.log which operation it was"
ADVICE = {
    "start": "correct the options of the component that job.log names",
    "load": "correct the function of model or dataset that job.log names, its options or its files",
    "baseline": "see in job.log what the uncompressed network or an evaluation image does wrong",
    "prune": "choose another pruner, or see in job.log which layer it was",
    "recover": "change the options of recovery, or choose recovery=none",
    "probe": "name other layers by recovery.probe_layers, or give recovery.probe=false",
    "trace": WITHOUT_GRAPH,
    "export": WITHOUT_GRAPH,
    "calibrate": "choose another quantizer.calibration, or leave the layer out by quantizer.exclude",
    "sensitivity": "choose quantizer=int8, or leave the layer out by quantizer.exclude",
    "quantize": "leave the layer out by quantizer.exclude, or choose another quantizer",
    "build": "choose another runtime, or leave the layer out by quantizer.exclude",
    "accuracy": "choose another runtime, as this one cannot run the network on these images",
}
LOADING = re.compile(r"Error loading '(.+?)':")  # of Hydra
# Errors of these packages are sentences of ours, or handled below.
OURS = ("pq_sweep", "submitit")


class Stages:
    """Times stages by name, `with stages("export"): ...`, and keeps what was finished.

    What is kept in the job's folder serves the job itself when it is continued, that is, when it starts again there
    with the same key after a time limit, preemption, the death of its node, or a new start of the sweep:
    `progress.json` then holds what each finished part returned. What is kept in the cache serves every job that needs
    the same.
    """

    # Set when the process ends only to be started again by SLURM: that is no failure.
    leaving: ClassVar[bool] = False

    def __init__(self, folder: Path, label: str, cache: Cache | None = None) -> None:
        self.folder, self.files = folder, JobFolder(folder)
        self.label = label
        self.cache = cache
        self.turns: Turns | None = None
        self.started = time.time()
        self.seconds: dict[str, float] = {}
        self.current = "start"
        self.key = ""
        self.tries: list[Record] = []
        self.kept: Record = {}
        self.timed_before: frozenset[str] = frozenset()
        self.from_cache: list[str] = []
        self.apart_s = 0.0  # of the stage that runs, what belongs to another

    @contextmanager
    def __call__(self, name: str, *, alone: bool = False) -> Iterator[None]:
        """Time what is inside, `alone` on the device or among other jobs; waiting for them is not counted."""
        log.info("%s | %s", self.label, name)
        self.current = name
        where = {"pid": os.getpid(), "host": os.uname().nodename, "slurm": slurm()}
        write_json(self.files.status, {"stage": name, "since": time.time(), **where})
        with self.turns.take(alone) if self.turns else nullcontext():
            outer, self.apart_s = self.apart_s, 0.0
            start = time.perf_counter()
            try:
                yield
            finally:
                self._count(name, time.perf_counter() - start - self.apart_s)
                self.apart_s += outer

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds of the stage that runs, as they belong to another."""
        self.apart_s += seconds

    def set_seconds(self, name: str, seconds: float, *, cached: bool) -> None:
        """Say what a stage took when its outcome was made, in this try or another, or in another job."""
        self.seconds[name] = seconds
        if cached:
            self.from_cache.append(name)

    def _count(self, name: str, seconds: float) -> None:
        """Add to the seconds of a stage, unless an earlier try timed it: then the time of that try stands."""
        if name not in self.timed_before:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def resume(self, key: str) -> None:
        """Take over what an earlier try of the same job finished, or clear away what another job left."""
        earlier = read_json(self.files.progress) or {}
        if earlier.get("key") != key or not unchanged(read_json(self.files.opened)):
            earlier = {}
            self.files.clear()
        self.key, self.kept = key, earlier.get("kept", {})
        self.seconds = earlier.get("seconds", {})
        self.timed_before = frozenset(self.seconds)
        self.tries = [*earlier.get("tries", ()), {"started": self.started, "host": os.uname().nodename, **slurm()}]
        if self.kept:
            log.info("%s | continued after: %s", self.label, ", ".join(self.kept))
        self._write()

    def _write(self) -> None:
        state = {"key": self.key, "tries": self.tries, "seconds": self.seconds, "kept": self.kept}
        write_json(self.files.progress, state)

    def note_opened(self, found: Opened) -> None:
        """Write which files components opened, in this try or an earlier one: the result holds while they are so."""
        whole = merged(read_json(self.files.opened) or {}, found)
        if any(whole.values()):
            write_json(self.files.opened, whole)

    def has(self, name: str) -> bool:
        """Say whether a part is finished and its files still have the sizes that they had then."""
        files = self.kept.get(name, {}).get("files", {})
        return name in self.kept and all(_size(self.folder / file) == size for file, size in files.items())

    def keep_in_job(self, name: str, make: Callable[[], Any], *files: Path) -> Any:
        """Return the plain value of `make`, which also writes `files`; a continued job does not make it again."""
        if self.has(name):
            return self.kept[name]["value"]
        value = make()
        self.kept[name] = {"value": value, "files": {file.name: _size(file) for file in files}}
        self._write()
        return value

    def time_and_keep(self, name: str, make: Callable[[], Any], *files: Path) -> Any:
        """Do as `keep_in_job`, timed as a stage of that name."""

        def timed() -> Any:
            with self(name):
                return make()

        return self.keep_in_job(name, timed, *files)

    def keep_in_cache(self, kind: str, about: About, make: Callable[[], Any], *files: Path) -> Any:
        """Return what any job, of any sweep, made from what `about` returns, or make it for all of them.

        All `files` belong in one folder; `make` need not write every one. A continued job may have to make again
        what the cache no longer has.
        """
        if self.cache is None:
            return make()
        folder, known = files[0].parent, about()
        with self.cache.alone(kind, known):
            if record := self.cache.take(kind, known, folder):
                for stage, seconds in record["seconds"].items():
                    self.count_cached(stage, seconds)
                return record["value"]
            before = dict(self.seconds)
            value = make()
            spent = {name: took - before.get(name, 0.0) for name, took in self.seconds.items()}
            seconds = {name: took for name, took in spent.items() if took > 0}
            there = [file.name for file in files if file.exists()]
            self.cache.put(kind, known, folder, {"value": value, "seconds": seconds}, there)
            return value

    def keep_in_both(self, name: str, about: About, make: Callable[[], Any], *files: Path) -> Any:
        """Keep in the job what `keep_in_cache` returns."""
        return self.keep_in_job(name, partial(self.keep_in_cache, name, about, make, *files), *files)

    def count_cached(self, name: str, seconds: float) -> None:
        """Count a stage whose outcome came from the cache, with the seconds that making it took."""
        self.from_cache.append(name)
        self._count(name, seconds)

    # Their former names, which pruners and quantizers that users wrote may still call.
    keep, share, shared, cached = keep_in_job, keep_in_both, keep_in_cache, count_cached

    @property
    def preparation(self) -> Preparation:
        """Return the seconds of all stages, and of those that make the compressed model."""
        prep = {name: self.seconds[name] for name in PREP if name in self.seconds}
        return Preparation(prep_s=prep, from_cache=self.from_cache, stage_s=self.seconds)

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Write `error.json` if what is inside fails, and let the error go on."""
        self.files.forget_error()
        self.files.result.unlink(missing_ok=True)
        try:
            yield
        except (Exception, SystemExit, Stopped) as error:
            if not is_leaving(error):
                self.files.write_error(told_of(error, self.current, self.started))
            raise


def told_of(error: BaseException, stage: str, started: float) -> Record:
    """Return what `error.json` says of an error."""
    message = sentence(error, stage)
    if isinstance(error, SystemExit):
        message = f"the job called sys.exit({error.code!r}) instead of raising an error."
    if type(error).__name__ == "UncompletedJobError":  # raised by submitit in the middle of whatever ran
        message = f"{message.rstrip('.')}; raise hydra.launcher.timeout_min or max_num_timeout."
    record = {"type": type(error).__name__, "message": message, "stage": stage, "started": started}
    return record | {"slurm": slurm(), "stderr": getattr(error, "__notes__", []), "traceback": traceback.format_exc()}


def sentence(error: BaseException, stage: str) -> str:
    """Return the sentence of an error, led by what to do if it is a library's."""
    own = ours(error)
    told = own or _unwrapped(error)
    if isinstance(told, ImportError) and (target := LOADING.match(str(told))):
        return _not_loaded(target[1], told)
    message = " ".join(str(told).split()) or type(told).__name__
    return message if own else f"{lead(told, stage)} ({type(told).__name__}: {message.rstrip('.')})."


def _not_loaded(target: str, error: ImportError) -> str:
    """Say why the target of a component cannot be loaded, of which Hydra says so."""
    cause, (module, _, name) = error.__cause__ or error, target.rpartition(".")
    if isinstance(cause, ModuleNotFoundError) and cause.name == target:
        file = getattr(sys.modules.get(module), "__file__", None)  # perhaps of another module than the user thinks
        place = f"{module} ({file})" if file else module
        return f"_target_={target} cannot be loaded, as {place} has no {name}; give module.function as it is there."
    line = own_line(cause)
    where = f" in {line}" if line else ""
    why = " ".join(str(cause).split()).rstrip(".")
    return f"_target_={target} cannot be loaded ({type(cause).__name__}{where}: {why}); correct that in its module."


def _unwrapped(error: BaseException) -> BaseException:
    """Return what Hydra wrapped into an error that says only which target it was."""
    while type(error).__module__.startswith("hydra") and error.__cause__:
        error = error.__cause__
    return error


def ours(error: BaseException | None) -> BaseException | None:
    """Return the error itself if it is a sentence of ours, or the one that a library wrapped into it."""
    while error and not type(error).__module__.startswith(OURS):
        error = error.__cause__
    return error


def lead(error: BaseException, stage: str) -> str:
    """Return a sentence, without its full stop, that says what can be done about an error of a library's."""
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return "the memory is too small; lower measure.batch_sizes or measure.eval_batch_size, or take another device"
    name, line = stage.partition(" ")[0], own_line(error)
    return f"the stage {name} failed{line and f' in {line}'}; {ADVICE.get(name, 'see in job.log where')}"


def is_leaving(error: BaseException) -> bool:
    """Say whether submitit ends the process because SLURM will start it again."""
    return Stages.leaving and isinstance(error, SystemExit)


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None
