"""GPUs that torch.cuda finds where there are none: memory is the CPU's, and time is counted instead of taken.

What CUDA refuses, or does wrong in silence, is refused here: work on a stream of another device than the current one,
two events of different devices, a graph that is recorded on another device's stream, an output that is read after it
was overwritten. The rules are those of the CUDA programming guide and of torch's own code (c10/cuda/CUDAStream.h,
aten/src/ATen/cuda/CUDAEvent.h, torch/cuda/graphs.py), read in November 2026.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

Work = Callable[[], None]
Call = Callable[[Tensor], Tensor]

EVENT_HOST_NS = 2_000
NAME, UUIDS, MEMORY = "A100", ("aa11", "bb11"), 40_000_000_000


class CudaError(RuntimeError):
    """What a real device would not do."""


def index_of(device: Any) -> int:
    """Return the number of a device; a tensor's "cpu" stands for the first GPU, as tensors lie on the CPU here."""
    return torch.device(device).index or 0


class Stream:
    """torch.cuda.Stream: does one thing after another, from the time on at which it is handed over."""

    def __init__(self, machine: Machine, device: int, handle: int) -> None:
        self.machine, self.device_index, self.cuda_stream, self.done_ns = machine, device, handle, 0

    def take(self, device_ns: int) -> None:
        self.done_ns = max(self.done_ns, self.machine.host_ns) + device_ns

    def synchronize(self) -> None:
        self.machine.host_ns = max(self.machine.host_ns, self.done_ns)

    def wait_stream(self, other: Stream) -> None:
        self.done_ns = max(self.done_ns, other.done_ns)


class Event:
    """torch.cuda.Event: belongs to the device on which it is recorded first."""

    def __init__(self, machine: Machine, timing: bool) -> None:
        self.machine, self.timing = machine, timing
        self.stream: Stream | None = None
        self.at_ns = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.machine.stream_of(self.machine.current)
        if self.stream and self.stream.device_index != stream.device_index:
            raise CudaError(f"Event device {self.stream.device_index} does not match recording stream's device")
        self.machine.host_ns += EVENT_HOST_NS
        stream.take(0)
        self.stream, self.at_ns = stream, stream.done_ns

    def query(self) -> bool:
        return self.at_ns <= self.machine.host_ns

    def synchronize(self) -> None:
        self.machine.host_ns = max(self.machine.host_ns, self.at_ns)

    def elapsed_time(self, end: Event) -> float:
        assert self.timing
        assert end.timing
        if not (self.stream and end.stream and self.stream.device_index == end.stream.device_index):
            raise CudaError("invalid resource handle")
        return (end.at_ns - self.at_ns) / 1e6


class Graph:
    """torch.cuda.CUDAGraph: a replay does again what was handed over while it was recorded, in the same memory."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.work: list[Work] = []
        machine.graphs.append(self)

    def replay(self) -> None:
        for step in self.work:
            step()


class Machine:
    """Two GPUs; each thread has a current device, each device a current stream for the thread."""

    def __init__(self) -> None:
        self.host_ns = 0
        self.local = threading.local()
        self.handles = itertools.count(1)
        self.default = [Stream(self, device, 0) for device in (0, 1)]
        self.streams: dict[int, Stream] = {}  # by handle
        self.graphs: list[Graph] = []
        self.recording: tuple[Graph, Stream] | None = None
        self.capture_stream: Stream | None = None  # of torch.cuda.graph, which makes one for all devices
        self.pinned_on: list[int] = []
        self.taken = [0, 0]  # bytes of each device's memory, of which torch's allocator knows none

    @property
    def current(self) -> int:
        return getattr(self.local, "device", 0)

    @current.setter
    def current(self, device: int) -> None:
        self.local.device = device

    def stream_of(self, device: Any = None) -> Stream:
        index = self.current if device is None else index_of(device)
        return getattr(self.local, f"stream{index}", self.default[index])

    def set_stream(self, stream: Stream) -> None:
        """As c10: the stream becomes its device's current one, and its device the current one."""
        self.current = stream.device_index
        setattr(self.local, f"stream{stream.device_index}", stream)

    def new_stream(self, device: Any = None) -> Stream:
        stream = Stream(self, self.current if device is None else index_of(device), next(self.handles))
        self.streams[stream.cuda_stream] = stream
        return stream

    def stream_at(self, handle: int) -> Stream:
        return self.streams[handle] if handle else self.default[self.current]

    def synchronize(self, device: Any = None) -> None:
        self.stream_of(device).synchronize()

    @contextlib.contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.current = self.current, index_of(device)
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        device, before = self.current, self.stream_of(stream.device_index)
        self.set_stream(stream)
        try:
            yield
        finally:
            self.set_stream(before)
            self.current = device

    @contextlib.contextmanager
    def record(self, graph: Graph, stream: Stream | None = None) -> Iterator[None]:
        """torch.cuda.graph: without a stream, one that was made at the first use serves every device."""
        self.capture_stream = self.capture_stream or self.new_stream()
        stream = stream or self.capture_stream
        with self.on_stream(stream):
            self.recording = graph, stream
            try:
                yield
            finally:
                self.recording = None

    def hand_over(self, work: Work, stream: Stream, *, device_ns: int = 0, host_ns: int = 0) -> None:
        """Do some work on a stream as a library does that minds no device: the stream's has to be the current one."""
        if stream.device_index != self.current:
            raise CudaError(f"invalid resource handle: cuda:{stream.device_index} is not the current device")
        self.host_ns += host_ns
        if self.recording is None:
            stream.take(device_ns)
            return work()
        graph, recorded = self.recording
        if stream is not recorded:
            raise CudaError("operation not permitted: this stream is not the one that is recorded")
        return graph.work.append(work)

    def torch_op(self, device: Any, work: Work = lambda: None, *, device_ns: int = 0, host_ns: int = 0) -> None:
        """Do some work as torch does, which sees to the device itself."""
        with self.on_device(device):
            self.hand_over(work, self.stream_of(device), device_ns=device_ns, host_ns=host_ns)

    def sleep(self, cycles: int) -> None:
        """torch.cuda._sleep on a GPU of 2 GHz."""
        self.stream_of(self.current).take(cycles // 2)

    def install(self, patch: pytest.MonkeyPatch) -> Machine:
        """Put the machine in the place of torch.cuda, whose tensors lie on the CPU."""
        functions = {
            "current_device": lambda: self.current,
            "set_device": lambda device: setattr(self, "current", index_of(device)),
            "device": self.on_device,
            "current_stream": self.stream_of,
            "set_stream": self.set_stream,
            "stream": self.on_stream,
            "Stream": self.new_stream,
            "Event": lambda enable_timing=False: Event(self, enable_timing),
            "synchronize": self.synchronize,
            "CUDAGraph": lambda: Graph(self),
            "graph": self.record,
            "_sleep": self.sleep,
            "mem_get_info": lambda device=None: (MEMORY - self.taken[self.stream_of(device).device_index], MEMORY),
            "max_memory_allocated": lambda device=None: 0,
            "max_memory_reserved": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "empty_cache": lambda: None,
            "get_device_name": lambda device=None: NAME,
            "get_device_properties": lambda device: SimpleNamespace(
                name=NAME, uuid=UUIDS[index_of(device)], major=8, minor=0, total_memory=MEMORY
            ),
        }
        for name, function in functions.items():
            patch.setattr(torch.cuda, name, function)
        for owner, name in ((torch, "zeros"), (torch, "empty"), (torch.Tensor, "to"), (torch.nn.Module, "to")):
            patch.setattr(owner, name, self._on_cpu(getattr(owner, name)))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        return self

    def _on_cpu(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Let a function of torch take "cuda:1" for the memory of the CPU, which may also be page-locked."""

        def there(*args: Any, **kwargs: Any) -> Any:
            args = tuple("cpu" if _is_cuda(value) else value for value in args)
            kwargs = {key: "cpu" if _is_cuda(value) else value for key, value in kwargs.items()}
            pinned = kwargs.pop("pin_memory", False)
            found = function(*args, **kwargs)
            return self._pin(found) if pinned else found

        return there

    def _pin(self, tensor: Tensor) -> Tensor:
        """Page-lock memory, for which CUDA makes a context on the current device."""
        self.pinned_on.append(self.current)
        return tensor


def _is_cuda(value: Any) -> bool:
    return str(value).startswith("cuda") if isinstance(value, str | torch.device) else False


class Overwriting:
    """What torch.compile returns in modes with CUDA graphs: a call that ends the life of its earlier outputs."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.given: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        for logits in self.given:
            logits.fill_(torch.nan)  # where torch raises: "output of CUDAGraphs that has been overwritten"
        logits = self.call(images).clone()
        self.given.append(logits)
        return logits
