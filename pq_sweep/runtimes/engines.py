"""Engines of TensorRT: how they are built, the versions that can build them, and a cache of those built before.

Wherever TensorRT can read precision from the graph, the graph has it: it then means the same under every version.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pq_sweep.core.environment import device_name
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.fingerprint import file_hash
from pq_sweep.core.hardware import GPU, Capability, Gpu
from pq_sweep.runtimes.graph import Precisions, RuntimeMismatch
from pq_sweep.runtimes.ort import ENVIRONMENTS, require_onnxruntime
from pq_sweep.types import Model, Runtime, Stage, UserError, Workspace, choose

T = TypeVar("T")
Shape = tuple[int, int, int, int]

log = logging.getLogger(__name__)

PROFILES = ("each", "range")
RECORD = "built.json"
# Precisions that TensorRT runs only from a compute capability on, and what to do on other GPUs. For INT4 it is what the
# builder of TensorRT-RTX 1.7 says: it refuses 7.5.
NEEDED: dict[str, tuple[Capability, str]] = {
    "bf16": (GPU["bf16"].since or (0, 0), "leave it out"),
    "fp8": (GPU["fp8"].since or (0, 0), "use quantizer=int8 or quantizer=fp16"),
    "int4": ((8, 0), "use quantizer=int8 or quantizer=fp16"),
}
WITHOUT_EFFECT = ("cuda_graph",)  # on the engine: a CUDA graph is recorded after it is built


@dataclass(frozen=True, kw_only=True)
class EngineBuilder:
    """How TensorRT builds: tuned for `each` timed batch size or for their `range`, and at which level (0 to 5).

    With `sparsity`, kernels for 2:4 sparse weights are tried where weights have that pattern.
    """

    profile: str
    optimization_level: int
    sparsity: bool
    tf32: bool

    name: ClassVar[str] = "tensorrt"
    precisions: ClassVar[Precisions] = {"cpu": (), "cuda": ("fp32", "fp16", "bf16", "int8", "mixed")}

    def __post_init__(self) -> None:
        choose("runtime.profile", self.profile, PROFILES)
        if self.optimization_level not in range(6) or isinstance(self.optimization_level, bool):
            raise UserError(
                f"runtime.optimization_level={self.optimization_level} is not valid; give a whole number from 0 to 5."
            )

    def resolve(self, precision: str, device: str) -> Runtime:
        return self  # type: ignore[return-value]  # `open` is the subclass's

    def library(self) -> Any:
        """Return the module that builds and runs engines."""
        return import_tensorrt(self.name)

    def target(self, device: str) -> Capability:
        """Return the compute capability that engines are built for."""
        import torch

        return torch.cuda.get_device_capability(device)

    def require(self, device: str) -> None:
        """Refuse to start without a supported TensorRT, or with an option that the GPU does not support."""
        self.library()
        require_onnxruntime(self.name)
        if self.sparsity:
            need(GPU["sparse"].since or (0, 0), "runtime.sparsity=true", self.gpu(device), "leave it out")

    def gpu(self, device: str) -> Gpu:
        """Return the GPU that engines are built for."""
        return Gpu(device_name(device), self.target(device))

    def require_precision(self, precision: str, device: str) -> None:
        """Refuse a precision that the GPU does not run, before anything is built."""
        if precision in NEEDED:
            least, instead = NEEDED[precision]
            need(least, f"quantizer={precision} under TensorRT", self.gpu(device), instead)

    def profiles(self, sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Return the batch sizes (least, optimal, most) of each optimization profile."""
        if self.profile == "each":
            return [(size, size, size) for size in sizes]
        return [(1, max(sizes), max(sizes))]

    def about(self, graph: Path, work: Workspace, precision: str) -> dict[str, Any]:
        """Return all that an engine depends on."""
        return {
            "graph": file_hash(graph),
            "precision": precision,
            "tensorrt": self.library().__version__,
            "gpu": device_name(work.device),
            "compute_capability": list(self.target(work.device)),
            "batch_sizes": list(work.batch_sizes),
            "builder": self.name,
            "options": {name: value for name, value in asdict(self).items() if name not in WITHOUT_EFFECT},
        }

    def described(self, about: dict[str, Any]) -> dict[str, Any]:
        """Return what a result records about how its engine was built."""
        options = {name: getattr(self, name) for name in ("profile", "optimization_level", "sparsity", "tf32")}
        return {"tensorrt": about["tensorrt"]} | options


def import_tensorrt(runtime: str) -> Any:
    """Return the module `tensorrt`, or refuse if it is missing or a version that is not supported."""
    if find_spec("tensorrt") is None:
        raise UserError(f"runtime={runtime} needs TensorRT; {ENVIRONMENTS}, or use runtime=onnxruntime.")
    import tensorrt

    if tensorrt.__version__.partition(".")[0] != "10":
        raise UserError(
            f"runtime={runtime} works with TensorRT 10 and found {tensorrt.__version__}; install tensorrt-cu12==10.4.0"
            " (V100, A100) or tensorrt-cu13<11."
        )
    return tensorrt


def need(least: Capability, what: str, gpu: Gpu, instead: str) -> None:
    """Refuse `what` on a GPU of less than a compute capability, and say what to do instead."""
    if gpu.capability < least:
        raise UserError(
            "{} needs compute capability {}.{} or later and this is {}; {}.".format(what, *least, gpu, instead)
        )


def shape_of(model: Model, size: int) -> Shape:
    """Return the shape of a batch of `size` images."""
    return size, model.preprocess.channels, model.preprocess.size, model.preprocess.size


def built(folder: Path, about: dict[str, Any], work: Workspace, build: Callable[[], T]) -> T:
    """Return what `build` makes; it leaves its engine files in `folder`, or finds those of an earlier build there.

    The cache finds an engine by all that it depends on, and two graphs never share one. The seconds of an earlier
    build count as preparation as if they had been spent now, and are marked as cached.
    """
    seconds = _taken(folder, about, work.stage)
    if seconds is not None:
        before = _engines(folder)
        with work.stage("load_engine"):
            made = build()
        if _engines(folder) != before:
            raise RuntimeMismatch("TensorRT does not take the engine in the cache that it built itself; use cache=off.")
        work.stage.count_cached("build", seconds)
        return made
    start = time.perf_counter()
    with work.stage("build"):
        made = build()
    record = {"about": about, "seconds": time.perf_counter() - start, "bytes": _bytes(folder)}
    write_json(folder / RECORD, record)
    if work.stage.cache:
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        work.stage.cache.put("engines", about, folder, {"seconds": record["seconds"]}, names)
    return made


def _taken(folder: Path, about: dict[str, Any], stage: Stage) -> float | None:
    """Return how long the engine in a job's folder, or its copy from the cache, took; without one, empty the folder."""
    if record := _whole(folder, about):
        return float(record["seconds"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    found = stage.cache and stage.cache.take("engines", about, folder)
    return float(found["seconds"]) if found else None


def _whole(folder: Path, about: dict[str, Any]) -> dict[str, Any] | None:
    """Return the folder's record if it holds just the wanted engine, in the size in which it was built."""
    record: dict[str, Any] | None = read_json(folder / RECORD)
    return record if record and record["about"] == about and record["bytes"] == _bytes(folder) else None


def _bytes(folder: Path) -> dict[str, int]:
    """Return the size of each file below a folder, except JSON files, which only describe it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json")
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}


def _engines(folder: Path) -> dict[Path, int]:
    """Return when each engine was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.engine")}
