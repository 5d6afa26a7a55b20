"""PyTorch itself: eager, compiled, or recorded as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pq_sweep.runtimes.cuda import own_stream, record_graph, refuse_on_cpu, use_tf32
from pq_sweep.runtimes.graph import Precisions, precision_of
from pq_sweep.runtimes.session import BySize, Call, CallSession
from pq_sweep.types import Data, Model, Quantizer, Runtime, Session, UserError, Workspace, choose

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# For so many batch sizes and live sessions together torch.compile may make separate code; its default is 8.
MOST_COMPILED = 64
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # in these, torch.compile records CUDA graphs


@dataclass(frozen=True, kw_only=True)
class Torch:
    """PyTorch; `compile` is a mode of torch.compile, and `cuda_graph` records the calls that are timed."""

    channels_last: bool
    compile: str | None
    cuda_graph: bool
    tf32: bool

    # FP16 on a CPU is emulated, some 26 times slower than FP32: not worth measuring.
    precisions: ClassVar[Precisions] = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "fp16", "bf16")}
    graphs: ClassVar[bool] = False  # it runs the network itself

    def __post_init__(self) -> None:
        choose("runtime.compile", self.compile or "default", COMPILE_MODES)
        if self.cuda_graph and self.compile in GRAPH_MODES:
            raise UserError(
                f"runtime.compile={self.compile} makes CUDA graphs itself; leave runtime.cuda_graph=true out."
            )

    def resolve(self, precision: str, device: str) -> Runtime:
        refuse_on_cpu(device, {"cuda_graph": self.cuda_graph, "tf32": self.tf32})
        return self

    def require(self, device: str) -> None:
        """Torch is always there."""

    def open(self, model: Model, quantizer: Quantizer, data: Data, work: Workspace) -> Session:
        """Convert the network to the quantizer's precision, save its state_dict and run it."""
        import torch

        if excluded := getattr(quantizer, "keywords", {}).get("exclude"):
            raise UserError(
                f"runtime=torch converts every layer, so quantizer.exclude={excluded} needs runtime=onnxruntime."
            )
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision_of(quantizer)]
        use_tf32(self.tf32, work.device)
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        with work.stage("quantize"):
            module = model.module.to(work.device, dtype).to(memory_format=layout)
            module.eval()
        artifact = work.folder / "model.pt"
        torch.save(module.state_dict(), artifact)
        details = {"dtype": str(dtype).removeprefix("torch."), "tf32": self.tf32, "channels_last": self.channels_last}
        details |= {"compile": self.compile, "cuda_graph": self.cuda_graph}
        if work.device != "cpu":
            own_stream(work.device)
            torch.backends.cudnn.benchmark = True  # batch sizes are fixed: cuDNN may look for the fastest kernels
        network = converting(module, dtype, layout)
        call = inferring(compiled(network, self.compile) if self.compile else network)
        if self.compile or self.cuda_graph:
            with work.stage("build"):
                ready = {size: self._ready(call, model.sample(size).float(), work.device) for size in work.batch_sizes}
                call = BySize(ready)
        return CallSession(call, "torch", self._engine(), work.device, artifact, details, self._release)

    def _ready(self, call: Call, images: Tensor, device: str) -> Call:
        """Compile the call for a batch of this size, and record it; torch.compile records at the second call."""
        for _ in range(3 if self.compile in GRAPH_MODES else 1):
            call(images)
        return record_graph(call, images, device) if self.cuda_graph else call

    def _engine(self) -> str:
        import torch

        how = f"compiled ({self.compile})" if self.compile else "eager"
        return f"torch {torch.__version__} {how}" + (", CUDA graph" if self.cuda_graph else "")

    def _release(self) -> None:
        """Leave torch as other parts of a job expect it."""
        import torch

        torch.backends.cudnn.benchmark = False
        if self.compile:
            torch.compiler.reset()


def converting(module: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> Call:
    """Return a call from float32 images to float32 logits by a network of another type and memory layout."""
    return lambda images: module(images.to(dtype, memory_format=layout)).float()


def inferring(call: Call) -> Call:
    """Return a call that runs without anything that training needs."""
    import torch

    return torch.inference_mode()(call)


def compiled(call: Call, mode: str) -> Call:
    """Compile as one graph; what cannot be compiled is an error instead of falling back to eager.

    A CUDA graph that torch.compile makes writes its logits to where the next call writes them too, so they are copied.
    """
    import torch

    torch._dynamo.config.recompile_limit = MOST_COMPILED
    fast = torch.compile(call, mode=mode, fullgraph=True, dynamic=False)
    own = torch.clone if overwrites(mode) else _as_it_is

    def run(images: Tensor) -> Tensor:
        try:
            return own(fast(images))
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"runtime.compile={mode} cannot compile this model: {reason}; leave it out.") from error

    return run


def overwrites(mode: str) -> bool:
    """Say whether code that is compiled in this mode, or in any by a setting of torch's, runs as CUDA graphs."""
    from torch._inductor import config, list_mode_options

    return bool(list_mode_options(mode).get("triton.cudagraphs", config.triton.cudagraphs))


def _as_it_is(logits: Tensor) -> Tensor:
    return logits
