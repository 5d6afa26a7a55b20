"""What a recovery has learned about rounding, on its way to the quantizer that writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from inspect import signature

from hydra.utils import get_method
from omegaconf import DictConfig

from pq_sweep.compress.quantizers import NOTHING_LEARNED
from pq_sweep.core.options import is_ours
from pq_sweep.types import Quantizer, Record, UserError


def learning_problems(cfg: DictConfig) -> Iterator[str]:
    """Check that a quantizer writes what the recovery learns, and that a recovery learns what the quantizer writes.

    Of this package's recoveries, those learn that have an option `bits`; what others learn shows when they end.
    """
    recovery, quantizer = cfg.get("recovery"), cfg.get("quantizer")
    if not all(isinstance(group, DictConfig) and is_ours(group) for group in (recovery, quantizer)):
        return
    learns, takes = "bits" in recovery, _takes(_function(quantizer))
    if takes and not learns:
        yield NOTHING_LEARNED
    if learns and not takes:
        yield _unwritten(str(quantizer._target_))


def taught(quantizer: Quantizer, recovery: Record | None) -> Quantizer:
    """Hand a quantizer what a recovery has learned if it takes that, or refuse one that would round otherwise."""
    function, options = getattr(quantizer, "func", quantizer), getattr(quantizer, "keywords", {})
    learned = (recovery or {}).get("learned")
    if _takes(function):
        return partial(function, **options, learned=learned)
    if learned:
        raise UserError(_unwritten(f"{function.__module__}.{function.__qualname__}"))
    return quantizer


def _function(quantizer: DictConfig) -> Quantizer | None:
    """Return the function of a quantizer, or None if it cannot be found, which other checks tell."""
    with suppress(Exception):  # Hydra wraps whatever importing a module raises
        return get_method(str(quantizer._target_))
    return None


def _takes(function: Quantizer | None) -> bool:
    return function is not None and "learned" in signature(function).parameters


def _unwritten(target: str) -> str:
    return (
        f"the recovery learns how weights are rounded, and the quantizer {target} would round them in its own way; give"
        " quantizer=learned, or recovery=finetune."
    )
