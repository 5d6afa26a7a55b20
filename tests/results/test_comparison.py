"""How much faster a job is than the uncompressed model, how sure that is, and when its preparation is earned back."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pq_sweep.results.comparison import Estimate, drop, payback, speedup

DEVICE = {"gpu_uuid": "GPU-1", "device_name": "A100", "host": "a1"}


def row(p50_ms: float, half: float | None = None, *, prep_s: float = 0.0, **more: Any) -> dict[str, Any]:
    """Return a job with a median at batch 8 and, with `half`, its interval to both sides."""
    found = {"latency_ms/b8": p50_ms, "prep_time_s": prep_s, **DEVICE, **more}
    ends = {"latency_ci95_low_ms/b8": p50_ms - half, "latency_ci95_high_ms/b8": p50_ms + half} if half else {}
    return found | ends


def test_the_interval_of_a_speed_up_holds_the_ends_of_both_medians() -> None:
    assert speedup(row(4, 0.5), row(8, 1), 8) == Estimate(2.0, (7 / 4.5, 9 / 3.5))


def test_without_an_interval_of_each_there_is_none_of_the_ratio() -> None:
    assert speedup(row(4), row(8, 1), 8) == Estimate(2.0)


def test_a_ratio_of_pairs_comes_first_and_needs_no_other_job() -> None:
    pairs = {"speedup/b8": 1.7, "speedup_ci95_low/b8": 1.6, "speedup_ci95_high/b8": 1.8}

    assert speedup(row(4, **pairs), row(8), 8) == Estimate(1.7, (1.6, 1.8))
    assert speedup(row(4, **pairs), None, 8) == Estimate(1.7, (1.6, 1.8))


@pytest.mark.parametrize("other", [None, {**row(8), "gpu_uuid": "GPU-2"}, {**DEVICE}])
def test_a_speed_up_needs_the_same_device_and_both_latencies(other: dict[str, Any] | None) -> None:
    assert speedup(row(4), other, 8) is None
    assert payback(row(4), other, 8) is None


def test_a_drop_has_the_interval_of_its_pairs() -> None:
    ends = {"accuracy_drop_ci95_low_points": 0.1, "accuracy_drop_ci95_high_points": 0.9}

    assert drop({"accuracy_drop_points": 0.5, **ends}) == Estimate(0.5, (0.1, 0.9))
    assert drop({"accuracy_drop_points": 0.5}) == Estimate(0.5)


@pytest.mark.parametrize(
    ("own", "other", "images"),
    [
        # 4 ms less for each 8 images: 0.5 ms an image.
        (row(4, prep_s=40), row(8, prep_s=10), 80_000),
        (row(8, prep_s=40), row(4, prep_s=10), math.inf),
        (row(4, prep_s=40), row(4), math.inf),
        (row(4, prep_s=40, **{"speedup/b8": 2.0}), None, 80_000),
    ],
)
def test_preparation_is_earned_back_after_so_many_images(
    own: dict[str, Any], other: dict[str, Any] | None, images: float
) -> None:
    assert payback(own, other, 8) == pytest.approx(images)
