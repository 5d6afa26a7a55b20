"""Stands in for a GPU where there is none: what runs on it runs on the CPU, on the same memory, and is noted.

ONNX Runtime's and TensorRT's answers are real ones of ONNX Runtime on the CPU. `tensorrt` has nothing but names of
TensorRT 10's Python API as NVIDIA documents it (docs.nvidia.com/deeplearning/tensorrt, read in November 2026), so that
any other name is an error here.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cuda_stand_in import CudaError, Machine
from onnx import numpy_helper

from pq_sweep.runtimes import cuda, engines

real_session, INSTALLED = onnxruntime.InferenceSession, onnxruntime.__version__


def array_at(address: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the float32 array at an address."""
    size = int(np.prod(shape))
    return np.ctypeslib.as_array((ctypes.c_float * size).from_address(address)).reshape(shape)


# CUDA has kernels for these, but their answers lie in the host's memory, so ONNX Runtime leaves them, and all that is
# worked out from them, to the CPU (its core/framework/fallback_cpu_capability.cc).
SHAPES = {"Shape", "Size"}
FORBIDDEN = "session.disable_cpu_ep_fallback"
ON_THE_CPU = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but"
    " fallback to CPU EP has been explicitly disabled by the user."
)


def forbids_the_cpu(settings: Any) -> bool:
    return bool(settings.get_session_config_entry(FORBIDDEN) == "1")


def optimized(path: Path, settings: Any, disabled: list[str]) -> tuple[Any, onnx.GraphProto]:
    """Load a graph on the CPU as it is to be loaded, and return what is left of it when providers share it.

    That is after the first level of optimization, which is the same for all of them.
    """
    strict = forbids_the_cpu(settings)
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.add_session_config_entry(FORBIDDEN, "0")
    with tempfile.TemporaryDirectory() as folder:
        settings.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = real_session(path, settings, providers=["CPUExecutionProvider"], disabled_optimizers=disabled)
        graph = onnx.load(settings.optimized_model_filepath).graph
    settings.add_session_config_entry(FORBIDDEN, str(int(strict)))
    return session, graph


def parse(graph: onnx.GraphProto) -> None:
    """Refuse what TensorRT's parser does not take of a Q/DQ graph: other than INT8, or a zero point other than 0."""
    stored = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            value, zero = (stored.get(name) for name in (node.input[0], *node.input[2:], "")[:2])
            whole = [array for array in (value, zero) if array is not None and array.dtype.kind in "iu"]
            if any(array.dtype != np.int8 for array in whole) or (zero is not None and zero.any()):
                raise RuntimeError(f"[ONNXRuntimeError] : 11 : EP_FAIL : TensorRT EP failed to parse {node.name}")


class Gpu:
    """onnxruntime.InferenceSession: notes what it is told, and builds engines as the TensorRT provider does."""

    sessions: ClassVar[list[Gpu]] = []
    ran_on: ClassVar[str | None] = None
    elsewhere: ClassVar[dict[str, int]] = {}
    engines: ClassVar[int] = 1
    slow_in: ClassVar[tuple[str, ...]] = ()
    builds: ClassVar[int] = 0
    machine: ClassVar[Machine]

    def __new__(cls, *args: Any, providers: Any, **kwargs: Any) -> Any:
        """Leave to ONNX Runtime what is to run on the CPU."""
        return (
            super().__new__(cls)
            if isinstance(providers[0], tuple)
            else real_session(*args, providers=providers, **kwargs)
        )

    def __init__(self, path: Path, settings: Any, *, providers: Any, **kwargs: Any) -> None:
        ((self.provider, self.options),) = providers
        self.settings, self.kwargs = settings, kwargs
        self.inner, graph = optimized(path, settings, kwargs["disabled_optimizers"])
        shapes = SHAPES & {node.op_type for node in graph.node}
        if self.provider == "CUDAExecutionProvider" and shapes and forbids_the_cpu(settings):
            raise RuntimeError(ON_THE_CPU)
        self.ran: list[int] = []
        Gpu.sessions.append(self)
        if self.provider == "TensorrtExecutionProvider":
            parse(graph)
            self._build()

    def _build(self) -> None:
        wanted = ("fp16", "int8", "bf16")
        flags = [name for name in wanted if f"trt_{name}_enable" in self.options and name not in Gpu.slow_in]
        for number in range(Gpu.engines):
            name = "_".join(["TensorrtExecutionProvider_TRTKernel_graph_main_1", str(number), *flags, "sm80"])
            engine = Path(self.options["trt_engine_cache_path"]) / f"{name}.engine"
            if not engine.exists():
                Gpu.builds += 1
                engine.write_bytes(b"engine")
                (Path(self.options["trt_timing_cache_path"]) / "TensorrtExecutionProvider_cache_sm80.timing").touch()

    def get_providers(self) -> list[str]:
        return [Gpu.ran_on or self.provider, "CPUExecutionProvider"]

    def get_inputs(self) -> Any:
        return self.inner.get_inputs()

    def get_outputs(self) -> Any:
        return self.inner.get_outputs()

    def get_provider_graph_assignment_info(self) -> list[Any]:
        counts = {self.provider: 3} | Gpu.elsewhere
        return [SimpleNamespace(ep_name=name, get_nodes=lambda n=n: [None] * n) for name, n in counts.items()]

    def io_binding(self) -> Binding:
        return Binding()

    def run_with_iobinding(self, binding: Binding, options: Any) -> None:
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        images, device = binding.bound["input"], int(self.options["device_id"])
        self.ran.append(len(images))

        def work() -> None:
            binding.bound["logits"][:] = self.inner.run(None, {"input": images})[0]

        Gpu.machine.current = device  # the provider makes its device the current one, and leaves it so
        Gpu.machine.hand_over(work, Gpu.machine.stream_at(int(self.options["user_compute_stream"])))


class Binding:
    """onnxruntime.IOBinding on memory of the CPU."""

    def __init__(self) -> None:
        self.bound: dict[str, np.ndarray] = {}

    def bind_input(self, name: str, device: str, index: int, dtype: Any, shape: tuple[int, ...], address: int) -> None:
        assert (device, dtype) == ("cuda", np.float32)
        self.bound[name] = array_at(address, shape)

    bind_output = bind_input


ONLY_IN_10 = ("BF16", "FP16", "INT8")  # flags of builders; TensorRT 11 takes every type from the graph


def tensorrt(machine: Machine, version: str = "10.13.3.9") -> Any:
    """Return a module like `tensorrt` whose engines are ONNX graphs that run on the CPU.

    As TensorRT's guide says, an engine belongs to the device that is current when it is loaded, and a context is no
    longer used by anyone else once a graph was recorded with it.
    """
    flags = ("TF32", "SPARSE_WEIGHTS", *(ONLY_IN_10 if version.startswith("10.") else ()))
    told: dict[str, Any] = {"flags": {"TF32"}, "profiles": [], "contexts": [], "says": {}}

    class Severity(IntEnum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class ILogger:
        pass

    ILogger.Severity = Severity  # type: ignore[attr-defined]

    class Logger(ILogger):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

        def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
            pass

    class Config:
        builder_optimization_level = 3
        profiling_verbosity = None

        def set_flag(self, flag: str) -> None:
            told["flags"].add(flag)

        def clear_flag(self, flag: str) -> None:
            told["flags"].discard(flag)

        def create_timing_cache(self, serialized: bytes) -> str:
            assert serialized == b""
            return "timing"

        def set_timing_cache(self, cache: str, ignore_mismatch: bool) -> bool:
            told["timing"] = cache
            return not ignore_mismatch

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: b"kernels and their times")

        def add_optimization_profile(self, profile: Any) -> int:
            told["profiles"].append(profile.shapes)
            return len(told["profiles"]) - 1

    class Profile:
        def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
            assert name == "input"
            self.shapes = (tuple(least), tuple(best), tuple(most))

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            self.logger = logger

        def create_network(self, flags: int) -> Any:
            told["network_flags"] = flags
            return SimpleNamespace()

        def create_builder_config(self) -> Config:
            return Config()

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, network: Any, config: Config) -> bytes | None:
            told["level"], told["verbosity"] = config.builder_optimization_level, config.profiling_verbosity
            told["builds"] = told.get("builds", 0) + 1
            for severity, message in told["says"].items():
                self.logger.log(severity, message)  # type: ignore[attr-defined]
            return (
                None
                if told.get("fails")
                else json.dumps({"graph": network.graph, "profiles": told["profiles"]}).encode()
            )

    class OnnxParser:
        def __init__(self, network: Any, logger: ILogger) -> None:
            self.network = network
            self.num_errors = 0

        def parse_from_file(self, path: str) -> bool:
            self.network.graph = Path(path).read_bytes().hex()
            self.num_errors = 1 if told.get("unreadable") else 0
            return not self.num_errors

        def get_error(self, index: int) -> Any:
            return SimpleNamespace(desc=lambda: told["unreadable"])

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.recorded = engine, False
            self.addresses: dict[str, int] = {}
            told["contexts"].append(self)
            self.least, _, self.most = engine.profiles[0]  # what a new context starts with

        def set_optimization_profile_async(self, index: int, stream: int) -> bool:
            self.engine.be_current()
            assert machine.stream_at(stream).device_index == self.engine.device
            self.least, _, self.most = self.engine.profiles[index]
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            assert self.least[0] <= shape[0] <= self.most[0]
            if self.recorded:
                raise CudaError("a graph was recorded with this context, and its memory is the graph's")
            self.shape = shape
            return True

        def set_tensor_address(self, name: str, address: int) -> bool:
            self.addresses[name] = address
            return True

        def execute_async_v3(self, stream: int) -> bool:
            self.engine.be_current()
            addresses, shape = dict(self.addresses), self.shape

            def work() -> None:
                logits = self.engine.inner.run(None, {"input": array_at(addresses["input"], shape)})[0]
                array_at(addresses["logits"], logits.shape)[:] = logits

            self.recorded = machine.recording is not None
            machine.hand_over(work, machine.stream_at(stream))
            return not told.get("cannot_run")

    class Engine:
        device_memory_size_v2 = 4096

        def __init__(self, plan: bytes) -> None:
            content, self.device = json.loads(plan), machine.current
            self.inner = real_session(bytes.fromhex(content["graph"]), providers=["CPUExecutionProvider"])
            self.profiles = content["profiles"]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            assert name == "logits"
            return (-1, self.inner.get_outputs()[0].shape[1])

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert name == "input"
            return [tuple(shape) for shape in self.profiles[profile_index]]

        def be_current(self) -> None:
            if machine.current != self.device:
                raise CudaError(f"the engine is one of cuda:{self.device}, and cuda:{machine.current} is current")

        def create_execution_context(self) -> Context:
            self.be_current()
            return Context(self)

        def create_engine_inspector(self) -> Any:
            layers = [
                {
                    "Name": "Reformatting CopyNode for Input Tensor 0",
                    "Outputs": [{"Format/Datatype": "Int8 NC/32HW32"}],
                },
                {
                    "Name": "conv1",
                    "TacticName": "sm80_xmma_fprop_sparse_conv_i8",
                    "Outputs": [{"Format/Datatype": "Int8"}],
                },
                {"Name": "fc", "TacticName": "sm80_xmma_gemm_f32", "Outputs": [{"Format/Datatype": "Float Row-major"}]},
            ]
            return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": layers}))

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            pass

        def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
            return Engine(plan) if plan.startswith(b"{") else None

    module = ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    module.__dict__.update(
        __version__=version, told=told, ILogger=ILogger, Logger=Logger, Builder=Builder, OnnxParser=OnnxParser,
        Runtime=Runtime,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=SimpleNamespace(**{name: name for name in flags}),
        ProfilingVerbosity=SimpleNamespace(DETAILED="DETAILED"), LayerInformationFormat=SimpleNamespace(JSON="JSON"),
    )  # fmt: skip
    return module


def layer(name: str, tactic: str, form: str) -> dict[str, Any]:
    """Return a layer as the engine inspector describes it."""
    return {"Name": name, "TacticName": tactic, "Outputs": [{"Name": "output", "Format/Datatype": form}]}


def as_a100(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make this machine one with A100s, whose memory is the CPU's, with ONNX Runtime's providers and TensorRT 10."""
    machine = Machine().install(monkeypatch)
    providers = [f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Gpu)
    monkeypatch.setattr(onnxruntime, "__version__", "1.31.1")
    fresh = {"sessions": [], "ran_on": None, "elsewhere": {}, "engines": 1, "slow_in": (), "builds": 0}
    for name, value in fresh.items():
        monkeypatch.setattr(Gpu, name, value)
    monkeypatch.setattr(Gpu, "machine", machine, raising=False)
    monkeypatch.setattr(cuda, "FIRST_CHOICE", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(engines, "device_name", lambda device: "NVIDIA A100-SXM4-40GB")
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt(machine))
    return machine
