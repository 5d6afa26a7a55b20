"""The grid of a sweep: composed and checked as a whole before its first job, so that no job starts that cannot run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from pq_sweep.core.fingerprint import WITHOUT_EFFECT, digest, fingerprint_of, resolved, unfollowed
from pq_sweep.core.folder import SweepFolder
from pq_sweep.core.groups import GROUPS, group_of, job_name, option_of, options_that_tell
from pq_sweep.core.options import BRACKETED, LISTS, entries_of, is_ours, spelled
from pq_sweep.core.sentences import without_password
from pq_sweep.job.check import COMPONENTS, problems
from pq_sweep.sweep.launcher_options import launcher_problems
from pq_sweep.sweep.quoting import quoted
from pq_sweep.tracking.addresses import address_problem
from pq_sweep.types import UserError

# Groups of options in the order of the stages that they first matter to; users' own options come before all of them.
STAGES = ("node", "device", "seed", "model", "dataset", "pruner", "recovery", "quantizer", "runtime", "measure",
          "repeat")  # fmt: skip


@dataclass
class Grid:
    """What is known of the jobs before they run, and one job for each pair of model and dataset that they load.

    `unfollowed` says, a sentence each, which code of theirs may change without being noticed.
    """

    announced: list[dict[str, Any]] = field(default_factory=list)
    loads: dict[str, DictConfig] = field(default_factory=dict)
    unfollowed: dict[str, None] = field(default_factory=dict)

    def refuse_other(self, folder: SweepFolder, earlier: list[dict[str, Any]]) -> None:
        """Raise a UserError if a finished job would be replaced by another one, not by itself after a change."""
        before = {job["folder"]: job for job in earlier}
        for job in self.announced:
            old = before.get(job["folder"], job)
            same = (_telling(old), old["choices"]) == (_telling(job), job["choices"])
            place = folder.job(job["folder"])
            if not same and place.result.exists():
                raise UserError(
                    f"{place.path} holds the finished job {old['name']!r} of another grid; start the new"
                    " grid in a folder of its own, or give resume=false to replace what is there."
                )


def _telling(job: dict[str, Any]) -> list[str]:
    """Return the overrides of a job that its result depends on."""
    return [word for word in job["overrides"] if group_of(word) not in WITHOUT_EFFECT]


def read_grid(jobs: Iterable[DictConfig]) -> Grid:
    """Check and announce every job, or raise one UserError that lists everything that is wrong, each problem once."""
    grid, wrong = Grid(), list[list[str]]()
    for job in jobs:
        bare = spelled(without_hydra(job))
        wrong.append(
            [
                *several_chosen(job),
                *problems(bare),
                *launcher_problems(job.hydra.launcher, job.node),
                *tracking_problems(bare),
            ]
        )
        if not wrong[-1]:
            options = resolved(bare)
            grid.announced.append(announce(job, options))
            grid.loads.setdefault(grid.announced[-1]["loads"], bare)
            grid.unfollowed |= dict.fromkeys(unfollowed(options))
    refuse_all(Counter(chain.from_iterable(wrong)), len(wrong))
    refuse_shared_folders([job["folder"] for job in grid.announced])
    return grid


def several_chosen(job: DictConfig) -> Iterator[str]:
    """Refuse a list for a group: Hydra would mix the choices into one component that has no name."""
    for word in as_given(job):
        key, _, value = word.partition("=")
        if option_of(key) in COMPONENTS and value.startswith("["):
            plain = value.replace("'", "")
            yield f"{key}={plain} would mix choices into one; give {key}={plain[1:-1]}, with a job for each choice."


def tracking_problems(job: DictConfig) -> Iterator[str]:
    """Say what is wrong with the address of the store in which a job is to be logged."""
    options, uri = job.get("tracking"), OmegaConf.select(job, "tracking.uri")
    has_store = isinstance(options, DictConfig) and is_ours(options) and "uri" in options
    problem = address_problem(uri, "tracking.uri") if has_store and isinstance(uri, str | None) else None
    yield from filter(None, [problem])


def compose_grid(config: DictConfig) -> Iterator[DictConfig]:
    """Compose the jobs one by one as the sweeper will; yield none if the sweeper chooses its jobs as it goes."""
    sweeper = config.hydra.sweeper
    split = getattr(get_class(sweeper._target_), "split_arguments", None)
    if split is None:  # not asked by class: Hydra loads its plugins twice, as different classes
        return
    loader = GlobalHydra.instance().config_loader()
    params = [quoted(f"{key}={value}") for key, value in (sweeper.params or {}).items()]
    overrides = OverridesParser.create(config_loader=loader).parse_overrides([*params, *as_given(config)])
    if any(override.key_or_group == "experiment" and override.is_sweep_override() for override in overrides):
        raise UserError(
            "experiment=a,b would run without the grids of both files; start one sweep for each experiment."
        )
    swept = swept_entries(overrides)
    for number, words in enumerate(split(overrides, max_batch_size=None)[0]):
        job = compose_job(config, list(words), number)
        refuse_entries(job, swept)
        yield job


def swept_entries(overrides: list[Override]) -> dict[str, list[str]]:
    """Return the sweeps, by key, whose values may all be meant as the entries of one list: exclude=first,last."""
    found: dict[str, list[str]] = {}
    for override in overrides:
        key, swept = override.key_or_group, override.value()
        name = key.rpartition(".")[2]
        if name in LISTS and isinstance(swept, ChoiceSweep) and swept.simple_form:
            values = [getattr(value, "text", value) for value in swept.list]
            found |= {key: [str(value) for value in values]} if all(_is_entry(name, value) for value in values) else {}
    return found


def _is_entry(name: str, value: Any) -> bool:
    """Say whether a value is a single one, and is not written as a list either."""
    if value is None or isinstance(value, list | dict):
        return False
    found = entries_of(name, value)
    return not BRACKETED.fullmatch(str(value).strip()) and not (isinstance(found, list) and len(found) > 1)


def refuse_entries(job: DictConfig, swept: dict[str, list[str]]) -> None:
    """Raise a UserError if a job has one of the values of a sweep where a component takes a list."""
    for key, values in swept.items():
        options = OmegaConf.select(job, key.rpartition(".")[0])
        if isinstance(options, DictConfig) and is_ours(options):
            whole, each = ",".join(values), ",".join(f"[{value}]" for value in values)
            raise UserError(
                f"{key}={whole} would be a sweep with one value in each job, and {key} takes a list; give"
                f" {key}=[{whole}] for one job with all, or {key}={each} for a job for each."
            )


def by_stage(overrides: list[Override]) -> list[Override]:
    """Order the options of a grid so that its last ones, which change from job to job, matter to the last stages.

    Jobs that share a stage then run next to each other, however the command line was written.
    """

    def stage(override: Override) -> int:
        root = group_of(override.key_or_group)
        return STAGES.index(root) + 1 if root in STAGES else 0

    return sorted(overrides, key=stage)


def as_given(config: DictConfig) -> list[str]:
    """Return the overrides of a command line or a job, with each `${...}` as it was written."""
    overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    return list(overrides)


def compose_job(config: DictConfig, overrides: list[str], number: int) -> DictConfig:
    """Compose one job of a sweep."""
    job: DictConfig = GlobalHydra.instance().config_loader().load_sweep_config(config, overrides)
    with open_dict(job):
        job.hydra.job.num = number
    return job


def without_hydra(job: DictConfig) -> DictConfig:
    """Return a composed job's config as the job itself sees it."""
    return OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])


def refuse_all(found: Counter[str], jobs: int) -> None:
    """Raise one UserError of all problems, each with the number of jobs that have it."""
    if found:
        lines = [f"{problem} ({count} of {jobs} jobs)" if jobs > 1 else problem for problem, count in found.items()]
        raise UserError("\n".join(lines))


def refuse_shared_folders(folders: list[str]) -> None:
    """Raise a UserError if two jobs would write into one folder."""
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice is not None:
        raise UserError(f"hydra.sweep.subdir={twice} is the folder of several jobs; use ${{hydra.job.num}} in it.")


def announce(job: DictConfig, options: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a job before it runs; `options` are its resolved ones."""
    chosen, folder = job.hydra.runtime.choices, str(job.hydra.sweep.subdir)
    if "/" in folder:
        raise UserError(
            f"hydra.sweep.subdir={folder} is nested; job folders lie side by side, such as ${{hydra.job.num}}."
        )
    choices = {group: str(chosen.get(group)) for group in GROUPS} | options_that_tell(job)
    return {
        "folder": folder,
        "name": job_name(choices),
        "choices": choices,
        "fingerprint": fingerprint_of(options),
        "loads": digest([OmegaConf.to_container(group) for group in (job.model, job.dataset)]),
        "overrides": [without_password(override) for override in as_given(job)],
    }
