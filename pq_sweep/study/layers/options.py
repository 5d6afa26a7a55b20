"""What the study of layers is asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """What is looked at of each network, and how long; see conf/study_layers.yaml."""

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    images: int
    inputs: int
    slices: int
    rows: int
    samples: int
    limit_s: float
