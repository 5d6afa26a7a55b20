"""The search space: channels that can only leave a network together (section 4 of the paper).

torch-pruning finds what depends on what, as for `pruner=remove`; quantizers are attached to the groups of the plain
network, so that no branch of theirs stands in the way. Channels of a group are zero together: their rows of weights,
their biases and their BatchNorm. What they feed is then given zeros, and the network without them answers as before.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from pq_sweep.compress.blocks import refresh
from pq_sweep.compress.removal import explained, graph_of, pruner_of, trainable
from pq_sweep.types import Model, UserError

Channels = dict[str, list[int]]  # of each group, by the layer that it begins at

# Steps that give zeros for channels that are zero, whatever else they are given.
FOLLOWED = frozenset({tp.ops.OPTYPE.CONV, tp.ops.OPTYPE.DEPTHWISE_CONV, tp.ops.OPTYPE.LINEAR, tp.ops.OPTYPE.BN,
                      tp.ops.OPTYPE.PRELU, tp.ops.OPTYPE.ELEMENTWISE, tp.ops.OPTYPE.CONCAT, tp.ops.OPTYPE.SPLIT,
                      tp.ops.OPTYPE.RESHAPE, tp.ops.OPTYPE.UNBIND, tp.ops.OPTYPE.EXPAND, tp.ops.OPTYPE.SLICE,
                      tp.ops.OPTYPE.OUTPUT})  # fmt: skip
SAME = 1e-4  # largest difference of answers, as a share of the largest, at which channels count as zero


@dataclass(frozen=True)
class Part:
    """Rows of a parameter, and the channel of the group to which each belongs."""

    parameter: str
    rows: Tensor
    channels: Tensor


@dataclass(frozen=True)
class Group:
    """Channels that leave together; `root` is the layer that the group begins at."""

    root: str
    channels: int
    parts: tuple[Part, ...]

    def sums(self, values: dict[str, Tensor]) -> Tensor:
        """Add up values of the shape of the parameters for each channel (channels,)."""
        total = next(iter(values.values())).new_zeros(self.channels)
        for part in self.parts:
            rows = values[part.parameter][part.rows.to(total.device)]
            total.index_add_(0, part.channels.to(total.device), rows.reshape(len(rows), -1).sum(1))
        return total

    def rows(self, part: Part, channels: Iterable[int]) -> Tensor:
        """Return the rows of a part that belong to channels."""
        return part.rows[torch.isin(part.channels, torch.tensor(sorted(channels), dtype=torch.int64))]


def groups_of(model: Model) -> tuple[list[Group], list[str]]:
    """Return the groups of a network, and a sentence on layers whose channels stay.

    The classifier keeps its classes. Each group is proven by the network itself: without its channels it answers as
    with zeros in their place.

    Raises:
        UserError: If no channel may leave.
    """
    found, stay = list[Group](), dict[str, str]()
    names = {part: name for name, part in model.module.named_modules()}
    with trainable(model.module), explained(model, "recovery=geta"):
        pruner = pruner_of(model, tp.importance.GroupMagnitudeImportance(), pruning_ratio=0.5)
        kinds = pruner.root_module_types
        for group in pruner.DG.get_all_groups(ignored_layers=pruner.ignored_layers, root_module_types=kinds):
            root = names[group[0].dep.target.module]
            if why := _why_not(pruner, group):
                stay[root] = why
            else:
                found.append(Group(root, len(group[0].idxs), tuple(_parts(pruner, group, names))))
    found, unproven = _proven(model, [group for group in found if group.channels > 1])
    stay |= dict.fromkeys(unproven, "what follows does not give zeros for zeros")
    if not found:
        raise UserError(
            "recovery=geta finds no channels that may leave"
            f"{': ' + '; '.join(f'{name} ({why})' for name, why in stay.items()) if stay else ''}; use recovery=lsq."
        )
    return found, _told(stay)


def _why_not(pruner: Any, group: Any) -> str:
    """Say why the channels of a group stay, or nothing if they may leave."""
    if not pruner._check_pruning_ratio(group):
        return "it shares parameters or runs more than once"
    strange = [dep.target for dep, _ in group if dep.target.type not in FOLLOWED]
    if strange:
        return f"a {type(strange[0].module).__name__} depends on them"
    return "its channels are in parts" if pruner._get_channel_groups(group) > 1 else ""


def _parts(pruner: Any, group: Any, names: dict[nn.Module, str]) -> Iterator[Part]:
    """Yield the rows that belong to the channels of a group; columns that only read them stay as they are."""
    for item in group:
        layer = item.dep.target.module
        if layer not in names or not pruner.DG.is_out_channel_pruning_fn(item.dep.handler):
            continue
        for key in ("weight", "bias"):
            if isinstance(getattr(layer, key, None), nn.Parameter) and not isinstance(layer, nn.PReLU):
                name = f"{names[layer]}.{key}".lstrip(".")
                yield Part(name, torch.tensor(item.idxs), torch.tensor(item.root_idxs))


def _told(stay: dict[str, str]) -> list[str]:
    """Return a sentence on what keeps its channels."""
    reasons: dict[str, list[str]] = {}
    for name, why in stay.items():
        reasons.setdefault(why, []).append(name)
    told = "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    return [f"recovery=geta kept the channels of {told}."] if told else []


# --- channels that go ------------------------------------------------------------------------------------------------


@torch.no_grad()
def zero(module: nn.Module, groups: list[Group], gone: Channels) -> None:
    """Set channels to zero in place."""
    for group in groups:
        for part in group.parts if gone.get(group.root) else ():
            module.get_parameter(part.parameter)[group.rows(part, gone[group.root])] = 0


def take_out(model: Model, gone: Channels) -> list[Any]:
    """Take channels out of a network, and return the history from which `removal.replay` repeats that."""
    module, layers = model.module, dict(model.module.named_modules())
    with trainable(module), explained(model, "recovery=geta"):
        graph = graph_of(module, model.sample())
        for root, channels in gone.items():
            if channels:
                function = graph.get_pruner_of_module(layers[root]).prune_out_channels
                graph.get_pruning_group(layers[root], function, sorted(channels)).prune()
    refresh(module)
    return list(graph.pruning_history())


def _proven(model: Model, groups: list[Group]) -> tuple[list[Group], list[str]]:
    """Return the groups whose zeros can leave without changing an answer, and the layers of the others.

    All are tried together, and one by one only if that fails.
    """
    if not groups or _same_without(model, groups):
        return groups, []
    good = [group for group in groups if _same_without(model, [group])]
    return good, [group.root for group in groups if group not in good]


def _same_without(model: Model, groups: list[Group]) -> bool:
    """Say whether a network without every other channel of groups answers as with zeros in their place."""
    gone = {group.root: list(range(0, group.channels, 2))[: group.channels - 1] for group in groups}
    tried = replace(model, module=copy.deepcopy(model.module).eval())
    images = model.sample(2)
    zero(tried.module, groups, gone)
    try:
        with torch.no_grad():
            before = tried.module(images)
            take_out(tried, gone)
            return bool((tried.module(images) - before).abs().max() <= SAME * before.abs().max().clamp_min(1e-12))
    except UserError:
        return False
