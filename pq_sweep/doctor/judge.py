"""Judge each section from what was found, which is plain data: a verdict, what to show, and remedies as sentences."""

from __future__ import annotations

import re

from pq_sweep.core.hardware import Capability, capability
from pq_sweep.doctor import Facts, Section
from pq_sweep.doctor.accelerators import NO_TENSORRT
from pq_sweep.runtimes.ort import CPU, CUDA
from pq_sweep.runtimes.rtx import INSTALL, RUNS_ON

LEAST_FREE_GB = 1.0
SHOWN = 12  # partitions of a cluster
V100: Capability = (7, 0)
TENSORRT_MAJOR, TENSORRT_WITHOUT_V100 = 10, (10, 5)
CUDA_OF_GPU_EXTRA = 13


def judge_python(machine: Facts) -> Section:
    """Judge whether the packages are the ones that pq_sweep requires."""
    found = machine["python"]
    remedies = [f"pq_sweep needs {wanted}; run pip install again." for wanted in found["unmet"]]
    details = {key: value for key, value in found.items() if key != "unmet"}
    return Section("python", "problem" if remedies else "ok", details, remedies)


def judge_cpu(machine: Facts) -> Section:
    """Judge whether threads would be throttled, which disturbs latency."""
    found = machine["cpu"]
    quota, cores = found["cgroup_cpus"], found["cores_usable"]
    remedies = []
    if quota is not None and quota < cores:
        threads = max(1, int(quota))
        remedies = [f"the cgroup gives {quota} CPUs' time to {cores} cores; set measure.threads={threads}."]
    return Section("cpu", "ok", found | {"cgroup_cpus": quota or "no limit"}, remedies)


def judge_gpu(machine: Facts) -> Section:
    """Judge the driver's GPUs."""
    found = machine["gpu"]
    gpus = {f"gpu {index}": gpu for index, gpu in enumerate(found["gpus"])}
    details = {key: value for key, value in found.items() if key != "gpus"} | gpus
    if "pynvml" in found.get("nvml", ""):
        return Section("gpu", "not here", details, ["to see the driver and its GPUs, pip install nvidia-ml-py."])
    remedies = [
        f"{name} is in MIG mode: what is measured is a slice of it, so compare it with slices of the same size alone."
        for name, gpu in gpus.items()
        if gpu["mig"]
    ]
    remedies += [
        f"{name} lets one process in at a time (compute mode EXCLUSIVE_PROCESS), so measure=rigorous fails, and so do"
        " jobs side by side; set it to DEFAULT (nvidia-smi -c 0)."
        for name, gpu in gpus.items()
        if gpu.get("compute_mode") == "exclusive_process"
    ]
    return Section("gpu", "ok" if gpus else "not here", details, remedies)


def judge_torch(machine: Facts) -> Section:
    """Judge whether torch runs on the GPUs that are here."""
    found = machine["torch"]
    devices = {f"cuda:{index}": device for index, device in enumerate(found["devices"])}
    remedies = [sentence for name, device in devices.items() if (sentence := _device_remedy(name, device, found))]
    if not devices and gpus_of(machine):
        remedies = [_blind_torch(found)]
    shown = {
        "version": found["version"],
        "cuda": found["cuda"] or "none in this build",
        "cudnn": found["cudnn"],
        "architectures": found["architectures"],
        "CUDA_VISIBLE_DEVICES": found["visible"],
    }
    shown |= devices or {"devices": found["error"] or "none"}
    return Section("torch", "problem" if remedies else "ok", shown, remedies)


def _blind_torch(found: Facts) -> str:
    if found["cuda"] is None:
        return f"torch {found['version']} was built without CUDA; install torch and torchvision from PyPI."
    why = found["error"].rstrip(".") or "it gives no reason"
    how = f"update the driver to one for CUDA {found['cuda']}, or use the older CUDA of environment.yml"
    return f"torch {found['version']} finds no GPU ({why}); {how}."


def _device_remedy(name: str, device: Facts, torch: Facts) -> str | None:
    """Say what to do about a device of torch that does not work, or None if it does."""
    found, built = capability(device["compute_capability"]), torch["architectures"]
    about = f"torch {torch['version']} on {name} ({device['name']}, sm_{found[0]}{found[1]})"
    if not built or has_kernels(found, built):
        return f"{about} fails: {device['error'].rstrip('.')}; see nvidia-smi." if device["error"] else None
    if found < V100:
        return f"{about} has no kernels, nor has any version that pq_sweep can use; use device=cpu."
    older = found < min(_built_for(name) for name in built)
    how = "use environment.yml, with torch 2.10, the last for V100" if older else "install a newer torch"
    return f"{about} has no kernels, only {', '.join(built)}; {how}."


def has_kernels(found: Capability, architectures: list[str]) -> bool:
    """Say whether code compiled for `architectures` (torch.cuda.get_arch_list) runs on a compute capability.

    Binaries (sm) run within their major version, from their minor version on; PTX (compute) also runs on everything
    newer. An "a" at the end ties either to one capability, an "f" to its major version (CUDA programming guide).
    """
    return any(_runs(found, name) for name in architectures)


def _runs(found: Capability, name: str) -> bool:
    built = _built_for(name)
    if name.endswith("a"):
        return built == found
    anywhere = name.startswith("compute_") and not name.endswith("f")
    return built <= found and (anywhere or built[0] == found[0])


def _built_for(name: str) -> Capability:
    """Read sm_120a as (12, 0)."""
    digits = "".join(re.findall(r"\d", name))
    return int(digits[:-1]), int(digits[-1])


def judge_onnxruntime(machine: Facts) -> Section:
    """Judge the providers: all have to run where there is a GPU; without one, only the CPU's has to."""
    found, gpu, how = machine["onnxruntime"], bool(gpus_of(machine)), right_versions(machine)
    packages, providers = found["packages"], found["providers"]
    if not providers and not packages:
        return Section("onnxruntime", "not here", {"packages": "none"}, [f"for ONNX Runtime {how}."])
    failed = {name: error for name, error in providers.items() if error and error != NO_TENSORRT}
    broken = {name: error for name, error in failed.items() if gpu or name == CPU}
    problems = [f"{name} does not run ({error.rstrip('.')}); {_library(error)}{how}." for name, error in broken.items()]
    if len(packages) > 1:
        names = " ".join(packages)
        problems.append(f"{' and '.join(packages)} overwrite each other; pip uninstall {names}, then {how}.")
    advice = [f"this package has no {CUDA}; {how}."] if gpu and CUDA not in providers else []
    shown = {"version": found["version"], "packages": packages}
    shown |= {name: error or "runs" for name, error in providers.items()}
    return Section("onnxruntime", "problem" if problems else "ok", shown, problems + advice)


def _library(error: str) -> str:
    """Say what to do about a library that was not found, or nothing if that is not the error."""
    missing = re.match(r"(lib\S+): cannot open shared object file", error)
    return f"install what {missing[1]} belongs to and put its folder on LD_LIBRARY_PATH, or " if missing else ""


def judge_tensorrt(machine: Facts) -> Section:
    """Judge whether the version fits the GPUs and the libraries that ONNX Runtime links."""
    version, how = machine["tensorrt"]["version"], right_versions(machine)
    if version is None:
        advice = [f"for runtime=tensorrt {how}."] if gpus_of(machine) else []
        return Section("tensorrt", "not here", {"version": "none"}, advice)
    why = misfit(version, capabilities(machine))
    remedies = [f"{why}; {how}."] if why else []
    return Section("tensorrt", "problem" if remedies else "ok", {"version": version}, remedies)


def judge_tensorrt_rtx(machine: Facts) -> Section:
    """Judge whether TensorRT-RTX builds, and say on which of the GPUs its engines run."""
    found = machine["tensorrt_rtx"]
    fitting = [str(index) for index, gpu in enumerate(capabilities(machine)) if gpu in RUNS_ON]
    if found["version"] is None:
        advice = [f"for runtime=tensorrt_rtx {INSTALL}."] if fitting else []
        return Section("tensorrt_rtx", "not here", {"version": "none"}, advice)
    runs = f"builds, and runs on cuda:{','.join(fitting)}" if fitting else "builds (runtime.build_only=true), not run"
    return Section("tensorrt_rtx", "ok", found | {"can": runs}, [])


def misfit(version: str, found: list[Capability]) -> str | None:
    """Say why a version of TensorRT does not work with GPUs of these compute capabilities, or None if it does."""
    number = tuple(map(int, re.findall(r"\d+", version)[:2]))
    if number[0] != TENSORRT_MAJOR:
        return f"TensorRT {version} is not what ONNX Runtime links (libnvinfer.so.{TENSORRT_MAJOR})"
    if number >= TENSORRT_WITHOUT_V100 and V100 in found:
        return f"TensorRT {version} does not support V100, 10.4 is the last that does"
    return None


def judge_disk(machine: Facts) -> Section:
    """Judge whether jobs can write and lock files, and whether there is room for them."""
    remedies = []
    for name, folder in machine["disk"].items():
        if folder.get("error"):
            where = "start elsewhere" if name == "working folder" else "set PQ_SWEEP_CACHE to another folder"
            remedies.append(f"files cannot be written and locked in the {name} ({folder['error']}); {where}.")
        elif folder.get("free_gb", LEAST_FREE_GB) < LEAST_FREE_GB:
            remedies.append(f"the file system of the {name} has {folder['free_gb']} GB free; make room.")
    return Section("disk", "problem" if remedies else "ok", machine["disk"], remedies)


def judge_slurm(machine: Facts) -> Section:
    """Judge whether SLURM answers, and can tell how its jobs ended."""
    found = machine["slurm"]
    if not found["tools"]:
        return Section("slurm", "not here", found, [])
    details = found | {"accounting": found["accounting"] or "answers", "partitions": found["partitions"][:SHOWN]}
    if found["error"]:
        remedy = f"sinfo does not answer ({found['error'].rstrip('.')}); ask on a login node, or set SLURM_CONF."
        return Section("slurm", "problem", details, [remedy])
    advice = "without accounting SLURM forgets within minutes how a job ended; watch sweeps while they run."
    return Section("slurm", "ok", details, [advice] if found["accounting"] else [])


def judge_tracking(machine: Facts) -> Section:
    """Judge whether the store answers, and whether SQLite is safe on its file system."""
    found = machine["tracking"]
    remedies = []
    if found["error"]:
        how = "start it, set MLFLOW_TRACKING_URI to another, or give tracking=none"
        remedies = [f"the store does not answer ({found['error'].rstrip('.')}); {how}."]
    elif found["network"]:
        remedies = [f"SQLite on {found['network']} breaks when several nodes write to it; see docs/cluster.md."]
    return Section("tracking", "problem" if found["error"] else "ok", found, remedies)


def gpus_of(machine: Facts) -> list[Facts]:
    """Return the GPUs that torch finds, else those of the driver, unless the user hides them."""
    hidden = machine["torch"].get("visible") in ("", "-1")
    return machine["torch"].get("devices") or ([] if hidden else machine["gpu"].get("gpus", []))


def capabilities(machine: Facts) -> list[Capability]:
    """Return the compute capabilities of the GPUs that are here."""
    return [capability(gpu["compute_capability"]) for gpu in gpus_of(machine)]


def right_versions(machine: Facts) -> str:
    """Say how to install the versions that fit the GPUs and the driver of this machine."""
    found, newest_cuda = capabilities(machine), machine["gpu"].get("newest_cuda")
    if not found:
        return "pip install '.[cpu]'"
    too_old = newest_cuda is not None and capability(newest_cuda)[0] < CUDA_OF_GPU_EXTRA
    if V100 in found or too_old:
        return "use the versions of environment.yml"
    return "use the versions of environment-cu13.yml (pip install '.[gpu]')"
