"""The choice of a runtime that fits a precision and a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pq_sweep.runtimes.eager import Torch
from pq_sweep.runtimes.graph import Precisions
from pq_sweep.runtimes.ort import WEIGHT_ONLY, OnnxRuntime
from pq_sweep.runtimes.tensorrt import TensorRT
from pq_sweep.types import Runtime


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Torch for a model that is not quantized to integers or FP16, else TensorRT on CUDA, else ONNX Runtime."""

    torch: Torch
    onnxruntime: OnnxRuntime
    tensorrt: TensorRT

    precisions: ClassVar[Precisions] = {
        "cpu": ("fp32", "fp16", "bf16", "int8", "int8_dynamic", "mixed", "fp8", "int4", *WEIGHT_ONLY),
        "cuda": ("fp32", "fp16", "bf16", "int8", "mixed"),
    }

    def resolve(self, precision: str, device: str) -> Runtime:
        """Return the runtime that fits."""
        if precision in ("fp32", "bf16"):
            return self.torch.resolve(precision, device)
        return (self.tensorrt if device.startswith("cuda") else self.onnxruntime).resolve(precision, device)
