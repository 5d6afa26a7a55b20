"""Which channels leave: torch-pruning's choice among them, held to the number that was asked for."""

from __future__ import annotations

import math
from typing import Any

import torch_pruning as tp
from torch import nn

from pq_sweep.types import UserError


class Nearest(dict[str, float]):
    """The channels of each scope of ranking, changed so that the library keeps the number nearest to the share.

    It multiplies them by the share and drops the decimals, so that any amount would take a channel of every layer.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share
        self.wanted = 0

    def __setitem__(self, scope: str, channels: float) -> None:
        kept = math.ceil(channels * self.share - 0.5)  # half a channel leaves
        self.wanted += int(channels) - kept
        super().__setitem__(scope, (kept + 0.25) / self.share if self.share else 0.0)


class Pruner(tp.pruner.BasePruner):
    """torch-pruning's pruner with a rounding that never gives up and importances that are numbers."""

    def __init__(self, *arguments: Any, shared: dict[nn.Module, str], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.shared, self.kept = shared, dict[str, None]()
        self.channels: dict[nn.Module, int] = {}
        self.nearest = self._scope_initial_channels = Nearest(1 - self.pruning_ratio)

    def removed(self) -> float:
        """Return which share has left of the channels that might have."""
        left = sum(self.DG.get_out_channels(layer) for layer in self.channels)
        return 1 - left / max(1, sum(self.channels.values()))

    def _check_pruning_ratio(self, group: Any) -> bool:
        """Leave out channels that a shared layer reads or writes: they would leave at one of its places alone."""
        shared = {self.shared[part]: None for dep, _ in group if (part := dep.target.module) in self.shared}
        self.kept |= shared
        return not shared and super()._check_pruning_ratio(group)

    def _is_atten_group(self, group: Any) -> Any:
        """Note the group, of which the library asks this before it rounds what leaves."""
        self.parts = self._get_channel_groups(group)
        return super()._is_atten_group(group)

    def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
        """Round what is kept down to a multiple, at least one; `n_pruned` leave each part of a grouped layer.

        The library leaves a layer whole if rounding would leave no channel: with round_to=8, 16 channels would become 8
        at amount .5 and stay 16 at .6. It also takes the channels of one part for those of the whole layer.
        """
        multiple = math.lcm(round_to, self.parts)
        kept = current_channels - n_pruned * self.parts
        return (current_channels - min(current_channels, max(multiple, kept - kept % multiple))) // self.parts

    def estimate_importance(self, group: Any) -> Any:
        """Refuse scores that are no numbers: gradients that are all zero rank nothing, and would silently keep all."""
        name = self.DG._module2name[group[0].dep.target.module]
        try:
            scores = super().estimate_importance(group)
        except Exception as error:
            error.add_note(f"from {name} on")
            raise
        if scores is not None and not scores.isfinite().all():
            raise UserError(
                f"pruner.importance cannot rank the channels of {name}, whose weights or gradients are all zero or not"
                " finite; use trained weights or importance=magnitude."
            )
        if scores is not None:
            self.channels[group[0].dep.target.module] = self.DG.get_out_channels(group[0].dep.target.module)
        return scores
