"""Entries: the tensors in each dictionary of a checkpoint, by the names that a network has without wrappers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pq_sweep.core.sentences import listed
from pq_sweep.inputs.checkpoints import ARRAYS, StandIn

State = dict[str, Tensor]

DEEPEST = 5  # dictionaries within dictionaries, in which weights are looked for
# Parts of names that are no layers: what runs a network in parallel, compiles, shards or averages it wraps it in these.
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Torchvision's published DenseNets have names of before it renamed these layers.
FORMER_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
PRESENT_DENSENET = re.compile(r"denselayer\d+\.norm[12]\.")


@dataclass(frozen=True)
class Entries:
    """The tensors of one dictionary in a checkpoint, by their names without wrappers; `place` is where it lies.

    `averaged` says that its weights are averaged ones whatever their place is called, `masked` how many were masked by
    torch's pruning.
    """

    place: str
    tensors: State
    versions: dict[str, Any]
    averaged: bool = False
    masked: int = 0


def all_entries(content: Any) -> Iterator[Entries]:
    """Yield the tensors of each dictionary in a checkpoint.

    Lightning's WeightAveraging puts the averaged weights where the plain ones usually are, and those elsewhere.
    """
    swapped = isinstance(content, Mapping) and {"averaging_state", "current_model_state"} <= content.keys()
    for place, values in _dictionaries(content, ""):
        tensors = {name: _strided(value) for name, value in values.items() if _is_entry(name, value)}
        if tensors or not content:
            versions = getattr(values, "_metadata", None) or {}
            yield Entries(place, tensors, versions, averaged=swapped and place == "state_dict")


def nameless(content: Any) -> list[str]:
    """List the places of tensors in lists: some tools keep averaged weights so, and without names none can be taken."""
    return [
        joined(place, name)
        for place, values in _dictionaries(content, "")
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, list) and value and isinstance(value[0], Tensor)
    ]


def objects(content: Any) -> dict[str, str]:
    """Return the places of pickled objects in a checkpoint, which stand-ins replace, and what they are objects of."""
    if isinstance(content, StandIn):
        return {"": type(content).__name__}
    return {
        joined(place, str(name)): type(value).__name__
        for place, values in _dictionaries(content, "")
        for name, value in values.items()
        if isinstance(value, StandIn)
    }


def holds(content: Any) -> str:
    """Say which pickled objects a file holds: "an object of models.yolo.Model at model", or nothing."""
    found: dict[str, list[str]] = {}
    for place, name in objects(content).items():
        found.setdefault("NumPy arrays" if name in ARRAYS else f"an object of {name}", []).append(place)
    named = [f"{name} at {listed(places)}" if places[0] else name for name, places in found.items()]
    return ", ".join(named[:3])


def _dictionaries(content: Any, place: str) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    if not isinstance(content, Mapping | list | tuple) or place.count(".") > DEEPEST:
        return
    if isinstance(content, Mapping):
        yield place, content
    for name, value in content.items() if isinstance(content, Mapping) else enumerate(content):
        if isinstance(name, str | int):
            yield from _dictionaries(value, joined(place, str(name)))


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _strided(tensor: Tensor) -> Tensor:
    """Return a tensor without a gradient, and a sparse one as a dense one."""
    tensor = tensor.detach()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def joined(*parts: str) -> str:
    """Return the dotted name of what lies in parts of which some may be empty."""
    return ".".join(part for part in parts if part)


def tidied(entries: Entries, expected: State) -> Entries:
    """Return entries by the names that a network without wrappers, pruning masks and former names has."""
    tensors, masked = _masked(entries.tensors, expected)
    parts = {part for name in expected for part in name.split(".")}
    renames = {name: _plain_name(name, WRAPPERS - parts) for name in [*tensors, *entries.versions]}
    if any(PRESENT_DENSENET.search(name) for name in expected):
        renames |= {name: FORMER_DENSENET.sub(r"\1\2", plain) for name, plain in renames.items()}
    if len({renames[name] for name in tensors}) < len(tensors):  # a wrapped and a plain one of the same name
        return replace(entries, tensors=tensors, masked=masked)
    renamed = {renames[name]: tensor for name, tensor in tensors.items()}
    versions = {renames[name]: version for name, version in entries.versions.items()}
    return replace(entries, tensors=renamed, versions=versions, masked=masked)


def _plain_name(name: str, wrappers: set[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in wrappers)


def _masked(tensors: State, expected: State) -> tuple[State, int]:
    """Apply the masks of torch.nn.utils.prune, as `prune.remove` does before saving; return how many there are."""
    masks = [
        name.removesuffix("_mask")
        for name, mask in tensors.items()
        if name.endswith("_mask") and _shape(tensors, name.removesuffix("_mask") + "_orig") == list(mask.shape)
    ]
    if not masks or any(name.endswith("_orig") for name in expected):
        return tensors, 0
    gone = {name + ending for name in masks for ending in ("_orig", "_mask")}
    folded = {name: tensors[f"{name}_orig"] * tensors[f"{name}_mask"].to(tensors[f"{name}_orig"]) for name in masks}
    return {name: tensor for name, tensor in tensors.items() if name not in gone} | folded, len(masks)


def _shape(tensors: State, name: str) -> list[int] | None:
    return list(tensors[name].shape) if name in tensors else None


def below(sets: list[Entries], key: str) -> list[Entries]:
    """Return the entries at or below a key, which names a dictionary or the beginning of names in one, or both."""
    places = [entries for entries in sets if f"{entries.place}.".startswith(f"{key}.")]
    rests = [(entries, _rest(key, entries.place)) for entries in sets if entries not in places]
    inside = [_cut(entries, rest, key) for entries, rest in rests if rest]
    found = [entries for entries in [*places, *inside] if entries.tensors]
    return found or [it for it in (_cut(each, key, joined(each.place, key)) for each in sets) if it.tensors]


def _rest(key: str, place: str) -> str:
    """Return what is left of a key within a place, or nothing if it leads elsewhere."""
    if not place:
        return key
    return key.removeprefix(f"{place}.") if key.startswith(f"{place}.") else ""


def _cut(entries: Entries, prefix: str, place: str) -> Entries:
    """Return the entries under a prefix, or under what is left of it without wrappers, as names have none."""
    tensors = under(entries.tensors, prefix)
    if not tensors:
        prefix = _plain_name(prefix, WRAPPERS)
        tensors = under(entries.tensors, prefix)
    return replace(entries, place=place, tensors=tensors, versions=under(entries.versions, prefix))


def under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values whose names begin with a prefix, without it."""
    whole = f"{prefix}." if prefix else ""
    return {name[len(whole) :]: value for name, value in values.items() if f"{name}.".startswith(whole)}
