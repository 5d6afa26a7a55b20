"""`python -m pq_sweep.study layers`: how near a layer's output can stay, quantized and pruned, whatever the algorithm.

Section 4 and appendix F of Kuzmin et al., *Pruning vs Quantization: Which is Better?*, 2023, for any network: a bound
on quantization (`limits`) and exact pruning (`subset`) of slices of layers (`slices`, `gather`), beside what algorithms
reach; sentences (`verdict`), a figure (`charts`), and what is written and shown (`files`).
"""

from __future__ import annotations

from pq_sweep.core.imports import quick_imports
from pq_sweep.job.check import component_problems, refuse
from pq_sweep.study import Case
from pq_sweep.study.layers.options import options_of
from pq_sweep.study.weights import names_of, only, writable
from pq_sweep.sweep.launcher_options import launcher_problems


def run(cases: list[Case]) -> bool:
    """Look at slices of layers of every network that was asked for, and write and show what was found.

    Return False if one of several networks could not be looked at.
    """
    names, options, output = names_of(cases), options_of(cases), only(cases, "output")
    for case in cases:
        refuse(" ".join([*component_problems(case.cfg, ["model", "dataset"]), *launcher_problems(case.launcher)]))
    folder = writable(output)
    with quick_imports("torch"):
        from pq_sweep.study.layers.files import show, write
        from pq_sweep.study.layers.gather import looked_at
    found, failed = looked_at(dict(zip(names, cases, strict=True)), options, folder)
    show(found, failed, write(found, failed, folder))
    return not failed
