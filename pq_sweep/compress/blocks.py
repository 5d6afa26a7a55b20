"""Blocks that torch-pruning cannot handle, and what helps it past them in every network that contains one.

torch-pruning follows the channels through one run of the network. A block through which it cannot follow them has a
stand-in for that run (`STAND_INS`): the same widths, in steps that it knows. A block that it cannot shrink, or not
without mixing up the block's heads, has a pruning function of its own (`SHRINKERS`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch_pruning.pruner import function
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleBlock
from torchvision.models.swin_transformer import PatchMerging, PatchMergingV2, ShiftedWindowAttention

from pq_sweep.compress.gradients import followed
from pq_sweep.types import UserError

Score = Callable[[Any], Tensor | None]


class Stay(torch.autograd.Function):
    """The identity, as a mark in the traced graph: channels that pass through it are not removed."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.view_as(x)


def stays(grad_fn: Any) -> bool:
    """Say whether a step of the traced graph is the mark `Stay`."""
    return isinstance(grad_fn, Stay._backward_cls)


def _without_shuffle(block: Any, x: Tensor) -> Tensor:
    """Run a block of ShuffleNet V2 without its shuffle: only channels inside its branches may be removed."""
    half = x.shape[1] // 2
    # torch-pruning knows the sizes of a split, but not of a chunk.
    first, second = Stay.apply(x).split([half, half], 1) if block.stride == 1 else (x, x)
    return Stay.apply(torch.cat((block.branch1(first), block.branch2(second)), 1))


def _same_width(block: Any, x: Tensor) -> Tensor:
    return x * 1


def _twice_the_width(block: Any, x: Tensor) -> Tensor:
    """Map (B, H, W, C) to (B, 1, W, 2C)."""
    return x.mean(1, keepdim=True).repeat(1, 1, 1, 2)


STAND_INS: dict[type[nn.Module], Callable[[Any, Tensor], Tensor]] = {
    ShuffleBlock: _without_shuffle,
    ShiftedWindowAttention: _same_width,
    PatchMerging: _twice_the_width,
    PatchMergingV2: _twice_the_width,
}


@contextmanager
def traceable(module: nn.Module) -> Iterator[None]:
    """Let stand-ins run for a while, and end a trace that recurses too deep, which could otherwise take hours.

    Nothing in the network's code may cut the trace.
    """
    standing = {part: partial(run, part) for part in module.modules()
                for kind, run in STAND_INS.items() if isinstance(part, kind)}  # fmt: skip
    standing[module] = partial(_run_followed, standing.get(module, module.forward))
    before = {part: vars(part).get("forward") for part in standing}
    for part, run in standing.items():
        vars(part)["forward"] = run
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unwrapped parameters detected")
            warnings.filterwarnings("error", "Maximum recursive depth")
            yield
    finally:
        for part, own in before.items():
            if own is None:
                del vars(part)["forward"]
            else:
                vars(part)["forward"] = own


def _run_followed(forward: Callable[..., Any], *images: Any) -> Any:
    with followed():
        return forward(*images)


class NormShrinker(function.LayernormPruner):
    """Takes channels out of LayerNorm and leaves the others in order.

    The library's own function sorts a copy and drops it, so that the norms of a network that keeps only a few channels
    end up in disorder.
    """

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        kept = _others(idxs, layer.normalized_shape[-1]).tolist()
        for name in ("weight", "bias"):
            if getattr(layer, name) is not None:
                setattr(layer, name, self._prune_parameter_and_grad(getattr(layer, name), kept, -1))
        layer.normalized_shape = (*layer.normalized_shape[:-1], len(kept))
        return layer

    prune_in_channels = prune_out_channels


# Importances only count what the functions under these names prune; a pruning function of ours they would leave out.
NORMS = NormShrinker()
function.PrunerBox[tp.ops.OPTYPE.LN] = NORMS
function.prune_layernorm_out_channels = function.prune_layernorm_in_channels = NORMS.prune_out_channels


class AttentionShrinker(function.MultiheadAttentionPruner):
    """Takes channels of the embedding out of MultiheadAttention, and as many out of its heads."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        if layer.in_proj_weight is None:
            raise UserError(
                "pruner=remove cannot shrink a MultiheadAttention with a kdim or vdim of its own;"
                " use a pruner that sets zeros, such as pruner=l1_global."
            )
        leaving = _weakest_of_each_head(layer.out_proj, layer.num_heads, len(idxs), self.score)
        rows, columns = [layer.in_proj_weight, layer.in_proj_bias], [layer.out_proj.weight, layer.bias_k, layer.bias_v]
        _line_up(rows, columns, leaving, idxs)
        return super().prune_out_channels(layer, idxs)

    prune_in_channels = prune_out_channels


class WindowAttentionShrinker(tp.BasePruningFunc):
    """Takes channels of the embedding out of Swin's attention, and as many out of its heads."""

    def __init__(self, score: Score) -> None:
        super().__init__()
        self.score = score

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        leaving = _weakest_of_each_head(layer.proj, layer.num_heads, len(idxs), self.score)
        _line_up([layer.qkv.weight, layer.qkv.bias], [layer.proj.weight], leaving, idxs)
        tp.prune_linear_out_channels(layer.qkv, _repeated(idxs, 3, layer.proj.in_features))
        tp.prune_linear_in_channels(layer.qkv, idxs)
        tp.prune_linear_in_channels(layer.proj, idxs)
        tp.prune_linear_out_channels(layer.proj, idxs)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        return layer.proj.out_features

    get_in_channels = get_out_channels


class MergingShrinker(tp.BasePruningFunc):
    """Takes channels out of Swin's patch merging, which reads four neighbouring pixels and writes one."""

    def __init__(self, score: Score) -> None:
        super().__init__()

    def prune_out_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        if isinstance(layer, PatchMergingV2):  # the second version normalises what it writes
            NORMS.prune_out_channels(layer.norm, idxs)
        tp.prune_linear_out_channels(layer.reduction, idxs)
        return layer

    def prune_in_channels(self, layer: Any, idxs: list[int]) -> nn.Module:
        four = _repeated(idxs, 4, layer.dim)
        if isinstance(layer, PatchMerging):
            NORMS.prune_out_channels(layer.norm, four)
        tp.prune_linear_in_channels(layer.reduction, four)
        layer.dim -= len(idxs)
        return layer

    def get_out_channels(self, layer: Any) -> int:
        return layer.reduction.out_features

    def get_in_channels(self, layer: Any) -> int:
        return layer.dim


SHRINKERS: dict[type[nn.Module], Callable[[Score], tp.BasePruningFunc]] = {
    nn.MultiheadAttention: AttentionShrinker,
    ShiftedWindowAttention: WindowAttentionShrinker,
    PatchMerging: MergingShrinker,
    PatchMergingV2: MergingShrinker,
}


def shrinkers(module: nn.Module, score: Score) -> dict[type[nn.Module], tp.BasePruningFunc]:
    """Return the pruning functions that this network needs, by exact type: torch-pruning does not look at bases."""
    types = {type(part) for part in module.modules()}
    return {found: shrink(score) for found in types for kind, shrink in SHRINKERS.items() if issubclass(found, kind)}


def rounding(module: nn.Module, round_to: int | None) -> int:
    """Return a multiple of `round_to` and of all head counts, so that every attention head keeps a whole size."""
    attentions = (nn.MultiheadAttention, ShiftedWindowAttention)
    return math.lcm(round_to or 1, *(part.num_heads for part in module.modules() if isinstance(part, attentions)))


def refresh(module: nn.Module) -> None:
    """Bring attributes in line with the removed channels: torchvision's ViT keeps its width in `hidden_dim`."""
    projection = getattr(module, "conv_proj", None)
    if isinstance(projection, nn.Conv2d) and hasattr(module, "hidden_dim"):
        setattr(module, "hidden_dim", projection.out_channels)  # noqa: B010  (mypy takes it for a parameter)


def _weakest_of_each_head(reader: nn.Linear, heads: int, count: int, score: Score) -> list[int]:
    """Return the `count` least important channels that `reader` takes in, equally many of each head."""
    width = reader.in_features
    graph = tp.DependencyGraph().build_dependency(reader, reader.weight.new_zeros(1, width))
    group = graph.get_pruning_group(reader, tp.prune_linear_in_channels, list(range(width)))
    scores = score(group)
    if scores is None:  # bn_scale knows BatchNorm only
        scores = tp.importance.GroupMagnitudeImportance()(group)
    weakest = scores.cpu().unflatten(0, (heads, -1)).argsort(1)[:, : count // heads]
    return (weakest + torch.arange(0, width, width // heads)[:, None]).flatten().tolist()


def _line_up(rows: list[Tensor | None], columns: list[Tensor | None], leaving: list[int], idxs: list[int]) -> None:
    """Move the channels inside attention that are `leaving` to `idxs`, so that one removal takes both.

    `rows` are the tensors that make queries, keys and values, `columns` those that read them. Without this a head would
    take over channels of its neighbour. Queries are rescaled, since attention divides by the root of a head's new size.
    """
    width = columns[0].shape[1]  # type: ignore[union-attr]
    order = torch.empty(width, dtype=torch.int64)
    order[idxs] = torch.tensor(leaving)
    order[_others(idxs, width)] = _others(leaving, width)
    for tensor in filter(torch.is_tensor, rows):
        thirds = tensor.data.unflatten(0, (3, width))[:, order]
        thirds[0] *= math.sqrt(1 - len(idxs) / width)
        tensor.data = thirds.flatten(0, 1)
    for tensor in filter(torch.is_tensor, columns):
        tensor.data = tensor.data[..., order]


def _others(idxs: list[int], width: int) -> Tensor:
    mask = torch.ones(width, dtype=torch.bool)
    mask[idxs] = False
    return mask.nonzero().flatten()


def _repeated(idxs: list[int], times: int, width: int) -> list[int]:
    return [part * width + index for part in range(times) for index in idxs]
