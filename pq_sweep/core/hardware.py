"""What hardware accelerates which precision: one table, and a sentence for each thing that a device lacks.

A model runs without such a feature too, but on slower units: its latency then tells about the device, not about the
technique. A second table has what each GPU reaches at most. `docs/hardware.md` shows both, the first for common
devices. Importing this imports no framework.
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
DEQUANTIZED = "ONNX Runtime, operators DequantizeLinear and Conv; measured in docs/performance.md"


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

    @property
    def is_nowhere(self) -> bool:
        """Say whether no device has it."""
        return self.since is None and not self.flags


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
_WEIGHTS = Feature("kernels for integer weights alone", "the file is smaller, time is not: each run dequantizes them",
                   DEQUANTIZED)  # fmt: skip
_ANY_CPU = {"sparse": _NO_SPARSE, "sparse fp32": _NO_SPARSE, "weights": _WEIGHTS}
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
COMPUTED_AS = {"int8_dynamic": "int8", "mixed": "int8", "int4": "weights"}
COMPUTED_AS |= {f"w{bits}": "weights" for bits in range(2, 9)}


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


# --- what a GPU reaches at most ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peaks:
    """The most that NVIDIA states of a product: 10^12 dense operations a second by precision, and GB/s of its memory.

    A multiplication and an addition are two operations, also of INT8. A precision that NVIDIA states nothing of, or
    that the product has no units for, is left out.
    """

    tera: Mapping[str, float]
    gb_per_s: float
    source: str

    def of(self, precision: str) -> float | None:
        """Return the peak of a precision, or of "tf32", which is FP32 where there are no units for TF32."""
        return self.tera.get(precision, self.tera["fp32"] if precision == "tf32" else None)


# Where a source states tensor cores only with 2:4 sparsity, half of it is the dense peak.
HALF_OF_SPARSE = ", halved where stated with sparsity"
V100 = "NVIDIA, V100 data sheet 1165301"
T4 = "NVIDIA, T4 data sheet 951643; its memory: product brief PB-09256"
A100 = "NVIDIA, A100 data sheet 1758950; A100 40 GB: Ampere Architecture In-Depth, table 1"
GA102 = "NVIDIA, Ampere GA102 whitepaper 2.0, table 3 and appendix A"
H100_SXM_NVL = f"NVIDIA, H100 product page and data sheet{HALF_OF_SPARSE}"
H100_PCIE = f"NVIDIA, H100 data sheet of 2022 and 2023{HALF_OF_SPARSE}"
H200 = f"NVIDIA, H200 product page and data sheet{HALF_OF_SPARSE}"
L4 = f"NVIDIA, L4 data sheet{HALF_OF_SPARSE}"
L40 = "NVIDIA, L40 and L40S data sheets"
ADA = "NVIDIA, Ada whitepaper 2.1, appendix A"
RTX_6000_ADA = f"NVIDIA, RTX 6000 Ada Generation data sheet{HALF_OF_SPARSE}; INT8 as FP8, FP16 half, TF32 a quarter"
BLACKWELL = "NVIDIA, RTX Blackwell whitepaper"

PEAK_COLUMNS = ("fp32", "tf32", "fp16", "bf16", "int8")


def _row(source: str, gb_per_s: float, *tera: float | None) -> Peaks:
    stated = zip(PEAK_COLUMNS, tera, strict=True)
    return Peaks({precision: value for precision, value in stated if value is not None}, gb_per_s, source)


# By the name that NVML and torch give, which tells PCIe from SXM and 40 from 80 GB, without the brand before it. On
# GeForce, FP16 is twice as fast with sums in FP16 as in FP32; this is the former, so that no share is too high.
PEAKS: dict[str, Peaks] = {
    "V100-SXM2-16GB": _row(V100, 900, 15.7, None, 125, None, None),
    "V100-SXM2-32GB": _row(V100, 900, 15.7, None, 125, None, None),
    "V100-PCIE-16GB": _row(V100, 900, 14, None, 112, None, None),
    "V100-PCIE-32GB": _row(V100, 900, 14, None, 112, None, None),
    "V100S-PCIE-32GB": _row(V100, 1134, 16.4, None, 130, None, None),
    "T4": _row(T4, 320, 8.1, None, 65, None, 130),
    "A100-SXM4-40GB": _row(A100, 1555, 19.5, 156, 312, 312, 624),
    "A100-PCIE-40GB": _row(A100, 1555, 19.5, 156, 312, 312, 624),
    "A100-SXM4-80GB": _row(A100, 2039, 19.5, 156, 312, 312, 624),
    "A100 80GB PCIe": _row(A100, 1935, 19.5, 156, 312, 312, 624),
    "A10": _row("NVIDIA, A10 data sheet", 600, 31.2, 62.5, 125, 125, 250),
    "A40": _row("NVIDIA, A40 data sheet", 696, 37.4, 74.8, 149.7, 149.7, 299.3),
    "RTX A6000": _row(GA102, 768, 38.7, 77.4, 154.8, 154.8, 309.7),
    "GeForce RTX 3090": _row(GA102, 936, 35.6, 35.6, 142, 71, 284),
    "H100 80GB HBM3": _row(H100_SXM_NVL, 3350, 67, 494.5, 989.5, 989.5, 1979),
    "H100 NVL": _row(H100_SXM_NVL, 3900, 60, 417.5, 835.5, 835.5, 1670.5),
    "H100 PCIe": _row(H100_PCIE, 2000, 51, 378, 756.5, 756.5, 1513),
    "H200": _row(H200, 4800, 67, 494.5, 989.5, 989.5, 1979),
    "H200 NVL": _row(H200, 4800, 60, 417.5, 835.5, 835.5, 1670.5),
    "L4": _row(L4, 300, 30.3, 60, 121, 121, 242.5),
    "L40": _row(L40, 864, 90.5, 90.5, 181.05, 181.05, 362),
    "L40S": _row(L40, 864, 91.6, 183, 362.05, 362.05, 733),
    "RTX 6000 Ada Generation": _row(RTX_6000_ADA, 960, 91.1, 182.1, 364.25, 364.25, 728.5),
    "GeForce RTX 4090": _row(ADA, 1008, 82.6, 82.6, 330.3, 165.2, 660.6),
    "GeForce RTX 5090": _row(BLACKWELL, 1792, 104.8, 104.8, 419, 209.5, 838),
}
BRANDS = ("NVIDIA ", "Tesla ")


def peaks(name: str) -> Peaks | None:
    """Return what NVIDIA states of a GPU of this name; None for a part of a GPU (MIG, vGPU) and any other product."""
    for brand in BRANDS:
        name = name.removeprefix(brand)
    return PEAKS.get(name)
