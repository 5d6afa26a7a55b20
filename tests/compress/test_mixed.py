"""Mixed precision: the layers that stay out of 8 bit are those that cost most, and no more than needed."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from independent import matrices, onnx_logits, relative_error, snr_db, torch_logits
from test_quantizers import FORMS, WEIGHTS, Case, exported, quantize

from pq_sweep.compress.mixed import snr_db as package_snr_db
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.types import Model, UserError

FRAGILE = {"fc1.weight", "fc2.weight"}

each_form = pytest.mark.parametrize("form", FORMS)


def fragile_model() -> Model:
    """The embedded network with one hidden unit 10,000 times as large, and its next weights as small.

    In FP32 nothing changes; in 8 bit the other units between fc1 and fc2 vanish beside it.
    """
    model = digits_cnn()
    first, second = model.module.fc1, model.module.fc2
    with torch.no_grad():
        first.weight[0] *= 1e4
        first.bias[0] *= 1e4
        second.weight[:, 0] /= 1e4
    return model


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = fragile_model()
    return exported(model, digits(model), tmp_path_factory.mktemp("fragile"))


def precisions(record: dict[str, Any]) -> dict[str, str]:
    return {layer["name"]: layer["precision"] for layer in record["layers"]}


def hits(case: Case, path: Path) -> int:
    labels = case.data.evaluation.labels.numpy()
    return int((onnx_logits(path, case.images).argmax(1) == labels).sum())


@pytest.mark.slow
def test_the_fragile_network_is_whole_in_fp32_and_broken_in_int8(fragile: Case, tmp_path: Path) -> None:
    before = digits_cnn()
    assert relative_error(torch_logits(before.module, fragile.images), fragile.logits) < 1e-4

    quantize("int8", fragile, tmp_path / "model.onnx")

    assert hits(fragile, fragile.source) > hits(fragile, tmp_path / "model.onnx") + 50


@pytest.mark.slow
@each_form
def test_keeps_what_breaks_and_nothing_else(fragile: Case, tmp_path: Path, form: str) -> None:
    record = quantize("mixed", fragile, tmp_path / "model.onnx", form, max_drop=0.0)

    kept = {name for name, precision in precisions(record).items() if precision == "fp32"}
    assert set(precisions(record)) == WEIGHTS
    assert kept <= FRAGILE
    assert record["kept_layers"] == len(kept) > 0
    assert matrices(onnx.load(tmp_path / "model.onnx")) == kept  # all other weights are 8 bit in the file
    assert hits(fragile, tmp_path / "model.onnx") >= hits(fragile, fragile.source) - 5
    assert record["calibration_drop_points"] <= 0


@pytest.mark.slow
def test_noise_of_a_layer_is_what_quantizing_it_alone_adds(fragile: Case, tmp_path: Path) -> None:
    record = quantize("mixed", fragile, tmp_path / "model.onnx")
    noise = {layer["name"]: layer["snr_db"] for layer in record["layers"]}
    sample = replace(fragile, images=next(fragile.data.calibration.batches(16))[0])

    for name in ("stem.1.0.weight", "fc2.weight"):
        alone = tmp_path / "alone.onnx"
        quantize("int8", sample, alone, exclude=sorted(WEIGHTS - {name}))
        measured = snr_db(torch_logits(fragile.model.module, sample.images), onnx_logits(alone, sample.images))
        # Operators without weights are in 8 bit here, too; they can only add noise.
        assert measured < noise[name] + 1

    assert set(sorted(noise, key=lambda name: noise[name])[: len(FRAGILE)]) == FRAGILE


@pytest.mark.slow
def test_a_sound_network_keeps_nothing(tmp_path: Path) -> None:
    model = digits_cnn()
    case = exported(model, digits(model), tmp_path)

    record = quantize("mixed", case, tmp_path / "mixed.onnx", max_drop=1.0)
    quantize("int8", case, tmp_path / "int8.onnx")

    assert set(precisions(record).values()) == {"int8"}
    np.testing.assert_array_equal(
        onnx_logits(tmp_path / "mixed.onnx", case.images), onnx_logits(tmp_path / "int8.onnx", case.images)
    )


@pytest.mark.slow
def test_more_may_be_lost_with_a_larger_max_drop(fragile: Case, tmp_path: Path) -> None:
    kept = [
        quantize("mixed", fragile, tmp_path / "model.onnx", max_drop=drop)["kept_layers"] for drop in (0.0, 20.0, 100.0)
    ]

    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1] == 0


def test_fewest_layers_stay(fragile: Case, tmp_path: Path) -> None:
    """With one layer fewer the drop, measured here anew, would be more than was allowed."""
    record = quantize("mixed", fragile, tmp_path / "model.onnx", max_drop=1.0)
    worst = [layer["name"] for layer in sorted(record["layers"], key=lambda layer: layer["snr_db"])]
    images, labels = next(fragile.data.calibration.batches(len(fragile.data.calibration)))

    def drop(kept: list[str]) -> float:
        quantize("int8", fragile, tmp_path / "trial.onnx", exclude=kept)
        answers = [onnx_logits(path, images).argmax(1) for path in (fragile.source, tmp_path / "trial.onnx")]
        float_hits, int8_hits = (int((answer == labels.numpy()).sum()) for answer in answers)
        return (float_hits - int8_hits) / len(labels) * 100

    count = record["kept_layers"]
    assert drop(worst[:count]) == pytest.approx(record["calibration_drop_points"])
    assert drop(worst[:count]) <= 1.0 < drop(worst[: count - 1])


def test_kept_layers_can_be_fp16(fragile: Case, tmp_path: Path) -> None:
    record = quantize("mixed", fragile, tmp_path / "model.onnx", max_drop=0.0, keep="fp16")

    kept = {name for name, precision in precisions(record).items() if precision == "fp16"}
    graph = onnx.load(tmp_path / "model.onnx")
    assert matrices(graph, np.float16) == kept != set()
    assert matrices(graph) == set()
    assert hits(fragile, tmp_path / "model.onnx") >= hits(fragile, fragile.source) - 5


def test_if_every_layer_is_kept_nothing_else_is_in_8_bit(fragile: Case, tmp_path: Path) -> None:
    """Less than nothing may be lost: no choice will do but the FP32 graph itself."""
    record = quantize("mixed", fragile, tmp_path / "model.onnx", max_drop=-1.0)

    operators = Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert record["kept_layers"] == len(WEIGHTS)
    assert "QuantizeLinear" not in operators
    np.testing.assert_allclose(
        onnx_logits(tmp_path / "model.onnx", fragile.images), fragile.logits, rtol=1e-3, atol=1e-2
    )


def test_the_choice_is_drawn_and_can_be_written_down(fragile: Case, tmp_path: Path) -> None:
    record = quantize("mixed", fragile, tmp_path / "model.onnx")

    drawing = (tmp_path / "precisions.svg").read_text()
    assert "<svg" in drawing
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_evaluation_images_are_never_fetched(fragile: Case, tmp_path: Path) -> None:
    def fetch(indices: list[int]) -> torch.Tensor:
        raise AssertionError("the evaluation images were looked at")

    blind = replace(fragile.data, evaluation=replace(fragile.data.evaluation, fetch=fetch))
    quantize("mixed", replace(fragile, data=blind), tmp_path / "model.onnx")


def test_unknown_precision_to_keep_is_refused(fragile: Case, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"quantizer.keep=fp8 is not known; valid are: fp32, fp16\."):
        quantize("mixed", fragile, tmp_path / "model.onnx", keep="fp8")


@pytest.mark.parametrize(("noise", "expected"), [(0.1, 20.0), (1.0, 0.0), (0.0, 200.0), (10.0, -20.0)])
def test_signal_to_noise_ratio(noise: float, expected: float) -> None:
    signal = torch.tensor([3.0, -4.0])

    assert package_snr_db(signal, signal * (1 + noise)) == pytest.approx(expected, abs=1e-4)


def test_signal_of_nothing_has_the_worst_ratio() -> None:
    assert package_snr_db(torch.zeros(2), torch.ones(2)) == -200
