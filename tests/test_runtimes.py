"""Runtimes: a session gives the answers of the network on the device asked for, or does not come to exist."""

from __future__ import annotations

import functools
import gc
import shutil
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import python
from independent import onnx_logits, relative_error, snr_db, torch_logits, workspace
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from pq_sweep import quantizers, runtimes
from pq_sweep.datasets import digits
from pq_sweep.environment import resolve_device
from pq_sweep.models import digits_cnn
from pq_sweep.quantizers import quantizer
from pq_sweep.runtimes import Auto, OnnxRuntime, RuntimeMismatch, TensorRT, Torch, precision_of
from pq_sweep.types import Data, Model, Session, Stage, UserError

fp16 = functools.partial(quantizers.fp16, exclude=[])
int8_dynamic = functools.partial(quantizers.int8_dynamic, exclude=[])

Opener = Callable[[str], Session]
REALISED: dict[str, tuple[Any, Any]] = {
    "torch fp32": (Torch(), quantizers.none),
    "torch bf16": (Torch(), quantizers.bf16),
    "onnxruntime fp32": (OnnxRuntime(), quantizers.none),
    "onnxruntime fp16": (OnnxRuntime(), fp16),
    "onnxruntime int8_dynamic": (OnnxRuntime(), int8_dynamic),
}
each_session = pytest.mark.parametrize("name", REALISED)


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn())


@pytest.fixture(scope="module")
def images(data: Data) -> Tensor:
    return data.evaluation.fetch(list(range(100)))


@pytest.fixture(scope="module")
def expected(images: Tensor) -> np.ndarray:
    return torch_logits(digits_cnn().module, images)


@pytest.fixture(scope="module")
def opened(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """Open each kind of session once."""

    @functools.cache
    def make(name: str) -> Session:
        runtime, what = REALISED[name]
        return runtime.open(digits_cnn(), what, data, workspace(tmp_path_factory.mktemp("job")))

    return make


# Sessions


@each_session
@pytest.mark.parametrize("batch", [1, 3, 100])
def test_a_session_answers_like_the_network(
    opened: Opener, images: Tensor, expected: np.ndarray, name: str, batch: int
) -> None:
    logits = opened(name)(images[:batch])

    assert (logits.dtype, logits.shape, logits.device.type) == (torch.float32, (batch, 10), "cpu")
    if name.endswith("fp32"):
        assert relative_error(expected[:batch], logits.numpy()) < 1e-5
    else:
        assert snr_db(expected[:batch], logits.numpy()) > 20


@each_session
def test_a_session_takes_images_in_any_memory_layout(opened: Opener, images: Tensor, name: str) -> None:
    columns_first = images.transpose(2, 3).contiguous().transpose(2, 3)

    assert not columns_first.is_contiguous()
    assert torch.allclose(opened(name)(columns_first), opened(name)(images), atol=1e-2)


@each_session
def test_a_session_says_what_runs_it(opened: Opener, name: str) -> None:
    session, library = opened(name), name.split()[0]

    assert (session.runtime, session.device) == (library, "cpu")
    version = {"torch": torch.__version__, "onnxruntime": onnxruntime.__version__}[library]
    assert session.engine.startswith(f"{library} {version} ")
    assert session.engine.endswith({"torch": "eager", "onnxruntime": "CPUExecutionProvider"}[library])


@each_session
def test_the_artifact_is_the_only_file_of_a_session(opened: Opener, name: str) -> None:
    artifact = opened(name).artifact

    assert artifact.is_file()
    assert {path.name for path in artifact.parent.rglob("*")} <= {artifact.name, "status.json", "progress.json"}


def test_the_artifact_of_torch_is_its_state_dict(opened: Opener) -> None:
    state = torch.load(opened("torch fp32").artifact, weights_only=True)
    expected = digits_cnn().module.state_dict()

    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_the_artifact_of_bf16_is_half_as_big(opened: Opener) -> None:
    state = torch.load(opened("torch bf16").artifact, weights_only=True)

    assert {value.dtype for key, value in state.items() if "num_batches" not in key} == {torch.bfloat16}


@pytest.mark.parametrize("name", [name for name in REALISED if name.startswith("onnxruntime")])
def test_the_artifact_of_onnxruntime_runs_alone(opened: Opener, images: Tensor, name: str) -> None:
    # In one batch: int8_dynamic takes the range of its activations over the batch.
    alone = onnx_logits(opened(name).artifact, images, batch=len(images))

    assert relative_error(alone, opened(name)(images).numpy()) < 1e-5


@pytest.mark.parametrize("name", [name for name in REALISED if name.startswith("onnxruntime")])
def test_every_node_is_placed_on_the_cpu(opened: Opener, name: str) -> None:
    if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
        pytest.skip(f"onnxruntime {onnxruntime.__version__} does not say where nodes are; 1.24 is the first that does")
    counts = opened(name).details["nodes_per_provider"]

    assert list(counts) == ["CPUExecutionProvider"]
    assert counts["CPUExecutionProvider"] >= 7  # five convolutions and two linear layers


def test_details_say_how_the_graph_came_to_be(opened: Opener) -> None:
    details = opened("onnxruntime fp16").details

    assert 0 <= details["export_error"] < 1e-5
    assert details["exported_bytes"] == pytest.approx(4 * 59_000, rel=0.2)
    assert details["quantizer"] == {"excluded_nodes": []}


def test_closing_frees_a_session_of_torch(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    network = weakref.ref(model.module)
    session = Torch().open(model, quantizers.none, data, workspace(tmp_path))
    del model
    assert network() is not None
    session.close()
    gc.collect()

    assert network() is None


def test_closing_frees_a_session_of_onnxruntime(tmp_path: Path, doubling: Path) -> None:
    work = workspace(tmp_path)
    inner = runtimes.ort_session(doubling, "CPUExecutionProvider", {}, work)
    alive = weakref.ref(inner)
    session = runtimes.OrtSession(inner, "cpu", doubling, {}, "onnxruntime")
    del inner
    session.close()
    gc.collect()

    assert alive() is None


# What ONNX Runtime is told


@pytest.fixture
def doubling(tmp_path: Path) -> Path:
    """A graph with one product, made without an exporter."""
    factor = numpy_helper.from_array(np.array(2, dtype=np.float32), "two")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("input", "logits")]
    node = helper.make_node("Mul", ["input", "two"], ["logits"])
    graph = helper.make_graph([node], "doubling", ends[:1], ends[1:], [factor])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "doubling.onnx")
    return tmp_path / "doubling.onnx"


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_gets_the_threads_of_the_job(tmp_path: Path, doubling: Path, threads: int) -> None:
    session = runtimes.ort_session(doubling, "CPUExecutionProvider", {}, workspace(tmp_path, threads))

    assert session.get_session_options().intra_op_num_threads == threads


def test_a_graph_that_cannot_be_read_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")

    with pytest.raises(RuntimeMismatch, match=r"CPUExecutionProvider cannot run broken\.onnx"):
        runtimes.ort_session(tmp_path / "broken.onnx", "CPUExecutionProvider", {}, workspace(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider"])
def test_a_provider_that_is_not_there_is_a_mismatch(tmp_path: Path, doubling: Path, provider: str) -> None:
    work = replace(workspace(tmp_path), device="cuda:0")

    with pytest.raises(RuntimeMismatch, match=provider):
        runtimes.ort_session(doubling, provider, {}, work)


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="onnxruntime has CUDA")
def test_onnxruntime_without_cuda_is_refused_at_once() -> None:
    OnnxRuntime().require("cpu")
    with pytest.raises(UserError, match=r"no CUDAExecutionProvider; see environment\.yml"):
        OnnxRuntime().require("cuda:0")


# Names in the documentation of the two providers, of those that matter here:
# https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html#configurations
# https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html#configuration-options
DOCUMENTED = {
    "TensorrtExecutionProvider": {
        "device_id",
        "user_compute_stream",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_profile_max_shapes",
        "trt_max_workspace_size",
        "trt_builder_optimization_level",
        "trt_cuda_graph_enable",
        "trt_fp16_enable",
        "trt_int8_enable",
    },
    "CUDAExecutionProvider": {
        "device_id",
        "user_compute_stream",
        "use_tf32",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "do_copy_in_default_stream",
        "arena_extend_strategy",
        "gpu_mem_limit",
        "enable_cuda_graph",
        "prefer_nhwc",
    },
}


class Gpu:
    """Stands in for onnxruntime.InferenceSession where there is no GPU: notes what it is told, leaves an engine."""

    engines = 1
    ran_on: str | None = None
    told: dict[str, Any]

    def __init__(
        self, path: Path, settings: Any, *, providers: list[tuple[str, dict[str, str]]], **kwargs: Any
    ) -> None:
        (self.provider, self.options), *more = providers
        Gpu.told = {"provider": self.provider, "more": more, "options": self.options, "settings": settings, **kwargs}

    def get_providers(self) -> list[str]:
        return [Gpu.ran_on or self.provider, "CPUExecutionProvider"]

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        for number in range(Gpu.engines):
            (Path(self.options["trt_engine_cache_path"]) / f"{number}.engine").touch()
        return [np.zeros((len(feed["input"]), 10), dtype=np.float32)]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> type[Gpu]:
    """A machine whose onnxruntime accepts every provider."""
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Gpu)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(Gpu, "told", {}, raising=False)
    monkeypatch.setattr(Gpu, "engines", 1)
    monkeypatch.setattr(Gpu, "ran_on", None)
    return Gpu


@pytest.fixture
def tensorrt(gpu: type[Gpu], monkeypatch: pytest.MonkeyPatch, doubling: Path) -> Callable[[Path], Session]:
    """Open a TensorRT session on a ready-made graph; its single run takes place on the CPU."""

    def make_graph(model: Model, what: Any, data: Any, work: Any, *, form: str) -> tuple[Path, dict[str, Any]]:
        assert form == "tensorrt"
        return Path(shutil.copy(doubling, work.folder / "model.onnx")), {}

    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    monkeypatch.setattr(runtimes, "make_graph", make_graph)
    return lambda folder: TensorRT().open(digits_cnn(), quantizers.none, None, workspace(folder))  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "index"), [("cuda:0", "0"), ("cuda:1", "1")])
def test_cuda_is_told_its_device_and_nothing_else_may_run(
    gpu: type[Gpu], tmp_path: Path, doubling: Path, device: str, index: str
) -> None:
    runtimes.ort_session(doubling, "CUDAExecutionProvider", {}, replace(workspace(tmp_path), device=device))

    assert (gpu.told["provider"], gpu.told["more"]) == ("CUDAExecutionProvider", [])
    assert gpu.told["settings"].get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert not gpu.told["enable_fallback"]
    assert gpu.told["options"]["device_id"] == index
    assert gpu.told["options"]["user_compute_stream"] == "7"
    assert set(gpu.told["options"]) <= DOCUMENTED["CUDAExecutionProvider"]


def test_fp32_on_cuda_is_not_tf32(gpu: type[Gpu], tmp_path: Path, doubling: Path) -> None:
    """The provider's default is TensorFloat-32 since Ampere, with 10 bits of mantissa; torch's is switched off."""
    runtimes.ort_session(doubling, "CUDAExecutionProvider", {}, replace(workspace(tmp_path), device="cuda:0"))

    assert gpu.told["options"].get("use_tf32") == "0"


def test_a_session_that_fell_back_is_refused(gpu: type[Gpu], tmp_path: Path, doubling: Path) -> None:
    gpu.ran_on = "CPUExecutionProvider"

    with pytest.raises(RuntimeMismatch, match="asked for CUDAExecutionProvider, got CPUExecutionProvider"):
        runtimes.ort_session(doubling, "CUDAExecutionProvider", {}, replace(workspace(tmp_path), device="cuda:0"))


def test_tensorrt_gets_documented_options(gpu: type[Gpu], tensorrt: Callable[[Path], Session], tmp_path: Path) -> None:
    tensorrt(tmp_path / "job")

    assert gpu.told["provider"] == "TensorrtExecutionProvider"
    assert set(gpu.told["options"]) <= DOCUMENTED["TensorrtExecutionProvider"]
    assert Path(gpu.told["options"]["trt_engine_cache_path"]).is_relative_to(tmp_path / "job")


def test_tensorrt_gets_booleans_that_its_python_binding_reads(
    gpu: type[Gpu], tensorrt: Callable[[Path], Session], tmp_path: Path
) -> None:
    """The binding raises for anything but True and False: https://github.com/microsoft/onnxruntime/issues/14091."""
    tensorrt(tmp_path / "job")
    switches = {key: value for key, value in gpu.told["options"].items() if key.endswith("_enable")}

    assert switches
    assert set(switches.values()) <= {"True", "true", "False", "false"}


def test_the_artifact_of_tensorrt_is_its_engine(tensorrt: Callable[[Path], Session], tmp_path: Path) -> None:
    session = tensorrt(tmp_path / "job")

    assert session.artifact == tmp_path / "job" / "engine" / "0.engine"
    assert session.runtime == "tensorrt"


@pytest.mark.parametrize("engines", [0, 2])
def test_tensorrt_has_to_build_one_engine(
    gpu: type[Gpu], tensorrt: Callable[[Path], Session], tmp_path: Path, engines: int
) -> None:
    gpu.engines = engines

    with pytest.raises(RuntimeMismatch, match=f"TensorRT built {engines} engines where one"):
        tensorrt(tmp_path / "job")


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_is_refused_without_its_libraries() -> None:
    with pytest.raises(UserError, match=r"runtime=tensorrt needs TensorRT; see environment\.yml"):
        TensorRT().require("cuda:0")


# Devices


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A machine with as many CUDA devices as the parameter says, of which the last is torch's current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: request.param - 1)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("devices", "asked", "expected"),
    [
        (0, "auto", "cpu"),
        (0, "cpu", "cpu"),
        (1, "auto", "cuda:0"),
        (1, "cpu", "cpu"),
        (1, "cuda", "cuda:0"),
        (2, "auto", "cuda:1"),
        (2, "cuda", "cuda:1"),
        (2, "cuda:0", "cuda:0"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["devices"],
)
def test_a_device_is_resolved(asked: str, expected: str) -> None:
    assert resolve_device(asked) == expected


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("devices", "asked", "message"),
    [
        (0, "cuda", "device=cuda was asked for and torch .* finds no CUDA device here; use device=cpu"),
        (0, "cuda:1", "device=cuda:1 was asked for"),
        (1, "cuda:1", "device=cuda:1 does not exist; this machine has cuda:0 to cuda:0"),
        (2, "cuda:2", "device=cuda:2 does not exist; this machine has cuda:0 to cuda:1"),
    ],
    indirect=["devices"],
)
def test_a_device_that_is_not_there_is_refused(asked: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_device(asked)


# What realises which precision


@pytest.mark.parametrize(
    ("precision", "device", "runtime"),
    [
        ("fp32", "cpu", Torch()),
        ("fp32", "cuda:0", Torch()),
        ("bf16", "cpu", Torch()),
        ("bf16", "cuda:0", Torch()),
        ("fp16", "cpu", OnnxRuntime()),
        ("int8", "cpu", OnnxRuntime()),
        ("int8_dynamic", "cpu", OnnxRuntime()),
        ("fp16", "cuda:0", TensorRT()),
        ("int8", "cuda:1", TensorRT()),
    ],
)
def test_auto_takes_the_runtime_that_is_fit(precision: str, device: str, runtime: Any) -> None:
    resolved = Auto().resolve(precision, device)

    assert resolved == runtime
    assert precision in resolved.precisions[device.partition(":")[0]]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_auto_promises_only_what_it_can_resolve(kind: str) -> None:
    for precision in Auto.precisions[kind]:
        assert precision in Auto().resolve(precision, kind).precisions[kind]


@pytest.mark.parametrize("runtime", [Torch(), OnnxRuntime(), TensorRT()])
def test_a_named_runtime_is_itself(runtime: Any) -> None:
    assert runtime.resolve("int8", "cpu") is runtime


@pytest.mark.parametrize(
    ("what", "precision"),
    [
        (quantizers.none, "fp32"),
        (quantizers.bf16, "bf16"),
        (fp16, "fp16"),
        (functools.partial(quantizers.int8, calibration="minmax"), "int8"),
        (functools.partial(int8_dynamic, exclude=["first"]), "int8_dynamic"),
    ],
)
def test_a_quantizer_says_its_precision(what: Any, precision: str) -> None:
    assert precision_of(what) == precision


def unmarked(source: Path, target: Path, data: Data, *, form: str, stage: Stage) -> None:
    """Forget the mark."""


@pytest.mark.parametrize("what", [unmarked, functools.partial(unmarked, form="cpu")])
def test_an_unmarked_function_is_no_quantizer(what: Any) -> None:
    with pytest.raises(UserError, match=r"unmarked is no quantizer; mark it with @quantizer\('int8'\)"):
        precision_of(what)


@quantizer("fp32")
def shifted(source: Path, target: Path, data: Data, *, form: str, stage: Stage, by: float) -> dict[str, Any]:
    """Add a constant to the last bias, as a user's own quantizer outside of the package could."""
    graph = onnx.load(source)
    bias = next(item for item in graph.graph.initializer if item.name == "fc2.bias")
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(by), bias.name))
    onnx.save(graph, target)
    return {"by": by, "form": form}


def test_a_quantizer_of_the_user_works(data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path) -> None:
    own = functools.partial(shifted, by=3.0)
    session = OnnxRuntime().open(digits_cnn(), own, data, workspace(tmp_path))

    assert precision_of(own) == "fp32"
    assert session.details["quantizer"] == {"by": 3.0, "form": "cpu"}
    assert relative_error(expected + 3, session(images).numpy()) < 1e-5


def test_torch_refuses_to_leave_layers_out(data: Data, tmp_path: Path) -> None:
    some = functools.partial(quantizers.fp16, exclude=["fc1"])

    with pytest.raises(UserError, match=r"runtime=torch converts every layer, so quantizer\.exclude=\['fc1'\] needs"):
        Torch().open(digits_cnn(), some, data, workspace(tmp_path))


# A network with attention

ATTENTION = """
import sys
from functools import partial
from pathlib import Path

import torch
from independent import relative_error, torch_logits, workspace
from torchvision.models.vision_transformer import VisionTransformer

from pq_sweep import quantizers
from pq_sweep.runtimes import OnnxRuntime
from pq_sweep.types import Model, Preprocess

torch.manual_seed(0)
network = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
torch.nn.init.normal_(network.heads.head.weight)
model = Model(network.eval(), 10, Preprocess(size=32, resize=32))
images = model.sample(3)
expected = torch_logits(network, images)
what = {"none": quantizers.none, "fp16": partial(quantizers.fp16, exclude=[])}[sys.argv[1]]
session = OnnxRuntime().open(model, what, None, workspace(Path(sys.argv[2])))
assert relative_error(expected, session(images).numpy()) < 0.01
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "fp16"])
def test_a_vision_transformer_runs_on_the_cpu(tmp_path: Path, environment: dict[str, str], name: str) -> None:
    """In a process of its own: onnxruntime can end the whole process while it loads a graph."""
    env = environment | {"PYTHONPATH": str(Path(__file__).parent)}
    done = python(["-c", ATTENTION, name, str(tmp_path / "job")], tmp_path, env)

    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
