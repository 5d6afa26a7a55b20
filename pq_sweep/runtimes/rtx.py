"""TensorRT-RTX: TensorRT for workstations, whose engines are built without the GPU that they are for."""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from pq_sweep.core.environment import device_name
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.hardware import GPU, Capability, Gpu, capability
from pq_sweep.runtimes.engines import shape_of
from pq_sweep.runtimes.graph import Precisions, RuntimeMismatch, make_graph, precision_of
from pq_sweep.runtimes.native import ENGINE, WARNINGS, TensorRTNative
from pq_sweep.runtimes.ort import require_onnxruntime
from pq_sweep.runtimes.session import BySize, CallSession
from pq_sweep.types import Data, Model, Quantizer, Runtime, Session, UserError, Workspace

PARSED = "parsed.json"
# What the product runs on; its builder also knows 8.0 (A100), for which NVIDIA has TensorRT.
RUNS_ON: tuple[Capability, ...] = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
WITHOUT_DEVICE: Capability = (8, 9)
INSTALL = "install it by pip install -e '.[rtx]'"
# The libraries lie in the wheel of ONNX Runtime's provider, the Python API in one of its own.
LIBRARIES, API = "onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"


@dataclass(frozen=True, kw_only=True)
class TensorRTRTX(TensorRTNative):
    """TensorRT-RTX; with `build_only` an engine is built for a compute capability and not run."""

    profile: str = "each"
    optimization_level: int = 3
    build_only: bool
    compute_capability: str | float | None

    name: ClassVar[str] = "tensorrt_rtx"
    # There is no BF16: such a graph is not written, and TensorRT-RTX takes every type from the graph.
    precisions: ClassVar[Precisions] = {"cpu": (), "cuda": ("fp32", "fp16", "int8", "mixed", "fp8", "int4")}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.build_only:  # which any machine can
            object.__setattr__(self, "precisions", dict.fromkeys(("cpu", "cuda"), self.precisions["cuda"]))
        if self.compute_capability is not None and not self.build_only:
            raise UserError(
                f"runtime.compute_capability={self.compute_capability} is only for runtime.build_only=true, as an"
                " engine that runs is built for the device; leave it out."
            )
        if self.compute_capability is not None:
            _read(self.compute_capability)

    def resolve(self, precision: str, device: str) -> Runtime:
        """Refuse to run where there is no GPU."""
        if device.startswith("cpu") and not self.build_only:
            raise UserError(
                f"runtime=tensorrt_rtx runs on CUDA devices and this is device={device}; use device=cuda, or"
                " runtime.build_only=true, which builds the engine and does not run it."
            )
        return super().resolve(precision, device)

    def library(self) -> Any:
        """Return the module that builds and runs engines."""
        return import_rtx()

    def require(self, device: str) -> None:
        """Refuse to start without TensorRT-RTX, or for a GPU that it is not for."""
        target, library = self.target(device), self.library()
        require_onnxruntime(self.name)
        if self.build_only and target not in builds_for(library):
            given = self.compute_capability is not None
            what = f"runtime.compute_capability={_dotted(target)}" if given else f"{_dotted(target)} of {device}"
            raise UserError(
                f"{what} is not known to TensorRT-RTX {library.__version__}; give another"
                f" runtime.compute_capability, valid are: {', '.join(map(_dotted, builds_for(library)))}."
            )
        if not self.build_only and target not in RUNS_ON:
            this = Gpu(device_name(device), target)
            raise UserError(
                f"runtime=tensorrt_rtx is for GPUs of compute capability {', '.join(map(_dotted, RUNS_ON))} and this is"
                f" {this}; use runtime=tensorrt_native or runtime=tensorrt."
            )
        if self.sparsity and target < (GPU["sparse"].since or target):
            raise UserError(f"runtime.sparsity=true needs compute capability 8.0 or later, not {_dotted(target)}.")

    def gpu(self, device: str) -> Gpu:
        """Return the GPU that engines are built for, which need not be here."""
        return Gpu("the GPU to build for", self.target(device)) if self.build_only else super().gpu(device)

    def target(self, device: str) -> Capability:
        """Return the compute capability that engines are built for: as given, else the device's, else 8.9."""
        if self.compute_capability is not None:
            return _read(self.compute_capability)
        return super().target(device) if device.startswith("cuda") else WITHOUT_DEVICE

    def open(self, model: Model, quantizer: Quantizer, data: Data, work: Workspace) -> Session:
        """Build the engine in the job's folder and load it, or only build it."""
        if not self.build_only:
            return super().open(model, quantizer, data, work)
        precision = precision_of(quantizer)
        self.require_precision(precision, work.device)
        graph, details = make_graph(model, quantizer, data, work, form="tensorrt")
        folder = JobFolder(work.folder).engine
        _, about = self.engine(graph, precision, model, work, load=lambda *_: None)
        details |= {
            **self.described(about),
            "build_only": True,
            "compute_capability": _dotted(self.target(work.device)),
            "layers": read_json(folder / PARSED),
            "builder_warnings": read_json(folder / WARNINGS),
        }
        how = f"TensorRT-RTX {about['tensorrt']} for compute capability {details['compute_capability']}, not run"
        return CallSession(None, self.name, how, work.device, folder / ENGINE, details)

    def _config(self, library: Any, builder: Any, precision: str, model: Model, work: Workspace) -> Any:
        """Build for the target alone; without one, the library would look for a device."""
        config = super()._config(library, builder, precision, model, work)
        major, minor = self.target(work.device)
        config.num_compute_capabilities = 1
        if not config.set_compute_capability(getattr(library.ComputeCapability, f"SM{major}{minor}"), 0):
            raise RuntimeMismatch(f"TensorRT-RTX does not build for compute capability {major}.{minor}.")
        return config

    def _call(self, engine: Any, model: Model, work: Workspace) -> BySize:
        """Make the calls, and run each once: TensorRT-RTX compiles kernels for the device when they first run.

        Calls that are recorded have run for that.
        """
        import torch

        calls = super()._call(engine, model, work)
        if self.cuda_graph:
            return calls
        with work.stage("build"):
            for size in work.batch_sizes:
                calls(torch.zeros(shape_of(model, size), device=work.device))
            torch.cuda.synchronize(work.device)
        return calls

    def _look_at(self, network: Any, folder: Path) -> None:
        """Write how many layers of the parsed network have an output of each type: an engine tells it only on a GPU."""
        layers = [network.get_layer(index) for index in range(network.num_layers)]
        types = Counter(str(layer.get_output(0).dtype).rpartition(".")[2].capitalize() for layer in layers)
        write_json(folder / PARSED, {"count": len(layers), "outputs": dict(types)})


@cache
def import_rtx() -> Any:
    """Return the module of TensorRT-RTX's Python API with its libraries loaded, or refuse if one of both is missing."""
    missing = [name for name in (LIBRARIES, API) if find_spec(name) is None]
    if missing:
        raise UserError(f"runtime=tensorrt_rtx needs TensorRT-RTX and {' and '.join(missing)} is missing; {INSTALL}.")
    (folder,) = find_spec(LIBRARIES).submodule_search_locations  # type: ignore[union-attr, misc]
    try:
        for name in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
            ctypes.CDLL(str(next(Path(folder).glob(name))), mode=ctypes.RTLD_GLOBAL)
        import tensorrt_rtx_bindings
    except (OSError, ImportError, StopIteration) as error:
        raise UserError(f"runtime=tensorrt_rtx cannot load TensorRT-RTX ({str(error) or name}); {INSTALL}.") from error
    return tensorrt_rtx_bindings


def builds_for(library: Any) -> list[Capability]:
    """Return the compute capabilities that the builder knows."""
    names = [name for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted(capability(f"{name[2:-1]}.{name[-1]}") for name in names)


def _read(value: str | float) -> Capability:
    try:
        return capability(str(value))
    except ValueError:
        raise UserError(
            f"runtime.compute_capability={value} is not valid; give one such as 8.9, and several as 8.6,8.9, with a job"
            " for each."
        ) from None


def _dotted(value: Capability) -> str:
    return f"{value[0]}.{value[1]}"
