"""Many jobs: compose and check the grid, search, submit, run one, conclude."""

from pq_sweep.core.former import former_values

__getattr__ = former_values(__name__)
