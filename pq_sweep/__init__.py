"""Prune, quantize and measure vision models, one Hydra job per combination."""

from pq_sweep.core import former

__version__ = "0.1.0"

former.install()
