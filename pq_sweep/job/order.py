"""What comes first, pruning or quantizing, and what can be in that order."""

from __future__ import annotations

from collections.abc import Iterator

from omegaconf import DictConfig

from pq_sweep.core.groups import ORDERS
from pq_sweep.core.options import is_ours


def quantizes_first(cfg: DictConfig) -> bool:
    """Say whether a job prunes the weights of the quantized graph."""
    return cfg.get("order") == "quantize_first"


def order_problems(cfg: DictConfig) -> Iterator[str]:
    """Check what comes first, and that the other steps can come in that order."""
    if (order := cfg.get("order", ORDERS[0])) not in ORDERS:
        yield f"order={order} is not known; valid are: {', '.join(ORDERS)}."
    if not quantizes_first(cfg):
        return
    if str(cfg.pruner._target_).startswith("pq_sweep.compress.removal."):
        yield (
            "order=quantize_first cannot take channels out, as pruner=remove does: the quantized graph has its shapes"
            " already; give order=prune_first, or a pruner that sets zeros, such as pruner=l1_global."
        )
    if is_ours(cfg.pruner) and "epochs" in cfg.pruner:
        yield (
            "order=quantize_first cannot train, as this pruner does: the quantized graph has no gradients; give"
            " order=prune_first, or a pruner that only sets zeros, such as pruner=l1_global."
        )
    if is_ours(cfg.pruner) and "images" in cfg.pruner:
        yield (
            "order=quantize_first cannot fit weights to images, as this pruner does: in the quantized graph it can only"
            " set zeros; give order=prune_first, or a pruner that only sets zeros, such as pruner=l1."
        )
    if is_ours(cfg.recovery) and not str(cfg.recovery._target_).endswith(".none"):
        yield (
            "order=quantize_first leaves nothing to recover, as a recovery trains the network before it is quantized;"
            " give recovery=none, or order=prune_first."
        )
    if cfg.recovery.get("probe") is True:
        yield (
            "recovery.probe=true looks at the network, of which order=quantize_first compresses the graph alone; give"
            " recovery.probe=false, or order=prune_first."
        )
    if cfg.pruner.get("every_weight") is True and is_ours(cfg.pruner):
        yield (
            "pruner.every_weight=true cannot be with order=quantize_first, as only weights of matrix operators are"
            " quantized; leave it out, or give order=prune_first."
        )
