"""Tell which precisions each runtime runs on each device, from what works here and from the hardware table."""

from __future__ import annotations

from pq_sweep.core import hardware
from pq_sweep.core.hardware import Cpu, Gpu, capability, missing
from pq_sweep.doctor import Facts, Section
from pq_sweep.doctor.judge import gpus_of, misfit
from pq_sweep.runtimes import OnnxRuntime, TensorRT, TensorRTNative, TensorRTRTX, Torch
from pq_sweep.runtimes.engines import NEEDED
from pq_sweep.runtimes.ort import CPU, CUDA, TENSORRT
from pq_sweep.runtimes.rtx import RUNS_ON

Realiser = type[Torch | OnnxRuntime | TensorRT | TensorRTNative]


def judge_precisions(machine: Facts) -> Section:
    """Tell which precisions run where, and which of them the hardware does not accelerate."""
    cpu = _on_cpu(machine)
    details = {f"cpu ({machine['cpu']['name']})": cpu}
    alike: dict[str, list[str]] = {}
    for index, gpu in enumerate(gpus_of(machine)):
        state = ", does not work" if gpu.get("error") else ""
        alike.setdefault(f"({gpu['name']}, {gpu['compute_capability']}{state})", []).append(str(index))
    for about, indices in alike.items():
        gpu = gpus_of(machine)[int(indices[0])]
        details[f"cuda:{','.join(indices)} {about}"] = _on_gpu(machine, gpu)
    remedies = [] if cpu["torch"] else ["nothing runs without torch; mend that first."]
    return Section("precisions", "problem" if remedies else "ok", details, remedies)


def _on_cpu(machine: Facts) -> Facts:
    found = machine["cpu"]
    cpu = Cpu(found["name"], frozenset(found["instruction_sets"]), found["architecture"])
    return {
        "torch": _marked(Torch, cpu) if "version" in machine["torch"] else [],
        "onnxruntime": _marked(OnnxRuntime, cpu) if _runs_here(machine, CPU) else [],
    }


def _on_gpu(machine: Facts, found: Facts) -> Facts:
    """Tell the precisions on a GPU; every runtime needs torch to work on it. Providers were tried on the first GPU."""
    gpu = Gpu(found["name"], capability(found["compute_capability"]))
    usable = found.get("error") == ""  # GPUs that only the driver reports, and not torch, have no "error"
    features = [feature for feature in hardware.GPU.values() if feature.since]
    return {
        "torch": _marked(Torch, gpu) if usable else [],
        "onnxruntime": _marked(OnnxRuntime, gpu) if usable and _runs_here(machine, CUDA) else [],
        "tensorrt": _built(TensorRT, gpu) if usable and _runs_here(machine, TENSORRT) else [],
        "tensorrt_native": _built(TensorRTNative, gpu) if usable and _fits(machine, gpu) else [],
        "tensorrt_rtx": _built(TensorRTRTX, gpu) if usable and _runs_rtx(machine, gpu) else [],
        "hardware has": [feature.name for feature in features if gpu.has(feature)],
        "hardware lacks": [feature.name for feature in features if not gpu.has(feature)],
    }


def _runs_here(machine: Facts, provider: str) -> bool:
    return machine["onnxruntime"].get("providers", {}).get(provider) == ""


def _fits(machine: Facts, gpu: Gpu) -> bool:
    version = machine["tensorrt"].get("version")
    return version is not None and misfit(version, [gpu.capability]) is None


def _runs_rtx(machine: Facts, gpu: Gpu) -> bool:
    return machine["tensorrt_rtx"].get("version") is not None and gpu.capability in RUNS_ON


def _built(runtime: Realiser, gpu: Gpu) -> list[str]:
    """Name the precisions of an engine, without those that are refused on a GPU."""
    refused = {name for name, (least, _) in NEEDED.items() if gpu.capability < least}
    return [text for text in _marked(runtime, gpu) if text.partition(" ")[0] not in refused]


def _marked(runtime: Realiser, device: Gpu | Cpu) -> list[str]:
    """Name a runtime's precisions, each with the hardware feature that it lacks to be fast.

    Those that lack what no device has are named together.
    """
    lacking = {name: missing(name, device)[:1] for name in runtime.precisions[device.kind]}
    nowhere = {name: features for name, features in lacking.items() if features and features[0].is_nowhere}
    found = [f"{name} (no {features[0].name})" if features else name
             for name, features in lacking.items() if name not in nowhere]  # fmt: skip
    return found + ([f"{', '.join(nowhere)} (no {next(iter(nowhere.values()))[0].name})"] if nowhere else [])
