"""Runtimes: a session gives the answers of the network on the device asked for, or does not come to exist."""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TESTS, python
from cuda_stand_in import Overwriting
from hydra.errors import InstantiationException
from independent import onnx_logits, relative_error, runtime, snr_db, torch_logits, workspace
from onnx import numpy_helper
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from pq_sweep.compress import quantizers
from pq_sweep.compress.quantizers import quantizer
from pq_sweep.core.environment import resolve_device
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.runtimes import Auto, precision_of
from pq_sweep.runtimes.eager import COMPILE_MODES, GRAPH_MODES, overwrites
from pq_sweep.runtimes.session import BySize
from pq_sweep.types import Data, Session, Stage, UserError

fp16 = functools.partial(quantizers.fp16, exclude=[])
int8_dynamic = functools.partial(quantizers.int8_dynamic, exclude=[])

Opener = Callable[[str], Session]
REALISED: dict[str, tuple[Any, Any]] = {
    "torch fp32": (runtime("torch"), quantizers.none),
    "torch bf16": (runtime("torch"), quantizers.bf16),
    "onnxruntime fp32": (runtime("onnxruntime"), quantizers.none),
    "onnxruntime fp16": (runtime("onnxruntime"), fp16),
    "onnxruntime int8_dynamic": (runtime("onnxruntime"), int8_dynamic),
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    session = runtime("torch").open(model, quantizers.none, data, workspace(tmp_path))
    del model
    assert network() is not None
    session.close()
    gc.collect()

    assert network() is None


@pytest.mark.slow
def test_closing_frees_a_session_of_onnxruntime(data: Data, tmp_path: Path) -> None:
    session: Any = runtime("onnxruntime").open(digits_cnn(), quantizers.none, data, workspace(tmp_path))
    alive = weakref.ref(session.call.session)
    session.close()
    gc.collect()

    assert alive() is None


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
        (2, "auto", "cuda:0"),
        (2, "cuda", "cuda:0"),  # an earlier job of the process made cuda:1 the current one
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

AUTO = runtime("auto")


@pytest.mark.parametrize(
    ("precision", "device", "name"),
    [
        ("fp32", "cpu", "torch"),
        ("fp32", "cuda:0", "torch"),
        ("bf16", "cpu", "torch"),
        ("bf16", "cuda:0", "torch"),
        ("fp16", "cpu", "onnxruntime"),
        ("int8", "cpu", "onnxruntime"),
        ("int8_dynamic", "cpu", "onnxruntime"),
        ("fp16", "cuda:0", "tensorrt"),
        ("int8", "cuda:1", "tensorrt"),
    ],
)
def test_auto_takes_the_runtime_that_is_fit(precision: str, device: str, name: str) -> None:
    resolved = AUTO.resolve(precision, device)

    assert resolved == getattr(AUTO, name)
    assert precision in resolved.precisions[device.partition(":")[0]]


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_auto_promises_only_what_it_can_resolve(kind: str) -> None:
    for precision in Auto.precisions[kind]:
        assert precision in AUTO.resolve(precision, kind).precisions[kind]


@pytest.mark.parametrize("named", [getattr(AUTO, part.name) for part in dataclasses.fields(AUTO)])
def test_a_named_runtime_is_itself(named: Any) -> None:
    assert named.resolve("int8", "cpu") is named


def test_auto_has_the_options_of_the_runtimes_that_it_stands_for() -> None:
    changed = runtime("auto", torch={"channels_last": True}, tensorrt={"profile": "range"})

    assert changed.resolve("fp32", "cpu").channels_last is True
    assert changed.resolve("int8", "cuda:0").profile == "range"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch", {"compile": "fast"}, r"runtime\.compile=fast is not known; valid are: default, reduce-overhead"),
        ("torch", {"compile": "max-autotune", "cuda_graph": True}, r"max-autotune makes CUDA graphs itself; leave"),
        ("onnxruntime", {"options": {"device_id": 1}}, r"runtime\.options\.device_id is set by pq_sweep"),
        ("onnxruntime", {"options": {"enable_cuda_graph": 1}}, r"runtime\.options\.enable_cuda_graph is set by"),
        ("tensorrt", {"options": {"trt_fp16_enable": True}}, r"runtime\.options\.trt_fp16_enable is set by pq_sweep"),
        ("tensorrt", {"profile": "some"}, r"runtime\.profile=some is not known; valid are: each, range"),
        ("tensorrt", {"optimization_level": 6}, r"optimization_level=6 is not valid; give a whole number from 0 to 5"),
        ("tensorrt_native", {"optimization_level": True}, r"optimization_level=True is not valid; give a whole"),
    ],
)
def test_options_that_cannot_be_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InstantiationException) as caught:
        runtime(name, **options)
    assert isinstance(caught.value.__cause__, UserError)
    assert re.search(message, str(caught.value.__cause__))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torch", {"cuda_graph": True}, r"runtime\.cuda_graph=true needs a GPU; leave it out with device=cpu"),
        ("torch", {"tf32": True}, r"runtime\.tf32=true needs a GPU"),
        ("onnxruntime", {"tf32": True}, r"runtime\.tf32=true needs a GPU"),
        ("onnxruntime", {"options": {"gpu_mem_limit": 1}}, r"gpu_mem_limit.* are of the CUDA provider; leave them out"),
    ],
)
def test_options_of_a_gpu_are_refused_on_a_cpu(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        runtime(name, **options).resolve("fp32", "cpu")
    assert runtime(name, **options).resolve("fp32", "cuda:0")


# Calls of fixed batch sizes


class Counted:
    """A call that takes so many images and no other number, and notes how often it ran."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0

    def __call__(self, images: Tensor) -> Tensor:
        assert len(images) == self.size
        self.calls += 1
        return images.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("count", "calls"),
    [(1, (1, 0, 0)), (2, (0, 1, 0)), (3, (0, 1, 0)), (4, (0, 1, 0)), (5, (0, 0, 1)), (8, (0, 0, 1)), (9, (1, 0, 1)),
     (21, (0, 0, 3)), (35, (0, 1, 4))],
)  # fmt: skip
def test_any_number_of_images_runs_on_fixed_sizes(count: int, calls: tuple[int, ...]) -> None:
    fixed = {size: Counted(size) for size in (1, 4, 8)}
    images = torch.arange(count * 12.0).reshape(count, 3, 2, 2)

    assert torch.equal(BySize(fixed)(images), images.flatten(1).sum(1, keepdim=True))
    assert tuple(call.calls for call in fixed.values()) == calls


# Torch compiled, and in another memory layout


def test_channels_last_is_the_layout_of_weights_and_images(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path
) -> None:
    model, seen = digits_cnn(), []
    first = next(part for part in model.module.modules() if isinstance(part, torch.nn.Conv2d))
    first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    session = runtime("torch", channels_last=True).open(model, quantizers.none, data, workspace(tmp_path))

    assert relative_error(expected, session(images).numpy()) < 1e-5
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert session.details["channels_last"] is True


@pytest.mark.slow
def test_a_compiled_network_answers_alike_and_was_compiled_before_it_is_timed(
    data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path
) -> None:
    work = replace(workspace(tmp_path), batch_sizes=(1, 8))
    session = runtime("torch", compile="default").open(digits_cnn(), quantizers.none, data, work)
    before = dict(counters["stats"])

    assert relative_error(expected, session(images).numpy()) < 1e-5
    assert relative_error(expected[:1], session(images[:1]).numpy()) < 1e-5
    assert before["unique_graphs"] >= 1
    assert dict(counters["stats"]) == before
    assert work.stage.seconds["build"] > 0  # type: ignore[attr-defined]
    assert session.engine == f"torch {torch.__version__} compiled (default)"
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPILE_MODES)
def test_logits_of_compiled_cuda_graphs_outlive_the_next_call(
    monkeypatch: pytest.MonkeyPatch, data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path, mode: str
) -> None:
    """Evaluation joins the logits of several calls, and torch ends the life of those of earlier ones."""
    made: list[dict[str, Any]] = []

    def compiling(call: Any, **options: Any) -> Any:
        made.append(options)
        return Overwriting(call) if mode in GRAPH_MODES else call

    monkeypatch.setattr(torch, "compile", compiling)
    work = replace(workspace(tmp_path), batch_sizes=(1, 8))
    session = runtime("torch", compile=mode).open(digits_cnn(), quantizers.none, data, work)
    first, rest = session(images[:1]), session(images)

    assert relative_error(expected, rest.numpy()) < 1e-5
    assert relative_error(expected[:1], first.numpy()) < 1e-5
    assert made == [{"mode": mode, "fullgraph": True, "dynamic": False}]


def test_modes_with_cuda_graphs_are_those_of_the_installed_torch() -> None:
    assert tuple(mode for mode in COMPILE_MODES if overwrites(mode)) == GRAPH_MODES
    with inductor.patch({"triton.cudagraphs": True}):  # as TORCHINDUCTOR_CUDAGRAPHS=1 does
        assert overwrites("default")


def test_what_cannot_be_compiled_is_an_error_and_not_eager(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    model.module.register_forward_hook(lambda module, given, output: print("a break in the graph"))

    with pytest.raises(UserError, match=r"runtime\.compile=default cannot compile this model: .*; leave it out"):
        runtime("torch", compile="default").open(model, quantizers.none, data, workspace(tmp_path))


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


@pytest.mark.slow
def test_a_quantizer_of_the_user_works(data: Data, images: Tensor, expected: np.ndarray, tmp_path: Path) -> None:
    own = functools.partial(shifted, by=3.0)
    session = runtime("onnxruntime").open(digits_cnn(), own, data, workspace(tmp_path))

    assert precision_of(own) == "fp32"
    assert session.details["quantizer"] == {"by": 3.0, "form": "cpu"}
    assert relative_error(expected + 3, session(images).numpy()) < 1e-5


def test_torch_refuses_to_leave_layers_out(data: Data, tmp_path: Path) -> None:
    some = functools.partial(quantizers.fp16, exclude=["fc1"])

    with pytest.raises(UserError, match=r"runtime=torch converts every layer, so quantizer\.exclude=\['fc1'\] needs"):
        runtime("torch").open(digits_cnn(), some, data, workspace(tmp_path))


# A network with attention

ATTENTION = """
import sys
from functools import partial
from pathlib import Path

import torch
from independent import relative_error, runtime, torch_logits, workspace
from torchvision.models.vision_transformer import VisionTransformer

from pq_sweep.compress import quantizers
from pq_sweep.types import Model, Preprocess

torch.manual_seed(0)
network = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
torch.nn.init.normal_(network.heads.head.weight)
model = Model(network.eval(), 10, Preprocess(size=32, resize=32))
images = model.sample(3)
expected = torch_logits(network, images)
what = {"none": quantizers.none, "fp16": partial(quantizers.fp16, exclude=[])}[sys.argv[1]]
session = runtime("onnxruntime").open(model, what, None, workspace(Path(sys.argv[2])))
assert relative_error(expected, session(images).numpy()) < 0.01
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "fp16"])
def test_a_vision_transformer_runs_on_the_cpu(tmp_path: Path, environment: dict[str, str], name: str) -> None:
    """In a process of its own: onnxruntime can end the whole process while it loads a graph."""
    env = environment | {"PYTHONPATH": str(TESTS)}
    done = python(["-c", ATTENTION, name, str(tmp_path / "job")], tmp_path, env)

    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
