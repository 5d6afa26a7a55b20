"""ONNX Runtime on the CPU and on CUDA: every node runs on the provider asked for, or the session is refused."""

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pq_sweep.core.stored import KEEPS_BIASES
from pq_sweep.runtimes.cuda import own_stream, refuse_on_cpu, use_tf32
from pq_sweep.runtimes.graph import Precisions, RuntimeMismatch, make_graph, precision_of
from pq_sweep.runtimes.session import BATCH, BySize, Call, CallSession
from pq_sweep.types import Data, Model, Quantizer, Runtime, Session, UserError, Workspace

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

ENVIRONMENTS = "see environment.yml (V100, A100) or environment-cu13.yml"
CPU, CUDA, TENSORRT = (f"{name}ExecutionProvider" for name in ("CPU", "CUDA", "Tensorrt"))
LIBRARIES = {CUDA: "cuda", TENSORRT: "tensorrt"}
# Beside what torch loads when it is imported: cuRAND is in a package of its own, and of cuDNN torch loads one library
# that opens the others when it needs them, while ONNX Runtime 1.20 links all of them.
PRELOADED = ("*/lib/libcurand.so.*", "*/lib/libcudnn*.so.*")
WEIGHT_ONLY = tuple(f"w{bits}" for bits in range(2, 9))
# What the CPU provider computes in another precision than the graph says.
SIMULATED = {"fp8": "FP8 is computed in FP32 by ONNX Runtime on a CPU: accuracy and size hold, time does not."}
FEW_BITS = (
    "Activations of fewer than 8 bits are computed in FP32 by ONNX Runtime: accuracy and size hold, time does not."
)
# Options of sessions by precision. There are no FP8 kernels to fuse Q and DQ into. Products with integer weights take
# activations in FP32, and do not round them to 8 bits first as they do by default.
SESSION_OPTIONS = {
    "fp8": {"session.disable_quant_qdq": "1"},
    **{name: {"session.qdq_matmulnbits_accuracy_level": "0"} for name in ("int4", *WEIGHT_ONLY)},
}
SHAPES = ("Shape", "Size")  # the operators by which a graph learns how many images it was given
REASON = re.compile(
    r"(CUDA failure \d+: [^;]+|Invalid TensorRT EP option: [\w.]+|Unknown provider option: \S+"
    r"|Failed to parse provider option .*|The value for the key .*)"
)
# Options that pq_sweep sets itself, or that need buffers at fixed addresses, which its sessions do not have.
RESERVED = ("device_id", "user_compute_stream", "has_user_compute_stream", "use_tf32", "enable_cuda_graph",
            "trt_cuda_graph_enable", "trt_engine_cache", "trt_timing_cache", "trt_profile", "trt_fp16", "trt_bf16",
            "trt_int8", "trt_sparsity", "trt_builder_optimization_level", "trt_dump_ep", "trt_ep_context")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU, or its CUDA provider; `options` are the provider's own, by their documented names."""

    tf32: bool
    options: dict[str, Any]

    precisions: ClassVar[Precisions] = {
        "cpu": ("fp32", "fp16", "int8", "int8_dynamic", "mixed", "fp8", "int4", *WEIGHT_ONLY),
        "cuda": ("fp32", "fp16"),
    }

    def __post_init__(self) -> None:
        check_options(self.options)

    def resolve(self, precision: str, device: str) -> Runtime:
        refuse_on_cpu(device, {"tf32": self.tf32})
        if device == "cpu" and self.options:
            raise UserError(f"runtime.options={self.options} are of the CUDA provider; leave them out with device=cpu.")
        return self

    def require(self, device: str) -> None:
        """Refuse a device for which the installed package has no provider."""
        require_onnxruntime("onnxruntime")
        require_provider(_provider(device))

    def open(self, model: Model, quantizer: Quantizer, data: Data, work: Workspace) -> Session:
        """Export, check, quantize and load the graph."""
        graph, details = make_graph(model, quantizer, data, work, form="cpu")
        return self.load(graph, quantizer, work, details)

    def load(self, graph: Path, quantizer: Quantizer, work: Workspace, details: dict[str, Any]) -> Session:
        """Load a graph that the quantizer wrote."""
        provider, precision = _provider(work.device), precision_of(quantizer)
        disabled = _wrong_optimizers(precision, graph)
        details = details | {"disabled_optimizers": disabled}
        simulated = FEW_BITS if _keeps_biases(graph) else SIMULATED.get(precision)
        found = {"simulated": simulated, "session_options": SESSION_OPTIONS.get(precision)}
        details |= {name: value for name, value in found.items() if value}
        with work.stage("build"):
            if work.device == "cpu":
                call, nodes = on_cpu(graph, work, disabled, details.get("session_options", {}))
            else:
                use_tf32(self.tf32, work.device)
                options = texts(self.options) | {"use_tf32": str(int(self.tf32))}
                fixed = works_out_shapes(graph)
                details |= {"tf32": self.tf32, "provider_options": options, "session_per_batch_size": fixed}
                call, nodes = on_cuda(graph, options, work, disabled, fixed=fixed)
        details |= {"nodes_per_provider": nodes}
        return CallSession(call, "onnxruntime", engine(provider), work.device, graph, details)


def on_cpu(
    graph: Path, work: Workspace, disabled: tuple[str, ...], entries: dict[str, str]
) -> tuple[Call, dict[str, int]]:
    """Load a graph on the CPU for any number of images; return the call and how many nodes are on each provider."""
    session = ort_session(graph, CPU, {}, work, disabled, entries=entries)
    call = Unbound(session)
    return call, placed_on(CPU, session, call, model_input(session, 1, work.device))


def on_cuda(
    graph: Path, options: dict[str, str], work: Workspace, disabled: tuple[str, ...], *, fixed: bool
) -> tuple[Call, dict[str, int]]:
    """Load a graph on CUDA and run each batch size once, which chooses kernels and allocates.

    ONNX Runtime works out shapes on the CPU, where nothing may run. With `fixed`, a session for each batch size, whose
    shapes are all known beforehand, has nothing left to work out.
    """
    calls: dict[int, Call] = {}
    nodes: dict[str, int] = {}
    for sizes in [(size,) for size in work.batch_sizes] if fixed else [work.batch_sizes]:
        session = ort_session(graph, CUDA, options, work, disabled, batch=sizes[0] if fixed else None)
        call = Bound(session)
        for size in sizes:
            call(model_input(session, size, work.device))
        nodes = placed_on(CUDA, session, call, model_input(session, sizes[0], work.device))
        calls |= dict.fromkeys(sizes, call)
    return BySize(calls), nodes


@dataclass(frozen=True)
class Unbound:
    """A graph on the CPU."""

    session: Any

    def __call__(self, images: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(self.session.run(None, {"input": images.numpy()})[0])


class Bound:
    """A graph on CUDA whose images and logits stay on the device (IO binding), on torch's current stream."""

    def __init__(self, session: Any) -> None:
        import onnxruntime

        self.session = session
        self.classes = session.get_outputs()[0].shape[1]
        self.binding = session.io_binding()
        self.options = onnxruntime.RunOptions()
        # A call need not wait for its logits: they are read on the same stream, or after waiting for it.
        self.options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def __call__(self, images: Tensor) -> Tensor:
        import numpy as np
        import torch

        images = images.contiguous()
        logits = torch.empty((len(images), self.classes), device=images.device)
        index = images.device.index or 0
        self.binding.bind_input("input", "cuda", index, np.float32, tuple(images.shape), images.data_ptr())
        self.binding.bind_output("logits", "cuda", index, np.float32, tuple(logits.shape), logits.data_ptr())
        self.session.run_with_iobinding(self.binding, self.options)
        return logits


def engine(provider: str) -> str:
    """Name ONNX Runtime, its version and provider."""
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__} {provider}"


def model_input(session: Any, size: int, device: str) -> Tensor:
    """Return a batch of zeros of the shape that a graph takes."""
    import torch

    return torch.zeros((size, *session.get_inputs()[0].shape[1:]), device=device)


def ort_session(
    graph: Path,
    provider: str,
    options: dict[str, str],
    work: Workspace,
    disabled: tuple[str, ...] = (),
    *,
    batch: int | None = None,
    entries: dict[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Load a graph on `provider` and nothing else, for just `batch` images if that is given.

    `entries` are options of the session beside those that every session has.
    Raise RuntimeMismatch with the reason if that is impossible.
    """
    import onnxruntime

    settings = _settings(work)
    for name, value in (entries or {}).items():
        settings.add_session_config_entry(name, value)
    if batch is not None:
        settings.add_free_dimension_override_by_name(BATCH, batch)
    if provider != CPU:
        # Old versions ignore enable_fallback and retry without the provider; with this entry that fails as well.
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        preload_gpu_libraries()
    try:
        options = options | _device_options(provider, work.device)
        session = onnxruntime.InferenceSession(
            graph, settings, providers=[(provider, options)], enable_fallback=0, disabled_optimizers=list(disabled)
        )
        if session.get_providers()[0] != provider:
            raise RuntimeError(f"onnxruntime took {session.get_providers()[0]} instead")
    except Exception as error:
        for profile in work.folder.glob("nodes_*.json"):  # it was begun with the session
            profile.unlink()
        reason = library_error(provider) or reason_in(str(error))
        raise RuntimeMismatch(f"{provider} cannot run {graph.name}: {reason}; {ENVIRONMENTS}.") from error
    return session


def reason_in(message: str) -> str:
    """Return the reason in an error of ONNX Runtime without the source lines, C++ types and host names around it."""
    text = " ".join(message.split())
    found = re.search(REASON, text)
    return (found[1] if found else text.removeprefix("[ONNXRuntimeError] : ")).rstrip(". ")


def _settings(work: Workspace) -> onnxruntime.SessionOptions:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = work.threads
    settings.log_severity_level = 3
    if work.shared:
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    if _tells_assignment():
        settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    else:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(work.folder / "nodes")
    return settings


def _device_options(provider: str, device: str) -> dict[str, str]:
    """Return the options for torch's device and stream, so that both libraries agree on when a tensor is ready."""
    if provider == CPU:
        return {}
    import torch

    stream = own_stream(device)
    return {"device_id": str(torch.device(device).index or 0), "user_compute_stream": str(stream.cuda_stream)}


def _tells_assignment() -> bool:
    """Say whether this ONNX Runtime can tell which provider got which node, as it can since 1.24."""
    import onnxruntime

    return hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info")


def placed_on(provider: str, session: Any, call: Call, images: Tensor) -> dict[str, int]:
    """Return how many nodes of a graph run on each provider; raise RuntimeMismatch unless all run on `provider`."""
    nodes = placement(session, call, images)
    if set(nodes) != {provider}:
        found = ", ".join(f"{count} nodes on {name}" for name, count in nodes.items()) or "no node anywhere"
        raise RuntimeMismatch(f"asked for {provider} and got {found}; use another runtime for this model.")
    return nodes


def placement(session: Any, call: Call, images: Tensor) -> dict[str, int]:
    """Count the nodes of a graph on each provider; before ONNX Runtime 1.24, from the profile of a run on `images`.

    The profile counts nodes after optimization, where several may have become one.
    """
    if _tells_assignment():
        groups = session.get_provider_graph_assignment_info()
        counts: Counter[str] = Counter()
        for group in groups:
            counts[group.ep_name] += len(group.get_nodes())
        return dict(counts)
    call(images)
    profile = Path(session.end_profiling())
    ran = {(event["name"], event["args"]["provider"]) for event in json.loads(profile.read_text()) if _is_node(event)}
    profile.unlink()
    return dict(Counter(provider for _, provider in ran))


def _is_node(event: dict[str, Any]) -> bool:
    return event.get("cat") == "Node" and "provider" in event.get("args", ())


def preload_gpu_libraries() -> None:
    """Load CUDA's libraries, which ONNX Runtime's providers link, from the installed packages.

    Importing torch loads nearly all of them, `PRELOADED` has the others. What does not load is left to the provider,
    whose error names it.
    """
    import torch  # noqa: F401

    for place in sys.path:  # packages may lie in several, such as a user's and the system's
        for library in sorted(path for name in PRELOADED for path in Path(place, "nvidia").glob(name)):
            with suppress(OSError):
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def library_error(provider: str) -> str:
    """Return the loader's error for a provider's library, or "" if it loads; ONNX Runtime only prints that error."""
    import onnxruntime

    if provider not in LIBRARIES:
        return ""
    folder = Path(onnxruntime.__file__).parent / "capi"
    try:
        for name in ("shared", LIBRARIES[provider]):
            ctypes.CDLL(str(folder / f"libonnxruntime_providers_{name}.so"), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    return ""


def require_onnxruntime(runtime: str) -> None:
    """Refuse to start without ONNX Runtime, which checks and quantizes every graph, whatever is to run it."""
    if find_spec("onnxruntime") is None:
        raise UserError(
            f"runtime={runtime} needs ONNX Runtime, which checks and quantizes graphs; install it by pip install -e"
            f" '.[cpu]', or for a GPU {ENVIRONMENTS}."
        )


def require_provider(provider: str) -> None:
    """Refuse a provider that is not listed, as it never loads; a listed one may fail too, so sessions are verified."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise UserError(f"this onnxruntime has no {provider}; {ENVIRONMENTS}, or use device=cpu.")


def check_options(options: dict[str, Any]) -> None:
    """Refuse options of a provider that would contradict what pq_sweep sets; unknown ones the provider refuses."""
    for name in options:
        if name.startswith(RESERVED):
            raise UserError(f"runtime.options.{name} is set by pq_sweep; choose it by the runtime's own options.")


def texts(options: dict[str, Any]) -> dict[str, str]:
    """Return options as ONNX Runtime takes them: text, with True and False for switches."""
    return {name: str(value) for name, value in options.items()}


def _provider(device: str) -> str:
    return CPU if device == "cpu" else CUDA


def works_out_shapes(graph: Path) -> bool:
    """Say whether a graph computes with the number of its images."""
    return not operators_of(graph).isdisjoint(SHAPES)


def operators_of(graph: Path) -> set[str]:
    """Name the operators of a graph."""
    import onnx

    return {node.op_type for node in onnx.load(graph).graph.node}


def _keeps_biases(graph: Path) -> bool:
    """Say whether a graph asks for biases as they are, as INT8 kernels do not have them."""
    import onnx

    return any(entry.key == KEEPS_BIASES for entry in onnx.load(graph).metadata_props)


def _wrong_optimizers(precision: str, graph: Path) -> tuple[str, ...]:
    """Name the optimizers to leave out as of onnxruntime 1.31.1.

    One kills the process on FP16 transformers. One drops a Relu before a QuantizeLinear to FP8, as it does where the
    lowest code stands for 0, so that negative numbers stay, and its like for Clip fails. One makes a Gemm of MatMul and
    Add, which has no kernel for 4-bit weights. And one rounds biases as INT8 kernels need them, which there are none of
    for activations of fewer bits.
    """
    if _keeps_biases(graph):
        return ("WeightBiasQuantization",)
    if precision == "fp16":
        return ("NchwcTransformer",) if "LayerNormalization" in operators_of(graph) else ()
    return {"fp8": ("ReluQuantRewrite", "ClipQuantRewrite"), "int4": ("MatMulAddFusion",)}.get(precision, ())
