"""Runtimes: each opens a Session that runs a model on the device asked for, or refuses to.

A runtime lists the precisions that it realises on each kind of device, so that combinations that cannot exist are
refused before anything is loaded. Frameworks are imported when a session is opened.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pq_sweep.types import Data, Model, Runtime, Session, UserError, Workspace

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

Precisions = dict[str, tuple[str, ...]]


class RuntimeMismatch(RuntimeError):
    """A session runs on something else than was asked for."""


@dataclass(frozen=True)
class Torch:
    """PyTorch in eager mode."""

    # FP16 on a CPU is emulated, some 26 times slower than FP32: no number worth having.
    precisions: ClassVar[Precisions] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}

    def resolve(self, precision: str, device: str) -> Runtime:
        return self

    def require(self, device: str) -> None:
        """Torch is always there."""

    def open(self, model: Model, quantizer: Any, data: Data, work: Workspace) -> Session:
        """Convert the network to the quantizer's precision, save its state_dict and run it."""
        import torch

        if excluded := getattr(quantizer, "keywords", {}).get("exclude"):
            raise UserError(
                f"runtime=torch converts every layer, so quantizer.exclude={excluded} needs runtime=onnxruntime."
            )
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision_of(quantizer)]
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with work.stage("quantize"):
            module = model.module.to(dtype).to(work.device).eval()
        artifact = work.folder / "model.pt"
        torch.save(module.state_dict(), artifact)
        details = {"dtype": str(dtype).removeprefix("torch."), "tf32": False}
        return TorchSession(module, dtype, work.device, artifact, details)


@dataclass
class TorchSession:
    """A torch module on one device."""

    module: Any
    dtype: Any
    device: str
    artifact: Path
    details: dict[str, Any]
    runtime: str = "torch"

    @property
    def engine(self) -> str:
        import torch

        return f"torch {torch.__version__} eager"

    def __call__(self, images: Tensor) -> Tensor:
        import torch

        with torch.inference_mode():
            return self.module(images.to(self.dtype)).float()

    def close(self) -> None:
        self.module = None


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime on the CPU, or its CUDA provider."""

    precisions: ClassVar[Precisions] = {
        "cpu": ("fp32", "fp16", "int8", "int8_dynamic", "mixed"),
        "cuda": ("fp32", "fp16"),
    }

    def resolve(self, precision: str, device: str) -> Runtime:
        return self

    def require(self, device: str) -> None:
        """Refuse a device for which the installed package has no provider."""
        _require_provider(_provider(device))

    def open(self, model: Model, quantizer: Any, data: Data, work: Workspace) -> Session:
        """Export, check, quantize and load the graph."""
        graph, details = make_graph(model, quantizer, data, work, form="cpu")
        with work.stage("build"):
            return self.load(graph, quantizer, work, details)

    def load(self, graph: Path, quantizer: Any, work: Workspace, details: dict[str, Any]) -> Session:
        """Load a graph that the quantizer wrote."""
        disabled = _crashing_optimizers(quantizer, graph)
        session = ort_session(graph, _provider(work.device), {}, work, disabled)
        details = details | {"disabled_optimizers": disabled} | _placement(session)
        return OrtSession(session, work.device, graph, details, "onnxruntime")


@dataclass(frozen=True)
class TensorRT:
    """TensorRT through ONNX Runtime's provider; the precision is in the graph, never a builder flag."""

    precisions: ClassVar[Precisions] = {"cpu": (), "cuda": ("fp32", "fp16", "int8", "mixed")}

    def resolve(self, precision: str, device: str) -> Runtime:
        return self

    def require(self, device: str) -> None:
        """Refuse to start without TensorRT's libraries and the provider that uses them."""
        if find_spec("tensorrt") is None:
            raise UserError(
                "runtime=tensorrt needs TensorRT; see environment.yml (V100, A100) or environment-cu13.yml, or use"
                " runtime=onnxruntime."
            )
        _require_provider("TensorrtExecutionProvider")

    def open(self, model: Model, quantizer: Any, data: Data, work: Workspace) -> Session:
        """Export, check and quantize the graph and build its engine in the job's folder."""
        import tensorrt  # noqa: F401  (loads the libraries that the provider links)

        graph, details = make_graph(model, quantizer, data, work, form="tensorrt")
        cache = work.folder / "engine"
        cache.mkdir(exist_ok=True)
        options = {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
        }
        with work.stage("build"):
            session = ort_session(graph, "TensorrtExecutionProvider", options, work)
            OrtSession(session, work.device, graph, {}, "tensorrt")(model.sample(1).to(work.device))
        engines = sorted(cache.glob("*.engine"))
        if len(engines) != 1:
            raise RuntimeMismatch(
                f"TensorRT built {len(engines)} engines where one for the whole graph was expected; see {cache}."
            )
        return OrtSession(session, work.device, engines[0], details | _placement(session), "tensorrt")


@dataclass(frozen=True)
class Auto:
    """Torch for a model that is not quantized to integers or FP16, else TensorRT on CUDA, else ONNX Runtime."""

    precisions: ClassVar[Precisions] = {
        "cpu": ("fp32", "fp16", "bf16", "int8", "int8_dynamic", "mixed"),
        "cuda": ("fp32", "fp16", "bf16", "int8", "mixed"),
    }

    def resolve(self, precision: str, device: str) -> Runtime:
        """Return the runtime that is meant."""
        if precision in ("fp32", "bf16"):
            return Torch()
        return TensorRT() if device.startswith("cuda") else OnnxRuntime()

    def require(self, device: str) -> None:
        raise AssertionError("resolve auto first")

    def open(self, model: Model, quantizer: Any, data: Data, work: Workspace) -> Session:
        raise AssertionError("resolve auto first")


@dataclass
class OrtSession:
    """A graph in ONNX Runtime; on CUDA inputs and logits stay on the device (IO binding)."""

    session: Any
    device: str
    artifact: Path
    details: dict[str, Any]
    runtime: str

    @property
    def engine(self) -> str:
        import onnxruntime

        return f"onnxruntime {onnxruntime.__version__} {self.session.get_providers()[0]}"

    def __call__(self, images: Tensor) -> Tensor:
        return self._on_cpu(images) if self.device == "cpu" else self._on_cuda(images)

    def _on_cpu(self, images: Tensor) -> Tensor:
        import torch

        return torch.from_numpy(self.session.run(None, {"input": images.numpy()})[0])

    def _on_cuda(self, images: Tensor) -> Tensor:
        import numpy as np
        import torch

        images = images.contiguous()
        logits = torch.empty((len(images), self.session.get_outputs()[0].shape[1]), device=images.device)
        binding = self.session.io_binding()
        index = images.device.index or 0
        binding.bind_input("input", "cuda", index, np.float32, tuple(images.shape), images.data_ptr())
        binding.bind_output("logits", "cuda", index, np.float32, tuple(logits.shape), logits.data_ptr())
        self.session.run_with_iobinding(binding)
        return logits

    def close(self) -> None:
        """Drop the session: the threads of an idle one would spin and disturb whatever is timed next."""
        self.session = None


def precision_of(quantizer: Callable[..., Any]) -> str:
    """Return the precision of a quantizer function or of a partial of one."""
    function = getattr(quantizer, "func", quantizer)
    if not hasattr(function, "precision"):
        raise UserError(
            f"{function.__module__}.{function.__qualname__} is no quantizer; mark it with @quantizer('int8') or such."
        )
    return str(function.precision)


def make_graph(model: Model, quantizer: Any, data: Data, work: Workspace, *, form: str) -> tuple[Path, dict[str, Any]]:
    """Export the network, prove the export, and let the quantizer write `model.onnx`."""
    from pq_sweep.export import check_export, export_onnx

    source, target = work.folder / "export.onnx", work.folder / "model.onnx"

    def export() -> dict[str, Any]:
        with work.stage("export"):
            export_onnx(model, source)
        with work.stage("check_export"):
            error = check_export(model, source)
        return {"export_error": error, "exported_bytes": source.stat().st_size}

    def quantize() -> dict[str, Any]:
        exported = work.stage.keep("exported", export, source)
        record = quantizer(source, target, data, form=form, stage=work.stage)
        source.unlink()
        return exported | {"quantizer": record or {}}

    return target, work.stage.keep("quantized", quantize, target)


def _provider(device: str) -> str:
    return "CPUExecutionProvider" if device == "cpu" else "CUDAExecutionProvider"


def _require_provider(provider: str) -> None:
    """A listed provider may still fail to load, so the session is verified too; an unlisted one never loads."""
    import onnxruntime

    if provider not in onnxruntime.get_available_providers():
        raise UserError(
            f"this onnxruntime has no {provider}; see environment.yml (V100, A100) or environment-cu13.yml, or use"
            " device=cpu."
        )


def ort_session(
    graph: Path, provider: str, options: dict[str, str], work: Workspace, disabled: tuple[str, ...] = ()
) -> onnxruntime.InferenceSession:
    """Load a graph on `provider` and nothing else."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = work.threads
    settings.log_severity_level = 3
    if work.shared:
        settings.add_session_config_entry("session.force_spinning_stop", "1")
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    try:
        if provider != "CPUExecutionProvider":
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            options = options | _device_options(provider, work.device)
        session = onnxruntime.InferenceSession(
            graph, settings, providers=[(provider, options)], enable_fallback=0, disabled_optimizers=list(disabled)
        )
    except Exception as error:
        raise RuntimeMismatch(f"{provider} cannot run {graph.name}: {error}") from error
    if session.get_providers()[0] != provider:
        raise RuntimeMismatch(
            f"asked for {provider}, got {session.get_providers()[0]}; check CUDA and TensorRT libraries."
        )
    return session


def _device_options(provider: str, device: str) -> dict[str, str]:
    """Run on torch's device and stream, so that both agree on when a tensor is ready; FP32 is not TF32."""
    import torch

    index = torch.device(device).index or 0
    stream = torch.cuda.current_stream(index)
    if stream.cuda_stream == 0:  # the default stream, which onnxruntime takes for "none given"
        stream = torch.cuda.Stream(index)
        torch.cuda.set_stream(stream)
    options = {"device_id": str(index), "user_compute_stream": str(stream.cuda_stream)}
    return options | ({"use_tf32": "0"} if provider == "CUDAExecutionProvider" else {})


def _crashing_optimizers(quantizer: Any, graph: Path) -> tuple[str, ...]:
    """Name the optimizers to leave out: this one kills the process on FP16 transformers (onnxruntime 1.31.1)."""
    import onnx

    operators = {node.op_type for node in onnx.load(graph).graph.node}
    return ("NchwcTransformer",) if precision_of(quantizer) == "fp16" and "LayerNormalization" in operators else ()


def _placement(session: Any) -> dict[str, Any]:
    """Count the nodes on each provider; onnxruntime says it from 1.24 on."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    counts: Counter[str] = Counter()
    for group in session.get_provider_graph_assignment_info():
        counts[group.ep_name] += len(group.get_nodes())
    return {"nodes_per_provider": dict(counts)}
