"""What the runtimes share on a CUDA device: a stream, TF32, CUDA graphs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pq_sweep.runtimes.graph import RuntimeMismatch
from pq_sweep.runtimes.session import Call
from pq_sweep.types import UserError

if TYPE_CHECKING:
    from torch import Tensor

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
FIRST_CHOICE: dict[str, bool] = {}  # what libraries that read the environment once have read in this process


def own_stream(device: str) -> Any:
    """Make a device current, and on it a stream other than the default one, and return the stream.

    ONNX Runtime takes the default stream for "none given", and TensorRT waits for the whole device on it. Another
    session may have made another device current meanwhile, so a stream of an earlier session does so as well.
    """
    import torch

    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream == 0:
        torch.cuda.synchronize(device)  # weights may still be on their way
        stream = torch.cuda.Stream(device)
    torch.cuda.set_device(device)
    torch.cuda.set_stream(stream)
    return stream


def record_graph(call: Call, images: Tensor, device: str) -> Call:
    """Record a call on a batch of this size as a CUDA graph, and prove that the graph answers new images correctly.

    A graph reads and writes fixed addresses: images are copied in and logits copied out on the device, as part of the
    call. The call itself is not made again afterwards, as what it works with now belongs to the graph. Raise
    RuntimeMismatch if the graph's logits are not those of the call.
    """
    import torch

    given = images, images.flip(0) + 1
    expected = [call(batch) for batch in given]
    fixed, graph = images.clone(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for _ in range(3):  # now libraries load, choose kernels and allocate, which must not happen while recording
            call(fixed)
    torch.cuda.synchronize(device)
    # Without a stream, torch records on one that it makes once, on the device that is current then.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        logits = call(fixed)

    def replay(images: Tensor) -> Tensor:
        fixed.copy_(images)
        graph.replay()
        return logits.clone()

    for batch, right in zip(given, expected, strict=True):
        if not torch.allclose(replay(batch), right, rtol=1e-2, atol=1e-2):
            raise RuntimeMismatch(f"the CUDA graph for {len(images)} images answers differently from the model.")
    return replay


def refuse_on_cpu(device: str, options: dict[str, bool]) -> None:
    """Refuse options that only a CUDA device has if the device is a CPU."""
    if device == "cpu" and (given := [name for name, value in options.items() if value]):
        raise UserError(f"runtime.{given[0]}=true needs a GPU; leave it out with device=cpu.")


def use_tf32(allowed: bool, device: str) -> None:
    """Let torch round FP32 products to TF32 on a device, or not; refuse what the environment makes impossible."""
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    told = os.environ.get(TF32_OVERRIDE)
    if device == "cpu" or told is None:
        return
    if allowed and told == "0":
        raise UserError(
            f"runtime.tf32=true is impossible with {TF32_OVERRIDE}=0, which the environment or an earlier job with"
            " runtime=tensorrt runtime.tf32=false of this process has set; run it as a sweep of its own."
        )
    if not allowed and told != "0":
        raise UserError(
            f"FP32 is impossible on {device} with {TF32_OVERRIDE}={told}, with which NVIDIA's libraries round it to"
            " TF32 whatever they are told; unset it, as runtime.tf32=true works without it."
        )


def override_tf32(allowed: bool, device: str) -> None:
    """Do as `use_tf32` for libraries that only look at the environment, such as TensorRT under ONNX Runtime.

    They read it once, so the choice of the first such job holds for the whole process. To allow TF32 nothing is set:
    they do so by themselves, and other libraries of the process would round FP32 as well, from then on.
    """
    use_tf32(allowed, device)
    if FIRST_CHOICE.setdefault("tf32", allowed) is not allowed:
        raise UserError(
            f"runtime=tensorrt runtime.tf32={str(allowed).lower()} is impossible after a job of this process with the"
            " contrary, as TensorRT looks at its environment once; run it as a sweep of its own."
        )
    if not allowed:
        os.environ[TF32_OVERRIDE] = "0"
