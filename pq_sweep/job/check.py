"""Checks before anything is loaded: they refuse values out of range and combinations that cannot exist."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from pq_sweep.compress.choices import AUGMENTATIONS, CALIBRATIONS, IMPORTANCES, KEPT_PRECISIONS, OPTIMIZERS, ROUNDINGS
from pq_sweep.core.opened import noting
from pq_sweep.core.options import (
    LISTS,
    LISTS_OF_LAYERS,
    LISTS_OF_NUMBERS,
    MAY_BE_NULL,
    PROBE,
    RANGES,
    SWITCHES,
    TEXTS,
    is_ours,
    plain_items,
    spelled,
)
from pq_sweep.core.sources import find_module, module_of
from pq_sweep.inputs.mistaken import refuse_mistaken
from pq_sweep.job.learned import learning_problems
from pq_sweep.job.order import order_problems, quantizes_first
from pq_sweep.runtimes import precision_of
from pq_sweep.types import RuntimeChoice, UserError

COMPONENTS = ("model", "dataset", "pruner", "recovery", "quantizer", "runtime", "measure", "tracking")
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
ONE_IN_A_JOB = ("pruner.amount", "device", "train_device", "seed", "repeat")
CHOICES = {
    "dataset.size": ("160", "320", "full"),
    "quantizer.calibration": CALIBRATIONS,
    "quantizer.rounding": ROUNDINGS,
    "quantizer.keep": KEPT_PRECISIONS,
    "pruner.importance": IMPORTANCES,
    **{f"{group}.optimizer": OPTIMIZERS for group in ("pruner", "recovery")},
    **{f"{group}.augment": AUGMENTATIONS for group in ("pruner", "recovery")},
}

WEIGHT_FILES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar", ".th", ".pkl")


def check(cfg: DictConfig) -> None:
    """Raise a UserError that says all that is wrong with a job's config."""
    refuse(" ".join(problems(cfg)))


def refuse(problem: str | None) -> None:
    """Raise a UserError if there is a problem."""
    if problem:
        raise UserError(problem)


def problems(cfg: DictConfig) -> list[str]:
    """List what is wrong with a job's config, one sentence each."""
    cfg = spelled(cfg)
    if found := [*learning_problems(cfg)]:  # its options may refer to those that another recovery has
        return found
    return _absent(cfg, COMPONENTS) or [*_values(cfg), *_files(cfg, COMPONENTS), *_combination(cfg)]


def component_problems(cfg: DictConfig, groups: Collection[str]) -> list[str]:
    """List what is wrong with the components of some groups, one sentence each, where there is no whole job."""
    cfg = spelled(cfg)
    return _absent(cfg, groups) or [*_options(cfg, groups), *_files(cfg, groups)]


def _absent(cfg: DictConfig, groups: Collection[str]) -> list[str]:
    """List values and components that are not there."""
    found = [f"{key} has no value; give {key}=..." for key in sorted(OmegaConf.missing_keys(cfg))]
    found += [
        f"{group} is not chosen; give {group}=..., none where it is to do nothing."
        for group in groups
        if not cfg.get(group) or (group == "recovery" and set(cfg[group]) <= set(PROBE))
    ]
    found += _words(cfg, groups)
    return found or [*_targets(cfg, groups)]


def _words(cfg: DictConfig, groups: Collection[str]) -> Iterator[str]:
    """Refuse what a file sets to a word that is a choice of a group, or sets beside all groups."""
    for group in groups:
        if (value := cfg.get(group)) and not isinstance(value, DictConfig):
            yield (
                f"{group}={value} is set as a value; to choose it in a file, write `- override /{group}: {value}` under"
                " its defaults."
            )
    if cfg.get("experiment"):
        yield (
            f"the file of this experiment has no effect, as what it sets ({', '.join(map(str, cfg.experiment))}) lies"
            " under experiment; begin it with the line `# @package _global_`."
        )


def _values(cfg: DictConfig) -> Iterator[str]:
    """Check single values."""
    if lists := [key for key in ONE_IN_A_JOB if isinstance(OmegaConf.select(cfg, key), ListConfig)]:
        yield from (_list_for_one(key, OmegaConf.select(cfg, key)) for key in lists)
        return
    for name in ("amount", "amount_last"):
        amount = cfg.pruner.get(name, 0)
        if not (amount is None and name == "amount_last") and not (_is_number(amount) and 0 <= amount < 1):
            yield f"pruner.{name}={amount} is out of range; give the share to prune, 0 <= {name} < 1."
    if not DEVICE.fullmatch(str(cfg.device)):
        yield f"device={cfg.device} is not known; valid are: auto, cpu, cuda, cuda:N."
    if (where := cfg.get("train_device")) is not None and (where == "auto" or not DEVICE.fullmatch(str(where))):
        yield f"train_device={where} is not known; valid are: null, cpu, cuda, cuda:N."
    if not (_is_number(cfg.seed, whole=True) and 0 <= cfg.seed < 2**32):
        yield f"seed={cfg.seed} is out of range; give a whole number from 0 to 2^32 - 1."
    if not (_is_number(cfg.get("repeat", 0), whole=True) and cfg.get("repeat", 0) >= 0):
        yield f"repeat={cfg.repeat} is out of range; give whole numbers from 0 on, such as repeat=1,2,3."
    if not isinstance(cfg.get("resume", True), bool):
        yield f"resume={cfg.resume} is neither true nor false; give one of them."
    if str(cfg.get("cache", "on")) not in ("on", "off"):
        yield f"cache={cfg.cache} is not known; valid are: on, off."
    sizes = cfg.measure.batch_sizes
    if isinstance(sizes, ListConfig) and (
        not sizes or not all(_is_number(size, whole=True) and size > 0 for size in sizes)
    ):
        yield f"measure.batch_sizes={sizes} is not valid; give whole numbers from 1 on, such as [1,8]."
    images, available = OmegaConf.select(cfg, "quantizer.images"), cfg.dataset.get("calibration")
    if _is_number(images) and _is_number(available) and images > available:
        yield f"quantizer.images={images} is more than dataset.calibration={available}; lower it or raise that."
    yield from _options(cfg, COMPONENTS)
    yield from _probe(cfg.recovery)
    yield from _pattern(cfg.pruner)
    yield from order_problems(cfg)
    yield from _ends(cfg.measure)


def _options(cfg: DictConfig, groups: Collection[str]) -> Iterator[str]:
    """Check the options of the components of some groups, each by itself."""
    for key, valid in CHOICES.items():
        group = key.partition(".")[0]
        value = OmegaConf.select(cfg, key) if group in groups and is_ours(cfg[group]) else None
        for each in value if isinstance(value, ListConfig) else [value]:
            if each is not None and str(each) not in valid:
                yield f"{key}={each} is not known; valid are: {', '.join(valid)}."
    for group in groups:
        yield from _not_finite(group, cfg[group])
        for name, part in _ours(group, cfg[group]):
            yield from _numbers(name, part)
            yield from _kinds(name, part)


def without_graph(cfg: DictConfig, runtime: RuntimeChoice) -> str | None:
    """Say why a runtime cannot take a graph that is quantized and then pruned, or None if it can."""
    if not quantizes_first(cfg) or getattr(runtime, "graphs", True):
        return None
    return (
        f"order=quantize_first prunes the weights of a graph, and runtime={_name(type(runtime))} runs the network"
        " without one; give runtime=onnxruntime, tensorrt, tensorrt_native or tensorrt_rtx, or order=prune_first."
    )


def _not_finite(group: str, options: DictConfig) -> Iterator[str]:
    """Refuse numbers that no result can hold, but for a NaN that is out of a range, which is said anyway."""
    for name, value in plain_items(options):
        ranged = math.isnan(value) and name in ("amount", "amount_last", *RANGES) if isinstance(value, float) else True
        if not ranged and not math.isfinite(value):
            yield f"{group}.{name}={value} is no number that a result can hold; give a finite one, or quote a word."


def _ours(name: str, options: Any) -> Iterator[tuple[str, DictConfig]]:
    """Yield our own components with their names: that of a group, and those among its options."""
    if not isinstance(options, DictConfig):
        return
    if is_ours(options):
        yield name, options
    for key, value in options.items():
        yield from _ours(f"{name}.{key!s}", value)


def _kinds(group: str, options: DictConfig) -> Iterator[str]:
    """Check the options of our own components that are switches, lists, texts or groups of values."""
    for name in SWITCHES:
        if not isinstance(value := options.get(name, False), bool):
            yield f"{group}.{name}={value} is neither true nor false; give one of them."
    for name in LISTS:
        value = options.get(name)
        if value is not None and not isinstance(value, ListConfig):
            right = f"{group}.{name}=[{_entries(name, value)}]"
            yield f"{group}.{name}={value} is not valid, as it is no list; give {right}."
    for name in TEXTS:
        if not isinstance(value := options.get(name, ""), str | None):
            yield f"{group}.{name}={value} is no text; quote a number: '{group}.{name}=\"1\"'."
    if not isinstance(value := options.get("options", OmegaConf.create()), DictConfig):
        yield f"{group}.options={value} is no group of values; give +{group}.options.NAME=VALUE."
    for name in LISTS_OF_LAYERS:
        layers = options.get(name)
        for value in layers if isinstance(layers, ListConfig) else ():
            if not isinstance(value, str):
                yield f"{group}.{name}={layers} has {value}, no text; quote layer names: '{group}.{name}=[\"1\"]'."


def _probe(recovery: DictConfig) -> Iterator[str]:
    """Check the options that stand beside those of every recovery, also beside those of one from elsewhere."""
    options = OmegaConf.masked_copy(recovery, [name for name in PROBE if name in recovery])
    if not is_ours(recovery):
        yield from _numbers("recovery", options)
        yield from _kinds("recovery", options)
    if options and options.get("probe_images") is None:
        yield "recovery.probe_images=null is not valid; give a whole number from 2 on."


def _entries(name: str, value: Any) -> str:
    """Return what would be between the brackets if a text were a list."""
    if name in LISTS_OF_NUMBERS:
        return ",".join(re.findall(r"\d+", str(value))) or "1,8"
    return ",".join(re.findall(r"[^\s,;()'\"]+", str(value)))


def _numbers(group: str, options: DictConfig) -> Iterator[str]:
    """Check the options of our own components by name; null is left to the component."""
    for name, (least, most, whole) in RANGES.items():
        value = options.get(name)
        if value is None or f"{group}.{name}" in CHOICES or (name == "n" and "m" in options):
            continue
        if isinstance(value, ListConfig):
            yield _list_for_one(f"{group}.{name}", value)
        elif not _is_number(value, whole=whole) or not least <= value <= most:
            kind = "a whole number" if whole else "a number"
            reach = f"from {least} on" if most == math.inf else f"from {least} to {most}"
            yield f"{group}.{name}={value} is out of range; give {kind} {reach}."


def _list_for_one(key: str, value: ListConfig) -> str:
    """Say how to give several values where an option takes one in each job."""
    each = ",".join(map(str, value)) or "..."
    return f"{key}={value} is a list, and a job takes one value; give {key}={each}, with a job for each."


def _pattern(pruner: DictConfig) -> Iterator[str]:
    """Check the pattern "n of m weights stay" where m is given; without m, n is the order of a norm."""
    if not is_ours(pruner) or "m" not in pruner:
        return
    n, m = pruner.get("n"), pruner.m
    if not (_is_number(n, whole=True) and _is_number(m, whole=True) and 0 < n < m):
        yield f"pruner.n={n} of pruner.m={m} is no pattern; give whole numbers with 0 < n < m, such as 2 of 4."
    if "amount" in pruner:
        yield "pruner.amount has no meaning beside pruner.n and pruner.m, which say how much goes; leave it out."


def _ends(measure: DictConfig) -> Iterator[str]:
    """Check that what ends warm-up and sampling in any case does not come before what they last at least."""
    yield from (
        f"measure.{name}=null is not valid; give a number."
        for name in RANGES
        if is_ours(measure) and name in measure and measure[name] is None and name not in MAY_BE_NULL
    )
    parts = [("sampling", "min_s", "max_s")] + [("warm-up", "warmup_s", "warmup_max_s")] * bool(measure.get("window"))
    for part, least, most in parts if is_ours(measure) else ():
        low, high = measure.get(least), measure.get(most)
        if _is_number(low) and _is_number(high) and low > high:
            yield (
                f"measure.{least}={low} is more than measure.{most}={high}, at which {part} ends in any case; lower"
                f" measure.{least} or raise measure.{most}."
            )


def _targets(cfg: DictConfig, groups: Collection[str]) -> Iterator[str]:
    """Check that the modules of all components are there, without importing them."""
    for group in groups:
        target = str(cfg[group].get("_target_"))
        if not _is_there(target):
            yield f"{group}._target_={target} cannot be found; give module.function of a module on the Python path."


def _is_there(target: str) -> bool:
    """Say whether the module of module.function is there, or that of module.Class.function."""
    name = target.rpartition(".")[0]
    if not name or find_module(name):
        return bool(name)
    module = module_of(name)
    # That a package makes a class by itself, as in its __init__.py, only shows when it is imported.
    return bool(module) and name.rpartition(".")[0] == module and name.rpartition(".")[2][:1].isupper()


def _files(cfg: DictConfig, groups: Collection[str]) -> Iterator[str]:
    """Check the paths that our own components are given."""
    for group, name in (("dataset", "root"), ("model", "weights")):
        value = cfg[group].get(name) if group in groups else None
        if value is None or not is_ours(cfg[group]):
            continue
        if not isinstance(value, str):
            yield f"{group}.{name}={value} is no text; give one path, and quote a number: '{group}.{name}=\"1\"'."
        elif name == "root" and not (value and Path(value).expanduser().is_dir()):
            yield f"dataset.root={value} is not a folder; give a folder with one sub-folder of images per class."
        elif name == "weights" and "://" in value and not str(cfg[group]._target_).endswith(".simplenet"):
            path = value.removeprefix("file://")
            right = f"give model.weights={path}" if path != value else "download the file and give its path"
            yield f"model.weights={value} is an address and no path; {right}."
        elif name == "weights" and not (value and (not _looks_like_path(value) or Path(value).expanduser().is_file())):
            yield f"model.weights={value} is no file; give DEFAULT, null or the path of a state_dict."
        elif name == "weights" and _looks_like_path(value):
            yield from _told(partial(refuse_mistaken, Path(value).expanduser()))


def _told(check: Callable[[], None]) -> Iterator[str]:
    """Yield the sentence with which a check refuses something."""
    try:
        check()
    except UserError as error:
        yield str(error)


def _combination(cfg: DictConfig) -> Iterator[str]:
    """Check that the runtime realises the quantizer's precision on the device; for device=auto, any device will do."""
    if not DEVICE.fullmatch(str(cfg.device)) or any(True for _ in _kinds("runtime", cfg.runtime)):
        return
    try:
        _refuse_unknown(cfg.runtime)
        with noting(cfg.quantizer):
            precision = precision_of(instantiate(cfg.quantizer, _partial_=True, _convert_="all"))
        runtime: RuntimeChoice = instantiate(cfg.runtime, _convert_="all")
        chosen = runtime.resolve(precision, str(cfg.device)) if cfg.device != "auto" else runtime
    except Exception as error:
        # Hydra wraps the error that a component raises about its options.
        yield " ".join(str(error.__cause__ if isinstance(error.__cause__, UserError) else error).split())
        return
    if problem := without_graph(cfg, chosen):
        yield problem
    kinds = ("cpu", "cuda") if cfg.device == "auto" else (str(cfg.device),)
    refusals = [impossible(runtime, precision, kind) for kind in kinds]
    if all(refusals):
        yield str(refusals[0])


def _refuse_unknown(runtime: DictConfig) -> None:
    """Refuse an option that our own runtime does not have: in a grid, others may have it."""
    for place, options in _ours("runtime", runtime):
        kind = get_class(options._target_)
        valid = list(signature(kind).parameters)
        for name in map(str, options):
            if name not in valid and not name.startswith("_"):
                raise UserError(
                    f"{place}.{name} is no option of the runtime {_name(kind)}, whose options are: {', '.join(valid)};"
                    " leave it out, or run each runtime as a sweep of its own."
                )


def impossible(runtime: RuntimeChoice, precision: str, device: str) -> str | None:
    """Say why a runtime cannot run a precision on a device, or None if it can."""
    if precision in runtime.precisions.get(device.partition(":")[0], ()):
        return None
    name = _name(type(runtime))
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, names in runtime.precisions.items():
        kinds.setdefault(tuple(names), []).append(kind)
    possible = [f"{', '.join(names)} on {' and '.join(alike)}" for names, alike in kinds.items() if names]
    return (
        f"runtime={name} cannot run precision {precision} on device={device}; it runs {' and '.join(possible)}."
        f" Precision {precision} runs with: {', '.join(_realisers(precision)) or 'none'}."
    )


def _realisers(precision: str) -> list[str]:
    """Name the runtimes and devices of this package that realise a precision."""
    from pq_sweep.runtimes import OnnxRuntime, TensorRT, TensorRTNative, TensorRTRTX, Torch

    runtimes = (Torch, OnnxRuntime, TensorRT, TensorRTNative, TensorRTRTX)
    return [f"runtime={_name(runtime)} device={kind}" for runtime in runtimes
            for kind, names in runtime.precisions.items() if precision in names]  # fmt: skip


def _name(runtime: type[Any]) -> str:
    """Return the name by which a runtime is chosen."""
    return getattr(runtime, "name", runtime.__name__.lower())


def _is_number(value: Any, *, whole: bool = False) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool)


def _looks_like_path(weights: str) -> bool:
    return "://" not in weights and ("/" in weights or weights.endswith(WEIGHT_FILES))
