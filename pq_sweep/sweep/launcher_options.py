"""Options of a launcher, checked before the first job: their kinds, the kind of node, and the time to stop in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, ListConfig

LISTS = ("setup", "srun_args")
GROUPS = ("additional_parameters", "node_types")
SWITCHES = ("exclusive", "prefetch")
SHARING = ("user", "mcs", "topo")  # what SLURM's exclusive may be beside true and false
WHOLE = ("gpus_per_node", "cpus_per_task", "timeout_min", "max_num_timeout", "signal_delay_s", "array_parallelism")


def launcher_problems(launcher: DictConfig, node: str | None = None) -> Iterator[str]:
    """List what is wrong with a launcher's options and with the kind of node that a job asks for."""
    found = list(_kinds("hydra.launcher", launcher)) if str(launcher._target_).startswith("hydra_plugins.pq_") else []
    yield from found or [*_node(node, launcher), *_limits(launcher)]


def _kinds(place: str, options: DictConfig) -> Iterator[str]:
    """Refuse values of another kind than options have; submitit would take a text for a list letter by letter."""
    for name, value in options.items():
        key = f"{place}.{name!s}"
        if name in GROUPS:
            yield from _group(key, value)
        elif name in LISTS:
            if value is not None and not isinstance(value, ListConfig):
                yield f"{key}={value} is not valid, as it is no list; give '{key}=[\"{value}\"]'."
        elif isinstance(value, ListConfig | DictConfig):
            yield f"{key}={value} is not valid; give one value, in quotes if it has commas: '{key}=\"a,b\"'."
        elif name in SWITCHES and not (isinstance(value, bool | None) or (name == "exclusive" and value in SHARING)):
            yield f"{key}={value} is neither true nor false; give one of them."
        elif value is not None and not _is_number(name, value):
            yield f"{key}={value!r} is no number; give a whole one without unit or quotes, such as {key}=4."


def _group(key: str, value: Any) -> Iterator[str]:
    if value is not None and not isinstance(value, DictConfig):
        yield f"{key}={value} is no group of values; give +{key}.NAME=VALUE."
    elif value and key.endswith(".node_types"):
        for name, options in value.items():
            yield from _kinds(f"{key}.{name!s}", options) if isinstance(options, DictConfig) else ()


def _is_number(name: Any, value: Any) -> bool:
    """Say whether a value is a number where an option has to be one."""
    if name == "mem_gb":
        return isinstance(value, int | float)
    return name not in WHOLE or (isinstance(value, int) and not isinstance(value, bool))


def _node(node: str | None, launcher: DictConfig) -> Iterator[str]:
    types = launcher.get("node_types") or {}
    if node is not None and node not in types:
        valid = (
            f"valid are: {', '.join(types)}" if types else "it needs hydra/launcher=slurm, whose node_types it names"
        )
        yield f"node={node} is not known; {valid}."


def _limits(launcher: DictConfig) -> Iterator[str]:
    minutes, delay = launcher.get("timeout_min"), launcher.get("signal_delay_s")
    if minutes and delay:
        # SLURM may warn a minute early. Before the last fifth of the time or the last ten minutes, submitit takes a
        # warning for preemption, which may happen for ever. A warning before Python listens would kill the job.
        most = max(0, min(max(12 * minutes, 600) - 60, 60 * minutes - 40))
        if delay > most:
            key = f"hydra.launcher.signal_delay_s={delay}"
            yield f"{key} is too long for timeout_min={minutes}; give at most {most:.0f}."
