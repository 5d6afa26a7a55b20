"""NVIDIA's own parser and builder take our graphs, strongly typed, and refuse those that are wrong; no GPU is needed.

The code is that of `runtime=tensorrt_native`, with TensorRT-RTX's library in place of TensorRT's.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gpu_stand_in
import numpy as np
import onnx
import pytest
import torch
from commands import SHORT
from conftest import ROOT, Launch, new_user, only_sweep, python, refused, results
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from independent import relative_error, runtime, torch_logits
from mlflow import MlflowClient
from onnx import ModelProto, helper, numpy_helper
from random_networks import randomise
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from pq_sweep.compress import quantizers
from pq_sweep.core.cache import Cache
from pq_sweep.core.folder import JobFolder
from pq_sweep.inputs.datasets import digits, fake
from pq_sweep.inputs.models import digits_cnn, torchvision_model
from pq_sweep.job.learned import taught
from pq_sweep.job.probing import without_probe
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes import RuntimeMismatch, engines, ort, rtx
from pq_sweep.types import Data, Model, Preprocess, Session, Workspace

pytestmark = [
    pytest.mark.skipif(find_spec(rtx.API) is None, reason="needs TensorRT-RTX: pip install -e '.[rtx]'"),
    pytest.mark.filterwarnings("ignore"),
]

fp16 = partial(quantizers.fp16, exclude=[])
int8 = partial(quantizers.int8, calibration="minmax", images=4, percentile=99.9)
QUANTIZERS: dict[str, Any] = {
    "fp32": quantizers.none,
    "fp16": fp16,
    "int8": partial(int8, exclude=[]),
    "int8 but the ends": partial(int8, exclude=["first", "last"]),
}
CAPABILITIES = ("8.0", "8.9")


@pytest.fixture(scope="module")
def made() -> Callable[[str], tuple[Model, Data]]:
    """Return a network with random weights, or the digits', and images for it."""

    def make(name: str) -> tuple[Model, Data]:
        torch.manual_seed(0)
        if name == "digits_cnn":
            return (model := digits_cnn()), digits(model)
        model = torchvision_model(name=name, weights=None, num_classes=10)
        return model, fake(model, images=4, calibration=4, seed=0)

    return make


def built(
    folder: Path, model: Model, data: Data, quantizer: Any, capability: str = "8.9", **options: Any
) -> tuple[Session, Path]:
    """Build as a job does; jobs of this session share exported graphs through the cache."""
    folder.mkdir(parents=True, exist_ok=True)
    work = Workspace(folder, "cpu", 1, Stages(folder, "", Cache({})), batch_sizes=(1, 8))
    builder = runtime("tensorrt_rtx", build_only=True, compute_capability=capability, **options)
    builder.require("cpu")
    return builder.open(model, quantizer, data, work), folder / "engine"


def check(session: Session, folder: Path, precision: str) -> None:
    """Check that the builder had nothing to complain of, and that the types of layers are those of the precision."""
    assert session.details["builder_warnings"] == []
    assert session.artifact.stat().st_size > 100_000
    assert (folder / "timing.cache").stat().st_size > 0
    graph = onnx.load(folder.parent / "model.onnx").graph
    types, counts = session.details["layers"]["outputs"], ops(graph)
    assert sum(types.values()) == session.details["layers"]["count"] > len(graph.node) / 2
    assert types.get("Int8", 0) >= counts.get("QuantizeLinear", 0)
    assert ("Int8" in types) == precision.startswith("int8")
    halves = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT16]
    assert ("Half" in types) == bool(halves) == (precision == "fp16")
    assert ("Float" in types) == (precision != "fp16") or types["Half"] > 5 * types["Float"]


def ops(graph: Any) -> dict[str, int]:
    names = [node.op_type for node in graph.node]
    return {name: names.count(name) for name in set(names)}


@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("precision", QUANTIZERS)
def test_graphs_of_the_digits_network_are_built(
    made: Callable[[str], tuple[Model, Data]], tmp_path: Path, precision: str, capability: str
) -> None:
    session, folder = built(tmp_path, *made("digits_cnn"), QUANTIZERS[precision], capability)
    check(session, folder, precision)
    assert capability in session.engine


class Shifted(nn.Module):
    """The digits' network with a constant that is added to what it is given."""

    def __init__(self, constant: Tensor) -> None:
        super().__init__()
        self.inner = digits_cnn().module
        self.register_buffer("constant", constant)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.constant + x)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (1, 8, 8)], ids=str)
def test_sums_with_constants_are_left_to_the_builder(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """As in torchvision's GoogLeNet and Inception, which change the normalisation of images."""
    plain = digits_cnn()
    model = Model(Shifted(torch.full(shape, 0.25)).eval(), 10, plain.preprocess)
    session, folder = built(tmp_path, model, digits(plain), QUANTIZERS["int8"])
    check(session, folder, "int8")
    residual = [node for node in onnx.load(folder.parent / "model.onnx").graph.node if node.op_type == "Add"]
    assert sum(all("Dequantize" in name for name in node.input) for node in residual) > 0


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["fp32", "fp16"])
def test_graphs_of_mixed_precision_are_built(
    made: Callable[[str], tuple[Model, Data]], tmp_path: Path, keep: str
) -> None:
    """With one hidden unit 1,000 times as large as the others, which 8 bit cannot hold."""
    model, data = made("digits_cnn")
    first, second = model.module.fc1, model.module.fc2
    with torch.no_grad():
        first.weight[0] *= 1e3
        first.bias[0] *= 1e3
        second.weight[:, 0] /= 1e3
    mixed = partial(quantizers.mixed, calibration="minmax", images=64, percentile=99.9, max_drop=0.0, keep=keep)
    session, _ = built(tmp_path, model, data, mixed)
    assert session.details["builder_warnings"] == []
    assert session.details["quantizer"]["kept_layers"] > 0
    types = session.details["layers"]["outputs"]
    assert types["Int8"] > 0
    assert ("Half" in types) == (keep == "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", QUANTIZERS)
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_graphs_of_larger_networks_are_built(
    made: Callable[[str], tuple[Model, Data]], tmp_path: Path, name: str, precision: str
) -> None:
    capability = CAPABILITIES[precision.startswith("int8")]
    check(*built(tmp_path, *made(name), QUANTIZERS[precision], capability, optimization_level=0), precision)


@pytest.fixture(scope="module")
def int8_graph(made: Callable[[str], tuple[Model, Data]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("int8")
    built(folder, *made("digits_cnn"), QUANTIZERS["int8"])
    return JobFolder(folder).model


def with_integer_bias(model: ModelProto) -> None:
    """Store a bias as INT32, as ONNX Runtime's own quantizer does."""
    graph = model.graph
    conv = next(node for node in graph.node if node.op_type == "Conv")
    bias = next(item for item in graph.initializer if item.name == conv.input[2])
    values = numpy_helper.to_array(bias)
    graph.initializer.append(numpy_helper.from_array((values * 1000).astype(np.int32), "bias_int32"))
    graph.initializer.append(numpy_helper.from_array(np.float32(1e-3), "bias_scale"))
    graph.node.insert(0, helper.make_node("DequantizeLinear", ["bias_int32", "bias_scale"], ["bias_float"]))
    conv.input[2] = "bias_float"


def with_zero_points(kind: type[np.generic], value: int, model: ModelProto) -> None:
    """Give each activation a zero point, where it is quantized and where it is dequantized."""
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(kind(value), "zero"))
    activations = {node.output[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" or (node.op_type == "DequantizeLinear" and node.input[0] in activations):
            del node.input[2:]
            node.input.append("zero")


WRONG: dict[str, tuple[Callable[[ModelProto], None], str]] = {
    "INT32 bias": (with_integer_bias, r"(?i)int32"),
    "zero points": (partial(with_zero_points, np.int8, 3), r"(?i)zero.?point"),
    "unsigned activations": (partial(with_zero_points, np.uint8, 0), r"(?i)uint8"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_graph_that_is_wrong_is_refused_with_its_reason(int8_graph: Path, tmp_path: Path, wrong: str) -> None:
    change, reason = WRONG[wrong]
    model = onnx.load(int8_graph)
    change(model)
    onnx.save(model, tmp_path / "model.onnx")
    builder = runtime("tensorrt_rtx", build_only=True, compute_capability="8.9")
    work = Workspace(tmp_path, "cpu", 1, Stages(tmp_path, ""), batch_sizes=(1,))
    with pytest.raises(RuntimeMismatch, match=reason):
        builder.engine(tmp_path / "model.onnx", "int8", digits_cnn(), work, lambda *_: None)


def test_what_one_build_is_told_is_not_lost_after_another_failed(
    made: Callable[[str], tuple[Model, Data]], int8_graph: Path, tmp_path: Path
) -> None:
    """TensorRT tells the first logger of a process everything while a builder of its own is held, as by a traceback."""
    kept = []
    for name, (change, reason) in WRONG.items():
        model = onnx.load(int8_graph)
        change(model)
        (tmp_path / name).mkdir()
        onnx.save(model, tmp_path / name / "model.onnx")
        work = Workspace(tmp_path / name, "cpu", 1, Stages(tmp_path / name, ""), batch_sizes=(1,))
        with pytest.raises(RuntimeMismatch, match=reason) as caught:
            options(build_only=True).engine(tmp_path / name / "model.onnx", "int8", digits_cnn(), work, lambda *_: None)
        kept.append(caught.value)
    session, _ = built(tmp_path / "sound", *made("digits_cnn"), QUANTIZERS["int8"])
    assert session.details["builder_warnings"] == []


@pytest.mark.slow
def test_an_engine_in_the_cache_is_not_built_again(made: Callable[[str], tuple[Model, Data]], tmp_path: Path) -> None:
    first, _ = built(tmp_path / "first", *made("digits_cnn"), QUANTIZERS["fp16"])
    stage = Stages(tmp_path / "second", "", Cache({}))
    (tmp_path / "second").mkdir()
    work = Workspace(tmp_path / "second", "cpu", 1, stage, batch_sizes=(1, 8))
    again = runtime("tensorrt_rtx", build_only=True, compute_capability="8.9")
    second = again.open(*made("digits_cnn")[:1], QUANTIZERS["fp16"], made("digits_cnn")[1], work)
    assert "build" in stage.from_cache
    assert first.artifact.read_bytes() == second.artifact.read_bytes()
    other, _ = built(tmp_path / "other", *made("digits_cnn"), QUANTIZERS["fp16"], "12.0")
    assert other.artifact.read_bytes() != first.artifact.read_bytes()


@pytest.mark.slow
def test_a_job_that_is_only_built_says_so_and_has_no_figures_of_speed(launch: Launch, tmp_path: Path) -> None:
    done = launch("-m", "runtime=tensorrt_rtx", "runtime.build_only=true", "quantizer=none,int8", "device=cpu", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 done, 2 built" in done.stdout
    assert (
        "built for another machine and not run, so without accuracy and latency: job 0, 1 (compute capability 8.9)\n"
        in done.stdout
    )
    sweep = only_sweep(tmp_path)
    for job, result in enumerate(results(sweep)):
        assert result["status"] == "built"
        assert result["accuracy"] is None
        assert "latency" not in result
        assert result["size_bytes"]["compressed"] == (sweep / str(job) / "engine" / "model.engine").stat().st_size
        assert result["prep_s"]["build"] > 0
        assert result["session"]["compute_capability"] == "8.9"
        assert result["hardware"] == []
        assert result["bits"]["rel_bops"] == (1, 0.0625)[job]
        layers = json.loads((sweep / str(job) / "layers.json").read_text())
        assert layers["after"].keys() == layers["before"].keys()
        assert {layer["weight_bits"] for layer in layers["after"].values()} == {(32, 8)[job]}
    rows = list(csv.DictReader((sweep / "results.csv").open()))
    assert [(row["status"], row["built_for"]) for row in rows] == [("built", "8.9")] * 2
    assert all(float(row["engine_size_mb"]) > 0 and not row.get("accuracy") for row in rows)
    again = launch("-m", "runtime=tensorrt_rtx", "runtime.build_only=true", "quantizer=none,int8", "device=cpu", *SHORT,
                   f"hydra.sweep.dir={sweep}")  # fmt: skip
    assert (again.stdout + again.stderr).count("reused") >= 2
    (run,) = [run for run in stored_runs(tmp_path) if run.data.tags.get("pq_sweep.job") == "1"]
    assert run.data.tags["pq_sweep.status"] == "built"
    assert run.data.metrics["engine_size_mb"] > 0
    assert "accuracy" not in run.data.metrics
    report = python(["-m", "pq_sweep.report", str(sweep)], tmp_path, new_user())
    assert report.returncode == 0, report.stderr
    recommended = python(["-m", "pq_sweep.recommend", str(sweep)], tmp_path, new_user())
    assert recommended.returncode != 0
    assert recommended.stderr.startswith("no job has finished (2 of 2 were only built, for another machine), so there")


def stored_runs(folder: Path) -> list[Any]:
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    return list(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def options(**given: Any) -> Any:
    return runtime("tensorrt_rtx", **given)


def test_what_cannot_be_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    text = refused(lambda: options().resolve("fp32", "cpu"))
    assert text.startswith("runtime=tensorrt_rtx runs on CUDA devices and this is device=cpu; use device=cuda, or")
    with pytest.raises(InstantiationException) as caught:  # which jobs and checks take the sentence out of
        options(compute_capability=8.9)
    assert "only for runtime.build_only=true" in str(caught.value.__cause__)
    for given, part in (
        ("9.0", "is not known to TensorRT-RTX 1."),
        ("7.0", "valid are: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1."),
    ):
        assert part in refused(lambda given=given: options(build_only=True, compute_capability=given).require("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refused(lambda: options(build_only=True).require("cuda:0")).startswith(
        "9.0 of cuda:0 is not known to TensorRT-RTX 1."
    )
    for given in ("Ada", "sm89", 12, [8.6, 8.9], True):  # as a job's config is checked, before anything is loaded
        with pytest.raises(InstantiationException) as caught:
            options(build_only=True, compute_capability=given)
        assert f"runtime.compute_capability={given} is not valid; give one such as 8.9" in str(caught.value.__cause__)
    assert "needs compute capability 8.0 or later, not 7.5" in refused(
        lambda: options(build_only=True, compute_capability="7.5", sparsity=True).require("cpu")
    )


@pytest.fixture
def workstation(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for a GPU of a workstation, and for TensorRT-RTX, which computes on the CPU."""
    machine = gpu_stand_in.as_a100(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    library = gpu_stand_in.tensorrt(machine, "1.7.1.116")
    library.ComputeCapability = IntEnum("ComputeCapability", {"NONE": 0, "CURRENT": 1, "SM86": 86})
    config = type(library.Builder(None).create_builder_config())
    config.set_compute_capability = lambda self, capability, index: library.told.update(built_for=capability) or True
    monkeypatch.setattr(library.Builder, "create_network", lambda self, flags: SimpleNamespace(num_layers=0))
    monkeypatch.setattr(rtx, "import_rtx", lambda: library)
    return library


@pytest.mark.slow
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_engines_run_on_the_gpu_of_a_workstation(
    made: Callable[[str], tuple[Model, Data]],
    tmp_path: Path,
    workstation: Any,
    monkeypatch: pytest.MonkeyPatch,
    cuda_graph: bool,
) -> None:
    model, data = made("digits_cnn")
    stage = Stages(tmp_path, "")
    work = Workspace(tmp_path, "cuda:0", 1, stage, batch_sizes=(1, 8))
    builder = runtime("tensorrt_rtx", cuda_graph=cuda_graph)
    builder.require("cuda:0")
    warmed = Mock(side_effect=rtx.shape_of)  # the sizes of the calls that are only made so that kernels are compiled
    monkeypatch.setattr(rtx, "shape_of", warmed)
    session = builder.open(model, quantizers.none, data, work)

    assert [size for _, size in (call.args for call in warmed.mock_calls)] == ([] if cuda_graph else [1, 8])
    images = data.evaluation.fetch(list(range(21)))
    assert relative_error(torch_logits(model.module, images), session(images).numpy()) < 1e-5
    assert session.runs
    assert (session.runtime, session.device) == ("tensorrt_rtx", "cuda:0")
    assert session.artifact == tmp_path / "engine" / "model.engine"
    assert workstation.told["built_for"].name == "SM86"
    assert "build" in stage.seconds
    assert "compute_capability" not in session.details


@pytest.mark.parametrize("capability", [(7, 0), (8, 0), (9, 0), (10, 0)])
def test_gpus_of_data_centres_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(rtx, "device_name", lambda device: "some GPU")
    text = refused(lambda: options().require("cuda:0"))
    assert text.startswith("runtime=tensorrt_rtx is for GPUs of compute capability 7.5, 8.6, 8.9, 12.0, 12.1 and this")
    assert text.endswith("; use runtime=tensorrt_native or runtime=tensorrt.")
    options(build_only=True).require("cpu")


def test_libraries_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(rtx, "find_spec", lambda name: empty)
    text = refused(rtx.import_rtx.__wrapped__)
    assert text.startswith("runtime=tensorrt_rtx cannot load TensorRT-RTX (libtensorrt_rtx.so.*); install it by pip")


@pytest.mark.parametrize("name", ["onnxruntime", "tensorrt_native", "tensorrt_rtx"])
def test_without_onnxruntime_no_graph_is_begun(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The extra `rtx` does not bring it, as the package for a GPU may be wanted."""
    monkeypatch.setattr(ort, "find_spec", lambda wanted: None)
    monkeypatch.setattr(engines, "import_tensorrt", lambda runtime: None)
    build = {"build_only": True} if name == "tensorrt_rtx" else {}
    text = refused(lambda: runtime(name, **build).require("cpu"))
    assert text.startswith(f"runtime={name} needs ONNX Runtime, which checks and quantizes graphs; install it by pip")


@pytest.mark.parametrize("lacking", [rtx.API, rtx.LIBRARIES])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, lacking: str) -> None:
    monkeypatch.setattr(rtx, "find_spec", lambda name: None if name == lacking else find_spec(name))
    text = refused(rtx.import_rtx.__wrapped__)
    assert text == (
        f"runtime=tensorrt_rtx needs TensorRT-RTX and {lacking} is missing; install it by pip install -e '.[rtx]'."
    )


fp8 = partial(quantizers.fp8, calibration="minmax", images=4, exclude=[], percentile=99.9)
int4 = partial(quantizers.int4, block=64, exclude=[])


@pytest.fixture(scope="module")
def transformer() -> tuple[Model, Data]:
    """A small network of attention, with random weights."""
    torch.manual_seed(0)
    width: dict[str, int] = {"num_heads": 2, "hidden_dim": 64, "mlp_dim": 128}
    network = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_classes=10, **width)
    randomise(network)
    model = Model(network.eval(), 10, Preprocess(size=32, resize=32))
    return model, fake(model, images=4, calibration=4, seed=0)


def network(made: Callable[[str], tuple[Model, Data]], transformer: tuple[Model, Data], name: str) -> Any:
    return transformer if name == "transformer" else made(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits_cnn", "resnet18", "transformer"])
def test_graphs_in_fp8_are_built(
    made: Callable[[str], tuple[Model, Data]], transformer: tuple[Model, Data], tmp_path: Path, name: str
) -> None:
    session, folder = built(tmp_path, *network(made, transformer, name), fp8, optimization_level=0)
    assert session.details["builder_warnings"] == []
    graph, types = onnx.load(folder.parent / "model.onnx").graph, session.details["layers"]["outputs"]
    weights = [item for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT8E4M3FN and item.dims]
    without = session.details["quantizer"]["without_fp8_kernels"]
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul") and node.name not in without]
    assert len(weights) == sum(bool({item.name.removesuffix("_quantized") for item in weights} & {*node.input})
                               for node in products)  # fmt: skip
    assert len(products) - len(weights) == (4 if name == "transformer" else 0)  # two products in each attention
    # Each constant in FP8 is a layer, and so is each rounding of an activation.
    assert types["Fp8"] == len(weights) + ops(graph)["QuantizeLinear"]
    assert set(types) - {"Fp8", "Float"} <= {"Int64", "Int32", "Bool"}  # of shapes


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("digits_cnn", 2), ("resnet18", 1), ("transformer", 9)])
@pytest.mark.parametrize("capability", ["8.6", "8.9"])
def test_graphs_in_int4_are_built(
    made: Callable[[str], tuple[Model, Data]],
    transformer: tuple[Model, Data],
    tmp_path: Path,
    name: str,
    layers: int,
    capability: str,
) -> None:
    session, _ = built(tmp_path, *network(made, transformer, name), int4, capability, optimization_level=0)
    assert session.details["builder_warnings"] == []
    assert len(session.details["quantizer"]["int4_nodes"]) == layers
    types = session.details["layers"]["outputs"]
    assert types["Int4"] == layers
    assert types["Half"] > 10 * types["Float"]
    assert set(types) - {"Int4", "Half", "Float"} <= {"Int64", "Int32", "Bool"}  # of shapes


LEARNED = {"digits_cnn": (8, 7), "digits_cnn of few bits": (3, 4), "resnet18": (4, 7)}


@pytest.mark.slow
@pytest.mark.parametrize("case", LEARNED)
def test_graphs_with_learned_integers_are_built(
    made: Callable[[str], tuple[Model, Data]], tmp_path: Path, case: str
) -> None:
    """Every layer that was trained with rounding is computed in INT8, fewer bits too."""
    bits, activations = LEARNED[case]
    model, data = made(case.partition(" ")[0])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["recovery=lsq", f"recovery.bits={bits}", f"recovery.activations={activations}", "quantizer=learned"]
        cfg = compose("config", overrides=[*words, "recovery.epochs=1"])
    data = replace(data, train=(data.train or data.calibration).take(64))
    train = instantiate(without_probe(cfg.recovery), _partial_=True, _convert_="all")
    record = json.loads(json.dumps(train(model, data)))
    quantizer = taught(instantiate(cfg.quantizer, _partial_=True, _convert_="all"), record)
    session, folder = built(tmp_path, model, data, quantizer, "8.0", optimization_level=0)

    graph, types = onnx.load(folder.parent / "model.onnx").graph, session.details["layers"]["outputs"]
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert session.details["builder_warnings"] == []
    assert session.details["quantizer"]["learned_weights"] == len(products) == len(record["learned"])
    assert session.details["quantizer"]["learned_activations"] == len(products)
    assert types["Int8"] >= len(products)


@pytest.mark.parametrize(("name", "least", "less"), [("fp8", "8.9", "8.6"), ("int4", "8.0", "7.5")])
def test_gpus_without_a_precision_are_refused_before_anything_is_built(
    made: Callable[[str], tuple[Model, Data]], tmp_path: Path, name: str, least: str, less: str
) -> None:
    text = refused(lambda: built(tmp_path, *made("digits_cnn"), {"fp8": fp8, "int4": int4}[name], less))
    assert text == (
        f"quantizer={name} under TensorRT needs compute capability {least} or later and this is the GPU to build for"
        f" (compute capability {less}); use quantizer=int8 or quantizer=fp16."
    )
    assert not (tmp_path / "model.onnx").exists()


def test_the_builder_itself_refuses_int4_on_turing(
    made: Callable[[str], tuple[Model, Data]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "NEEDED", {})
    with pytest.raises(RuntimeMismatch, match=r"sm75.*int4"):
        built(tmp_path, *made("digits_cnn"), int4, "7.5")
