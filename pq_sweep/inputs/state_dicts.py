"""State_dicts: find a network's weights in a checkpoint, whatever a tool wrapped around them, and load all of them."""

from __future__ import annotations

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_sweep.inputs.checkpoints import HOW_TO_SAVE, holds, read_checkpoint
from pq_sweep.inputs.mismatch import Mismatch, quantized, reshaped
from pq_sweep.types import UserError

log = logging.getLogger(__name__)

State = dict[str, Tensor]

DEEPEST = 5  # dictionaries within dictionaries, in which weights are looked for
# Parts of names that are no layers: what runs a network in parallel, compiles, shards or averages it wraps it in these.
WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Classifiers of GoogLeNet and Inception that only training uses.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
AVERAGED = {"ema", "swa", "lawa", "avg", "average", "averaged", "averaging", "polyak", "shadow"}
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
# Losses and metrics that a training module keeps beside its network, and what tools count with.
TRAINING = re.compile(
    r"(.*_)?(loss(es)?|loss_?(fn|func|function)?s?|criteri(on|a)|metrics?|acc(uracy)?|top_?\d+|f1(_?score)?|auc|auroc"
    r"|precision|recall|confmat|confusion_?matrix|iou|dice|kappa|ece|(class|pos|loss)_weights?)(_?\d+)?(_.*)?",
    re.IGNORECASE,
)
COUNTS = {"n_averaged", "initted", "step", "steps", "global_step", "epoch", "decay", "num_updates"}
COUNTS |= {"total_ops", "total_params"}  # thop adds these to every layer
# Torchvision's published DenseNets have names of before it renamed these layers.
FORMER_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
PRESENT_DENSENET = re.compile(r"denselayer\d+\.norm[12]\.")


@dataclass(frozen=True)
class Network:
    """The network that weights are for: the shapes it expects, and the names that share one parameter."""

    module: nn.Module

    @cached_property
    def expected(self) -> State:
        """Return the entries of its state_dict."""
        return {name: value for name, value in self.module.state_dict().items() if isinstance(value, Tensor)}

    @cached_property
    def shared(self) -> list[list[str]]:
        """List the names of each parameter that has several; a file needs to have only one of them."""
        names: dict[int, list[str]] = {}
        for name, value in self.module.state_dict(keep_vars=True).items():
            names.setdefault(id(value), []).append(name)
        return [group for group in names.values() if len(group) > 1]

    @cached_property
    def infinite(self) -> set[str]:
        """Name the buffers that are not finite by themselves, such as masks of attention."""
        return {name for name, buffer in self.module.named_buffers() if not _is_finite(buffer)}

    def completed(self, state: State) -> State:
        """Add what a file may leave out: other names of a parameter, and BatchNorm's count of batches."""
        full = dict(state)
        for names in self.shared:
            if present := [state[name] for name in names if name in state]:
                full |= {name: state.get(name, present[0]) for name in names}
        counts = (name for name in self.expected if name.endswith("num_batches_tracked"))
        return full | {name: self.expected[name] for name in counts if name not in full}


@dataclass(frozen=True)
class Entries:
    """The tensors of one dictionary in a checkpoint, by their names without wrappers; `place` is where it lies.

    `masked` says how many were masked by torch's pruning.
    """

    place: str
    tensors: State
    versions: dict[str, Any]
    masked: int = 0


@dataclass(frozen=True)
class Found:
    """Weights of the network in a checkpoint: those under a prefix, and what lies beside them in the same dictionary.

    `left` names entries for which the network has no place and which are plainly no part of it.
    """

    entries: Entries
    prefix: str
    state: State
    beside: State
    left: tuple[str, ...]
    averaged: bool

    @property
    def key(self) -> str:
        """Return what `model.key` calls these weights."""
        return _joined(self.entries.place, self.prefix)

    def fits(self, expected: State) -> bool:
        """Say whether all weights are there in the right shapes, and no others under the same prefix."""
        same = all(name in self.state and self.state[name].shape == value.shape for name, value in expected.items())
        return same and len(self.state) == len(expected)

    def matched(self, expected: State) -> int:
        """Count the entries that the network has by name."""
        return len(self.state.keys() & expected.keys())


def load_weights(module: nn.Module, path: Path, key: str | None = None) -> tuple[str, ...]:
    """Load the weights in a file into `module`, which has to have a place for each; say what was done, for the row.

    The file is what torch.save or safetensors write, and no code in it is run. `key` chooses among several sets of
    weights in it, dotted where they are nested.
    """
    path, network = path.expanduser(), Network(module)
    content = read_checkpoint(path)
    sets = list(_tensors(content))
    if not sets:
        inside = holds(content)
        raise UserError(f"model.weights={path} holds no state_dict{inside and f' but {inside}'}; {HOW_TO_SAVE}.")
    tidied = [_tidied(entries, network.expected) for entries in sets]
    key = str(key) if key else None
    candidates = list(_candidates(_below(tidied, key) if key else tidied, network, content))
    if not candidates:
        raise _no_such_key(path, str(key), _candidates(tidied, network, content), network.expected)
    chosen = _choose(candidates, network.expected, path)
    infinite = network.infinite
    _put(network, chosen, path)
    _refuse_infinite(module, infinite, path)
    notes = tuple(f"{path.name}: {note}." for note in _notes(chosen, candidates, network.expected, key))
    for note in notes:
        log.info("%s", note)
    return notes


def _tensors(content: Any, place: str = "") -> Iterator[Entries]:
    """Yield the tensors of each dictionary in a checkpoint."""
    if not isinstance(content, Mapping) or place.count(".") > DEEPEST:
        return
    tensors = {name: _strided(value) for name, value in content.items() if _is_entry(name, value)}
    if tensors or not (content or place):
        yield Entries(place, tensors, getattr(content, "_metadata", None) or {})
    for name, value in content.items():
        if isinstance(name, str):
            yield from _tensors(value, _joined(place, name))


def _is_entry(name: Any, value: Any) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def _strided(tensor: Tensor) -> Tensor:
    """Return a tensor without a gradient, and a sparse one as a dense one."""
    tensor = tensor.detach()
    return tensor if tensor.layout is torch.strided else tensor.to_dense()


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _tidied(entries: Entries, expected: State) -> Entries:
    """Return entries by the names that a network without wrappers, pruning masks and former names has."""
    tensors, masked = _masked(entries.tensors, expected)
    parts = {part for name in expected for part in name.split(".")}
    renames = {name: _plain_name(name, WRAPPERS - parts) for name in [*tensors, *entries.versions]}
    if any(PRESENT_DENSENET.search(name) for name in expected):
        renames |= {name: FORMER_DENSENET.sub(r"\1\2", plain) for name, plain in renames.items()}
    if len({renames[name] for name in tensors}) < len(tensors):  # a wrapped and a plain one of the same name
        return Entries(entries.place, tensors, entries.versions, masked)
    renamed = {renames[name]: tensor for name, tensor in tensors.items()}
    return Entries(entries.place, renamed, {renames[name]: it for name, it in entries.versions.items()}, masked)


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


def _below(sets: list[Entries], key: str) -> Iterator[Entries]:
    """Yield the entries at or below a key, which may name a dictionary or the beginning of names in it."""
    for entries in sets:
        if entries.place == key or entries.place.startswith(f"{key}."):
            yield entries
        elif not entries.place or key.startswith(f"{entries.place}."):
            prefix = _plain_name(key.removeprefix(entries.place).removeprefix("."), WRAPPERS)
            tensors, versions = _under(entries.tensors, prefix), _under(entries.versions, prefix)
            if tensors:
                yield Entries(key, tensors, versions, entries.masked)


def _under(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the values whose names begin with a prefix, without it."""
    whole = f"{prefix}." if prefix else ""
    return {name[len(whole) :]: value for name, value in values.items() if f"{name}.".startswith(whole)}


def _candidates(sets: Iterable[Entries], network: Network, content: Any) -> Iterator[Found]:
    """Yield weights of the network: in each dictionary, under each prefix with as many of its names as any other."""
    for entries in sets:
        counts = _prefixes(entries.tensors, network.expected)
        most = max(counts.values(), default=0)
        prefixes = [prefix for prefix, count in counts.items() if count == most] or [""]
        found = [_found(entries, prefix, network, content) for prefix in prefixes]
        yield from (_without_twins(one, found) for one in found)


def _prefixes(names: Iterable[str], expected: State) -> Counter[str]:
    """Count for each prefix how many names of the network follow it."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:at]) for at in range(len(parts)) if ".".join(parts[at:]) in expected)
    return counts


def _found(entries: Entries, prefix: str, network: Network, content: Any) -> Found:
    inside = _under(entries.tensors, prefix)
    spare = [name for name, tensor in inside.items() if name not in network.expected and _is_spare(name, tensor)]
    beside = {name: it for name, it in entries.tensors.items() if prefix and not name.startswith(f"{prefix}.")}
    left = [name for name, tensor in beside.items() if _is_spare(name, tensor)]
    state = network.completed({name: tensor for name, tensor in inside.items() if name not in spare})
    others = {name: tensor for name, tensor in beside.items() if name not in left}
    return Found(entries, prefix, state, others, (*left, *spare), _holds_averaged(entries, prefix, content))


def _without_twins(found: Found, candidates: list[Found]) -> Found:
    """Leave out of what lies beside the same weights under another name, as a module has that holds a network twice."""
    twins = [other.prefix for other in candidates if other is not found and _same(other.state, found.state)]
    beside = {name: it for name, it in found.beside.items() if not name.startswith(tuple(f"{at}." for at in twins))}
    return replace(found, beside=beside)


def _holds_averaged(entries: Entries, prefix: str, content: Any) -> bool:
    """Say whether weights are averaged ones: by the names above them, or by what averages weights keeps beside them.

    Lightning's WeightAveraging has the averaged weights under `state_dict`, and the plain ones elsewhere.
    """
    above = [prefix.split(".")[:length] for length in range(prefix.count(".") + 2)]
    counted = any(_joined(*parts, "n_averaged") in entries.tensors for parts in above)
    swapped = isinstance(content, Mapping) and {"averaging_state", "current_model_state"} <= content.keys()
    return _is_averaged(_joined(entries.place, prefix)) or counted or (swapped and entries.place == "state_dict")


def _is_averaged(name: str) -> bool:
    return bool(AVERAGED & {word.lower() for word in WORDS.findall(name)})


def _is_spare(name: str, tensor: Tensor) -> bool:
    """Say whether an entry is plainly none of the network's: of a loss, a metric, a count or an averaged copy."""
    if name.startswith(AUXILIARY) or _is_averaged(name):
        return True
    parts = name.split(".")
    return any(TRAINING.fullmatch(part) for part in parts[:-1]) or (parts[-1] in COUNTS and tensor.numel() == 1)


def _choose(candidates: list[Found], expected: State, path: Path) -> Found:
    """Return the weights that fit, the plain ones rather than averaged ones; refuse to guess among different ones."""
    most = max(candidate.matched(expected) for candidate in candidates)
    fitting = [candidate for candidate in candidates if candidate.fits(expected) and not candidate.beside]
    best = fitting or [candidate for candidate in candidates if candidate.matched(expected) == most]
    best = [candidate for candidate in best if not candidate.averaged] or best
    others = [candidate.key for candidate in best if not _same(candidate.state, best[0].state)]
    if others and most:
        keys = ", ".join([best[0].key, *others])
        raise UserError(
            f"model.weights={path} holds several sets of weights: {keys}; choose one, such as model.key={best[0].key}."
        )
    return best[0]


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _no_such_key(path: Path, key: str, candidates: Iterable[Found], expected: State) -> UserError:
    """Return the error for a key under which there are no weights; it lists those under which there are."""
    keys = [candidate.key for candidate in candidates if candidate.key and candidate.matched(expected)]
    remedy = f"there are weights under {', '.join(keys)}" if keys else "its weights lie under none, so leave it out"
    return UserError(f"model.key={key} names no weights in model.weights={path}; {remedy}.")


def _put(network: Network, found: Found, path: Path) -> None:
    """Load weights into the network by torch's own rules, all of them or a UserError."""
    state: OrderedDict[str, Tensor] = OrderedDict(found.state)
    if kinds := quantized(state, network.expected):
        raise UserError(f"model.weights={path} holds {kinds}; give the weights in floating point.")
    versions = {"": {"version": network.module._version}} | _under(found.entries.versions, found.prefix)
    state._metadata = versions  # type: ignore[attr-defined]  # by these, layers know the names of their former versions
    try:
        names = network.module.load_state_dict(state, strict=False)
        missing, unexpected = names.missing_keys, names.unexpected_keys
    except Exception as error:  # a shape, or a hook of the network's own
        missing, unexpected = [*network.expected.keys() - state.keys()], [*state.keys() - network.expected.keys()]
        if not reshaped(state, network.expected):
            reason = " ".join(str(error).split())
            raise UserError(f"model.weights={path} cannot be loaded into the model ({reason}); check model.") from error
    mismatch = Mismatch(network.expected, state, missing, unexpected, found.beside, found.key)
    if mismatch:
        raise mismatch.error(path)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _refuse_infinite(module: nn.Module, may_be: set[str], path: Path) -> None:
    """Refuse weights with NaN or infinity, but where the network has them by itself."""
    state = module.state_dict()
    names = [name for name, it in state.items() if isinstance(it, Tensor) and name not in may_be and not _is_finite(it)]
    if names:
        raise UserError(
            f"model.weights={path} has values that are not finite, first {names[0]}"
            f" ({len(names)} of {len(state)} entries have such); give weights from before the training diverged."
        )


def _notes(chosen: Found, candidates: list[Found], expected: State, key: str | None) -> Iterator[str]:
    """Yield what a row has to say about how its weights came out of a file."""
    where, left = f" in {chosen.key}" if chosen.key else "", chosen.left
    others = [found for found in candidates if found.averaged and found is not chosen and found.fits(expected)]
    if chosen.averaged or key:
        why = "as model.key says" if key else "as there are no plain ones that fit"
        yield f"the {'averaged' if chosen.averaged else 'plain'} weights{where} were taken, {why}"
    elif others:
        yield f"the plain weights{where} were taken; model.key={others[0].key} takes the averaged ones"
        left = tuple(name for name in left if not _is_averaged(name))
    if chosen.entries.masked:
        yield f"the pruning masks of {chosen.entries.masked} entries were applied"
    pairs = ((tensor, expected[name]) for name, tensor in chosen.state.items() if name in expected)
    kinds = {str(a.dtype).removeprefix("torch.") for a, b in pairs if b.is_floating_point() and a.dtype != b.dtype}
    if kinds:
        yield f"weights in {' and '.join(sorted(kinds))} were converted to float32"
    if left:
        yield f"{len(left)} entries that are no part of the network were left out, first {left[0]}"
