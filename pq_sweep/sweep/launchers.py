"""Hydra launchers over submitit that outlive the death of any job, and whose jobs outlive the launcher.

Hydra's own submitit launcher stops watching at the first job that dies, hangs on clusters without accounting, and
submits everything anew when it is started again. The part of it that runs inside a job is used unchanged.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher
from omegaconf import open_dict

from pq_sweep.core.folder import SweepFolder
from pq_sweep.core.sources import fix_search_path
from pq_sweep.job.stages import Stages
from pq_sweep.results.slurm import max_array_size
from pq_sweep.results.standing import Watch, record_loss, remember
from pq_sweep.results.watch import watch
from pq_sweep.sweep.current import CURRENT
from pq_sweep.types import Stopped, UserError

if TYPE_CHECKING:
    import submitit

log = logging.getLogger(__name__)

OWN_OPTIONS = ("submitit_folder", "max_num_timeout", "node_types", "prefetch")
# The options that submitit has for every kind of cluster; all others are given with the kind before their name.
COMMON = tuple(BaseQueueConf.__dataclass_fields__)


@dataclass
class Planned:
    """A job: its place in the grid, its options, folder and kind of node, and submitit's handle once it has one."""

    number: int
    overrides: list[str]
    folder: str
    fingerprint: str | None
    node: str | None
    job: Any = None


class WatchedLauncher(BaseSubmititLauncher):
    """Watches the folders of all jobs instead of waiting for one job after another."""

    def __call__(self, *args: Any) -> JobReturn:
        """Run one job on its node."""
        fix_search_path()
        try:
            return super().__call__(*args)
        except Stopped as stopped:
            log.warning("%s", stopped)
            sys.exit(143)

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """Let submitit queue the job again; that this process then ends is no failure."""
        Stages.leaving = True
        return super().checkpoint(*args, **kwargs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return how each ended; those that fail do not end the watching of the others."""
        assert self.config is not None
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        share_path()
        planned = [self._plan(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        self._run(folder, planned)
        return [self._returned(plan) for plan in planned]

    def _plan(self, overrides: list[str], number: int) -> Planned:
        """Return a job as it was announced; a job that the sweeper chose as it went has to be composed first."""
        if number < len(CURRENT.announced):
            known = CURRENT.announced[number]
            return Planned(number, overrides, known["folder"], known["fingerprint"], known["choices"].get("node_type"))
        assert self.config is not None
        assert self.hydra_context is not None
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = f"job_id_for_{number}", number
        return Planned(number, overrides, str(config.hydra.sweep.subdir), None, config.get("node"))

    def _run(self, folder: Path, planned: list[Planned]) -> None:
        raise NotImplementedError

    def executor(self, node: str = "") -> submitit.AutoExecutor:
        """Return submitit's executor with the launcher's options; those of the kind of node take precedence."""
        import submitit

        params = self.params | ((self.params.get("node_types") or {}).get(node) or {})
        limits = {f"{self._EXECUTOR}_max_num_timeout": params["max_num_timeout"]} if "max_num_timeout" in params else {}
        executor = submitit.AutoExecutor(params["submitit_folder"], cluster=self._EXECUTOR, **limits)
        # sbatch would take "False" as a value.
        given = {key: value for key, value in params.items() if key not in OWN_OPTIONS and value is not False}
        executor.update_parameters(
            **{key if key in COMMON else f"{self._EXECUTOR}_{key}": value for key, value in given.items()}
        )
        return executor

    def _arguments(self, plan: Planned) -> tuple[Any, ...]:
        """Return what `__call__` takes on the node."""
        return (plan.overrides, "hydra.sweep.dir", plan.number, f"job_id_for_{plan.number}", Singleton.get_state())

    def _returned(self, plan: Planned) -> JobReturn:
        """Return what Hydra asks about a job; one that died does not raise here, as its folder says so."""
        if plan.job is not None and plan.job.paths.result_pickle.exists():
            error = plan.job.exception()
            if error is None:
                returned = plan.job.result()
                assert isinstance(returned, JobReturn)
                return returned
            log.error("%s", error)
        skipped = JobReturn(overrides=plan.overrides, status=JobStatus.COMPLETED)
        skipped.return_value = None
        return skipped


class SlurmLauncher(WatchedLauncher):
    """Jobs on the nodes of a SLURM cluster, as arrays."""

    _EXECUTOR = "slurm"

    def __init__(self, setup: Sequence[str] | None = None, **params: Any) -> None:
        # srun does not always inherit the number of cores from sbatch, and torch would then run on one core.
        super().__init__(setup=["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK", *(setup or ())], **params)

    def _run(self, folder: Path, planned: list[Planned]) -> None:
        # Two launchers that start the same sweep at once must not both find its jobs missing.
        with FileLock(SweepFolder(folder).submit_lock):
            missing = list(self._missing(folder, planned))
            try:
                for node, group in groupby(sorted(missing, key=_node), key=_node):
                    self._submit(folder, node, list(group))
            except Exception as error:
                done = sum(plan.job is not None for plan in missing)
                later = (
                    f"; {done} jobs were submitted before, start again with hydra.sweep.dir={folder}" if done else ""
                )
                raise UserError(f"SLURM took no jobs: {' '.join(str(error).split())}{later}.") from error
        log.warning("%d jobs submitted, %d finished or queued before", len(missing), len(planned) - len(missing))
        watch(folder, log=CURRENT.log)

    def _missing(self, folder: Path, planned: list[Planned]) -> Iterator[Planned]:
        """Yield the jobs that are neither finished nor in the queue."""
        assert self.config is not None
        resume = self.config.get("resume") and not (self.config.get("cache") == "off" and CURRENT.unfollowed)
        active = {
            row["job"] for row in Watch(folder, patient=False).look().rows if row["status"] in ("pending", "running")
        }
        for plan in planned:
            done = resume and plan.fingerprint and SweepFolder(folder).job(plan.folder).finished(plan.fingerprint)
            if not done and plan.folder not in active:
                yield plan

    def _submit(self, folder: Path, node: str, plans: list[Planned]) -> None:
        """Submit jobs of one kind of node in as few arrays as SLURM allows, and write down which job is which."""
        executor, size = self.executor(node), max_array_size()
        for start in range(0, len(plans), size):
            chunk = plans[start : start + size]
            arguments = zip(*(self._arguments(plan) for plan in chunk), strict=True)
            for plan, job in zip(chunk, executor.map_array(self, *arguments), strict=True):
                plan.job = job
                SweepFolder(folder).job(plan.folder).forget_error()
            remember(folder, {plan.folder: _describe(folder, plan) for plan in chunk})


class LocalLauncher(WatchedLauncher):
    """Jobs as processes of this machine, some at a time."""

    _EXECUTOR = "local"
    visible: str | None = None

    def __init__(self, array_parallelism: int | None = None, **params: Any) -> None:
        super().__init__(**params)
        self.at_once = array_parallelism  # for local jobs submitit has no such option

    def __call__(self, *args: Any) -> JobReturn:
        """Run one job with the GPUs of the launcher: submitit hides them from local jobs."""
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if self.visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = self.visible
        return super().__call__(*args)

    def _run(self, folder: Path, planned: list[Planned]) -> None:
        self.visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        at_once = self.at_once or len(planned)
        executor = self.executor()
        waiting = list(planned)
        running: list[Planned] = []

        def busy() -> bool:
            for plan in [plan for plan in running if plan.job.done()]:
                running.remove(plan)
                _tell_if_lost(folder, plan)
            while waiting and len(running) < at_once:
                plan = waiting.pop(0)
                plan.job = executor.submit(self, *self._arguments(plan))
                running.append(plan)
            return bool(running)

        watch(folder, log=CURRENT.log, busy=busy)


def _tell_if_lost(folder: Path, plan: Planned) -> None:
    """Write down that a job's process ended, if the job could not do so itself."""
    job = SweepFolder(folder).job(plan.folder)
    if job.read_error() is None:
        reason = "The process of the job ended without a result: killed, perhaps for want of memory."
        record_loss(job, _describe(folder, plan), reason)


def _node(plan: Planned) -> str:
    return plan.node or ""


def share_path() -> None:
    """Let jobs find the modules beside the script, also when this process was started in another folder."""
    roots = dict.fromkeys(
        [str(Path(__file__).parent.parent.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
    os.environ["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)


def _describe(folder: Path, plan: Planned) -> dict[str, Any]:
    """Return where a submitted job can be found again, by paths relative to the sweep's folder."""
    assert plan.job is not None
    paths = {"pickle": plan.job.paths.result_pickle, "stderr": plan.job.paths.stderr}
    found = {name: os.path.relpath(path, folder) for name, path in paths.items()}
    return {"id": plan.job.job_id, "submitted": time.time(), **found}
