"""Prune, quantize and measure vision models, one Hydra job per combination."""

__version__ = "0.1.0"
