"""Many jobs: the command line, composing and checking the grid, searching, submitting, running each, concluding."""

from pq_sweep.core.former import former_values

__getattr__ = former_values(__name__)
