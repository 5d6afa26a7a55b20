"""TensorRT by its own Python API: an engine file to deploy, with a profile for each batch size that is timed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.runtimes.cuda import own_stream, record_graph, use_tf32
from pq_sweep.runtimes.engines import EngineBuilder, built, shape_of
from pq_sweep.runtimes.graph import Precisions, RuntimeMismatch, make_graph, precision_of
from pq_sweep.runtimes.session import BySize, Call, CallSession
from pq_sweep.types import Data, Model, Quantizer, Session, UserError, Workspace

if TYPE_CHECKING:
    from torch import Tensor

ENGINE, TIMING, LAYERS = "model.engine", "timing.cache", "layers.json"
SPARSITY, WARNINGS = "sparsity.json", "warnings.json"


@dataclass(frozen=True, kw_only=True)
class TensorRTNative(EngineBuilder):
    """TensorRT itself; `cuda_graph` records the calls that are timed."""

    cuda_graph: bool

    name: ClassVar[str] = "tensorrt_native"
    # FP8 and INT4 take strongly typed networks, which ONNX Runtime's provider for TensorRT does not build.
    precisions: ClassVar[Precisions] = {"cpu": (), "cuda": (*EngineBuilder.precisions["cuda"], "fp8", "int4")}

    def open(self, model: Model, quantizer: Quantizer, data: Data, work: Workspace) -> Session:
        """Export, check and quantize the graph, build its engine in the job's folder and load that file."""
        precision = precision_of(quantizer)
        use_tf32(self.tf32, work.device)
        self.require_precision(precision, work.device)
        graph, details = make_graph(model, quantizer, data, work, form="tensorrt")
        own_stream(work.device)  # an engine belongs to the device that is current when it is built and loaded
        engine, about = self.engine(graph, precision, model, work, load)
        folder = JobFolder(work.folder).engine
        details = details | {
            **self.described(about),
            "cuda_graph": self.cuda_graph,
            "layers": describe_layers(self.library(), engine, folder / LAYERS),
            "sparsity_log": read_json(folder / SPARSITY),
            "builder_warnings": read_json(folder / WARNINGS),
            "activation_memory_bytes": _activation_memory(engine),
        }
        call = self._call(engine, model, work)
        how = f"tensorrt {about['tensorrt']}" + (", CUDA graph" if self.cuda_graph else "")
        return CallSession(call, self.name, how, work.device, folder / ENGINE, details)

    def engine(
        self, graph: Path, precision: str, model: Model, work: Workspace, load: Callable[..., Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Build the engine of a graph in the job's folder, or find it there or in the cache.

        Return what `load` makes of it, and all that it depends on.
        """
        library, folder = self.library(), JobFolder(work.folder).engine
        messages = collector(library)
        messages.forget()

        def build() -> Any:
            if not (folder / ENGINE).exists():
                self._write(library, graph, folder, precision, model, work, messages)
            return load(library, folder / ENGINE, messages)

        about = self.about(graph, work, precision)
        return built(folder, about, work, build), about

    def _write(
        self, library: Any, graph: Path, folder: Path, precision: str, model: Model, work: Workspace, messages: Any
    ) -> None:
        """Build and write the engine and its timing cache."""
        builder = library.Builder(messages)
        network = builder.create_network(typing_flag(library, precision))
        parser = library.OnnxParser(network, messages)
        if not parser.parse_from_file(str(graph)):
            errors = "; ".join(str(parser.get_error(index).desc()) for index in range(parser.num_errors))
            raise RuntimeMismatch(f"TensorRT cannot read {graph.name}: {errors}")
        if changed := [text for text in messages.warnings if "Defaulting to" in text]:  # as with unsigned numbers
            raise RuntimeMismatch(f"TensorRT reads {graph.name} otherwise than it is written: {changed[0]}")
        self._look_at(network, folder)
        config = self._config(library, builder, precision, model, work)
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeMismatch(f"TensorRT cannot build {graph.name}: {'; '.join(messages.errors)}")
        (folder / TIMING).write_bytes(memoryview(config.get_timing_cache().serialize()))
        (folder / ENGINE).write_bytes(memoryview(plan))
        write_json(folder / SPARSITY, messages.sparsity)
        write_json(folder / WARNINGS, messages.warnings)

    def _look_at(self, network: Any, folder: Path) -> None:
        """Write what can only be said of the network before it is built; the inspector tells all of an engine."""

    def _config(self, library: Any, builder: Any, precision: str, model: Model, work: Workspace) -> Any:
        config = builder.create_builder_config()
        config.builder_optimization_level = self.optimization_level
        config.profiling_verbosity = library.ProfilingVerbosity.DETAILED  # for the names and types of layers
        if not self.tf32:
            config.clear_flag(library.BuilderFlag.TF32)  # the only flag that is set by default
        wanted = {"SPARSE_WEIGHTS": self.sparsity, "BF16": precision == "bf16"}
        for name in (name for name, is_wanted in wanted.items() if is_wanted):
            config.set_flag(getattr(library.BuilderFlag, name))  # not every version has every flag
        for sizes in self.profiles(work.batch_sizes):
            profile = builder.create_optimization_profile()
            profile.set_shape("input", *(shape_of(model, size) for size in sizes))
            config.add_optimization_profile(profile)
        return config

    def _call(self, engine: Any, model: Model, work: Workspace) -> BySize:
        """Make a context for each profile or, if wanted, for each batch size, and record a call with it.

        What a context works with belongs to the graph that was recorded with it, so each graph has its own.
        """
        import torch

        calls: dict[int, Call] = {}
        profiles = list(enumerate(self.profiles(work.batch_sizes)))
        if not self.cuda_graph:
            for index, (least, _, most) in profiles:
                calls |= dict.fromkeys(range(least, most + 1), Context(engine, index, work.device))
            return BySize(calls)
        with work.stage("build"):
            for size in work.batch_sizes:
                fitting = next(index for index, (least, _, most) in profiles if least <= size <= most)
                images = torch.zeros(shape_of(model, size), device=work.device)
                calls[size] = record_graph(Context(engine, fitting, work.device), images, work.device)
        return BySize(calls)


class Context:
    """Runs an engine under one of its profiles, on its device's current stream; images and logits stay there."""

    def __init__(self, engine: Any, profile: int, device: str) -> None:
        import torch

        self.classes, self.device = engine.get_tensor_shape("logits")[-1], device
        self.context = engine.create_execution_context()
        stream = torch.cuda.current_stream(device)
        if not self.context or not self.context.set_optimization_profile_async(profile, stream.cuda_stream):
            raise RuntimeMismatch(f"TensorRT has no room on {device} for the engine's profile {profile}.")

    def __call__(self, images: Tensor) -> Tensor:
        import torch

        images = images.contiguous()
        logits = torch.empty((len(images), self.classes), device=images.device)
        self.context.set_input_shape("input", tuple(images.shape))
        self.context.set_tensor_address("input", images.data_ptr())
        self.context.set_tensor_address("logits", logits.data_ptr())
        with torch.cuda.device(self.device):  # TensorRT itself minds no device but the current one
            if not self.context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
                raise RuntimeMismatch(f"TensorRT could not run the engine on {len(images)} images.")
        return logits


def typing_flag(library: Any, precision: str) -> int:
    """Return the flags of a network: strongly typed, which takes every type from the graph, but for BF16.

    No graph is written in BF16: TensorRT may choose it layer by layer, up to version 10.
    """
    if precision != "bf16":
        return 1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    if not hasattr(library.BuilderFlag, "BF16"):
        raise UserError(
            f"TensorRT {library.__version__} takes types from the graph alone, and quantizer=bf16 writes none in BF16;"
            " use runtime=torch."
        )
    return 0


@cache
def collector(library: Any) -> Any:
    """Return the logger of this process, which keeps TensorRT's errors, warnings, and messages about sparse kernels.

    TensorRT tells the first logger everything while anything lives that was made with it, whatever others it is given.
    """

    class Messages(library.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.forget()

        def forget(self) -> None:
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.sparsity: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.INTERNAL_ERROR, library.ILogger.Severity.ERROR):
                self.errors.append(message)
            elif severity == library.ILogger.Severity.WARNING:
                self.warnings.append(message)
            elif "(Sparsity)" in message:
                self.sparsity.append(message)

    return Messages()


def load(library: Any, path: Path, messages: Any) -> Any:
    """Return the engine of a file, for the device that is current."""
    engine = library.Runtime(messages).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RuntimeMismatch(f"TensorRT cannot load {path.name}: {'; '.join(messages.errors)}")
    return engine


def describe_layers(library: Any, engine: Any, path: Path) -> dict[str, Any]:
    """Write what TensorRT says about each layer, and return how many layers there are by type of output.

    `reformats` counts layers that only change the layout or type of a tensor, `sparse` those whose kernel is for 2:4
    sparse weights.
    """
    inspector = engine.create_engine_inspector()
    layers = json.loads(inspector.get_engine_information(library.LayerInformationFormat.JSON))["Layers"]
    write_json(path, layers)
    known = [layer for layer in layers if isinstance(layer, dict)]
    return {
        "count": len(layers),
        "outputs": dict(Counter(_type_of(output) for layer in known for output in layer.get("Outputs", ())[:1])),
        "reformats": sum("reformat" in layer.get("Name", "").lower() for layer in known),
        "sparse": sum("sparse" in layer.get("TacticName", "").lower() for layer in known),
    }


def _type_of(output: dict[str, Any]) -> str:
    """Return the type of a tensor, which TensorRT gives in front of its layout: "Int8" of "Int8 NC/32HW32"."""
    return str(output.get("Format/Datatype") or output.get("Datatype") or "unknown").split()[0]


def _activation_memory(engine: Any) -> int:
    """Return the bytes of device memory that a context takes; the newer property exists since TensorRT 10.1."""
    return int(engine.device_memory_size_v2 if hasattr(engine, "device_memory_size_v2") else engine.device_memory_size)
