"""What a job found: typed parts, made plain only where `result.json` is written and read.

`docs/results.md` describes every field. A part is written with its fields in order; a field whose default is None is
left out if it is None. A field that an earlier version did not write is read as its default, or as None without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from pq_sweep.core.files import read_json
from pq_sweep.types import Record

# If other processes keep more cores than this busy, latency is called disturbed.
NOISY_LOAD = 0.2

Interval = tuple[float, float]
# Marks a field whose own entries are written among those of the part that it belongs to.
INLINE = {"inline": True}


class Part:
    """A frozen dataclass that knows its plain form."""

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Read a part; entries that are no field of it are left out."""
        return cls(**{name: plain.get(name, default) for name, default in _defaults(cls).items()})

    def plain(self) -> Record:
        """Return the part as JSON knows it."""
        found: Record = {}
        for each in fields(self):  # type: ignore[arg-type]
            value = getattr(self, each.name)
            inline = each.metadata.get("inline", False)
            if value is None and (inline or each.default is None):
                continue
            found |= _plain(value) if inline else {each.name: _plain(value)}
        return found


def _defaults(cls: type[Any]) -> Record:
    return {each.name: None if each.default is MISSING else each.default for each in fields(cls)}


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        return value.plain()
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True, kw_only=True)
class Accuracy(Part):
    """Shares of the evaluation images whose class came first, or among the first five."""

    samples: int
    batch_size: int
    top1: float
    top1_ci95: Interval
    top5: float | None


@dataclass(frozen=True, kw_only=True)
class Compared(Accuracy):
    """Accuracy beside that of the uncompressed model on the same images; the drop is in points."""

    drop_points: float
    drop_ci95_points: Interval
    drop_p: float
    only_baseline_right: int
    only_this_right: int
    agreement: float


@dataclass(frozen=True, kw_only=True)
class Counts(Part):
    """The size of a network itself: its parameters, zeros, shapes and multiply-accumulate operations.

    `uncounted` are operations that no multiply-accumulates are counted for, if there are any.
    """

    params: int
    nonzero_params: int
    weights: int
    sparsity: float
    structure: str
    macs: int
    uncounted: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Network(Counts):
    """A network's input, classes, licence and size; `labels` are the classes of its logits in order."""

    input: list[int]
    preprocess: Record
    classes: int
    labels: list[str] | None
    licence: str | None


@dataclass(frozen=True, kw_only=True)
class Reference(Accuracy, Counts):
    """The uncompressed model in FP32 under torch; `size_bytes` is the size of its state_dict."""

    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Spread(Part):
    """Statistics of a call's time; a percentile for which there are too few samples is None."""

    iterations: int
    p50_ms: float
    p50_ci95_ms: Interval | None
    p90_ms: float | None
    p99_ms: float | None
    mean_ms: float
    std_ms: float | None
    throughput: float
    outliers: int
    unstable: list[str]


@dataclass(frozen=True, kw_only=True)
class Timed(Spread):
    """A call timed by one clock, after its warm-up."""

    clock: str
    warmup: Record
    duration_s: float


@dataclass(frozen=True, kw_only=True)
class Latency(Timed):
    """The latency of a batch size, and what device and machine did meanwhile; a GPU or repeats give the last fields."""

    energy_per_image_j: float | None
    device_state: Record
    cpu_time_per_iteration_ms: float | None = None
    load_of_others: float = 0.0
    loads: list[float] | None = None
    host_to_host: Timed | None = None
    enqueue_ms: float | None = None
    host_bound: bool | None = None
    pipelined_throughput: float | None = None
    repeats: Record | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Read a latency."""
        host = plain.get("host_to_host")
        return super().of({**plain, "host_to_host": host and Timed.of(host)})


@dataclass(frozen=True, kw_only=True)
class Paired(Part):
    """How much faster a session is than one of the uncompressed model, with both timed in turn."""

    pairs: int
    speedup: float
    speedup_ci95: Interval | None
    dense_p50_ms: float
    p50_ms: float
    unstable: list[str]
    repeats: Record | None = None


@dataclass(frozen=True, kw_only=True)
class Memory(Part):
    """Peaks of a GPU's memory in MB, by torch's allocator, by NVML, and by what is less free than at the beginning."""

    allocator_mb: float | None
    allocator_reserved_mb: float | None
    nvml_process_mb: float | None
    nvml_device_mb: float | None
    taken_mb: float | None

    @property
    def process_mb(self) -> float | None:
        """Return what the process holds, whichever library took it: TensorRT's and ONNX Runtime's share as well."""
        return self.taken_mb if self.nvml_process_mb is None else self.nvml_process_mb


@dataclass(frozen=True, kw_only=True)
class Speed(Part):
    """Latency by batch size, and the peak of memory meanwhile."""

    latency: dict[str, Latency]
    peak_memory_mb: float | None
    memory: Memory | None = None
    paired: dict[str, Paired] | None = None

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Read what was measured of speed."""
        memory, pairs = plain.get("memory"), plain.get("paired")
        return cls(
            latency={size: Latency.of(one) for size, one in plain["latency"].items()},
            peak_memory_mb=plain["peak_memory_mb"],
            memory=memory and Memory.of(memory),
            paired=pairs and {size: Paired.of(one) for size, one in pairs.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Sizes(Part):
    """Bytes of the original, of the file to deploy, and of the pruned FP32 network in each format."""

    original: int
    compressed: int
    compressed_zstd: int
    formats: dict[str, int]
    smallest_format: str


@dataclass(frozen=True, kw_only=True)
class Bits(Part):
    """The bits of an artifact's weights and of both factors of its products, by what it or its graph holds.

    `packed_bytes` are those of all tensors if each weight took just its bits, `bops` the multiply-accumulates of one
    image, each times the bits of both factors, and `rel_bops` their share of those of the uncompressed model in FP32.
    `weight_bits` is the mean of the weights, `activation_bits` of the multiply-accumulates, and `sparsity` the share of
    weights whose code stands for 0. What has nothing to be the mean of is None.
    """

    packed_bytes: int
    bops: int
    rel_bops: float | None
    weight_bits: float | None
    activation_bits: float | None
    sparsity: float | None


@dataclass(frozen=True, kw_only=True)
class Preparation(Part):
    """Seconds of the stages that make the compressed model and of all stages, and which came out of the cache."""

    prep_s: dict[str, float]
    from_cache: list[str]
    stage_s: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Ran(Part):
    """What really ran; `details` are the runtime's own."""

    runtime: str
    device: str
    engine: str
    precision: str
    artifact: str
    sha256: str
    details: Record = field(default_factory=dict, metadata=INLINE)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Read what ran; whatever is no field is a detail."""
        known = {each.name for each in fields(cls)}
        return super().of({**plain, "details": {key: value for key, value in plain.items() if key not in known}})


@dataclass(frozen=True, kw_only=True)
class Result(Part):
    """A finished job, or one whose artifact was built for another machine and not run: it has no `accuracy` or `speed`.

    `status` says which.
    """

    status: str = "finished"
    fingerprint: str
    started: float
    seconds: float
    tries: list[Record]
    accuracy: Compared | None
    speed: Speed | None = field(metadata=INLINE)
    network: Network
    images: Record
    size_bytes: Sizes
    bits: Bits | None = None
    preparation: Preparation = field(metadata=INLINE)
    baseline: Reference
    session: Ran
    hardware: list[str]
    notes: list[str] | None = None
    config: Record
    environment: Record

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Read a result, also one that an earlier version wrote."""
        parts = {
            "accuracy": plain["accuracy"] and Compared.of(plain["accuracy"]),
            "speed": Speed.of(plain) if "latency" in plain else None,
            "network": Network.of(plain["network"]),
            "size_bytes": Sizes.of(plain["size_bytes"]),
            "bits": Bits.of(plain["bits"]) if plain.get("bits") else None,
            "preparation": Preparation.of(plain),
            "baseline": Reference.of(plain["baseline"]),
            "session": Ran.of(plain["session"]),
            "hardware": plain.get("hardware") or [],
        }
        return super().of({**plain, **parts})

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return what a `result.json` holds, or None if there is none or it is damaged."""
        try:
            return cls.of(read_json(path))
        except (KeyError, TypeError, AttributeError):
            return None
