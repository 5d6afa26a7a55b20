"""Runtimes of GPUs on a stand-in for one: what they ask for, what they refuse, and that answers are the network's."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gpu_stand_in
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cuda_stand_in import Machine
from gpu_stand_in import Gpu
from independent import relative_error, runtime, snr_db, torch_logits
from independent import workspace as uncached_workspace
from onnx import TensorProto, helper, numpy_helper
from packaging.version import Version
from PIL import Image
from provider_options import DOCUMENTED
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import Module
from torchvision.models import SwinTransformer, VisionTransformer

from pq_sweep.compress import quantizers
from pq_sweep.core.cache import Cache
from pq_sweep.core.environment import cache_home
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.measure.timing import CudaClock
from pq_sweep.results.shipping import render
from pq_sweep.runtimes import (
    RuntimeMismatch,
    cuda,
    engines,
    library_error,
    make_graph,
    ort,
    ort_session,
    precision_of,
)
from pq_sweep.runtimes.cuda import TF32_OVERRIDE, record_graph
from pq_sweep.runtimes.tensorrt import DISABLED
from pq_sweep.types import Data, Model, Preprocess, Session, UserError, Workspace

fp16 = functools.partial(quantizers.fp16, exclude=[])
int8 = functools.partial(quantizers.int8, calibration="minmax", images=16, exclude=[], percentile=99.9)
QUANTIZERS = {"fp32": quantizers.none, "fp16": fp16, "int8": int8, "bf16": quantizers.bf16}
SIZES = (1, 8)
TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn())


@pytest.fixture(scope="module")
def images(data: Data) -> Tensor:
    return data.evaluation.fetch(list(range(21)))


@pytest.fixture(scope="module")
def expected(images: Tensor) -> np.ndarray:
    return torch_logits(digits_cnn().module, images)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(TF32_OVERRIDE, "0")
    return gpu_stand_in.as_a100(monkeypatch)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory, data: Data) -> Any:
    """Return the graph of the digits network for a quantizer, made once."""

    @functools.cache
    def make(precision: str, scale: float) -> tuple[Path, dict[str, Any]]:
        model = digits_cnn()
        first_weights(model).mul_(scale)
        what = QUANTIZERS[precision]
        return make_graph(model, what, data, workspace(tmp_path_factory.mktemp("graph")), form="tensorrt")

    return make


def first_weights(model: Any) -> Tensor:
    weights: Tensor = next(model.module.parameters()).detach()
    return weights


@pytest.fixture(autouse=True)
def no_work_done_twice(monkeypatch: pytest.MonkeyPatch, graphs: Any) -> None:
    def copied(model: Any, what: Any, data: Data, work: Any, *, form: str) -> tuple[Path, dict[str, Any]]:
        assert form == "tensorrt"
        scale = float(first_weights(model).sum() / first_weights(digits_cnn()).sum())
        path, details = graphs(precision_of(what), round(scale, 3))
        return Path(shutil.copy(path, work.folder / "model.onnx")), details

    for module in ("tensorrt", "native"):
        monkeypatch.setattr(f"pq_sweep.runtimes.{module}.make_graph", copied)


def told() -> dict[str, Any]:
    """Return what the stand-in for TensorRT was told."""
    return sys.modules["tensorrt"].told  # type: ignore[no-any-return]


@pytest.fixture
def real_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "InferenceSession", gpu_stand_in.real_session)


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


def workspace(folder: Path, threads: int = 1) -> Workspace:
    """Return what a job hands to a runtime, with a cache."""
    work = uncached_workspace(folder, threads)
    work.stage.cache = Cache({})
    return work


def opened(
    name: str, folder: Path, data: Data, what: Any = quantizers.none, *, device: str = "cuda:0", **options: Any
) -> Any:
    """Open the digits network in a runtime for the batch sizes 1 and 8; tensors lie on the CPU."""
    work = replace(workspace(folder), device=device, batch_sizes=SIZES)
    return runtime(name, **options).open(digits_cnn(), what, data, work)


# What ONNX Runtime is told


@pytest.mark.usefixtures("real_onnxruntime")
@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_gets_the_threads_of_the_job(tmp_path: Path, doubling: Path, threads: int) -> None:
    session = ort_session(doubling, ort.CPU, {}, workspace(tmp_path, threads))

    assert session.get_session_options().intra_op_num_threads == threads


@pytest.mark.usefixtures("real_onnxruntime")
def test_a_graph_that_cannot_be_read_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"no graph")

    with pytest.raises(RuntimeMismatch, match=r"CPUExecutionProvider cannot run broken\.onnx"):
        ort_session(tmp_path / "broken.onnx", ort.CPU, {}, workspace(tmp_path))


@pytest.mark.usefixtures("real_onnxruntime")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("provider", [CUDA, TENSORRT])
def test_a_provider_that_is_not_there_is_a_mismatch(tmp_path: Path, doubling: Path, provider: str) -> None:
    with pytest.raises(RuntimeMismatch, match=provider):
        ort_session(doubling, provider, {}, replace(workspace(tmp_path), device="cuda:0"))


@pytest.mark.parametrize(("device", "index"), [("cuda:0", "0"), ("cuda:1", "1")])
def test_cuda_is_told_its_device_and_nothing_else_may_run(
    tmp_path: Path, doubling: Path, gpu: Machine, device: str, index: str
) -> None:
    ort_session(doubling, CUDA, {}, replace(workspace(tmp_path), device=device))
    (session,) = Gpu.sessions

    assert session.provider == CUDA
    assert session.settings.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert not session.kwargs["enable_fallback"]
    assert session.options["device_id"] == index
    stream = gpu.stream_at(int(session.options["user_compute_stream"]))
    assert stream is gpu.stream_of(device)
    assert stream.device_index == gpu.current == int(index)


@pytest.mark.parametrize("tf32", [False, True])
def test_cuda_rounds_to_tf32_only_if_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, doubling: Path, tf32: bool
) -> None:
    """The provider's default is TensorFloat-32 since Ampere, with 10 bits of mantissa."""
    monkeypatch.delenv(TF32_OVERRIDE)
    session = on_cuda(tmp_path, doubling, tf32=tf32, options={"cudnn_conv_algo_search": "HEURISTIC"})
    options = Gpu.sessions[0].options

    assert options["use_tf32"] == str(int(tf32))
    assert options["cudnn_conv_algo_search"] == "HEURISTIC"
    assert set(options) <= DOCUMENTED[CUDA].keys()
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert session.details["tf32"] is tf32
    cuda.use_tf32(False, "cpu")


def on_cuda(folder: Path, graph: Path, **options: Any) -> Session:
    """Load a graph on the CUDA provider."""
    work = replace(workspace(folder / "job"), device="cuda:0", batch_sizes=SIZES)
    loaded: Session = runtime("onnxruntime", **options).load(graph, quantizers.none, work, {})
    return loaded


def test_images_and_logits_stay_on_the_device(tmp_path: Path, doubling: Path) -> None:
    session = on_cuda(tmp_path, doubling)
    images = torch.arange(24.0).reshape(4, 6)[:, :4]

    assert not images.is_contiguous()
    assert torch.equal(session(images), images * 2)
    assert session.engine.endswith(CUDA)
    # Kernels were chosen for each batch size before anything is timed, and no other size is ever run.
    assert [run.ran for run in Gpu.sessions] == [[*SIZES, 8]]
    assert session.details["session_per_batch_size"] is False


@pytest.fixture
def flattening(tmp_path: Path) -> Path:
    """A graph that works out the shape of its answer from that of its images, as transformers of torchvision do."""
    four = numpy_helper.from_array(np.array([-1], dtype=np.int64), "rest")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])
        for name, shape in (("input", [2, 2]), ("logits", [4]))
    ]
    nodes = [
        helper.make_node("Shape", ["input"], ["count"], end=1),
        helper.make_node("Concat", ["count", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["input", "shape"], ["flat"]),
        helper.make_node("Neg", ["flat"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "flattening", ends[:1], ends[1:], [four])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "flattening.onnx")
    return tmp_path / "flattening.onnx"


def test_a_graph_that_works_out_shapes_gets_a_session_for_each_batch_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flattening: Path
) -> None:
    """ONNX Runtime would do that on the CPU, which is forbidden."""
    monkeypatch.setattr(ort, "library_error", lambda provider: "")
    with pytest.raises(RuntimeMismatch, match="contains graph nodes that are assigned to the default CPU EP"):
        ort_session(flattening, CUDA, {}, replace(workspace(tmp_path / "free"), device="cuda:0"))
    session = on_cuda(tmp_path, flattening)
    images = torch.arange(44.0).reshape(11, 2, 2)

    assert torch.equal(session(images), -images.flatten(1))
    assert [run.get_inputs()[0].shape[0] for run in Gpu.sessions[-2:]] == list(SIZES)
    assert [run.ran for run in Gpu.sessions[-2:]] == [[1], [8, 8, 8]]
    assert session.details["session_per_batch_size"] is True


def vit() -> Module:
    """A small network of the same code as vit_b_16."""
    return VisionTransformer(16, 8, num_layers=1, num_heads=1, hidden_dim=8, mlp_dim=8, num_classes=4)


def swin() -> Module:
    """A small network of the same code as swin_t."""
    return SwinTransformer([4, 4], 8, [1, 2], [1, 1], [2, 2], num_classes=4)


@pytest.mark.slow
@pytest.mark.parametrize("network", [vit, swin])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_transformers_leave_the_cpu_nothing_to_do(
    data: Data, tmp_path: Path, network: Callable[[], Module], precision: str
) -> None:
    torch.manual_seed(0)
    model = Model(network().eval(), 4, Preprocess(size=16, resize=16, channels=3))
    with torch.no_grad():
        for parameter in model.module.parameters():  # torchvision begins with a last layer of zeros
            parameter.normal_(std=0.5)
    what = QUANTIZERS[precision]
    graph, _ = make_graph(model, what, data, workspace(tmp_path / "graph"), form="cpu")
    work = replace(workspace(tmp_path / "job"), device="cuda:0", batch_sizes=(1, 4))
    session = runtime("onnxruntime").load(graph, what, work, {})

    assert session.details["session_per_batch_size"] is True
    assert [run.get_inputs()[0].shape for run in Gpu.sessions] == [[size, 3, 16, 16] for size in (1, 4)]
    images = model.sample(6)
    assert relative_error(torch_logits(model.module, images), session(images).numpy()) < 0.02


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, doubling: Path) -> None:
    monkeypatch.setattr(Gpu, "ran_on", "CPUExecutionProvider")

    monkeypatch.setattr(ort, "library_error", lambda provider: "")

    with pytest.raises(
        RuntimeMismatch, match=f"{CUDA} cannot run doubling.onnx: onnxruntime took CPUExecutionProvider instead; see"
    ):
        on_cuda(tmp_path, doubling)


@pytest.mark.parametrize("name", ["CPUExecutionProvider", TENSORRT])
def test_a_graph_that_is_only_partly_on_the_device_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, doubling: Path, name: str
) -> None:
    monkeypatch.setattr(Gpu, "elsewhere", {name: 2})

    with pytest.raises(RuntimeMismatch, match=rf"asked for {CUDA} and got 3 nodes on {CUDA}, 2 nodes on {name}; use"):
        on_cuda(tmp_path, doubling)


@pytest.mark.usefixtures("real_onnxruntime")
def test_nodes_are_found_in_a_profile_where_onnxruntime_does_not_tell_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, doubling: Path
) -> None:
    """As before onnxruntime 1.24."""
    monkeypatch.setattr(ort, "_tells_assignment", lambda: False)
    session: Any = runtime("onnxruntime").load(doubling, quantizers.none, workspace(tmp_path / "job"), {})

    assert session.details["nodes_per_provider"] == {"CPUExecutionProvider": 1}
    assert list((tmp_path / "job").glob("nodes*")) == []
    with pytest.raises(RuntimeMismatch, match=f"asked for {CUDA} and got .* on CPUExecutionProvider"):
        ort.placed_on(CUDA, *profiled(tmp_path, doubling))


def profiled(folder: Path, graph: Path) -> tuple[Any, Any, Tensor]:
    session = ort_session(graph, ort.CPU, {}, workspace(folder / "again"))
    return session, ort.Unbound(session), torch.zeros(1, 4)


def test_the_loader_says_why_a_provider_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(onnxruntime, "__file__", str(tmp_path / "__init__.py"))

    assert "libonnxruntime_providers_shared.so: cannot open" in library_error(CUDA)
    assert library_error("CPUExecutionProvider") == ""


def test_libraries_that_torch_leaves_out_are_loaded_from_their_packages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ONNX Runtime links them."""
    names = ("cu13/lib/libcurand.so.10", "cudnn/lib/libcudnn.so.9", "cudnn/lib/libcudnn_adv.so.9")
    libraries = [tmp_path / place / "nvidia" / name for place, name in zip("abb", names, strict=True)]
    for library in libraries:
        library.parent.mkdir(parents=True, exist_ok=True)
        library.touch()
    tried: list[tuple[str, int]] = []

    def load(path: str, mode: int) -> None:
        tried.append((path, mode))
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b"), *sys.path])
    monkeypatch.setattr(ort.ctypes, "CDLL", load)
    ort.preload_gpu_libraries()

    ours = [(path, mode) for path, mode in tried if path.startswith(str(tmp_path))]
    assert ours == [(str(library), ctypes.RTLD_GLOBAL) for library in libraries]


# TensorRT by ONNX Runtime


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "flags"), [(quantizers.none, set()), (fp16, {"fp16"}), (int8, {"int8"}), (quantizers.bf16, {"bf16"})]
)
def test_tensorrt_may_use_just_the_precisions_of_the_graph(
    data: Data, tmp_path: Path, what: Any, flags: set[str]
) -> None:
    session = opened("tensorrt", tmp_path, data, what)
    for built in Gpu.sessions:
        assert {name for name in ("fp16", "int8", "bf16") if f"trt_{name}_enable" in built.options} == flags
    assert session.artifact.parent == tmp_path / "engine" / "b1"
    assert session.artifact.suffix == ".engine"
    assert set(session.details["nodes_per_provider"]) == {TENSORRT}


@pytest.mark.slow
def test_tensorrt_gets_documented_options(data: Data, tmp_path: Path) -> None:
    options = {"trt_auxiliary_streams": 0, "trt_context_memory_sharing_enable": True}
    opened("tensorrt", tmp_path, data, sparsity=True, optimization_level=5, options=options)
    first, second = (session.options for session in Gpu.sessions)

    assert set(first) <= DOCUMENTED[TENSORRT].keys()
    assert first["trt_profile_min_shapes"] == first["trt_profile_max_shapes"] == "input:1x1x8x8"
    assert second["trt_profile_opt_shapes"] == "input:8x1x8x8"
    assert first["trt_builder_optimization_level"] == "5"
    assert first["trt_auxiliary_streams"] == "0"
    # The binding reads no switch but True and False: https://github.com/microsoft/onnxruntime/issues/14091.
    switches = {name: value for name, value in first.items() if name.endswith("_enable")}
    assert set(switches.values()) == {"True"}
    assert {"trt_sparsity_enable", "trt_context_memory_sharing_enable"} < switches.keys()
    assert Path(first["trt_engine_cache_path"]).is_relative_to(tmp_path)
    assert first["trt_engine_cache_path"] != second["trt_engine_cache_path"]


@pytest.mark.parametrize("profile", ["each", "range"])
def test_tensorrt_answers_like_the_network(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path, profile: str
) -> None:
    session = opened("tensorrt", tmp_path, data, profile=profile)

    assert relative_error(expected, session(images).numpy()) < 1e-5
    assert relative_error(expected[:1], session(images[:1]).numpy()) < 1e-5
    assert session.details["engine_bytes"].keys() == ({"1", "8"} if profile == "each" else {"8"})
    # 21 images are two batches of 8 and one that is padded.
    runs = {"each": [[1, 1], [8, 8, 8, 8]], "range": [[8, 8, 8, 5, 1]]}[profile]
    assert [built.ran for built in Gpu.sessions] == runs


@pytest.mark.slow
def test_tensorrt_takes_int8_weights_of_both_signs(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path
) -> None:
    session = opened("tensorrt", tmp_path, data, int8)

    assert snr_db(expected, session(images).numpy()) > 20
    assert session.runtime == "tensorrt"


def test_onnxruntime_adds_nothing_to_a_graph_that_tensorrt_refuses(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, graphs: Any
) -> None:
    """Since 1.31 it quantizes biases to INT32, unless it is told not to."""
    monkeypatch.setattr(ort, "library_error", lambda provider: "")
    work = replace(workspace(tmp_path / "job"), device="cuda:0")
    options = runtime("tensorrt").provider_options(["int8"], {}, tmp_path / "engine", tmp_path)
    graph, _ = graphs("int8", 1.0)
    if Version(gpu_stand_in.INSTALLED) >= Version("1.31"):
        with pytest.raises(RuntimeMismatch, match=r"TensorRT EP failed to parse \S*bias"):
            ort_session(graph, TENSORRT, options, work)
    ort_session(graph, TENSORRT, options, work, DISABLED)

    details = opened("tensorrt", tmp_path / "again", data, int8).details
    assert details["disabled_optimizers"] == list(DISABLED)


@pytest.mark.parametrize("engines", [0, 2])
def test_tensorrt_has_to_build_one_engine(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, engines: int
) -> None:
    monkeypatch.setattr(Gpu, "engines", engines)

    with pytest.raises(RuntimeMismatch, match=f"TensorRT built {engines} engines where one"):
        opened("tensorrt", tmp_path, data)
    assert not list(cache_home().glob("stages/engines/*"))  # a mended machine is not to fail for it again


def test_a_precision_that_tensorrt_left_out_is_a_mismatch(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path
) -> None:
    """The provider warns and goes on in FP32 where the GPU is not fast in a precision."""
    monkeypatch.setattr(Gpu, "slow_in", ("fp16",))

    with pytest.raises(RuntimeMismatch, match="TensorRT left fp16 out, as this GPU is not fast in it"):
        opened("tensorrt", tmp_path, data, fp16)


def test_tf32_under_tensorrt_is_what_the_process_began_with(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path
) -> None:
    """TensorRT's libraries read it once, and ONNX Runtime has no option for it."""
    monkeypatch.delenv(TF32_OVERRIDE)
    opened("tensorrt", tmp_path / "0", data)

    assert os.environ[TF32_OVERRIDE] == "0"
    for name in ("tensorrt", "tensorrt_native"):
        with pytest.raises(UserError, match=r"runtime\.tf32=true is impossible with NVIDIA_TF32_OVERRIDE=0"):
            opened(name, tmp_path / name, data, tf32=True)


def test_tf32_under_tensorrt_is_left_to_tensorrt(monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path) -> None:
    """What is set in the environment for it would stay, and make TF32 of the FP32 of later jobs."""
    monkeypatch.delenv(TF32_OVERRIDE)
    opened("tensorrt", tmp_path / "0", data, tf32=True)

    assert TF32_OVERRIDE not in os.environ
    opened("tensorrt_native", tmp_path / "1", data)
    assert torch.backends.cudnn.allow_tf32 is False
    with pytest.raises(UserError, match=r"tensorrt runtime\.tf32=false is impossible after a job .* the contrary"):
        opened("tensorrt", tmp_path / "2", data)


@pytest.mark.parametrize("name", ["torch", "tensorrt", "tensorrt_native"])
def test_fp32_is_refused_where_the_environment_makes_tf32_of_it(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv(TF32_OVERRIDE, "1")

    with pytest.raises(UserError, match=r"FP32 is impossible on cuda:0 with NVIDIA_TF32_OVERRIDE=1.*; unset it"):
        opened(name, tmp_path, data)
    cuda.use_tf32(False, "cpu")


# TensorRT itself


@pytest.mark.parametrize("profile", ["each", "range"])
def test_tensorrt_native_answers_like_the_network(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path, profile: str
) -> None:
    session = opened("tensorrt_native", tmp_path, data, profile=profile)

    assert relative_error(expected, session(images).numpy()) < 1e-5
    assert relative_error(expected[:1], session(images[:1]).numpy()) < 1e-5
    assert session.artifact == tmp_path / "engine" / "model.engine"
    assert (session.runtime, session.engine) == ("tensorrt_native", "tensorrt 10.13.3.9")
    shapes = {size: (size, 1, 8, 8) for size in (1, 8)}
    ranges = {"each": [(shapes[size],) * 3 for size in SIZES], "range": [(shapes[1], shapes[8], shapes[8])]}
    assert told()["profiles"] == ranges[profile]
    assert len(told()["contexts"]) == len(ranges[profile])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "options", "typed", "flags"),
    [
        (quantizers.none, {}, True, set()),
        (fp16, {"tf32": True}, True, {"TF32"}),
        (int8, {"sparsity": True}, True, {"SPARSE_WEIGHTS"}),
        (quantizers.bf16, {}, False, {"BF16"}),
    ],
)
def test_types_of_a_native_engine_are_those_of_the_graph(
    monkeypatch: pytest.MonkeyPatch,
    data: Data,
    tmp_path: Path,
    what: Any,
    options: dict[str, Any],
    typed: bool,
    flags: set[str],
) -> None:
    monkeypatch.delenv(TF32_OVERRIDE)
    session = opened("tensorrt_native", tmp_path, data, what, optimization_level=4, **options)

    assert told()["network_flags"] == (1 << 1 if typed else 0)
    assert told()["flags"] == flags
    assert (told()["level"], told()["verbosity"]) == (4, "DETAILED")
    assert session.details["optimization_level"] == 4
    cuda.use_tf32(False, "cpu")


def test_a_builder_without_flags_for_types_builds_what_the_graph_says(
    monkeypatch: pytest.MonkeyPatch, data: Data, images: Tensor, gpu: Machine, tmp_path: Path
) -> None:
    """TensorRT 11, and TensorRT-RTX, have no flag for BF16, FP16 and INT8; here they are taken for supported."""
    library = gpu_stand_in.tensorrt(gpu, "11.4.0.106")
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(engines, "import_tensorrt", lambda name: library)
    monkeypatch.setattr(engines, "import_tensorrt", lambda name: library)
    session = opened("tensorrt_native", tmp_path, data, fp16, sparsity=True)

    assert session(images).isfinite().all()
    assert library.told["flags"] == {"SPARSE_WEIGHTS"}
    with pytest.raises(UserError, match=r"TensorRT 11\.4\.0\.106 takes types from the graph alone.*use runtime=torch"):
        opened("tensorrt_native", tmp_path / "bf16", data, quantizers.bf16)


def test_a_native_engine_is_described(data: Data, tmp_path: Path) -> None:
    severity = sys.modules["tensorrt"].ILogger.Severity
    told()["says"] = {severity.INFO: "(Sparsity) Chose 1 layer(s) using sparse tactics: conv1", severity.VERBOSE: "x"}
    details = opened("tensorrt_native", tmp_path, data, sparsity=True).details

    assert details["layers"] == {"count": 3, "outputs": {"Int8": 2, "Float": 1}, "reformats": 1, "sparse": 1}
    assert details["sparsity_log"] == ["(Sparsity) Chose 1 layer(s) using sparse tactics: conv1"]
    told()["says"] = {}
    again = opened("tensorrt_native", tmp_path / "again", data, sparsity=True).details
    assert again["sparsity_log"] == details["sparsity_log"]  # out of the cache
    assert details["activation_memory_bytes"] == 4096
    assert [layer["Name"] for layer in json.loads((tmp_path / "engine" / "layers.json").read_text())][1:] == [
        "conv1",
        "fc",
    ]
    assert (tmp_path / "engine" / "timing.cache").read_bytes() == b"kernels and their times"


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ({"unreadable": "no such operator"}, r"TensorRT cannot read model\.onnx: no such operator"),
        ({"fails": True}, r"TensorRT cannot build model\.onnx: no room"),
    ],
)
def test_what_tensorrt_cannot_build_is_said_in_its_words(
    data: Data, tmp_path: Path, trouble: dict[str, Any], message: str
) -> None:
    told().update(trouble, says={sys.modules["tensorrt"].ILogger.Severity.ERROR: "no room"})

    with pytest.raises(RuntimeMismatch, match=message):
        opened("tensorrt_native", tmp_path, data)


def test_an_engine_that_does_not_run_is_a_mismatch(data: Data, images: Tensor, tmp_path: Path) -> None:
    session = opened("tensorrt_native", tmp_path, data)
    told()["cannot_run"] = True

    with pytest.raises(RuntimeMismatch, match="TensorRT could not run the engine on 8 images"):
        session(images[:8])


def test_a_closed_session_frees_its_contexts(data: Data, images: Tensor, tmp_path: Path) -> None:
    session = opened("tensorrt_native", tmp_path, data)
    session.close()

    with pytest.raises(AssertionError, match="the session is closed"):
        session(images)


# What cannot be


@pytest.mark.parametrize("profile", ["each", "range"])
def test_the_script_of_a_shipped_engine_answers_as_the_network(
    monkeypatch: pytest.MonkeyPatch,
    data: Data,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    profile: str,
) -> None:
    work = replace(workspace(tmp_path), batch_sizes=(4, 8))  # no engine takes a single image
    model = digits_cnn()
    session = runtime("tensorrt_native", profile=profile).open(model, quantizers.none, data, work)
    about = {"name": "n", "runtime": session.runtime, "removed": False, "artifact": session.artifact.name}
    script = session.artifact.with_name("run.py")
    script.write_text(render("run.py.j2", about | {"preprocess": asdict(model.preprocess) | {"channels": 1}}))
    script.with_name("labels.txt").write_text("\n".join("abcdefghij"))
    Image.fromarray((load_digits().images[3] * 15.9).astype(np.uint8)).save(tmp_path / "three.png")
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "three.png")])
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor, raising=False)
    runpy.run_path(str(script))

    assert capsys.readouterr().out.splitlines()[0].split()[1] == "d"


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_native"])
@pytest.mark.parametrize("version", ["8.6.1", "11.4.0.106"])
def test_an_unsupported_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, version: str) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", gpu_stand_in.tensorrt(Machine(), version))

    with pytest.raises(UserError, match=f"runtime={name} works with TensorRT 10 and found {version}; install"):
        runtime(name).require("cuda:0")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_native"])
def test_sparsity_needs_an_a100(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runtime(name, sparsity=True).require("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(engines, "device_name", lambda device: "Tesla V100-SXM2-16GB")
    runtime(name).require("cuda:0")

    with pytest.raises(
        UserError,
        match=r"sparsity=true needs compute capability 8\.0 or later and this is Tesla V100-SXM2-16GB \(.* 7\.0\)",
    ):
        runtime(name, sparsity=True).require("cuda:0")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_native"])
def test_bf16_needs_an_a100(monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))

    with pytest.raises(UserError, match=r"quantizer=bf16 under TensorRT needs compute capability 8\.0"):
        opened(name, tmp_path, data, quantizers.bf16)


@pytest.mark.parametrize(
    ("name", "capability", "least"), [("fp8", (8, 0), "8.9"), ("fp8", (7, 0), "8.9"), ("int4", (7, 0), "8.0")]
)
def test_fp8_and_int4_need_newer_gpus(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, name: str, capability: tuple[int, int], least: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    what = {
        "fp8": functools.partial(quantizers.fp8, calibration="minmax", images=4, exclude=[], percentile=99.9),
        "int4": functools.partial(quantizers.int4, block=64, exclude=[]),
    }[name]
    with pytest.raises(
        UserError,
        match=rf"quantizer={name} under TensorRT needs compute capability {least} or later.*; use quantizer=int8 or",
    ):
        opened("tensorrt_native", tmp_path, data, what)
    assert not (tmp_path / "model.onnx").exists()


def test_bf16_by_the_provider_needs_a_newer_onnxruntime(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.2")

    with pytest.raises(
        UserError, match=r"needs onnxruntime 1\.23 or later and found 1\.20\.2; use runtime=tensorrt_native"
    ):
        opened("tensorrt", tmp_path, data, quantizers.bf16)


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_native"])
def test_tensorrt_is_refused_without_its_libraries(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt")

    with pytest.raises(UserError, match=rf"runtime={name} needs TensorRT; see environment\.yml"):
        runtime(name).require("cuda:0")


def test_onnxruntime_without_cuda_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    runtime("onnxruntime").require("cpu")

    for name, provider in (("onnxruntime", CUDA), ("tensorrt", TENSORRT)):
        with pytest.raises(UserError, match=rf"no {provider}; see environment\.yml"):
            runtime(name).require("cuda:0")


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "/onnxruntime_src/onnxruntime/python/state.cc:1220 std::shared_ptr<F> create(const A&) Invalid TensorRT EP"
            " option: no_such.",
            "Invalid TensorRT EP option: no_such",
        ),
        (
            "/onnxruntime_src/cuda_call.cc:129 bool CudaCall(ERRTYPE) [with T = cudaError] CUDA failure 35: CUDA driver"
            " version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=node7 ; file=/onnxruntime_src/x.cc",
            "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version",
        ),
        (
            "[ONNXRuntimeError] : 1 : FAIL : This session\n contains graph nodes.",
            "1 : FAIL : This session contains graph nodes",
        ),
    ],
)
def test_the_reason_is_taken_out_of_a_message_of_onnxruntime(message: str, reason: str) -> None:
    assert ort.reason_in(message) == reason


# The cache of engines

NAMES = ("tensorrt", "tensorrt_native")


def builds() -> int:
    return Gpu.builds + int(told().get("builds", 0))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_engine_is_built_once(data: Data, images: Tensor, tmp_path: Path, name: str) -> None:
    first = opened(name, tmp_path / "0", data)
    built, seconds = builds(), first_build(tmp_path / "0")
    second = opened(name, tmp_path / "1", data)

    assert builds() == built
    assert torch.equal(first(images), second(images))
    assert second.artifact.read_bytes() == first.artifact.read_bytes()
    assert second.artifact.is_relative_to(tmp_path / "1")
    assert seconds > 0


def first_build(folder: Path) -> float:
    (record,) = cache_home().glob("stages/engines/*/record.json")
    return float(json.loads(record.read_text())["seconds"])


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_out_of_the_cache_counts_as_what_it_cost(data: Data, tmp_path: Path, name: str) -> None:
    opened(name, tmp_path / "0", data)
    (record,) = cache_home().glob("stages/engines/*/record.json")
    record.write_text(record.read_text().replace(f'"seconds": {first_build(tmp_path)}', '"seconds": 1234.5'))
    work = replace(workspace(tmp_path / "1"), batch_sizes=SIZES)
    runtime(name).open(digits_cnn(), quantizers.none, data, work)
    stage: Any = work.stage

    assert stage.seconds["build"] == 1234.5
    assert stage.from_cache == ["build"]
    assert stage.seconds["load_engine"] < 100
    assert "load_engine" not in stage.preparation.prep_s


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    ["graph", "precision", "batch sizes", "optimization_level", "profile", "sparsity", "gpu", "capability", "version"],
)
def test_an_engine_is_shared_only_by_what_is_the_same(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, name: str, change: str
) -> None:
    opened(name, tmp_path / "0", data)
    before, model, what, sizes = builds(), digits_cnn(), quantizers.none, SIZES
    options: dict[str, Any] = {"optimization_level": 2, "profile": "range", "sparsity": True}
    if change == "graph":  # the same structure with other weights
        first_weights(model).mul_(2)
    if change == "precision":
        what = quantizers.bf16
    if change == "batch sizes":
        sizes = (1, 4)
    if change == "gpu":
        monkeypatch.setattr(engines, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    if change == "capability":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if change == "version":
        monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.16.1.11")
    work = replace(workspace(tmp_path / "1"), batch_sizes=sizes)
    runtime(name, **{key: value for key, value in options.items() if key == change}).open(model, what, data, work)

    assert builds() > before
    assert len(list(cache_home().glob("stages/engines/*/record.json"))) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_cache_is_not_trusted(data: Data, tmp_path: Path, name: str) -> None:
    opened(name, tmp_path / "0", data)
    before = builds()
    for engine in cache_home().glob("stages/engines/**/*.engine"):
        engine.write_bytes(b"half an eng")
    opened(name, tmp_path / "1", data)

    assert builds() == 2 * before
    assert len(list(cache_home().glob("stages/engines/*/record.json"))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_job_that_is_opened_again_takes_its_own_engine(
    monkeypatch: pytest.MonkeyPatch, data: Data, tmp_path: Path, name: str
) -> None:
    """Also where nothing can be cached: a fresh process has to time the engine that was evaluated."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "file"))
    before = opened(name, tmp_path / "0", data).artifact.stat().st_mtime_ns
    built = builds()

    assert opened(name, tmp_path / "0", data).artifact.stat().st_mtime_ns == before
    assert builds() == built
    opened(name, tmp_path / "0", data, optimization_level=5)
    assert builds() > built


def test_a_cache_that_cannot_be_written_stops_no_job(
    monkeypatch: pytest.MonkeyPatch, data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "file"))
    session = opened("tensorrt_native", tmp_path / "0", data)

    assert relative_error(expected, session(images).numpy()) < 1e-5


# Streams, devices and CUDA graphs

ORDER = ("cuda:0", "cuda:1", "cuda:0")  # of jobs in one process


def test_a_stream_of_its_own_begins_when_the_default_one_is_done(gpu: Machine) -> None:
    """ONNX Runtime takes the default stream for none; weights may still be copied on it."""
    gpu.default[1].take(5_000)
    stream = cuda.own_stream("cuda:1")

    assert gpu.host_ns == 5_000
    assert stream.cuda_stream != 0
    assert cuda.own_stream("cuda:1") is stream


def test_each_session_makes_its_device_the_current_one(gpu: Machine) -> None:
    streams = {device: cuda.own_stream(device) for device in ORDER}

    for device, stream in streams.items():
        assert cuda.own_stream(device) is stream
        assert gpu.stream_of() is stream
        assert gpu.current == int(device[-1])


def test_device_time_is_that_of_the_device_that_works(gpu: Machine) -> None:
    """In this order, events went to the other device's idle stream."""

    def work() -> None:
        gpu.torch_op(device, device_ns=700_000)

    for device in ORDER:
        cuda.own_stream(device)
        assert CudaClock(device)(work) == 700_000
    gpu.current = 1  # as another session leaves it
    assert CudaClock(device)(work) == 700_000


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("profile", ["each", "range"])
def test_native_engines_run_on_their_own_device(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path, profile: str, cuda_graph: bool
) -> None:
    options = {"profile": profile, "cuda_graph": cuda_graph}
    sessions = [
        opened("tensorrt_native", tmp_path / str(number), data, device=device, **options)
        for number, device in enumerate(ORDER)
    ]

    for session in sessions:
        assert relative_error(expected, session(images).numpy()) < 1e-5
        assert relative_error(expected[:1], session(images[:1]).numpy()) < 1e-5


def test_sessions_of_the_provider_run_on_their_own_device(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path, doubling: Path
) -> None:
    sessions = [opened("tensorrt", tmp_path / str(number), data, device=device) for number, device in enumerate(ORDER)]
    on_cuda(tmp_path, doubling)

    for session in sessions:
        assert relative_error(expected, session(images).numpy()) < 1e-5


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_cuda_graph_has_to_answer_new_images(gpu: Machine, stale: bool, device: str) -> None:
    """On another device than the first one that recorded, too."""

    def call(images: Tensor) -> Tensor:
        logits = torch.empty(len(images), 6)
        seen = float(images.sum()) if stale else 0.0  # by the host, which a replay leaves out
        gpu.torch_op(device, lambda: logits.copy_(images.flatten(1) * 2 + seen))
        return logits

    images = torch.arange(12.0).reshape(2, 1, 2, 3)
    with gpu.record(gpu_graph := torch.cuda.CUDAGraph()):
        assert not gpu_graph.work
    cuda.own_stream(device)
    if stale:
        with pytest.raises(RuntimeMismatch, match="the CUDA graph for 2 images answers differently from the model"):
            record_graph(call, images, device)
        return
    replay = record_graph(call, images, device)
    first, second = replay(images), replay(images + 5)

    assert torch.equal(first, images.flatten(1) * 2)
    assert torch.equal(second, images.flatten(1) * 2 + 10)
