"""Values that options of components may have, for checks that do not load the components."""

from __future__ import annotations

CALIBRATIONS = ("minmax", "entropy", "percentile")

KEPT_PRECISIONS = ("fp32", "fp16")

# Those that TensorRT takes: "Working with Quantized Types", quantization schemes.
INT4_BLOCKS = (64, 128)

IMPORTANCES = ("random", "magnitude", "taylor", "sensitivity", "bn_scale", "lamp")

OPTIMIZERS = ("adamw", "adam", "sgd")

AUGMENTATIONS = ("flip", "shift")

ROUNDINGS = ("nearest", "optimal")
