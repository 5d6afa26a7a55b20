"""Everything that is made from job folders: rows, tables, comparisons, recommendations, reports, and watching."""

from pq_sweep.core.former import former_values

__getattr__ = former_values(__name__)
