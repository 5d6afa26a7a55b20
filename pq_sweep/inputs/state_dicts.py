"""State_dicts: find a network's weights in a checkpoint, whatever a tool wrapped around them, and load all of them."""

from __future__ import annotations

import logging
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_sweep.inputs.checkpoints import DATA, read_checkpoint
from pq_sweep.inputs.entries import (
    Entries,
    State,
    all_entries,
    below,
    holds,
    joined,
    nameless,
    objects,
    tidied,
    under,
)
from pq_sweep.inputs.finite import is_finite
from pq_sweep.inputs.mismatch import Mismatch, quantized, reshaped
from pq_sweep.inputs.mistaken import HOW_TO_SAVE
from pq_sweep.types import UserError

log = logging.getLogger(__name__)

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
COUNTS_OF_LAYERS = {"total_ops", "total_params"}  # of thop


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
        return {name for name, buffer in self.module.named_buffers() if not is_finite(buffer)}

    @cached_property
    def buffers(self) -> set[str]:
        """Name what is no parameter, such as the statistics of BatchNorm."""
        return {name for name, _ in self.module.named_buffers(remove_duplicate=False)}

    @cached_property
    def layers(self) -> set[str]:
        """Name its outermost layers."""
        return {name.partition(".")[0] for name in self.expected}

    def is_copied(self, name: str) -> bool:
        """Say whether this is the name of an averaged copy of one of its entries; some tools leave out the dots."""
        copied = tuple(name.replace(".", "") for name in self.expected)
        return _is_averaged(name) and name.replace(".", "").endswith(copied)

    def completed(self, state: State) -> State:
        """Add what a file may leave out: other names of a parameter, and BatchNorm's count of batches."""
        full = dict(state)
        for names in self.shared:
            if present := [state[name] for name in names if name in state]:
                full |= {name: state.get(name, present[0]) for name in names}
        counts = (name for name in self.expected if name.endswith("num_batches_tracked"))
        return full | {name: self.expected[name] for name in counts if name not in full}


@dataclass(frozen=True)
class Found:
    """Weights of the network in a checkpoint: those under a prefix, and what lies beside them in the same dictionary.

    `left` names entries for which the network has no place and which are plainly no part of it, `borrowed` the weights
    from which statistics were taken.
    """

    entries: Entries
    prefix: str
    state: State
    beside: State
    left: tuple[str, ...]
    averaged: bool
    borrowed: str = ""

    @property
    def key(self) -> str:
        """Return what `model.key` calls these weights."""
        return joined(self.entries.place, self.prefix)

    def fits(self, expected: State, but: Set[str] = frozenset()) -> bool:
        """Say whether all weights are there but some, in the right shapes, and no others under the same prefix."""
        shapes = {name: value.shape for name, value in self.state.items()}
        wanted = {name: value.shape for name, value in expected.items() if name in shapes or name not in but}
        return shapes == wanted

    def matched(self, expected: State) -> int:
        """Count the entries that the network has by name."""
        return len(self.state.keys() & expected.keys())


def load_weights(module: nn.Module, path: Path, key: str | None = None) -> tuple[str, ...]:
    """Load the weights in a file into `module`, which has to have a place for each; say what was done, for the row.

    The file is what torch.save or safetensors write, and no code in it is run. `key` chooses among several sets of
    weights in it, dotted where they are nested.
    """
    path, network, key = path.expanduser(), Network(module), str(key) if key else None
    content = read_checkpoint(path)
    candidates = _search(content, network, key, path)
    chosen = _choose(candidates, network.expected, path)
    if key:
        chosen = _with_statistics(chosen, _search(content, network, None, path), network)
    _put(network, chosen, path)
    chosen = replace(chosen, left=(*chosen.left, *filter(_is_averaged, nameless(content))))
    told = [*_notes(chosen, candidates, network, key), *(() if key else _unread(content))]
    notes = tuple(f"{path.name}: {note}." for note in told)
    for note in notes:
        log.info("%s", note)
    return notes


def _search(content: Any, network: Network, key: str | None, path: Path) -> list[Found]:
    """Return all sets of weights in a checkpoint, or those under a key; refuse a checkpoint without any."""
    sets = [tidied(entries, network.expected) for entries in all_entries(content)]
    if not sets:
        inside = ", ".join(f"tensors without names at {place}" for place in nameless(content)) or holds(content)
        raise UserError(f"model.weights={path} holds no state_dict{inside and f' but {inside}'}; {HOW_TO_SAVE}.")
    found = list(_candidates(below(sets, key) if key else sets, network))
    if not found:
        raise _no_such_key(path, str(key), _candidates(sets, network), network.expected, objects(content))
    return found


def _candidates(sets: Iterable[Entries], network: Network) -> Iterator[Found]:
    """Yield weights of the network: in each dictionary, under each prefix with as many of its names as any other."""
    for entries in sets:
        counts = _prefixes(entries.tensors, network.expected)
        most = max(counts.values(), default=0)
        prefixes = [prefix for prefix, count in counts.items() if count == most] or [""]
        found = [_found(entries, prefix, network) for prefix in prefixes]
        yield from (_without_twins(one, found) for one in found)


def _prefixes(names: Iterable[str], expected: State) -> Counter[str]:
    """Count for each prefix how many names of the network follow it."""
    counts: Counter[str] = Counter()
    for name in names:
        parts = name.split(".")
        counts.update(".".join(parts[:at]) for at in range(len(parts)) if ".".join(parts[at:]) in expected)
    return counts


def _found(entries: Entries, prefix: str, network: Network) -> Found:
    inside = under(entries.tensors, prefix)
    spare = [
        name for name, tensor in inside.items() if name not in network.expected and _is_spare(name, tensor, network)
    ]
    beside = {name: it for name, it in entries.tensors.items() if prefix and not name.startswith(f"{prefix}.")}
    left = [name for name, tensor in beside.items() if _is_spare(name, tensor, network)]
    state = network.completed({name: tensor for name, tensor in inside.items() if name not in spare})
    others = {name: tensor for name, tensor in beside.items() if name not in left}
    return Found(entries, prefix, state, others, (*left, *spare), _holds_averaged(entries, prefix))


def _without_twins(found: Found, candidates: list[Found]) -> Found:
    """Leave out of what lies beside the same weights under another name, as a module has that holds a network twice."""
    twins = [other.prefix for other in candidates if other is not found and _same(other.state, found.state)]
    beside = {name: it for name, it in found.beside.items() if not name.startswith(tuple(f"{at}." for at in twins))}
    return replace(found, beside=beside)


def _holds_averaged(entries: Entries, prefix: str) -> bool:
    """Say whether weights are averaged ones, by the names above them or by the count that AveragedModel keeps there."""
    above = [prefix.split(".")[:length] for length in range(prefix.count(".") + 2)]
    counted = any(joined(*parts, "n_averaged") in entries.tensors for parts in above)
    return entries.averaged or counted or _is_averaged(joined(entries.place, prefix))


def _is_averaged(name: str) -> bool:
    return bool(AVERAGED & {word.lower() for word in WORDS.findall(name)})


def _is_spare(name: str, tensor: Tensor, network: Network) -> bool:
    """Say whether an entry is plainly none of the network's: of a loss, a metric, a count or an averaged copy.

    Within a layer of the network, nothing but a count of a tool's is: there, the same names may be of layers.
    """
    parts = name.split(".")
    if name.startswith(AUXILIARY) or (parts[-1] in COUNTS_OF_LAYERS and tensor.numel() == 1):
        return True
    if parts[0] in network.layers:
        return False
    trains = any(TRAINING.fullmatch(part) for part in parts[:-1]) or TRAINING.fullmatch(parts[0])
    return bool(trains) or (parts[-1] in COUNTS and tensor.numel() == 1) or network.is_copied(name)


def _choose(candidates: list[Found], expected: State, path: Path) -> Found:
    """Return the weights that fit, the plain ones rather than averaged ones; refuse to guess among different ones."""
    most = max(candidate.matched(expected) for candidate in candidates)
    fitting = [candidate for candidate in candidates if candidate.fits(expected) and not candidate.beside]
    best = fitting or [candidate for candidate in candidates if candidate.matched(expected) == most]
    best = [candidate for candidate in best if not candidate.averaged] or best
    others = [candidate.key for candidate in best[1:] if not _same(candidate.state, best[0].state)]
    if others and most:
        keys = [key for key in (best[0].key, *others) if key]
        beside = "" if best[0].key else ", and others beside them"
        raise UserError(
            f"model.weights={path} holds several sets of weights, under {', '.join(keys)}{beside};"
            f" choose one, such as model.key={keys[0]}."
        )
    return best[0]


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.is_meta or other.is_meta:
        return False
    return torch.equal(one, other)


def _no_such_key(
    path: Path, key: str, candidates: Iterable[Found], expected: State, pickled: dict[str, str]
) -> UserError:
    """Return the error for a key under which there are no weights; it lists those under which there are."""
    keys = [candidate.key for candidate in candidates if candidate.key and candidate.matched(expected)]
    remedy = f"there are weights under {', '.join(keys[:8])}" if keys else "its weights lie under none, so leave it out"
    kind = next((name for place, name in pickled.items() if f"{place}.".startswith(f"{key}.")), None)
    if kind:
        return UserError(
            f"model.key={key} names an object of {kind} in model.weights={path}, which is never loaded as that can run"
            f" code; {save_from(key)} where it is made, or take what is readable: {remedy}."
        )
    return UserError(f"model.key={key} names no weights in model.weights={path}; {remedy}.")


def save_from(place: str) -> str:
    """Say how to make a file of the weights in an object."""
    return f"save its weights by torch.save({place.rpartition('.')[2]}.state_dict(), path)"


def _unread(content: Any) -> Iterator[str]:
    """Say that averaged weights lie beside in a pickled object, which is not read."""
    for place, kind in objects(content).items():
        if not DATA.fullmatch(kind) and (_is_averaged(place) or _is_averaged(kind.rpartition(".")[2])):
            yield (
                f"averaged weights seem to be at {place} in an object of {kind}, which is never loaded as that can run"
                f" code; to measure them, {save_from(place)} where it is made"
            )


def _with_statistics(chosen: Found, candidates: list[Found], network: Network) -> Found:
    """Add the plain weights' buffers to averaged weights without any: some tools average the parameters alone."""
    expected, lacking = network.expected, network.expected.keys() - chosen.state.keys()
    plain = [found for found in candidates if found.fits(expected) and not (found.averaged or found.beside)]
    if not lacking or not chosen.averaged or not chosen.fits(expected, but=network.buffers) or len(plain) != 1:
        return chosen
    state = chosen.state | {name: plain[0].state[name] for name in lacking}
    return replace(chosen, state=state, borrowed=plain[0].key or "the plain weights")


def _put(network: Network, found: Found, path: Path) -> None:
    """Load weights into the network by torch's own rules, all of them or a UserError."""
    state: OrderedDict[str, Tensor] = OrderedDict(found.state)
    _refuse_other_values(state, network.expected, path)
    infinite = network.infinite
    versions = {"": {"version": network.module._version}} | under(found.entries.versions, found.prefix)
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
    _refuse_infinite(network.module, infinite, path)


def _refuse_other_values(state: State, expected: State, path: Path) -> None:
    """Refuse values that torch would not load, or would load as other ones without a word."""
    if any(tensor.is_meta for tensor in state.values()):
        raise UserError(
            f"model.weights={path} holds shapes without values; save the network after its values are there."
        )
    if kinds := quantized(state, expected):
        raise UserError(f"model.weights={path} holds {kinds}; give the weights in floating point.")


def _refuse_infinite(module: nn.Module, may_be: set[str], path: Path) -> None:
    """Refuse weights with NaN or infinity, but where the network has them by itself."""
    state = module.state_dict()
    names = [name for name, it in state.items() if isinstance(it, Tensor) and name not in may_be and not is_finite(it)]
    if names:
        raise UserError(
            f"model.weights={path} has values that are not finite, first {names[0]}"
            f" ({len(names)} of {len(state)} entries have such); give weights from before the training diverged."
        )


def _notes(chosen: Found, candidates: list[Found], network: Network, key: str | None) -> Iterator[str]:
    """Yield what a row has to say about how its weights came out of a file."""
    yield from _choice(chosen, candidates, network, key)
    if chosen.entries.masked:
        yield f"the pruning masks of {_count(chosen.entries.masked)} were applied"
    for there, here in sorted(_conversions(chosen.state, network.expected)):
        yield f"weights in {there} were converted to {here}"
    if left := [name for name in chosen.left if not (_is_averaged(name) or name.endswith("n_averaged"))]:
        yield f"{_count(len(left))} beside the network, first {left[0]}, {'was' if len(left) == 1 else 'were'} left out"


def _conversions(state: State, expected: State) -> set[tuple[str, str]]:
    """Return the types of floating point numbers that become others in the network, with those."""
    pairs = [(state[name].dtype, it.dtype) for name, it in expected.items() if name in state and it.is_floating_point()]
    return {(_kind(there), _kind(here)) for there, here in pairs if there != here}


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _choice(chosen: Found, candidates: list[Found], network: Network, key: str | None) -> Iterator[str]:
    """Say which weights were taken, where there were averaged ones or `model.key` chose."""
    where = f" in {chosen.key}" if chosen.key else ""
    averaged = [found for found in candidates if found.averaged and found.matched(network.expected)]
    others = [found.key for found in averaged if found.fits(network.expected, but=network.buffers)]
    left = [*filter(_is_averaged, chosen.left), *(found.key for found in averaged if found.key not in others)]
    if chosen.averaged or key:
        why = "as model.key says" if key else "as there are no plain ones that fit"
        also = f", with the statistics of {chosen.borrowed}" if chosen.borrowed else ""
        yield f"the {'averaged' if chosen.averaged else 'plain'} weights{where} were taken, {why}{also}"
    elif others:
        yield f"the plain weights{where} were taken, and model.key={others[0]} takes the averaged ones"
    elif left:
        yield f"the plain weights{where} were taken, and the averaged ones, first {left[0]}, left out"


def _count(entries: int) -> str:
    return "1 entry" if entries == 1 else f"{entries} entries"
