"""What job folders say: read, watch, compare, decide, draw."""

from pq_sweep.core.former import former_values

__getattr__ = former_values(__name__)
