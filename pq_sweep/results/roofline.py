"""How much of its GPU a call uses: operations over the peak of their precision, bytes over the memory's bandwidth.

docs/measuring.md says what these shares mean and what they do not.
"""

from __future__ import annotations

from math import prod
from typing import Any

from pq_sweep.core.hardware import Peaks, peaks
from pq_sweep.core.result import Latency, Ran, Result

# Bytes of a weight; of `mixed` it is the least, as some of its layers keep more. Images and logits are FP32 everywhere.
WEIGHT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "mixed": 1, "fp8": 1, "int4": 0.5}
FP32_BYTES = 4


def rates(result: Result, batch_size: int, timed: Latency) -> dict[str, float]:
    """Return what a batch size reaches of its GPU; what is not known is left out, and all of it on a CPU."""
    return _of_peaks(result, batch_size, timed) | _clocks(timed.device_state)


def _of_peaks(result: Result, batch_size: int, timed: Latency) -> dict[str, float]:
    """Return 10^12 operations a second and the shares of what NVIDIA states of the GPU."""
    most, precision = _most(result, timed), products_in(result.session)
    if most is None:
        return {}
    calls_per_s = 1e3 / timed.p50_ms
    operations = 2 * result.network.macs * batch_size * calls_per_s / 1e12
    gb_per_s = least_bytes(result, batch_size) * calls_per_s / 1e9
    found = {"achieved_tflops": operations, "bandwidth_share": gb_per_s / most.gb_per_s}
    peak = most.of(precision) if precision else None
    return found | ({"compute_share": operations / peak} if peak else {})


def least_bytes(result: Result, batch_size: int) -> float:
    """Return the bytes that a call has to move at least: each weight once, images and logits.

    What layers hand over to each other is left out.
    """
    network = result.network
    image = prod(network.input) + network.classes
    return network.weights * WEIGHT_BYTES[result.session.precision] + batch_size * image * FP32_BYTES


def products_in(ran: Ran) -> str | None:
    """Return the precision in which a GPU multiplied, "tf32" included; None if there were several, or nobody knows."""
    several = ran.precision == "mixed" or (ran.details.get("quantizer") or {}).get("excluded_nodes")
    chosen_by_layer = ran.precision == "bf16" and ran.runtime != "torch"  # TensorRT may also stay in FP32
    if several or chosen_by_layer:
        return None
    return "tf32" if ran.precision == "fp32" and ran.details.get("tf32") else ran.precision


def _most(result: Result, timed: Latency) -> Peaks | None:
    """Return the peaks of the GPU; None for a part of one, and where kernels may leave out zeros (2:4)."""
    gpu = result.environment["gpu"] or {}
    divided = timed.device_state.get("mig") or (gpu.get("nvml") or {}).get("mig")
    skips_zeros = result.session.details.get("sparsity")
    return peaks(gpu["name"]) if gpu and not divided and not skips_zeros else None


def _clocks(state: dict[str, Any]) -> dict[str, float]:
    """Return the median clocks of processors and memory over their highest."""
    units = {"clock_share": "sm", "memory_clock_share": "memory"}
    known = {name: (state.get(f"{unit}_mhz"), state.get(f"{unit}_max_mhz")) for name, unit in units.items()}
    return {name: clock["median"] / highest for name, (clock, highest) in known.items() if clock and highest}
