"""Slices of layers: a bound on every rounding of their weights, and the best weights to keep."""
