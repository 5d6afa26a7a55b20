"""rounding=optimal: the same file with other integers, whose layers answer more as they did."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from independent import onnx_logits, snr_db, tensors
from random_networks import small_vit
from shared_networks import shared_network
from test_weight_only import Unusual, exported
from torch import Tensor

from pq_sweep.compress import pruners, quantizers
from pq_sweep.core.stored import stored_weights
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.runtimes.graph import graph_options
from pq_sweep.types import Data, Model, Split, UserError

WEIGHTS: dict[str, Any] = {"block": None, "exclude": [], "images": 32}
INT8: dict[str, Any] = {"calibration": "minmax", "images": 32, "exclude": [], "percentile": 99.999}


def written(source: Path, data: Data, rounding: str, name: str = "weights", form: str = "cpu", **options: Any) -> Path:
    """Run a quantizer and return its file."""
    target = source.with_name(f"{name}_{rounding}_{form}_{options.get('bits')}_{options.get('block')}.onnx")
    chosen = {**(WEIGHTS if name == "weights" else INT8), "rounding": rounding, **options}
    getattr(quantizers, name)(source, target, data, form=form, stage=Stages(target.parent, ""), **chosen)
    return target


def data_for(model: Model, count: int = 16) -> Data:
    images = Split.of_tensors(model.sample(count), torch.zeros(count, dtype=torch.int64))
    return Data(images, images, None, tuple("0123456789"))


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "export.onnx"
    export_onnx(digits_cnn(), path)
    return path


@pytest.fixture(scope="module")
def images(data: Data) -> Tensor:
    return data.evaluation.fetch(list(range(100)))


def differing(first: Path, second: Path) -> set[str]:
    """Name the initializers in which two graphs differ, which have to be the same otherwise."""
    graphs = [onnx.load(path) for path in (first, second)]
    values = [tensors(graph) for graph in graphs]
    for graph in graphs:
        del graph.graph.initializer[:]
    assert graphs[0] == graphs[1]
    assert values[0].keys() == values[1].keys()
    assert all(values[0][name].dtype == values[1][name].dtype for name in values[0])
    return {name for name in values[0] if not np.array_equal(values[0][name], values[1][name])}


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "gain"), [(8, 2), (4, 8), (3, 8), (2, 5)])
def test_few_bits_answer_more_as_the_network_does(
    source: Path, data: Data, images: Tensor, bits: int, gain: float
) -> None:
    expected = onnx_logits(source, images)
    nearest, optimal = (written(source, data, rounding, bits=bits) for rounding in ("nearest", "optimal"))
    before, after = (snr_db(expected, onnx_logits(path, images)) for path in (nearest, optimal))
    codes = [each.codes() for each in stored_weights(onnx.load(optimal).graph)]

    assert after > before + gain
    assert {name.removesuffix("_quantized") for name in differing(nearest, optimal)} == {
        each.name for each in stored_weights(onnx.load(source).graph)}  # fmt: skip
    assert min(each.min() for each in codes) >= -(2 ** (bits - 1))
    assert max(each.max() for each in codes) <= 2 ** (bits - 1) - 1


@pytest.mark.slow
def test_blocks_keep_their_scales(source: Path, data: Data, images: Tensor) -> None:
    expected = onnx_logits(source, images)
    nearest, optimal = (written(source, data, rounding, bits=3, block=32) for rounding in ("nearest", "optimal"))

    assert all(name.endswith("_quantized") for name in differing(nearest, optimal))
    assert snr_db(expected, onnx_logits(optimal, images)) > snr_db(expected, onnx_logits(nearest, images)) + 5


@pytest.mark.slow
@pytest.mark.parametrize("form", ["cpu", "tensorrt"])
def test_eight_bits_are_the_same_graph_with_other_integers(source: Path, data: Data, images: Tensor, form: str) -> None:
    """Activations are rounded too, which leaves less to gain."""
    expected = onnx_logits(source, images)
    nearest, optimal = (written(source, data, rounding, "int8", form) for rounding in ("nearest", "optimal"))
    changed = differing(nearest, optimal)
    graph = onnx.load(optimal)
    codes = {each.name: each.codes() for each in stored_weights(graph.graph) if each.scale is not None}

    assert changed == {f"{name}_quantized" for name in codes}
    assert max(np.abs(each).max() for each in codes.values()) <= 127
    assert snr_db(expected, onnx_logits(optimal, images)) > snr_db(expected, onnx_logits(nearest, images))


@pytest.mark.slow
def test_seven_bits_stay_seven_bits_where_products_saturate(
    source: Path, data: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pq_sweep.compress.qdq.multiplies_bytes", lambda flags: False)
    graph = onnx.load(written(source, data, "optimal", "int8", exclude=["last"]))
    codes = [each.codes() for each in stored_weights(graph.graph) if each.scale is not None]

    assert max(np.abs(each).max() for each in codes) <= 64


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights", "int8"])
def test_what_is_pruned_stays_pruned(name: str, data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    pruners.l1(model, data, amount=0.6)
    export_onnx(model, tmp_path / "export.onnx")
    before = {each.name: each.values() for each in stored_weights(onnx.load(tmp_path / "export.onnx").graph)}
    path = written(tmp_path / "export.onnx", data, "optimal", name, **({"bits": 3} if name == "weights" else {}))
    after = {each.name: each.codes() for each in stored_weights(onnx.load(path).graph)}

    assert before.keys() == after.keys()
    assert all(not after[key][before[key] == 0].any() for key in before)


@pytest.mark.slow
def test_excluded_layers_stay_in_float(source: Path, data: Data) -> None:
    graph = onnx.load(written(source, data, "optimal", bits=3, exclude=["first"]))
    floats = [each.name for each in stored_weights(graph.graph) if each.scale is None]

    assert floats == ["stem.0.0.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["grouped and transposed", "transformer", "shared"])
def test_every_kind_of_layer_is_rounded(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if case == "grouped and transposed":
        source = exported(Unusual(), (4, 8, 8), tmp_path)
        images = torch.randn(16, 4, 8, 8)
        data = data_for(Model(Unusual(), 10))
        split = Split.of_tensors(images, torch.zeros(16, dtype=torch.int64))
        data = Data(split, split, None, tuple("0123456789"))
    else:
        model = small_vit() if case == "transformer" else shared_network("one Parameter of two convolutions")
        source, data = tmp_path / "export.onnx", data_for(model, 4)
        export_onnx(model, source)
        images = data.evaluation.fetch(list(range(4)))
    count = len(images)
    nearest, optimal = (written(source, data, rounding, bits=3, images=count) for rounding in ("nearest", "optimal"))
    weights = {f"{each.name}_quantized" for each in stored_weights(onnx.load(source).graph)}
    expected = onnx_logits(source, images)

    changed = differing(nearest, optimal)

    assert changed <= weights
    assert len(changed) >= len(weights) - 1  # a first layer of independent inputs is best rounded to the nearest
    assert snr_db(expected, onnx_logits(optimal, images)) > snr_db(expected, onnx_logits(nearest, images)) + 3


@pytest.mark.slow
def test_integers_are_the_same_each_time(source: Path, data: Data) -> None:
    first, second = (written(source, data, "optimal", bits=bits, exclude=list(some)).read_bytes()
                     for bits, some in itertools.repeat((4, ()), 2))  # fmt: skip

    assert first == second


def test_only_optimal_integers_depend_on_images(data: Data) -> None:
    about = {rounding: graph_options(partial(quantizers.weights, bits=4, rounding=rounding), data, "cpu")
             for rounding in ("nearest", "optimal")}  # fmt: skip

    assert "calibration" not in about["nearest"]
    assert about["optimal"]["calibration"] == data.identity(data.calibration)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rounding": "up"}, r"quantizer\.rounding=up"),
        ({"rounding": "optimal", "images": 10_000}, r"images=10000 does not"),
    ],
)
def test_what_cannot_be_is_refused(source: Path, data: Data, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        written(source, data, **{"bits": 4, "rounding": "optimal", **options})
