"""The time of a call by other tools than ours: torch.utils.benchmark, torch's profiler, and events as in trtexec."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Call = Callable[[], object]


def benchmark_ms(call: Call, calls: int) -> float:
    """Return the wall time of a call by torch.utils.benchmark, which waits for the last of `calls` alone."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.timeit(calls).median * 1e3


def kernels_ms(call: Call, calls: int) -> float:
    """Return how long the GPU works on a call by torch's profiler: the sum of its kernels, without gaps between them.

    It is 0 where the profiler sees no kernels.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return busy_ms(found, DeviceType.CUDA) / calls


def busy_ms(found: profile, device: DeviceType) -> float:
    """Return the sum of all that a profile has of a device."""
    events = [event for event in found.events() or () if event.device_type == device and not event.is_user_annotation]
    return sum(event.time_range.elapsed_us() for event in events) / 1e3


def in_flight_ms(call: Call, calls: int) -> float:
    """Return the median device time of calls that do not wait for each other, by two events around each.

    So trtexec times an enqueue ("GPU Compute Time"); where handing over takes longer than the device, that is in it.
    """
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    stream = torch.cuda.current_stream()
    for first, last in events:
        first.record(stream)
        call()
        last.record(stream)
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(last) for first, last in events)


class Enqueued:
    """A call of an engine's file as trtexec makes it: addresses are set once, and enqueueV3 is all that is left."""

    def __init__(self, path: Path, profile: int, images: Tensor) -> None:
        tensorrt = import_module("tensorrt")
        self.engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING)).deserialize_cuda_engine(
            path.read_bytes()
        )
        self.context = self.engine.create_execution_context()
        classes = self.engine.get_tensor_shape("logits")[-1]
        self.images, self.logits = images, torch.empty((len(images), classes), device=images.device)
        assert self.context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
        self.context.set_input_shape("input", tuple(images.shape))
        self.context.set_tensor_address("input", self.images.data_ptr())
        self.context.set_tensor_address("logits", self.logits.data_ptr())

    def __call__(self) -> None:
        assert self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream)
