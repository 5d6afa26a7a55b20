"""What hardware accelerates which precision: one table, and a sentence for each thing that a device lacks.

A model runs without such a feature too, but on slower units: its latency then tells about the device, not about the
technique. `docs/hardware.md` shows the table for common devices. Importing this imports no framework.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

Capability = tuple[int, int]

# NVML's compute modes, in its order: any number of processes, one thread, none, or one process may use a GPU at a time.
COMPUTE_MODES = ("default", "exclusive_thread", "prohibited", "exclusive_process")

CPUINFO = Path("/proc/cpuinfo")

WMMA = "NVIDIA, PTX ISA 9, wmma.mma, target ISA notes; TensorRT 10 support matrix, hardware and precision"
MMA_SP = "NVIDIA, PTX ISA 9, mma.sp, target ISA notes"
QUANTIZATION = "ONNX Runtime, Quantize ONNX models, FAQ; its mlas/lib/platform.cpp"
HALF = "ONNX Runtime, mlas/lib/halfgemm.cpp: FP16 kernels on ARM alone"
ONEDNN = "oneDNN, Developer Guide, Data Types, hardware limitations"
HWCAPS = "Linux, ARM64 ELF hwcaps"


@dataclass(frozen=True)
class Feature:
    """A feature that makes something fast: its name, as in "has no ...", what happens without it, and the source.

    A GPU has it from compute capability `since` on, a CPU if it has one of the `flags`. If neither is given, no device
    has it.
    """

    name: str
    without: str
    source: str
    since: Capability | None = None
    flags: frozenset[str] = frozenset()


DENSE = "2:4 sparse weights run as dense ones"

# The keys are precisions, and "tf32" and "sparse", which are options beside a precision.
GPU: dict[str, Feature] = {
    "fp16": Feature("FP16 tensor cores", "FP16 runs on CUDA cores and may be slower than FP32", WMMA, (7, 0)),
    # 7.2 is Jetson Xavier, 7.5 Turing; V100 (7.0) has only DP4A, on CUDA cores.
    "int8": Feature("INT8 tensor cores", "INT8 runs on CUDA cores and may be slower than FP16", WMMA, (7, 2)),
    "bf16": Feature("BF16 tensor cores", "BF16 is computed in FP32 and may be slower than FP32", WMMA, (8, 0)),
    "tf32": Feature("TF32 tensor cores", "FP32 runs on CUDA cores, as without TF32", WMMA, (8, 0)),
    "sparse": Feature("2:4 sparse tensor cores", DENSE, MMA_SP, (8, 0)),
    "sparse fp32": Feature("sparse tensor cores for FP32 without TF32", DENSE, MMA_SP),
    "fp8": Feature("FP8 tensor cores", "FP8 does not run", MMA_SP, (8, 9)),
}
_NO_SPARSE = Feature("2:4 sparse matrix units", DENSE, MMA_SP)
_ANY_CPU = {"sparse": _NO_SPARSE, "sparse fp32": _NO_SPARSE}
CPU: dict[str, dict[str, Feature]] = {
    "x86_64": _ANY_CPU
    | {
        "int8": Feature("VNNI", "INT8 may be slower than FP32", QUANTIZATION,
                        flags=frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})),
        "bf16": Feature("BF16 instructions", "BF16 is computed in FP32 and may be slower than FP32", ONEDNN,
                        flags=frozenset({"avx512_bf16", "amx_bf16"})),
        "fp16": Feature("FP16 instructions", "FP16 is computed in FP32 and may be slower than FP32", ONEDNN,
                        flags=frozenset({"avx512_fp16"})),
    },
    "aarch64": _ANY_CPU
    | {
        "int8": Feature("dot product instructions", "INT8 may be slower than FP32", QUANTIZATION,
                        flags=frozenset({"asimddp", "i8mm"})),
        "bf16": Feature("BF16 instructions", "BF16 is computed in FP32 and may be slower than FP32", HWCAPS,
                        flags=frozenset({"bf16"})),
        "fp16": Feature("FP16 instructions", "FP16 is computed in FP32 and may be slower than FP32", HALF,
                        flags=frozenset({"asimdhp"})),
    },
}  # fmt: skip
COMPUTED_AS = {"int8_dynamic": "int8", "mixed": "int8"}


@dataclass(frozen=True)
class Gpu:
    """A CUDA device: its product name and compute capability."""

    name: str
    capability: Capability

    kind: ClassVar[str] = "cuda"

    def __str__(self) -> str:
        return "{} (compute capability {}.{})".format(self.name, *self.capability)

    @property
    def features(self) -> Mapping[str, Feature]:
        """What a GPU may have."""
        return GPU

    def has(self, feature: Feature) -> bool:
        """Say whether it has a feature."""
        return feature.since is not None and self.capability >= feature.since


@dataclass(frozen=True)
class Cpu:
    """A CPU: its product name, the flags of /proc/cpuinfo, and its architecture; only those in `CPU` are judged."""

    name: str
    flags: frozenset[str]
    architecture: str = field(default_factory=platform.machine)

    kind: ClassVar[str] = "cpu"

    def __str__(self) -> str:
        return self.name

    @property
    def features(self) -> Mapping[str, Feature]:
        """What a CPU of its architecture may have."""
        return CPU.get(self.architecture, {})

    def has(self, feature: Feature) -> bool:
        """Say whether it has a feature."""
        return not self.flags.isdisjoint(feature.flags)


def capability(text: str) -> Capability:
    """Read "7.0" as (7, 0)."""
    major, minor = text.split(".")
    return int(major), int(minor)


def processors(path: Path = CPUINFO) -> list[dict[str, str]]:
    """Return what /proc/cpuinfo says of each processor; nothing on a system without it."""
    blocks = path.read_text().split("\n\n") if path.exists() else []
    lines = ([line.partition(":") for line in block.splitlines()] for block in blocks if block.strip())
    return [{key.strip(): value.strip() for key, _, value in block} for block in lines]


def cpu_name() -> str:
    """Return the product name of the CPU."""
    names = [processor["model name"] for processor in processors() if "model name" in processor]
    return names[0] if names else platform.processor() or platform.machine()


def cpu_flags(path: Path = CPUINFO) -> frozenset[str]:
    """Return what the first processor can do: on x86 the line `flags`, on ARM `Features`."""
    lists = (one[key] for one in processors(path) for key in ("flags", "Features") if key in one)
    return frozenset(next(lists, "").split())


def multiplies_bytes(flags: frozenset[str]) -> bool:
    """Say whether a CPU adds products of bytes without saturating; x86 needs VNNI or AMX, others are assumed to."""
    return platform.machine() != "x86_64" or not flags.isdisjoint(CPU["x86_64"]["int8"].flags)


def missing(precision: str, device: Gpu | Cpu, *, sparse: bool = False, tf32: bool = False) -> list[Feature]:
    """Return the missing features that would make a precision fast, skip 2:4 zeros or run FP32 as TF32.

    Sparse tensor cores take every precision except FP32 without TF32.
    """
    sparse_key = "sparse fp32" if precision == "fp32" and not tf32 else "sparse"
    wanted = [COMPUTED_AS.get(precision, precision)] + ["tf32"] * tf32 + [sparse_key] * sparse
    known = [device.features[key] for key in wanted if key in device.features]
    return [feature for feature in known if not device.has(feature)]


def lacks(precision: str, device: Gpu | Cpu, *, sparse: bool = False, tf32: bool = False) -> list[str]:
    """Return one sentence for each thing asked for that the device does not accelerate."""
    lacking = missing(precision, device, sparse=sparse, tf32=tf32)
    return [f"{device} has no {feature.name}: {feature.without}." for feature in lacking]
