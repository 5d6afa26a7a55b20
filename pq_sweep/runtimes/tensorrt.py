"""TensorRT through ONNX Runtime's provider: the whole graph as one engine, for all batch sizes or for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pq_sweep.core.folder import JobFolder
from pq_sweep.runtimes.cuda import override_tf32
from pq_sweep.runtimes.engines import EngineBuilder, Shape, built, import_tensorrt, shape_of
from pq_sweep.runtimes.graph import RuntimeMismatch, make_graph, precision_of
from pq_sweep.runtimes.ort import (
    TENSORRT,
    Bound,
    check_options,
    engine,
    model_input,
    ort_session,
    placed_on,
    require_provider,
    texts,
)
from pq_sweep.runtimes.session import BySize, Call, CallSession
from pq_sweep.types import Data, Model, Quantizer, Session, UserError, Workspace

BF16_OPTION_SINCE = (1, 23)
# ONNX Runtime 1.31 quantizes biases to INT32 before a provider gets the graph, which TensorRT's parser refuses.
DISABLED = ("WeightBiasQuantization",)


@dataclass(frozen=True, kw_only=True)
class TensorRT(EngineBuilder):
    """TensorRT through ONNX Runtime; `options` are further options of its provider, by their documented names."""

    options: dict[str, Any]

    name: ClassVar[str] = "tensorrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.options)

    def require(self, device: str) -> None:
        """Refuse to start without TensorRT's libraries and the provider that uses them."""
        super().require(device)
        require_provider(TENSORRT)

    def about(self, graph: Path, work: Workspace, precision: str) -> dict[str, Any]:
        """Return all that an engine depends on."""
        import onnxruntime

        return super().about(graph, work, precision) | {
            "onnxruntime": onnxruntime.__version__,
            "disabled_optimizers": list(DISABLED),
        }

    def open(self, model: Model, quantizer: Quantizer, data: Data, work: Workspace) -> Session:
        """Export, check and quantize the graph, and build its engines in the job's folder."""
        precision = precision_of(quantizer)
        import_tensorrt(self.name)  # loads the libraries that the provider links
        override_tf32(self.tf32, work.device)
        self.require_precision(precision, work.device)
        if precision == "bf16":
            need_bf16_option()
        graph, details = make_graph(model, quantizer, data, work, form="tensorrt")
        permissions = permitted(graph, precision)
        folder = JobFolder(work.folder).engine
        about = self.about(graph, work, precision)
        calls, nodes, engines = built(folder, about, work, lambda: self._build(graph, permissions, folder, model, work))
        details = details | {
            **self.described(about),
            "disabled_optimizers": list(DISABLED),
            "nodes_per_provider": nodes,
            "engine_bytes": {str(size): path.stat().st_size for size, path in engines.items()},
        }
        call = BySize(calls if self.profile == "each" else dict.fromkeys(range(1, max(calls) + 1), calls[max(calls)]))
        return CallSession(call, self.name, engine(TENSORRT), work.device, next(iter(engines.values())), details)

    def _build(
        self, graph: Path, permissions: list[str], folder: Path, model: Model, work: Workspace
    ) -> tuple[dict[int, Call], dict[str, int], dict[int, Path]]:
        """Open a session for each profile, which builds its engine, and run it once; the largest batch is the key."""
        calls: dict[int, Call] = {}
        nodes: dict[str, int] = {}
        engines: dict[int, Path] = {}
        for least, best, most in self.profiles(work.batch_sizes):
            shapes = dict(
                zip(("min", "opt", "max"), (shape_of(model, size) for size in (least, best, most)), strict=True)
            )
            options = self.provider_options(permissions, shapes, folder / f"b{most}", folder)
            session = ort_session(graph, TENSORRT, options, work, DISABLED)
            engines[most] = one_engine(folder / f"b{most}", permissions)
            calls[most] = Bound(session)
            nodes = placed_on(TENSORRT, session, calls[most], model_input(session, most, work.device))
            calls[most](model_input(session, most, work.device))
        return calls, nodes, engines

    def provider_options(
        self, permissions: list[str], shapes: dict[str, Shape], engine: Path, timing: Path
    ) -> dict[str, str]:
        """Return the options for one engine; the provider takes True and False for switches, not 1 and 0."""
        engine.mkdir(exist_ok=True)
        profile = {f"trt_profile_{name}_shapes": f"input:{'x'.join(map(str, shape))}" for name, shape in shapes.items()}
        return (
            texts(self.options)
            | profile
            | {f"trt_{permission}_enable": "True" for permission in permissions}
            | {
                "trt_engine_cache_enable": "True",
                "trt_engine_cache_path": str(engine),
                "trt_timing_cache_enable": "True",
                "trt_timing_cache_path": str(timing),
                "trt_builder_optimization_level": str(self.optimization_level),
                "trt_sparsity_enable": str(self.sparsity),
            }
        )


def need_bf16_option() -> None:
    """Refuse an ONNX Runtime whose provider does not know BF16."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < BF16_OPTION_SINCE:
        raise UserError(
            "quantizer=bf16 with runtime=tensorrt needs onnxruntime "
            f"{'.'.join(map(str, BF16_OPTION_SINCE))} or later and found {onnxruntime.__version__};"
            " use runtime=tensorrt_native or runtime=torch."
        )


def permitted(graph: Path, precision: str) -> list[str]:
    """Name the precisions below FP32 that the provider has to permit so that a graph can be built as it is written.

    ONNX Runtime builds weakly typed networks: TensorRT refuses Q/DQ without the INT8 flag and computes FP16 tensors in
    FP32 without the FP16 flag. No graph is written in BF16: the flag alone lets TensorRT choose it.
    """
    import onnx

    model = onnx.load(graph)
    wanted = {
        "int8": any(node.op_type == "QuantizeLinear" for node in model.graph.node),
        "fp16": any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in model.graph.initializer),
        "bf16": precision == "bf16",
    }
    return [name for name, is_so in wanted.items() if is_so]


def one_engine(folder: Path, permissions: list[str]) -> Path:
    """Return the engine in a folder; raise RuntimeMismatch unless there is just one, with all permitted precisions.

    The provider leaves out a precision, with a warning, on a GPU that is not fast in it; the file's name lists those
    that were used.
    """
    engines = sorted(folder.glob("*.engine"))
    if len(engines) != 1:
        raise RuntimeMismatch(
            f"TensorRT built {len(engines)} engines where one for the whole graph was expected; see {folder}."
        )
    if missing := [name for name in permissions if name not in engines[0].name.rpartition("_sm")[0].split("_")]:
        raise RuntimeMismatch(f"TensorRT left {', '.join(missing)} out, as this GPU is not fast in it; use another.")
    return engines[0]
