"""How sure a difference in accuracy is when two models answer the same images, so that their answers are pairs.

The intervals of the two accuracies say little here: most images are easy for both models, and only the images that one
model alone gets right tell the two apart.
"""

from __future__ import annotations

import math

Z95 = 1.959963984540054


def drop_interval(only_before: int, only_after: int, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of how much accuracy was lost, as a share; negative is a gain.

    Of `samples` images, `only_before` were right before and wrong after, `only_after` the other way round. This is
    Tango's score interval for the difference of two paired proportions (Statistics in Medicine 17, 1998). It holds for
    few images too, and if there are no images of either kind.
    """
    from scipy.optimize import brentq

    drop = (only_before - only_after) / samples

    def above(share: float) -> float:
        return _score(share, only_before, only_after, samples) - Z95

    def below(share: float) -> float:
        return _score(share, only_before, only_after, samples) + Z95

    low = brentq(above, -1 + 1e-12, drop) if drop > -1 else -1.0
    high = brentq(below, drop, 1 - 1e-12) if drop < 1 else 1.0
    return float(low), float(high)


def _score(drop: float, only_before: int, only_after: int, samples: int) -> float:
    """Return how many standard errors the counts are from a true drop, at the likeliest share of `only_after`."""
    linear = (2 * samples - only_before + only_after) * drop - only_before - only_after
    constant = -only_after * drop * (1 - drop)
    share = (math.sqrt(max(linear * linear - 8 * samples * constant, 0.0)) - linear) / (4 * samples)
    variance = samples * (2 * share + drop * (1 - drop))
    away = only_before - only_after - samples * drop
    return away / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, away) if away else 0.0


def mcnemar(only_before: int, only_after: int) -> float:
    """Return how likely a difference at least this large is if both models are equally good: McNemar's exact test."""
    from scipy.special import bdtr

    return min(1.0, 2 * float(bdtr(min(only_before, only_after), only_before + only_after, 0.5)))
