"""Parameters that a network uses at several places: pruned once, counted once, and never torn apart."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import refused
from independent import onnx_logits, relative_error, tensors, torch_logits
from random_networks import fresh, randomise, small_vit, state_of
from shared_networks import CASES, DIGITS, shared_network
from torch import nn
from torchvision.models import swin_t

from pq_sweep.compress import pruners, quantizers, recovery, removal
from pq_sweep.compress.shared import shared_layers
from pq_sweep.core.weights import network_state, network_structure, prunable, prunable_by_name
from pq_sweep.job.stages import Stages
from pq_sweep.measure import network
from pq_sweep.measure.graph import Graph
from pq_sweep.measure.layers import compressed_layers, dense_layers
from pq_sweep.measure.sizes import storage_sizes
from pq_sweep.runtimes.export import check_export, export_onnx, fill, trace
from pq_sweep.types import Data, Model, Split

every_case = pytest.mark.parametrize("case", CASES)
OF_ZEROS: dict[str, dict[str, Any]] = {
    "random": {"amount": 0.5},
    "l1": {"amount": 0.5},
    "l1_global": {"amount": 0.5},
    "ln_structured": {"amount": 0.5, "n": 2, "dim": 0},
    "random_structured": {"amount": 0.5, "dim": 1},
    "nm_sparsity": {"n": 2, "m": 4},
}
REMOVE: dict[str, Any] = {"amount": 0.5, "importance": "magnitude", "p": 2, "global_ranking": False, "round_to": None}


@pytest.fixture(scope="module")
def data() -> Data:
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    split = Split.of_tensors(images, torch.arange(24) % 10)
    return Data(split, split, split, tuple("0123456789"))


def held_twice(model: Model) -> list[list[str]]:
    """List the names of the state's entries that are one memory."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.module.state_dict().items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    return sorted(group for group in names.values() if len(group) > 1)


# --- pruners of zeros ------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("name", OF_ZEROS)
def test_each_parameter_is_pruned_once_and_stays_shared(case: str, name: str, data: Data) -> None:
    model = shared_network(case)
    before = held_twice(model)
    record = getattr(pruners, name)(model, data, **OF_ZEROS[name])
    assert held_twice(model) == before
    weights = prunable_by_name(model.module)
    share = sum(int((weight == 0).sum()) for weight in weights.values()) / sum(w.numel() for w in weights.values())
    assert network.count(model).sparsity == pytest.approx(share, abs=1e-12)
    assert share == pytest.approx(record["reached"]["weights"], abs=1e-12)
    if name in ("random", "l1", "l1_global"):
        assert share == pytest.approx(0.5, abs=0.002)


@every_case
def test_each_parameter_is_counted_once(case: str) -> None:
    model = shared_network(case)
    found = network.count(model)
    assert found.params == CASES[case].params
    assert found.params - found.nonzero_params == 0
    assert found.weights == sum(layer["weights"] for layer in dense_layers(model).values())


@every_case
def test_sparse_formats_hold_each_parameter_once(case: str, tmp_path: Path) -> None:
    """A bit for each prunable weight beside all values: 33 bits of what is prunable, 32 of the rest."""
    model = shared_network(case)
    found = network.count(model)
    bits = sum((weight.numel() + 7) // 8 for weight in prunable_by_name(model.module).values())
    assert storage_sizes(model, tmp_path)["bitmask"] == 4 * found.params + bits


def test_every_weight_lists_a_shared_norm_once() -> None:
    norm = nn.BatchNorm1d(4)
    other = nn.BatchNorm1d(4)
    other.weight = norm.weight
    assert len(prunable(nn.Sequential(norm, other), every_weight=True)) == 1


# --- removal ---------------------------------------------------------------------------------------------------------


@every_case
def test_shared_layers_are_found_by_name(case: str) -> None:
    assert tuple(shared_layers(shared_network(case)).values()) == CASES[case].shared


@pytest.mark.parametrize(
    "make", [fresh, small_vit, pytest.param(lambda: Model(swin_t(), 1000), marks=pytest.mark.slow)]
)
def test_packaged_networks_share_nothing(make: Any) -> None:
    assert shared_layers(make()) == {}


def test_a_weight_that_its_own_layer_uses_twice_is_not_shared() -> None:
    """Such as a standardised convolution, which subtracts the mean of its weight."""

    class Standardised(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / self.weight.std()
            return nn.functional.conv2d(x, weight, self.bias, padding=1)

    module = nn.Sequential(Standardised(1, 4, 3), nn.Flatten(), nn.Linear(256, 10))
    assert shared_layers(Model(module, 10, shared_network(next(iter(CASES))).preprocess)) == {}


@every_case
@pytest.mark.parametrize("global_ranking", [False, True])
def test_removal_leaves_shared_layers_whole_and_names_them(case: str, global_ranking: bool, data: Data) -> None:
    """What is left computes what the whole computes without the channels that are gone."""
    model, images = shared_network(case), torch.randn(5, 1, 8, 8)
    whole, before = copy.deepcopy(model.module), held_twice(model)
    record = removal.remove(model, data, **(REMOVE | {"global_ranking": global_ranking}))
    assert any(all(name in note for name in CASES[case].shared) for note in record["notes"])
    assert held_twice(model) == before
    assert network.count(model).params < CASES[case].params
    for layer, left in zip(whole.modules(), model.module.modules(), strict=True):
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None and len(left.bias) < len(layer.bias):  # type: ignore[arg-type]
            gone = ~torch.isin(layer.bias, left.bias)  # type: ignore[arg-type]
            layer.weight.data[gone], layer.bias.data[gone] = 0, 0
    assert relative_error(torch_logits(whole, images), torch_logits(model.module, images)) < 1e-5

    again = shared_network(case, seed=1)
    removal.replay(again, json.loads(json.dumps(record)))
    again.module.load_state_dict(model.module.state_dict())
    assert np.array_equal(torch_logits(again.module, images), torch_logits(model.module, images))


def test_a_network_in_which_all_follows_shared_layers_is_refused(data: Data) -> None:
    model = shared_network("one Parameter of two convolutions")
    model.module.free, model.module.last = nn.Identity(), nn.Identity()
    model.module.head = nn.Linear(32, 10)
    text = refused(lambda: removal.remove(model, data, **REMOVE))
    assert "no channels that may leave (a, b share parameters or run more than once)" in text


# --- recovery, export and cache --------------------------------------------------------------------------------------


def test_fine_tuning_keeps_zeros_of_a_shared_weight(data: Data) -> None:
    model = shared_network("one Parameter of two convolutions")
    pruners.l1(model, data, amount=0.5)
    zero = model.module.a.weight.detach() == 0  # type: ignore[union-attr]
    recovery.finetune(model, data, epochs=1, lr=0.01, batch_size=8)
    assert model.module.a.weight is model.module.b.weight
    assert not model.module.a.weight.detach()[zero].any()  # type: ignore[index, union-attr]


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8_dynamic"])
def test_graphs_of_every_precision_hold_a_shared_weight_once(
    case: str, precision: str, data: Data, tmp_path: Path
) -> None:
    model, images = shared_network(case), torch.randn(4, 1, 8, 8)
    pruners.l1(model, data, amount=0.5)
    dense, source, target = dense_layers(model), tmp_path / "export.onnx", tmp_path / "model.onnx"
    export_onnx(model, source)
    assert check_export(model, source) < 1e-5
    options: dict[str, Any] = {"exclude": []} if precision != "fp32" else {}
    if precision == "int8":
        options |= {"calibration": "minmax", "images": 24, "percentile": 99.9}
    make = quantizers.none if precision == "fp32" else getattr(quantizers, precision)
    make(source, target, data, form="cpu", stage=Stages(tmp_path, ""), **options)

    expected = torch_logits(model.module, images)
    assert relative_error(expected, onnx_logits(target, images)) < (1e-5 if precision == "fp32" else 0.2)
    stored = sum(value.size for value in tensors(onnx.load(target)).values() if value.ndim > 1)
    matrices = sum(weight.numel() for weight in prunable_by_name(model.module).values())
    copied = precision == "int8_dynamic" or case == "a weight that code uses too"  # it is stored transposed as well
    assert stored == matrices or (copied and stored > matrices)
    after = compressed_layers(Graph(target), dense)
    assert after.keys() == dense.keys()
    if precision in ("fp32", "fp16"):
        assert {name: layer["nonzero"] for name, layer in after.items()} == {
            name: layer["nonzero"] for name, layer in dense.items()
        }


def untied() -> Model:
    """Return a network with the shapes and values of the first case, in which nothing is shared."""
    model = shared_network("one Parameter of two convolutions")
    model.module.b.weight = nn.Parameter(model.module.a.weight.detach().clone())
    return model


def test_a_network_that_shares_has_another_graph_than_one_that_does_not(tmp_path: Path) -> None:
    """Their shapes are the same, but the traced graph of one cannot be filled with the weights of the other."""
    tied = shared_network("one Parameter of two convolutions")
    assert network_structure(tied) != network_structure(untied())
    assert network_state(tied) != network_state(untied())
    assert network_structure(tied) == network_structure(shared_network("one Parameter of two convolutions", seed=1))


@pytest.mark.slow
def test_a_traced_graph_is_filled_with_shared_weights(tmp_path: Path) -> None:
    first, second = (shared_network("one memory of two Parameters", seed=seed) for seed in (0, 1))
    trace(first, tmp_path / "traced.onnx")
    fill(second, tmp_path / "traced.onnx", tmp_path / "filled.onnx")
    assert check_export(second, tmp_path / "filled.onnx") < 1e-5


def test_pruning_leaves_the_names_of_the_state(data: Data) -> None:
    model = shared_network("a layer that runs twice")
    before = state_of(model).keys()
    pruners.random(model, data, amount=0.5)
    assert state_of(model).keys() == before


# --- 8 bit where a weight is shared ----------------------------------------------------------------------------------


class Square(nn.Module):
    """Two linear layers with one square weight, which nothing but its answers would tell from its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x.flatten(1)).relu()).relu())


@pytest.fixture(scope="module")
def square(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Path]:
    torch.manual_seed(0)
    module = Square().eval()
    randomise(module)
    model = Model(module, 10, DIGITS)
    path = tmp_path_factory.mktemp("square") / "export.onnx"
    export_onnx(model, path)
    return model, path


@pytest.mark.slow
def test_the_dynamic_quantizer_transposes_a_shared_weight_for_each_layer(
    square: tuple[Model, Path], data: Data, tmp_path: Path
) -> None:
    """ONNX Runtime's own transposes the one weight twice, and leaves it as it was."""
    (model, source), images = square, torch.randn(8, 1, 8, 8)
    quantizers.int8_dynamic(source, tmp_path / "model.onnx", data, form="cpu", stage=Stages(tmp_path, ""), exclude=[])
    assert relative_error(torch_logits(model.module, images), onnx_logits(tmp_path / "model.onnx", images)) < 0.1


def test_layers_that_share_a_weight_are_left_out_together(
    square: tuple[Model, Path], data: Data, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": "minmax", "images": 24, "percentile": 99.9, "exclude": ["first"]}
    record = quantizers.int8(
        square[1], tmp_path / "model.onnx", data, form="cpu", stage=Stages(tmp_path, ""), **options
    )
    stored = tensors(onnx.load(tmp_path / "model.onnx"))
    assert len(record["excluded_nodes"]) == 2
    assert np.array_equal(stored["first.weight"], square[0].module.first.weight.detach().numpy())  # type: ignore[union-attr]
    assert not {name for name in stored if name.startswith(("first.weight_", "second"))} - {"second.bias"}


def test_mixed_precision_takes_layers_that_share_a_weight_as_one(
    square: tuple[Model, Path], data: Data, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": "minmax", "images": 24, "percentile": 99.9, "max_drop": 0}
    record = quantizers.mixed(
        square[1],
        tmp_path / "model.onnx",
        data,
        form="cpu",
        stage=Stages(tmp_path, ""),
        keep="fp16",
        **options,  # type: ignore[arg-type]
    )
    assert [layer["name"] for layer in record["layers"]] == ["first.weight", "head.weight"]


class Transposed(nn.Module):
    """A decoder whose Parameter is the encoder's memory, read the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.decode, self.encode = nn.Linear(8, 64), nn.Linear(64, 8)
        self.decode.weight = nn.Parameter(self.encode.weight.data.t())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(images.flatten(1)))


def test_one_memory_in_two_orders_is_refused() -> None:
    model = Model(Transposed().eval(), 64, DIGITS)
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    text = refused(lambda: pruners.l1_global(model, None, amount=0.5))
    assert text.startswith("the weight of decode shares its memory with encode.weight in another order")
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
