"""Say what this machine can run, and how to mend what it cannot: `python -m pq_sweep.doctor`, for bug reports too.

First everything is looked at, side by side; what loads drivers or native libraries does so in a process of its own, as
it may crash or hang. Then each section is judged from what was found, which is plain data.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, requires
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, cast

from pq_sweep.environment import cache_home, device_name, git_state, slurm, versions, without_password
from pq_sweep.runtimes import OnnxRuntime, TensorRT, Torch
from pq_sweep.stores import Store, bounded, reason, shared_file_system
from pq_sweep.types import Stage, Workspace

if TYPE_CHECKING:
    import onnx
    from rich.console import Console

Facts = dict[str, Any]
Capability = tuple[int, int]
Verdict = Literal["ok", "problem", "not here"]

CHILD_S = 90.0  # for a process that imports torch or TensorRT from a slow file system
UNKILLABLE_S = 5.0  # more than that for one that the kernel does not let go
LOOK_S = 4 * CHILD_S  # for all that one section looks at and waits for
SLURM_S = 8.0  # for an answer of the controller, or of the accounting
LEAST_FREE_GB = 1.0
WIDTH = 118  # of a report that is not read in a terminal
SHOWN = 12  # partitions of a cluster

HERE = "pq_sweep.doctor"
SERVE = "import sys; from pq_sweep.doctor import serve; serve(*sys.argv[1:])"
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
CGROUPS = Path("/sys/fs/cgroup")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
# What makes precisions fast: on a CPU, instruction sets of which one is enough; on a GPU, from which compute capability
# on (NVIDIA's matrix of tensor core precisions; 7.0 is V100, 8.0 is A100).
CPU_HARDWARE = {
    "BF16 instructions": {"avx512_bf16", "amx_bf16"},
    "VNNI": {"avx512_vnni", "avx_vnni", "amx_int8"},
}
HARDWARE: dict[str, Capability] = {
    "FP16 tensor cores": (7, 0),
    "INT8 tensor cores": (7, 2),
    "BF16 tensor cores": (8, 0),
    "TF32 tensor cores": (8, 0),
    "2:4 sparsity": (8, 0),
    "FP8 tensor cores": (8, 9),
}
INT8 = ("int8", "int8_dynamic", "mixed")
NEEDS = {
    "cpu": {"bf16": "BF16 instructions", **dict.fromkeys(INT8, "VNNI")},
    "cuda": {"fp16": "FP16 tensor cores", "bf16": "BF16 tensor cores", **dict.fromkeys(INT8, "INT8 tensor cores")},
}
V100: Capability = (7, 0)
TENSORRT_WITHOUT_V100, TENSORRT_UNSUPPORTED = (10, 5), (11, 0)
NO_TENSORRT = "TensorRT is not installed"
FAILED = {
    "gpu": "restart the machine after an update of the driver, or install the driver again",
    "torch": "install torch and torchvision again, from PyPI",
    "onnxruntime": "uninstall every package of it, then {how}",
    "tensorrt": "uninstall it, then {how}",
}
MARKS = {"ok": ("✓", "green"), "problem": ("✗", "red"), "not here": ("-", "dim")}
ALONE = Lock()


class ChildError(RuntimeError):
    """A process of its own failed, crashed or did not answer; the message says which, `stderr` is what it printed."""

    def __init__(self, message: str, stderr: str = "") -> None:
        super().__init__(message)
        self.stderr = stderr


@dataclass(frozen=True)
class Section:
    """What was found of one part of the machine; remedies are sentences, the more so for a problem."""

    name: str
    verdict: Verdict
    details: Facts
    remedies: list[str]


# --- looking ----------------------------------------------------------------------------------------------------------


def in_child(module: str, function: str, *arguments: str) -> Any:
    """Return what a function returns in a process of its own, as JSON has it; a ChildError says why there is none."""
    command = [sys.executable, "-c", SERVE, module, function, *arguments]
    run = partial(subprocess.run, command, capture_output=True, errors="replace", timeout=CHILD_S, check=False)
    try:
        done = bounded(run, CHILD_S + UNKILLABLE_S)
    except (subprocess.TimeoutExpired, TimeoutError):
        raise ChildError(f"no answer within {CHILD_S:.0f} s") from None
    if code := done.returncode:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise ChildError(": ".join(filter(None, [f"crashed, {how}", last_line(done.stderr)])))
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        raise ChildError("ended without an answer") from None
    if "error" in answer:
        raise ChildError(answer["error"], done.stderr)
    return answer["value"]


def alone(function: str, *arguments: str) -> Any:
    """Call a function of this module in a child that has the GPUs to itself, as they may take one process at a time."""
    with ALONE:
        return in_child(HERE, function, *arguments)


def serve(module: str, function: str, *arguments: str) -> None:
    """Be the child: print what a function returns, or the first line of its error."""
    try:
        answer = {"value": getattr(import_module(module), function)(*arguments)}
    except Exception as error:
        answer = {"error": first_line(error)}
    print(json.dumps(answer, default=str))


def look_at_python() -> Facts:
    """Look at Python and the packages."""
    git = git_state() or {}
    return {
        "python": platform.python_version(),
        "os": platform.platform(),
        "executable": without_home(sys.executable),
        "commit": git.get("commit", "")[:12] + (" with changes" if git.get("dirty") else ""),
        "versions": versions(),
        "unmet": list(unmet(requirements(), installed())),
    }


def requirements() -> list[str]:
    """Return what this package requires; nothing where it runs from its folder without being installed."""
    try:
        return requires("pq-sweep") or []
    except PackageNotFoundError:
        return []


def installed() -> dict[str, str]:
    """Return the versions of all packages by their normalized names."""
    from packaging.utils import canonicalize_name

    first_last = reversed(list(distributions()))  # of several the first is imported
    return {canonicalize_name(found.name): found.version for found in first_last if found.name}


def unmet(requirements: Iterable[str], installed: dict[str, str]) -> Iterator[str]:
    """Yield the requirements, such as "torch>=2.10", that the installed packages do not meet, and what is there."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    for wanted in map(Requirement, requirements):
        found = installed.get(canonicalize_name(wanted.name))
        applies = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if applies and (found is None or not wanted.specifier.contains(found, prereleases=True)):
            yield f"{wanted.name}{wanted.specifier} (here: {found or 'none'})"


def look_at_cpu() -> Facts:
    """Look at the CPU, its memory, and what a container or SLURM leaves of it."""
    about, memory = (_colon_separated(Path("/proc") / name) for name in ("cpuinfo", "meminfo"))
    flags = about.get("flags", "").split()
    membership = Path("/proc/self/cgroup")
    return {
        "name": device_name("cpu"),
        "architecture": platform.machine(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "cgroup_cpus": cgroup_cpus(membership.read_text()) if membership.exists() else None,
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_gb": round(int(memory["MemTotal"].split()[0]) * 1024 / 1e9, 1),
        "memory_free_gb": round(int(memory["MemAvailable"].split()[0]) * 1024 / 1e9, 1),
    }


def cgroup_cpus(membership: str, root: Path = CGROUPS) -> float | None:
    """Return how many CPUs' time the cgroups named in `membership` (/proc/self/cgroup) allow, or None if all."""
    limits = []
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)  # the second version names no controllers
        base = root / controllers
        group = base / path.lstrip("/")
        if not controllers or "cpu" in controllers.split(","):
            limits += [_cpus(folder) for folder in (group, *group.parents) if folder.is_relative_to(base)]
    return min((limit for limit in limits if limit is not None), default=None)


def _cpus(group: Path) -> float | None:
    """Read quota and period of a group: in one file, or in two by the first version of cgroups."""
    files = [group / name for name in ("cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    quota, period, *_ = [*" ".join(file.read_text() for file in files if file.is_file()).split(), "max", "max"]
    return None if quota in ("max", "-1") else round(int(quota) / int(period), 2)


def _colon_separated(path: Path) -> dict[str, str]:
    """Read lines such as `MemTotal: 12 kB`, of equal keys the last."""
    parts = (line.partition(":") for line in path.read_text().splitlines())
    return {key.strip(): value.strip() for key, _, value in parts}


def look_at_gpus() -> Facts:
    """Ask the driver for its GPUs; it knows of no CUDA_VISIBLE_DEVICES. To be called in a child."""
    try:
        import pynvml
    except ImportError:
        return {"nvml": "the module pynvml is not installed", "gpus": []}
    try:
        pynvml.nvmlInit()
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded):
        return {"nvml": "no NVIDIA driver", "gpus": []}
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return {
        "driver": pynvml.nvmlSystemGetDriverVersion(),
        "newest_cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
        "gpus": [_gpu(pynvml, handle) for handle in handles],
    }


def _gpu(nvml: Any, handle: Any) -> Facts:
    def ask(function: str) -> Any:
        """Not every GPU knows everything: a V100 has no MIG."""
        try:
            return getattr(nvml, function)(handle)
        except nvml.NVMLError:
            return None

    memory, mig, persistence = map(ask, ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode",
                                         "nvmlDeviceGetPersistenceMode"))  # fmt: skip
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "compute_capability": "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "memory_gb": round(memory.total / 1e9, 1) if memory else None,
        "mig": bool(mig[0]) if mig else None,
        "persistence": None if persistence is None else bool(persistence),
    }


def look_at_torch() -> Facts:
    """Run a convolution on each of torch's devices. To be called in a child."""
    import torch

    error = ""
    try:
        torch.cuda.init()
    except Exception as problem:
        error = first_line(problem)
    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "architectures": torch.cuda.get_arch_list(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "error": error,
        "devices": [] if error else [_torch_device(index) for index in range(torch.cuda.device_count())],
    }


def _torch_device(index: int) -> Facts:
    import torch

    found, error = torch.cuda.get_device_properties(index), ""
    try:
        image = torch.ones(1, 1, 4, 4, device=f"cuda:{index}")
        torch.nn.functional.conv2d(image, image).item()
    except Exception as problem:
        error = first_line(problem)
    return {"name": found.name, "compute_capability": f"{found.major}.{found.minor}", "error": error}


def look_at_onnxruntime() -> Facts:
    """Look at which packages of ONNX Runtime are installed, and make each provider that it lists run something."""
    packages = {name: found for name, found in installed().items() if re.fullmatch(r"onnxruntime(-gpu)?", name)}
    if not packages and find_spec("onnxruntime") is None:
        return {"packages": {}, "providers": {}}
    about = in_child(HERE, "list_providers")
    names = [name for name in (CPU, CUDA, TENSORRT) if name in about["listed"]]
    with ThreadPoolExecutor(len(names)) as pool:
        errors = list(pool.map(provider_error, names))
    return {"version": about["version"], "packages": packages, "providers": dict(zip(names, errors, strict=True))}


def list_providers() -> Facts:
    """Say what this ONNX Runtime is and which providers it claims to have. To be called in a child."""
    import onnxruntime

    return {"version": onnxruntime.__version__, "listed": onnxruntime.get_available_providers()}


def provider_error(provider: str) -> str:
    """Say in one line why a provider does not run, or "" if it does."""
    if provider == TENSORRT and find_spec("tensorrt") is None:
        return NO_TENSORRT
    run = partial(in_child, HERE) if provider == CPU else alone
    try:
        run("run_on", provider)
    except ChildError as error:
        # ONNX Runtime prints why it could not load a provider, and raises that there is none to run on.
        cause = re.search(r"Failed to load library .* with error: (.+)", error.stderr)
        return last_line(cause[1]) if cause else re.sub(rf"^{provider} cannot run \S+: ", "", str(error))
    return ""


def run_on(provider: str) -> None:
    """Run a convolution (on CUDA: cuDNN) on a provider as a job does, or raise. To be called in a child."""
    import numpy as np

    from pq_sweep.runtimes import ort_session

    if provider == TENSORRT:
        import tensorrt  # noqa: F401  (loads the libraries that the provider links)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "convolution.onnx"
        graph.write_bytes(convolution().SerializeToString())
        device = "cpu" if provider == CPU else "cuda:0"
        work = Workspace(Path(folder), device, 1, cast(Stage, None))  # loading a graph has no stages
        ort_session(graph, provider, {}, work).run(None, {"input": np.ones((1, 1, 4, 4), np.float32)})


def convolution() -> onnx.ModelProto:
    """Make a graph of one convolution, (1, 1, 4, 4) to (1, 1, 1, 1), that ONNX Runtime reads from 1.16 on."""
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, 1, 1])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 4, 4], [1.0] * 16)
    node = helper.make_node("Conv", ["input", "weight"], ["logits"])
    graph = helper.make_graph([node], "convolution", [image], [logits], [weight])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def look_at_tensorrt() -> Facts:
    """Import TensorRT, if it is installed."""
    if find_spec("tensorrt") is None:
        return {"version": None}
    return {"version": in_child(HERE, "tensorrt_version")}


def tensorrt_version() -> str:
    """Import TensorRT with its libraries. To be called in a child."""
    import tensorrt

    return str(tensorrt.__version__)


def look_at_disk() -> Facts:
    """Look at the folders that jobs write to."""
    return {"working folder": _folder(Path.cwd()), "cache": _folder(cache_home())}


def _folder(path: Path) -> Facts:
    """Look at a folder, or at the closest one above it that is there."""
    there = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return {
        "path": without_home(str(path)),
        "free_gb": round(shutil.disk_usage(there).free / 1e9, 1),
        "network": shared_file_system(there.resolve()),
        "error": _lock_error(there),
    }


def _lock_error(folder: Path) -> str:
    """Say why files in a folder cannot be written or locked, as jobs do, or "" if they can."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.strerror or first_line(error)
    return ""


def look_at_slurm() -> Facts:
    """Ask SLURM's command line tools, if they are here."""
    tools = [tool for tool in ("sbatch", "squeue", "scontrol", "sinfo", "sacct") if shutil.which(tool)]
    if not tools:
        return {"tools": []}
    answers, printed = ask("sinfo", "--noheader", "--format=%P %a %D nodes %G")
    accounting, complaint = ask("sacct", "--noheader", "--allocations", "--starttime=now")
    return {
        "tools": tools,
        "version": ask("sinfo", "--version")[1] if answers else None,
        "error": "" if answers else last_line(printed),
        "partitions": [" ".join(line.split()) for line in printed.splitlines()] if answers else [],
        "accounting": "" if accounting else last_line(complaint),
        "job": slurm(),
    }


def ask(*command: str) -> tuple[bool, str]:
    """Say whether a command works within seconds, and what it prints or complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SLURM_S, check=False)
    except subprocess.TimeoutExpired:
        return False, f"no answer within {SLURM_S:.0f} s"
    except OSError as error:
        return False, f"{command[0]}: {error.strerror}"
    return done.returncode == 0, (done.stderr.strip() or done.stdout if done.returncode else done.stdout).strip()


def look_at_tracking() -> Facts:
    """Reach for the store that a sweep would log to."""
    from pq_sweep.tracking import Mlflow

    store, error = Store(Mlflow(None, "").store), ""
    try:
        store.reach()
    except Exception as problem:
        error = reason(problem)
    return {
        "store": without_home(without_password(store.uri)),
        "from": "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "the working folder",
        "network": shared_file_system(store.file) if store.file else "",
        "error": error,
    }


# --- judging ----------------------------------------------------------------------------------------------------------


def judge_python(machine: Facts) -> Section:
    """Judge whether the packages are those that pq_sweep requires."""
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
    return Section("gpu", "ok" if gpus else "not here", details, remedies)


def judge_torch(machine: Facts) -> Section:
    """Judge whether torch runs on the GPUs that are here."""
    found = machine["torch"]
    devices = {f"cuda:{index}": device for index, device in enumerate(found["devices"])}
    remedies = [sentence for name, device in devices.items() if (sentence := device_remedy(name, device, found))]
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


def device_remedy(name: str, device: Facts, torch: Facts) -> str | None:
    """Say what to do about a device of torch that does not work, or None if it does."""
    capability, built = capability_of(device), torch["architectures"]
    about = f"torch {torch['version']} on {name} ({device['name']}, sm_{capability[0]}{capability[1]})"
    if not built or has_kernels(capability, built):
        return f"{about} fails: {device['error'].rstrip('.')}; see nvidia-smi." if device["error"] else None
    if capability < V100:
        return f"{about} has no kernels, nor has any version that pq_sweep can use; use device=cpu."
    older = capability < min(capability_built(name) for name in built)
    how = "use environment.yml, with torch 2.10, the last for V100" if older else "install a newer torch"
    return f"{about} has no kernels, only {', '.join(built)}; {how}."


def has_kernels(capability: Capability, architectures: list[str]) -> bool:
    """Say whether code compiled for `architectures` (torch.cuda.get_arch_list) runs on a compute capability.

    Binaries (sm) run within their major version, not below their minor one; PTX (compute) runs on all that is newer.
    An "a" at the end ties both to one capability, an "f" to its major version (CUDA programming guide).
    """
    return any(_runs(capability, name) for name in architectures)


def _runs(capability: Capability, name: str) -> bool:
    built = capability_built(name)
    if name.endswith("a"):
        return built == capability
    anywhere = name.startswith("compute_") and not name.endswith("f")
    return built <= capability and (anywhere or built[0] == capability[0])


def capability_built(name: str) -> Capability:
    """Read sm_120a as (12, 0)."""
    digits = "".join(re.findall(r"\d", name))
    return int(digits[:-1]), int(digits[-1])


def judge_onnxruntime(machine: Facts) -> Section:
    """Judge the providers: on a GPU they have to run; without one, those for GPUs need not."""
    found, gpu, how = machine["onnxruntime"], bool(gpus_of(machine)), right_versions(machine)
    packages, providers = found["packages"], found["providers"]
    if not providers and not packages:
        return Section("onnxruntime", "not here", {"packages": "none"}, [f"for ONNX Runtime {how}."])
    failed = {name: error for name, error in providers.items() if error and error != NO_TENSORRT}
    broken = {name: error for name, error in failed.items() if gpu or name == CPU}
    problems = [
        f"{name} does not run ({error.rstrip('.')}); {_library(error) or how}." for name, error in broken.items()
    ]
    if len(packages) > 1:
        names = " ".join(packages)
        problems.append(f"{' and '.join(packages)} overwrite each other; pip uninstall {names}, then {how}.")
    advice = [f"this package has no {CUDA}; {how}."] if gpu and CUDA not in providers else []
    shown = {"version": found["version"], "packages": packages}
    shown |= {name: error or "runs" for name, error in providers.items()}
    return Section("onnxruntime", "problem" if problems else "ok", shown, problems + advice)


def _library(error: str) -> str | None:
    """Say what to do about a library that was not found, or None if that is not the error."""
    missing = re.match(r"(lib\S+): cannot open shared object file", error)
    return f"install what {missing[1]} belongs to and put its folder on LD_LIBRARY_PATH" if missing else None


def judge_tensorrt(machine: Facts) -> Section:
    """Judge the version against the GPUs and against what ONNX Runtime links."""
    version, how = machine["tensorrt"]["version"], right_versions(machine)
    if version is None:
        advice = [f"for runtime=tensorrt {how}."] if gpus_of(machine) else []
        return Section("tensorrt", "not here", {"version": "none"}, advice)
    number = tuple(map(int, re.findall(r"\d+", version)[:2]))
    remedies = []
    if number >= TENSORRT_UNSUPPORTED:
        remedies = [f"TensorRT {version} is not what ONNX Runtime links (libnvinfer.so.10); {how}."]
    elif number >= TENSORRT_WITHOUT_V100 and V100 in map(capability_of, gpus_of(machine)):
        remedies = [f"TensorRT {version} does not support V100, 10.4 is the last that does; {how}."]
    return Section("tensorrt", "problem" if remedies else "ok", {"version": version}, remedies)


def judge_disk(machine: Facts) -> Section:
    """Judge whether jobs can write and lock files, and have room for them."""
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
    """Judge whether the store answers, and whether SQLite is safe where it lies."""
    found = machine["tracking"]
    remedies = []
    if found["error"]:
        how = "start it, set MLFLOW_TRACKING_URI to another, or give tracking=none"
        remedies = [f"the store does not answer ({found['error'].rstrip('.')}); {how}."]
    elif found["network"]:
        remedies = [f"SQLite on {found['network']} breaks when several nodes write to it; see docs/cluster.md."]
    return Section("tracking", "problem" if found["error"] else "ok", found, remedies)


def judge_precisions(machine: Facts) -> Section:
    """Tell which precisions each runtime runs on each device, by what works here and what the hardware has."""
    cpu = _cpu_precisions(machine)
    details = {f"cpu ({machine['cpu']['name']})": cpu}
    alike: dict[str, list[str]] = {}
    for index, gpu in enumerate(gpus_of(machine)):
        state = ", does not work" if gpu.get("error") else ""
        alike.setdefault(f"({gpu['name']}, {gpu['compute_capability']}{state})", []).append(str(index))
    for about, indices in alike.items():
        gpu = gpus_of(machine)[int(indices[0])]
        details[f"cuda:{','.join(indices)} {about}"] = _gpu_precisions(machine, gpu)
    remedies = [] if cpu["torch"] else ["nothing runs without torch; mend that first."]
    return Section("precisions", "problem" if remedies else "ok", details, remedies)


def _cpu_precisions(machine: Facts) -> Facts:
    sets, known = set(machine["cpu"]["instruction_sets"]), machine["cpu"]["architecture"] == "x86_64"
    lacks = [name for name, any_of in CPU_HARDWARE.items() if known and not sets & any_of]
    return {
        "torch": _marked(Torch, "cpu", lacks) if "version" in machine["torch"] else [],
        "onnxruntime": _marked(OnnxRuntime, "cpu", lacks) if _runs_here(machine, CPU) else [],
    }


def _gpu_precisions(machine: Facts, gpu: Facts) -> Facts:
    """Tell it of a GPU; every runtime needs torch to work there, and providers were tried on the first one."""
    lacks = [name for name, least in HARDWARE.items() if capability_of(gpu) < least]
    usable = gpu.get("error") == ""  # the driver's GPUs, where torch does not find them, have none
    return {
        "torch": _marked(Torch, "cuda", lacks) if usable else [],
        "onnxruntime": _marked(OnnxRuntime, "cuda", lacks) if usable and _runs_here(machine, CUDA) else [],
        "tensorrt": _marked(TensorRT, "cuda", lacks) if usable and _runs_here(machine, TENSORRT) else [],
        "hardware has": [name for name in HARDWARE if name not in lacks],
        "hardware lacks": lacks,
    }


def _runs_here(machine: Facts, provider: str) -> bool:
    return machine["onnxruntime"].get("providers", {}).get(provider) == ""


def _marked(runtime: type[Torch | OnnxRuntime | TensorRT], kind: str, lacks: list[str]) -> list[str]:
    """Name a runtime's precisions, and what of the hardware is not there that would make them fast."""
    missing = {name: NEEDS[kind].get(name) for name in runtime.precisions[kind]}
    return [f"{name} (no {need})" if need in lacks else name for name, need in missing.items()]


def gpus_of(machine: Facts) -> list[Facts]:
    """Return the GPUs that torch finds, else those that the driver has and the user does not hide."""
    hidden = machine["torch"].get("visible") in ("", "-1")
    return machine["torch"].get("devices") or ([] if hidden else machine["gpu"].get("gpus", []))


def capability_of(gpu: Facts) -> Capability:
    """Read "7.0" as (7, 0)."""
    major, minor = gpu["compute_capability"].split(".")
    return int(major), int(minor)


def right_versions(machine: Facts) -> str:
    """Say how to install what fits the GPUs that are here."""
    capabilities = [capability_of(gpu) for gpu in gpus_of(machine)]
    if V100 in capabilities:
        return "use the versions of environment.yml"
    return "pip install '.[gpu]'" if capabilities else "pip install '.[cpu]'"


# --- telling ----------------------------------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[], Facts]] = {
    "python": look_at_python,
    "cpu": look_at_cpu,
    "gpu": partial(in_child, HERE, "look_at_gpus"),
    "torch": partial(alone, "look_at_torch"),
    "onnxruntime": look_at_onnxruntime,
    "tensorrt": look_at_tensorrt,
    "disk": look_at_disk,
    "slurm": look_at_slurm,
    "tracking": look_at_tracking,
}
JUDGES: dict[str, Callable[[Facts], Section]] = {
    "python": judge_python,
    "cpu": judge_cpu,
    "gpu": judge_gpu,
    "torch": judge_torch,
    "onnxruntime": judge_onnxruntime,
    "tensorrt": judge_tensorrt,
    "disk": judge_disk,
    "slurm": judge_slurm,
    "tracking": judge_tracking,
    "precisions": judge_precisions,
}


def examine() -> list[Section]:
    """Look at everything side by side, then judge it; what fails or hangs is told in its section."""
    with ThreadPoolExecutor(len(LOOKS)) as pool:
        looked = {name: pool.submit(bounded, look, LOOK_S) for name, look in LOOKS.items()}
    machine = {name: _facts(future) for name, future in looked.items()}
    return [judged(name, machine) for name in JUDGES]


def _facts(future: Future[Facts]) -> Facts:
    error = future.exception()
    return future.result() if error is None else {"failed": first_line(error)}


def judged(name: str, machine: Facts) -> Section:
    """Judge a section, or say that it could not be looked at."""
    failed = machine.get(name, {}).get("failed")
    if failed:
        remedy = FAILED.get(name, "please report it, with this output").format(how=right_versions(machine))
        return Section(name, "problem", {"error": failed}, [f"{name} fails ({failed.rstrip('.')}); {remedy}."])
    try:
        return JUDGES[name](machine)
    except Exception as error:
        told = f"the doctor cannot judge this ({first_line(error)}); see the sections with errors, or report it."
        return Section(name, "problem", {"error": first_line(error)}, [told])


def draw(sections: list[Section], console: Console) -> None:
    """Print a table: verdict, section, and what was found, with the remedies below."""
    from rich.table import Table
    from rich.text import Text

    marks = console.is_terminal and not console.options.ascii_only
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for section in sections:
        told = Text("\n".join(lines(section.details)))
        for remedy in section.remedies:
            told.append(f"\n-> {remedy}", style="bold")
        mark, style = MARKS[section.verdict]
        table.add_row(Text(f"{mark} {section.verdict}" if marks else section.verdict, style), section.name, told)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    print(summary(sections))


def summary(sections: list[Section]) -> str:
    """Name the problems in one line."""
    names = [section.name for section in sections if section.verdict == "problem"]
    return f"{len(names)} problem{'' if len(names) == 1 else 's'}" + (f": {', '.join(names)}" if names else "")


def lines(details: Facts) -> list[str]:
    """Write one line for each detail, and for each group of them; what is not known or empty is left out."""
    return [f"{key}: {text}" for key, value in details.items() if (text := shown(value))]


def shown(value: Any) -> str:
    """Write a value as text: yes and no, commas between the items of a list, semicolons within a group."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {text}" for key, item in value.items() if (text := shown(item)))
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)


def first_line(error: BaseException) -> str:
    """Return the first line of an error, without a password."""
    return without_password((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def last_line(text: str) -> str:
    """Return the last line of what a process printed, without a password."""
    return without_password(text.strip().splitlines()[-1])[:300] if text.strip() else ""


def without_home(path: str) -> str:
    """Write the user's home folder as ~: its name is nobody's business."""
    return re.sub(rf"(?<!\w){re.escape(str(Path.home()))}(?=/|$)", "~", path) if Path.home() != Path("/") else path


def main() -> None:
    """Say what this machine can run, each problem with its remedy; exit 1 if what is installed does not work."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.doctor", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    arguments = parser.parse_args()
    from rich.console import Console

    with Console(stderr=True).status("looking at this machine"):
        sections = examine()
    console = Console(highlight=False)
    if arguments.json:
        report = {"summary": summary(sections), "sections": [asdict(section) for section in sections]}
        print(json.dumps(report, indent=1))
    else:
        draw(sections, console if console.is_terminal else Console(highlight=False, width=WIDTH))
    sys.exit(1 if any(section.verdict == "problem" for section in sections) else 0)


if __name__ == "__main__":
    main()
