"""Training with rounding: values and gradients are those of the paper, and the file is the network that was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from independent import tensors, torch_logits
from learned_files import (
    assert_equal_answers,
    assert_few_ties,
    composed_quantizer,
    job_in,
    logits_node_by_node,
    logits_of,
    rounding,
    written,
)
from omegaconf import OmegaConf
from random_networks import attention, fresh, same, small_vit, state_of
from shared_networks import CASES, shared_network
from test_conf import composed
from torch import Tensor, nn

from pq_sweep.compress import learned, lsq, quantizers
from pq_sweep.compress.lsq import Scale
from pq_sweep.compress.weight_only import Grid
from pq_sweep.core.stored import stored_weights
from pq_sweep.core.weights import prunable_by_name
from pq_sweep.inputs.datasets import digits, image_folder
from pq_sweep.inputs.models import cifar_resnet, digits_cnn
from pq_sweep.job import run as job
from pq_sweep.job import steps
from pq_sweep.job.check import problems
from pq_sweep.job.learned import taught
from pq_sweep.job.probing import without_probe
from pq_sweep.job.stages import Stages
from pq_sweep.measure.bits import of_graph
from pq_sweep.measure.graph import EXACT, Graph
from pq_sweep.runtimes import precision_of
from pq_sweep.types import Data, Model, Preprocess, Record, Split

Change = Callable[[Any], Any]


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None))


def options_of(name: str, **changed: Any) -> dict[str, Any]:
    """Return the options of a recovery as its YAML has them, with some changed."""
    found = OmegaConf.to_container(without_probe(composed(f"recovery={name}").recovery))
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items() if key != "_target_"} | changed


def trained(model: Model, data: Data, **changed: Any) -> Record:
    torch.manual_seed(0)
    record: Record = json.loads(json.dumps(lsq.lsq(model, data, **options_of("lsq", epochs=1) | changed)))
    return record


# --- The rounding ----------------------------------------------------------------------------------------------------


def closed_form(w: Tensor, s: float, low: int, high: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the value and the gradients by w and by s of equations 1 to 3 of Esser et al."""
    parts = w / s
    inside = (parts > low) & (parts < high)
    value = parts.clamp(low, high).round() * s
    by_s = torch.where(inside, parts.round() - parts, parts.clamp(low, high))
    return value, inside.float(), by_s


@pytest.mark.parametrize("grid", [*(Grid(bits) for bits in range(2, 9)), Grid(8, signed=False)], ids=str)
def test_values_and_gradients_are_those_of_the_paper(grid: Grid) -> None:
    torch.manual_seed(grid.bits)
    w, s = torch.randn(500), 0.13
    scale = Scale.of(torch.tensor(s), grid, len(w))
    latent, weight = w.clone().requires_grad_(), torch.randn(500)
    (scale.rounded(latent) * weight).sum().backward()

    value, by_w, by_s = closed_form(w, s, *grid.limits)
    torch.testing.assert_close(scale.rounded(latent), value)
    torch.testing.assert_close(latent.grad, by_w * weight)
    torch.testing.assert_close(scale.value.grad, (by_s * weight).sum() / (500 * grid.limits[1]) ** 0.5)


def test_gradient_where_values_are_clipped_is_the_difference_quotient() -> None:
    """There the rounding has a derivative."""
    w, grid = torch.tensor([-9.0, 9.0, 5.0]), Grid(3)
    scale = Scale.of(torch.tensor(1.0), grid, 1)
    scale.rounded(w).sum().backward()
    above, below = (w.div(s).clamp(*grid.limits).round().mul(s).sum() for s in (1.01, 0.99))

    assert scale.value.grad is not None
    assert scale.value.grad.item() * 3**0.5 == pytest.approx(((above - below) / 0.02).item(), rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_begin_where_the_squared_error_is_least(bits: int, data: Data) -> None:
    """Without steps that change anything, what is learned is where it began."""
    model = digits_cnn()
    before = {name: weight.detach().clone() for name, weight in prunable_by_name(model.module).items()}
    record = trained(model, data, bits=bits, lr=0.0, lr_scale=0.0)

    for name, entry in record["learned"].items():
        w, (s,) = before[name].double(), entry["scale"]
        errors = [float((closed_form(w, s * factor, *Grid(bits).limits)[0] - w).square().sum())
                  for factor in (1.0, *torch.linspace(0.3, 3, 200).tolist())]  # fmt: skip
        assert errors[0] <= 1.03 * min(errors)


def test_scales_stay_positive_however_fast_they_learn(data: Data) -> None:
    record = trained(digits_cnn(), data, bits=3, activations=8, lr_scale=1.0)
    scales = [value for entry in record["learned"].values() for value in entry["scale"]]
    scales += [entry["activation"]["scale"] for entry in record["learned"].values()]
    assert len(scales) == 2 * len(record["learned"])
    assert all(0 < scale < np.inf for scale in scales)


def test_scales_have_an_optimizer_of_their_own(data: Data) -> None:
    """Adam's first steps are as long as its learning rate, whatever the gradients; nothing decays."""
    began, moved = (trained(digits_cnn(), data, bits=4, lr=0.0, lr_scale=rate) for rate in (0.0, 1e-6))
    steps = len(data.training()) // 64
    for name, entry in moved["learned"].items():
        difference = abs(entry["scale"][0] - began["learned"][name]["scale"][0])
        assert 0 < difference <= 1.01e-6 * steps


# --- The network that comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_channel", [False, True])
def test_weights_are_integers_times_their_scale(per_channel: bool, data: Data) -> None:
    model = digits_cnn()
    keys = [*state_of(model)]
    record = trained(model, data, bits=3, per_channel=per_channel)
    assert [*state_of(model)] == keys
    assert not any(part._forward_pre_hooks for part in model.module.modules())
    assert record["learned"].keys() == prunable_by_name(model.module).keys()

    for name, weight in prunable_by_name(model.module).items():
        scale, rows = torch.tensor(record["learned"][name]["scale"]), weight.detach().flatten(1)
        assert len(scale) == (len(rows) if per_channel else 1)
        codes = rows / scale[:, None]
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert codes.round().min() >= -4
        assert codes.round().max() <= 3
        assert codes.round().abs().amax(1).int().tolist() == record["learned"][name]["largest"]


def test_training_helps(data: Data) -> None:
    """From random weights, with two bits all the time."""
    model = fresh()
    trained(model, data, bits=2, lr=0.01, lr_scale=1e-3, epochs=3)
    images, labels = data.evaluation.fetch(list(range(500))), data.evaluation.labels.numpy()
    assert (torch_logits(model.module, images).argmax(1) == labels).mean() > 0.7


def test_pruned_weights_stay_zero(data: Data) -> None:
    from pq_sweep.compress.pruners import l1_global

    model = digits_cnn()
    l1_global(model, data, amount=0.6)
    zero = {name: weight == 0 for name, weight in prunable_by_name(model.module).items()}
    trained(model, data, bits=4)
    for name, weight in prunable_by_name(model.module).items():
        assert not weight[zero[name]].any()


def test_the_seed_decides(data: Data) -> None:
    first, again = digits_cnn(), digits_cnn()
    records = [trained(model, data, bits=4, augment=["shift"]) for model in (first, again)]
    assert records[0] == records[1]
    assert same(state_of(first), state_of(again))


def test_images_are_needed(data: Data) -> None:
    alone = Data(data.evaluation, data.calibration, None, data.classes)
    assert "no training images" in refused(lambda: trained(digits_cnn(), alone))


# --- The file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(data: Data) -> Tensor:
    return data.evaluation.fetch(list(range(len(data.evaluation))))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "per_channel"), [(2, False), (3, True), (8, False)])
def test_file_is_the_network(bits: int, per_channel: bool, data: Data, images: Tensor, tmp_path: Path) -> None:
    model = digits_cnn()
    record = trained(model, data, bits=bits, per_channel=per_channel)
    path = written(model, record, tmp_path, bits=bits)
    assert_equal_answers(model, record, path, images, bits)
    container = {2: "INT2", 3: "INT4", 8: "INT8"}[bits]
    kinds = {item.data_type for item in onnx.load(path).graph.initializer if item.name.endswith("_quantized")}
    assert kinds == {getattr(onnx.TensorProto, container)}


@pytest.mark.slow
def test_learned_scales_are_in_the_file_as_they_are(data: Data, tmp_path: Path) -> None:
    """The linear layers have no BatchNorm behind them."""
    model = digits_cnn()
    record = trained(model, data, bits=4)
    found = tensors(onnx.load(written(model, record, tmp_path, bits=4)))
    for name in ("fc1.weight", "fc2.weight"):
        assert found[f"{name}_scale"].shape == ()
        assert found[f"{name}_scale"] == np.float32(record["learned"][name]["scale"][0])


@pytest.mark.slow
def test_exact_bits_are_noted(data: Data, tmp_path: Path) -> None:
    """Three bits are stored in four, and all in eight where activations are rounded."""
    model = digits_cnn()
    record = trained(model, data, bits=3)
    noted = {entry.key: entry.value for entry in onnx.load(written(model, record, tmp_path, bits=3)).metadata_props}
    assert set(json.loads(noted[EXACT]).values()) == {3}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "activations", "rest"), [(7, 8, 5e-3), (4, 8, 5e-3), (4, 4, 1e-5)])
def test_file_rounds_activations_as_the_network_did(
    bits: int, activations: int, rest: float, data: Data, images: Tensor, tmp_path: Path
) -> None:
    """ONNX Runtime's INT8 kernels round biases to 32 bits; at fewer bits than 8, jobs run without them."""
    model = digits_cnn()
    record = trained(model, data, bits=bits, activations=activations)
    assert all("activation" in entry for entry in record["learned"].values())
    path = written(model, record, tmp_path, bits=bits, activations=activations)
    with rounding(model.module, record):
        expected = torch_logits(model.module, images)
    assert_few_ties(logits_node_by_node(path, images), expected, 1e-5)
    assert_few_ties(logits_of(path, images, bits=bits, activations=activations), expected, rest)


@pytest.mark.slow
def test_what_tensorrt_is_given(data: Data, tmp_path: Path) -> None:
    """It takes bytes with a sign alone, and scales above zero, also where BatchNorm turns channels."""
    model = digits_cnn()
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data[::2] *= -1
    record = trained(model, data, bits=8, activations=7)
    graph = onnx.load(written(model, record, tmp_path, bits=8, activations=7, form="tensorrt"))
    found = tensors(graph)
    assert all((value > 0).all() for name, value in found.items() if name.endswith("_scale"))
    assert {found[node.input[2]].dtype for node in graph.graph.node if node.op_type == "QuantizeLinear"} == {
        np.dtype("int8")
    }
    assert min(found[name].min() for name in found if name.endswith("_quantized")) >= -127
    assert Grid(8, narrow=True).limits == (-127, 127)


@pytest.mark.slow
def test_bits_are_told_of_weights_and_activations(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    record = trained(model, data, bits=3, activations=4)
    found = of_graph(Graph(written(model, record, tmp_path, bits=3, activations=4)))
    assert found is not None
    assert {(each.weight_bits, each.activation_bits) for each in found.products} == {(3, 4)}


@pytest.mark.slow
def test_activations_are_one_step_of_integers_in_the_file(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    record = trained(model, data, bits=4, activations=8)
    graph = onnx.load(written(model, record, tmp_path, bits=4, activations=8))
    weights = {weight.name: weight for weight in stored_weights(graph.graph)}
    made_by = {node.output[0]: node for node in graph.graph.node}
    found = tensors(graph)
    for node in graph.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            inner = [made_by[name] for name in node.input[:2]]
            assert [each.op_type for each in inner] == ["DequantizeLinear"] * 2
            name = inner[1].input[0].removesuffix("_quantized")
            entry = record["learned"][name]["activation"]
            assert found[inner[0].input[1]] == np.float32(entry["scale"])
            assert found[inner[0].input[2]].dtype == (np.int8 if entry["signed"] else np.uint8)
            assert name in weights
    # Digits are not negative, and neither is what comes out of a ReLU.
    assert not any(entry["activation"]["signed"] for entry in record["learned"].values())


@pytest.mark.slow
@pytest.mark.parametrize("make", [attention, lambda: attention(20), lambda: fresh(3)], ids=["one", "three", "random"])
def test_attention_and_negative_factors(make: Callable[[], Model], data: Data, images: Tensor, tmp_path: Path) -> None:
    model = make()
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data[::2] *= -1
    record = trained(model, data, bits=8)
    assert_equal_answers(model, record, written(model, record, tmp_path, bits=8), images, bits=8)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_layers_that_share_a_weight(case: str, data: Data, images: Tensor, tmp_path: Path) -> None:
    model = shared_network(case)
    record = trained(model, data, bits=4)
    assert_equal_answers(model, record, written(model, record, tmp_path, bits=4), images)


class Upwards(nn.Sequential):
    def __init__(self) -> None:
        up = nn.ConvTranspose2d(1, 6, 3, stride=2)
        super().__init__(up, nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 17 * 17, 10))


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True])
def test_transposed_convolutions(per_channel: bool, data: Data, images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Model(Upwards().eval(), 10, Preprocess(8, 8, 1, (0.0,), (1.0,)))
    record = trained(model, data, bits=4, per_channel=per_channel)
    assert_equal_answers(model, record, written(model, record, tmp_path, bits=4), images)


@pytest.mark.slow
def test_vision_transformer(tmp_path: Path) -> None:
    model = small_vit()
    torch.manual_seed(0)
    few = Split.of_tensors(torch.randn(4, 3, 224, 224), torch.arange(4))
    record = trained(model, Data(few, few, few, tuple("abcdefghij")), bits=4, batch_size=2)
    assert_equal_answers(model, record, written(model, record, tmp_path, bits=4), few.fetch([0, 1, 2, 3]))


def test_other_weights_than_the_learned_ones_are_refused(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    record = trained(model, data, bits=4)
    with torch.no_grad():
        model.module.get_parameter("fc1.weight").add_(0.01)
    text = refused(lambda: written(model, record, tmp_path, bits=4))
    assert text.startswith("the weight fc1.weight of the exported graph is not made of the integers")


def test_a_weight_that_is_not_in_the_graph_is_refused(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    record = trained(model, data, bits=4)
    record["learned"]["gone.weight"] = record["learned"]["fc1.weight"]
    assert "does not find the weight gone.weight" in refused(lambda: written(model, record, tmp_path, bits=4))


def test_what_a_device_would_compute_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bits8 = {"a": {"bits": 8, "scale": [1.0], "largest": [1], "activation": {"bits": 8, "signed": False, "scale": 1.0}}}
    monkeypatch.setattr(learned, "multiplies_bytes", lambda flags: False)
    assert "give recovery.bits=7" in refused(lambda: learned.write_learned(onnx.ModelProto(), bits8, "cpu"))
    assert "recovery.activations=7" in refused(lambda: learned.write_learned(onnx.ModelProto(), bits8, "tensorrt"))


# --- From the recovery to the quantizer ------------------------------------------------------------------------------


def test_the_precision_says_what_is_computed() -> None:
    assert precision_of(composed_quantizer(3, None)) == "w3"
    assert precision_of(composed_quantizer(3, 8)) == "int8"


def test_a_quantizer_of_another_kind_is_left_alone() -> None:
    assert taught(quantizers.fp16, {"notes": []}) is quantizers.fp16
    assert taught(quantizers.fp16, None) is quantizers.fp16


def test_what_was_learned_is_never_dropped() -> None:
    text = refused(lambda: taught(quantizers.fp16, {"learned": {"a": {}}}))
    assert "pq_sweep.compress.quantizers.fp16 would round them in its own way" in text


@pytest.mark.parametrize("record", [None, {"notes": []}])
def test_nothing_learned_is_refused(record: Record | None, tmp_path: Path) -> None:
    nothing: Any = None
    call = taught(composed_quantizer(4, None), record)
    text = refused(lambda: call(tmp_path, tmp_path, nothing, form="cpu", stage=Stages(tmp_path, "")))
    assert text.startswith("quantizer=learned writes the integers that a recovery has learned")


LEARNED = ("recovery=lsq", "quantizer=learned")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("quantizer=learned",), "this one learns none; give recovery=lsq"),
        (("quantizer=learned", "recovery=finetune"), "this one learns none; give recovery=lsq"),
        (("recovery=lsq",), "give quantizer=learned, or recovery=finetune"),
        (("recovery=lsq", "quantizer=int8"), "quantizers.int8 would round them in its own way"),
        ((*LEARNED, "recovery.bits=1"), "recovery.bits=1 is out of range; give a whole number from 2 to 8"),
        ((*LEARNED, "recovery.bits=9"), "recovery.bits=9 is out of range; give a whole number from 2 to 8"),
        ((*LEARNED, "recovery.bits=2.5"), "recovery.bits=2.5 is out of range"),
        ((*LEARNED, "recovery.activations=9"), "recovery.activations=9 is out of range"),
        ((*LEARNED, "recovery.epochs=0"), "recovery.epochs=0 is out of range"),
        ((*LEARNED, "recovery.lr_scale=-1"), "recovery.lr_scale=-1 is out of range"),
        ((*LEARNED, "recovery.per_channel=maybe"), "recovery.per_channel=maybe is neither true nor false"),
        ((*LEARNED, "recovery.per_channel=1"), "recovery.per_channel=1 is neither true nor false"),
        ((*LEARNED, "recovery.optimizer=lion"), "recovery.optimizer=lion is not known; valid are: adamw, adam, sgd"),
        ((*LEARNED, "recovery.augment=[flip,spin]"), "recovery.augment=spin is not known; valid are: flip, shift"),
        ((*LEARNED, "recovery.augment=flip flip"), "recovery.augment=flip flip is not valid, as it is no list"),
        ((*LEARNED, "order=quantize_first"), "leaves nothing to recover"),
        ((*LEARNED, "runtime=torch"), "runtime=torch cannot run precision w4"),
    ],
)
def test_options_that_cannot_be_are_refused_in_a_sentence(overrides: tuple[str, ...], says: str) -> None:
    found = problems(composed(*overrides))
    assert [text for text in found if says in text]
    assert all(text.endswith(".") and "\n" not in text for text in found)


@pytest.mark.parametrize("options", [(), ("recovery.activations=8",), ("recovery.bits=2",), ("pruner=gradual",)])
def test_options_that_can_be_are_not(options: tuple[str, ...]) -> None:
    assert problems(composed(*LEARNED, *options)) == []


# --- Jobs ------------------------------------------------------------------------------------------------------------

SHORT_JOB = (*LEARNED, "recovery.epochs=1", "recovery.bits=3")


@pytest.fixture
def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "WORTH_KEEPING_S", 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("keep_everything")
def test_a_job_that_goes_on_has_its_scales(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second try takes the trained network from disk; so does another job, from the cache, and a fresh process."""
    whole = job_in(tmp_path / "whole", *SHORT_JOB, "cache=off")
    assert whole["session"]["precision"] == "w3"
    assert whole["bits"]["weight_bits"] == 3
    assert whole["session"]["quantizer"] == {"learned_weights": 7, "learned_activations": 0}

    with monkeypatch.context() as patch:
        patch.setattr(job, "open_session", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            job_in(tmp_path / "cut", *SHORT_JOB)
    with monkeypatch.context() as patch:
        patch.setattr(lsq, "train", None)  # it cannot be trained again
        again = job_in(tmp_path / "cut", *SHORT_JOB)
        other = job_in(tmp_path / "other", *SHORT_JOB, "recovery.lr_scale=1e-4", "measure.repeats=2")
    for folder, result in (("cut", again), ("other", other)):
        assert result["accuracy"] == whole["accuracy"]
        assert (tmp_path / folder / "model.onnx").read_bytes() == (tmp_path / "whole" / "model.onnx").read_bytes()


@pytest.mark.slow
def test_a_job_with_activations_computes_in_integers(tmp_path: Path) -> None:
    result = job_in(tmp_path / "0", *SHORT_JOB, "cache=off", "recovery.activations=8", "recovery.bits=4")
    assert result["session"]["precision"] == "int8"
    assert (result["bits"]["weight_bits"], result["bits"]["activation_bits"]) == (4, 8)
    assert result["accuracy"]["top1"] > 0.9
    assert "simulated" not in result["session"]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "activations", "count"), [(2, None, 2000), (4, 8, 200)])
def test_file_is_the_network_on_cifar(
    bits: int, activations: int | None, count: int, shared_data: Path, tmp_path: Path
) -> None:
    model = cifar_resnet(n=3, weights=str(shared_data / "weights" / "resnet20_cifar10.pth"))
    whole = image_folder(model, root=str(shared_data / "cifar10_jpeg"), calibration=64, evaluation=None, seed=0)
    data = Data(whole.evaluation, whole.calibration, whole.training().take(128), whole.classes)
    record = trained(model, data, bits=bits, activations=activations)
    path = written(model, record, tmp_path, bits=bits, activations=activations)
    images = data.evaluation.fetch(list(range(count)))
    if activations is None:
        assert_equal_answers(model, record, path, images)
        return
    with rounding(model.module, record):
        expected = torch_logits(model.module, images)
    assert_few_ties(logits_node_by_node(path, images), expected, 2e-2)
