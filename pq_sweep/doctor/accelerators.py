"""Look at GPUs and at what runs on them: driver, torch, ONNX Runtime, TensorRT; each is made to run something."""

from __future__ import annotations

import os
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from pq_sweep.core.hardware import COMPUTE_MODES
from pq_sweep.doctor import Facts
from pq_sweep.doctor.children import ChildError, alone, first_line, in_child
from pq_sweep.doctor.machine import installed
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes import rtx
from pq_sweep.runtimes.ort import CPU, CUDA, ENVIRONMENTS, TENSORRT, ort_session
from pq_sweep.types import Model, Preprocess, Stage, Workspace

if TYPE_CHECKING:
    import onnx

NO_TENSORRT = "TensorRT is not installed"


def look_at_gpus() -> Facts:
    """Ask the driver for its GPUs, which CUDA_VISIBLE_DEVICES does not hide from it. To be called in a child."""
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
        """Return an answer, or None: not every GPU knows everything, such as a V100, which has no MIG."""
        try:
            return getattr(nvml, function)(handle)
        except nvml.NVMLError:
            return None

    memory, mig, persistence, mode = map(ask, ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode",
                                               "nvmlDeviceGetPersistenceMode", "nvmlDeviceGetComputeMode"))  # fmt: skip
    return {
        "name": nvml.nvmlDeviceGetName(handle),
        "uuid": nvml.nvmlDeviceGetUUID(handle),
        "compute_capability": "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        "memory_gb": round(memory.total / 1e9, 1) if memory else None,
        "mig": bool(mig[0]) if mig else None,
        "persistence": None if persistence is None else bool(persistence),
        "compute_mode": None if mode is None else COMPUTE_MODES[mode],
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
    about = in_child(__name__, "list_providers")
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
    try:
        (in_child if provider == CPU else alone)(__name__, "run_on", provider)
    except ChildError as error:
        cause = re.sub(rf"^{provider} cannot run \S+: ", "", str(error))
        return cause.partition(f"; {ENVIRONMENTS}")[0]  # the remedies name the environments where they help
    return ""


def run_on(provider: str) -> None:
    """Run a graph on a provider as a job does, or raise. To be called in a child."""
    import numpy as np

    if provider == TENSORRT:
        import tensorrt  # noqa: F401  (loads the libraries that the provider links)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "convolution.onnx"
        graph.write_bytes(convolution().SerializeToString())
        device = "cpu" if provider == CPU else "cuda:0"
        work = Workspace(Path(folder), device, 1, cast(Stage, None))  # loading a graph has no stages
        ort_session(graph, provider, {}, work).run(None, {"input": np.ones((1, 1, 4, 4), np.float32)})


def convolution() -> onnx.ModelProto:
    """Make a graph, (1, 1, 4, 4) to (1, 1, 1, 1), that ONNX Runtime reads from 1.16 on.

    On CUDA the convolution runs in cuDNN, and the negation, which nothing fuses, in a kernel of the provider itself:
    either may lack code for a GPU that the other runs on.
    """
    from onnx import TensorProto, helper

    image = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 1, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 1, 1, 1])
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [1, 1, 4, 4], [1.0] * 16)
    nodes = [helper.make_node("Conv", ["input", "weight"], ["sum"]), helper.make_node("Neg", ["sum"], ["logits"])]
    graph = helper.make_graph(nodes, "convolution", [image], [logits], [weight])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def look_at_tensorrt() -> Facts:
    """Import TensorRT, if it is installed."""
    if find_spec("tensorrt") is None:
        return {"version": None}
    return {"version": in_child(__name__, "tensorrt_version")}


def look_at_tensorrt_rtx() -> Facts:
    """Have TensorRT-RTX build an engine, which needs no GPU, if it is installed."""
    if find_spec(rtx.API) is None and find_spec(rtx.LIBRARIES) is None:
        return {"version": None}
    return in_child(__name__, "build_by_rtx")


def build_by_rtx() -> Facts:
    """Build an engine of a convolution, and say for which GPUs that can be done. To be called in a child."""
    builder = rtx.TensorRTRTX(sparsity=False, tf32=False, cuda_graph=False, build_only=True, compute_capability=None)
    library, small = builder.library(), Preprocess(size=4, resize=4, channels=1, mean=(0.0,), std=(1.0,))
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "convolution.onnx"
        graph.write_bytes(convolution().SerializeToString())
        work = Workspace(Path(folder), "cpu", 1, Stages(Path(folder), ""))
        builder.engine(graph, "fp32", cast(Model, SimpleNamespace(preprocess=small)), work, lambda *_: None)
    return {"version": library.__version__, "builds_for": ["{}.{}".format(*one) for one in rtx.builds_for(library)]}


def tensorrt_version() -> str:
    """Import TensorRT with its libraries. To be called in a child."""
    import tensorrt

    return str(tensorrt.__version__)
