"""Zero-fill pruners: what they zero is recomputed here by hand, from the weights before and after."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import SHORT, launch_in
from conftest import ROOT, Launch, only_sweep, refused, results
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from independent import onnx_logits, tensors
from omegaconf import OmegaConf
from random_networks import (
    State,
    assert_alive,
    attention,
    big_digits,
    fresh,
    parameters,
    randomise,
    same,
    small_vit,
    state_of,
)
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from pq_sweep.compress import pruners
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.check import problems
from pq_sweep.measure import network
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Data, Model, Preprocess

Prune = Callable[..., Any]

AMOUNTS = [0, 0.0, 0.1, 0.5, 0.9]
ZERO_FILL: dict[str, dict[str, Any]] = {
    "random": {},
    "l1": {},
    "l1_global": {},
    "ln_structured": {"n": 2, "dim": 0},
    "random_structured": {"dim": 0},
}
# The pruner that trains has tests of its own, in test_training.py.
YAMLS = [path for path in sorted((ROOT / "conf" / "pruner").glob("*.yaml")) if path.stem != "gradual"]
RUNNING = ("remove", "obs")  # what runs the network too, whose arithmetic is another one in another layout

every_zero_fill = pytest.mark.parametrize("name", ZERO_FILL)
every_amount = pytest.mark.parametrize("amount", AMOUNTS, ids=repr)


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn(weights=None), calibration=8)


def weights_of(state: State, prefixes: tuple[str, ...] = ("weight",)) -> State:
    """Keep the weights of convolutions and linear layers: those of two dimensions or more."""
    return {key: value for key, value in state.items() if key.endswith(prefixes) and value.dim() > 1}


def pruned_states(name: str, data: Data, model: Model | None = None, **options: Any) -> tuple[State, State]:
    """Prune and return the state before and after."""
    model = model or fresh()
    before = state_of(model)
    torch.manual_seed(0)
    getattr(pruners, name)(model, data, **(ZERO_FILL.get(name, {}) | options))
    return before, state_of(model)


def zeros(tensor: Tensor) -> int:
    return int((tensor == 0).sum())


def zero_slices(weight: Tensor, dim: int) -> set[int]:
    flat = weight.movedim(dim, 0).flatten(1)
    return {index for index, row in enumerate(flat) if not row.any()}


# --- zero-fill -------------------------------------------------------------------------------------------------------


def test_none_changes_nothing(data: Data) -> None:
    assert same(*pruned_states("none", data, amount=0.5))


@every_zero_fill
@pytest.mark.parametrize("amount", [0, 0.0], ids=repr)
def test_amount_zero_changes_nothing(name: str, amount: float, data: Data) -> None:
    assert same(*pruned_states(name, data, amount=amount))


@pytest.mark.parametrize("name", ["l1", "random"])
@every_amount
def test_layerwise_amount_is_reached_exactly_in_each_layer(name: str, amount: float, data: Data) -> None:
    _, after = pruned_states(name, data, amount=amount)
    weights = weights_of(after)
    assert len(weights) == 7
    assert {key: zeros(w) for key, w in weights.items()} == {k: round(amount * w.numel()) for k, w in weights.items()}


@every_amount
def test_l1_keeps_the_largest_weights_of_each_layer(amount: float, data: Data) -> None:
    before, after = pruned_states("l1", data, amount=amount)
    for key, weight in weights_of(after).items():
        original, gone = before[key], weight == 0
        assert torch.equal(weight[~gone], original[~gone])
        if gone.any():
            assert original[gone].abs().max() <= original[~gone].abs().min()


@every_amount
def test_l1_global_zeroes_the_smallest_weights_of_all(amount: float, data: Data) -> None:
    before, after = pruned_states("l1_global", data, amount=amount)
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights_of(before).values()])
    count = round(amount * len(magnitudes))
    threshold = magnitudes.sort().values[count]
    for key, weight in weights_of(before).items():
        assert torch.equal(after[key], torch.where(weight.abs() < threshold, 0, weight))
    assert sum(zeros(weight) for weight in weights_of(after).values()) == count


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
@every_amount
def test_ln_structured_zeroes_the_slices_of_smallest_norm(amount: float, dim: int, n: int, data: Data) -> None:
    before, after = pruned_states("ln_structured", data, amount=amount, n=n, dim=dim)
    for key, weight in weights_of(before).items():
        norms = weight.movedim(dim, 0).flatten(1).abs().pow(n).sum(1)
        count = round(amount * len(norms))
        assert zero_slices(after[key], dim) == set(norms.argsort()[:count].tolist())
        kept = norms.argsort()[count:]
        assert torch.equal(after[key].index_select(dim, kept), weight.index_select(dim, kept))


@pytest.mark.parametrize("dim", [0, 1])
@every_amount
def test_random_structured_zeroes_whole_slices(amount: float, dim: int, data: Data) -> None:
    before, after = pruned_states("random_structured", data, amount=amount, dim=dim)
    for key, weight in weights_of(before).items():
        gone = zero_slices(after[key], dim)
        kept = torch.tensor([index for index in range(weight.shape[dim]) if index not in gone], dtype=torch.int64)
        assert len(gone) == round(amount * weight.shape[dim])
        assert torch.equal(after[key].index_select(dim, kept), weight.index_select(dim, kept))


@pytest.mark.parametrize("name", ["random", "random_structured"])
def test_random_choice_follows_the_seed(name: str, data: Data) -> None:
    def prune(seed: int) -> State:
        model = fresh()
        torch.manual_seed(seed)
        getattr(pruners, name)(model, data, amount=0.5, **ZERO_FILL[name])
        return state_of(model)

    first, again, other = prune(1), prune(1), prune(2)
    assert same(first, again)
    assert not same(first, other)


@every_zero_fill
def test_only_weights_of_layers_change(name: str, data: Data) -> None:
    """Biases, BatchNorm and its statistics stay."""
    before, after = pruned_states(name, data, amount=0.5)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == set(weights_of(before))


@every_zero_fill
def test_every_weight_takes_batchnorm_too(name: str, data: Data) -> None:
    """A slice of a vector is a single weight, so slice-wise pruners leave vectors out."""
    model = fresh()
    for part in model.module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data /= 10  # as small as the others, so that a global choice meets them too
    before, after = pruned_states(name, data, model, amount=0.5, every_weight=True)
    norms = {key for key, value in before.items() if key.endswith("weight") and value.dim() == 1}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert len(norms) == 5
    assert changed == set(weights_of(before)) | (set() if name.endswith("structured") else norms)


@pytest.mark.parametrize("name", ["l1", "random"])
def test_every_weight_reaches_the_amount_in_batchnorm(name: str, data: Data) -> None:
    _, after = pruned_states(name, data, amount=0.25, every_weight=True)
    norms = [value for key, value in after.items() if key.endswith("weight") and value.dim() == 1]
    assert [zeros(weight) for weight in norms] == [len(weight) // 4 for weight in norms]


@pytest.mark.parametrize("path", [path for path in YAMLS if path.stem not in RUNNING], ids=lambda path: path.stem)
def test_weights_in_another_layout_lose_the_same(path: Path, data: Data) -> None:
    """Networks may come as channels_last, which torch's pruning does not take."""
    plain, other = fresh(), fresh()
    other.module.to(memory_format=torch.channels_last)
    prune: Prune = instantiate(OmegaConf.load(path), _partial_=True, _convert_="all")
    for model in (plain, other):
        torch.manual_seed(0)
        prune(model, data)
    assert same(state_of(plain), state_of(other))


@every_zero_fill
@pytest.mark.parametrize("every_weight", [False, True])
def test_zeros_are_permanent(name: str, every_weight: bool, data: Data) -> None:
    """No mask is left that would double the state_dict or come back with it."""
    model = fresh()
    keys, parameters = set(model.module.state_dict()), {key for key, _ in model.module.named_parameters()}
    getattr(pruners, name)(model, data, amount=0.5, every_weight=every_weight, **ZERO_FILL[name])
    assert set(model.module.state_dict()) == keys
    assert {key for key, _ in model.module.named_parameters()} == parameters
    assert not any(part._forward_pre_hooks for part in model.module.modules())


@every_zero_fill
@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
def test_reported_sparsity_is_the_share_of_zeros(name: str, amount: float, data: Data) -> None:
    model = fresh()
    getattr(pruners, name)(model, data, amount=amount, **ZERO_FILL[name])
    weights = weights_of(state_of(model)).values()
    total = sum(weight.numel() for weight in weights)
    found = network.count(model)
    assert found.sparsity == sum(map(zeros, weights)) / total
    # One small layer rounds to whole channels.
    assert found.sparsity == pytest.approx(amount, abs=0.02)
    assert found.weights == total
    assert found.params - found.nonzero_params == sum(zeros(p) for p in model.module.parameters())


@pytest.mark.parametrize(
    ("kdim", "projections"), [(None, ["in_proj"]), (16, ["q_proj", "k_proj", "v_proj"])], ids=["one", "three"]
)
@every_zero_fill
def test_projections_of_attention_are_pruned(name: str, kdim: int | None, projections: list[str], data: Data) -> None:
    _, after = pruned_states(name, data, attention(kdim), amount=0.5)
    weights = {key: w for key, w in after.items() if key.endswith("weight")}
    inputs = {f"attention.{projection}_weight" for projection in projections}
    assert {key for key in weights if "proj_weight" in key} == inputs
    assert weights.keys() == inputs | {"embed.weight", "keys.weight", "attention.out_proj.weight", "head.weight"}
    for weight in weights.values():
        assert zeros(weight) / weight.numel() == pytest.approx(0.5, abs=0.4 if name == "l1_global" else 0.001)


@pytest.mark.parametrize("amount", [1, 1.5, -0.1])
@every_zero_fill
def test_amount_one_is_all_and_never_one_weight(name: str, amount: float, data: Data) -> None:
    """torch takes an integer as a number of weights; here `amount` always is a share."""
    if amount != 1:
        with pytest.raises(ValueError, match="amount"):
            pruned_states(name, data, amount=amount)
    else:
        assert all(not weight.any() for weight in weights_of(pruned_states(name, data, amount=amount)[1]).values())


# --- n of every m input channels -------------------------------------------------------------------------------------

# The layers of `every_kind` whose input channels, in each of their groups, are a multiple of m.
DIVISIBLE = {
    2: {"wide", "point", "grouped", "line", "volume", "hidden", "head"},
    4: {"wide", "point", "grouped", "line", "volume", "hidden", "head"},
    8: {"wide", "point", "line", "volume", "hidden"},
}

every_pattern = pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2), (4, 8)])


def every_kind() -> Model:
    torch.manual_seed(0)
    layers = {
        "stem": nn.Conv2d(3, 16, 3),
        "wide": nn.Conv2d(16, 24, (3, 2)),
        "point": nn.Conv2d(24, 16, 1),
        "grouped": nn.Conv2d(16, 8, 3, groups=4),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "line": nn.Conv1d(8, 4, 5),
        "volume": nn.Conv3d(8, 4, 2),
        "upwards": nn.ConvTranspose2d(16, 8, 2),
        "norm": nn.BatchNorm2d(16),
        "hidden": nn.Linear(8, 12),
        "head": nn.Linear(12, 10),
    }
    return Model(nn.ModuleDict(layers), 10)


def groups(weight: Any, m: int) -> Iterator[list[float]]:
    """Walk over every `m` successive input channels of a weight (K, C, ...), place by place of its kernel."""
    for kernel in np.asarray(weight):
        for place in np.ndindex(kernel.shape[1:]):
            channels = [kernel[(channel, *place)].item() for channel in range(len(kernel))]
            yield from (channels[start : start + m] for start in range(0, len(channels), m))


def follows(weight: Any, n: int, m: int) -> bool:
    return weight.shape[1] % m == 0 and all(m - group.count(0) <= n for group in groups(weight, m))


def sparsified(model: Model, data: Data, n: int, m: int) -> tuple[State, State, dict[str, Any]]:
    before = state_of(model)
    record = pruners.nm_sparsity(model, data, n=n, m=m)
    return before, state_of(model), record


@every_pattern
def test_the_n_largest_of_every_m_input_channels_stay(n: int, m: int, data: Data) -> None:
    before, after, _ = sparsified(every_kind(), data, n, m)
    for name in DIVISIBLE[m]:
        weights = (groups(state[f"{name}.weight"], m) for state in (before, after))
        for original, pruned in zip(*weights, strict=True):
            kept = sorted(range(m), key=lambda channel: abs(original[channel]))[m - n :]
            assert pruned == [original[channel] if channel in kept else 0 for channel in range(m)]
            assert m - pruned.count(0) == n


@every_pattern
def test_layers_that_are_sparse_are_so_by_exactly_the_share(n: int, m: int, data: Data) -> None:
    _, after, record = sparsified(every_kind(), data, n, m)
    weights = [after[f"{name}.weight"] for name in DIVISIBLE[m]]
    assert all(zeros(weight) * m == weight.numel() * (m - n) for weight in weights)
    assert record["sparse"] == {"layers": len(weights), "weights": sum(weight.numel() for weight in weights)}


@every_pattern
def test_layers_whose_input_channels_are_no_multiple_of_m_stay(n: int, m: int, data: Data) -> None:
    before, after, record = sparsified(every_kind(), data, n, m)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {f"{name}.weight" for name in DIVISIBLE[m]}
    left = weights_of(before).keys() - changed
    assert record["why_dense"].keys() == left
    assert record["dense"] == {"layers": len(left), "weights": sum(before[key].numel() for key in left)}


def test_the_record_says_what_was_left_dense_and_why(data: Data) -> None:
    _, _, record = sparsified(every_kind(), data, 4, 8)
    assert json.loads(json.dumps(record)) == {
        "pattern": "4:8",
        "sparse": {"layers": 5, "weights": 24 * 16 * 6 + 16 * 24 + 4 * 8 * 5 + 4 * 8 * 8 + 12 * 8},
        "dense": {"layers": 5, "weights": 16 * 3 * 9 + 8 * 4 * 9 + 8 * 9 + 16 * 8 * 4 + 10 * 12},
        "why_dense": {
            "stem.weight": "input channels: 3, no multiple of 8",
            "grouped.weight": "input channels of a group: 4, no multiple of 8",
            "depthwise.weight": "input channels of a group: 1, no multiple of 8",
            "upwards.weight": "transposed convolution",
            "head.weight": "input channels: 12, no multiple of 8",
        },
        "sparse_tensor_cores": {"pattern": "2:4", "min_compute_capability": "8.0"},
        "asked": {"weights": 0.5},
        "reached": {"weights": 1600 / (3200 + 1424)},
        "notes": [],
    }


def test_of_equal_weights_exactly_n_stay(data: Data) -> None:
    layer = nn.Linear(8, 3)
    layer.weight.data = torch.tensor([[1.0, -1.0] * 4, [0.5] * 8, [0.0, 0.0, 0.0, 2.0, 0.0, 3.0, 3.0, -3.0]])
    pruners.nm_sparsity(Model(layer, 3), data, n=2, m=4)
    assert layer.weight.tolist() == [
        [1, -1, 0, 0, 1, -1, 0, 0],
        [0.5, 0.5, 0, 0, 0.5, 0.5, 0, 0],
        [0, 0, 0, 2, 0, 3, 3, 0],
    ]


@pytest.mark.parametrize(
    ("kdim", "projections"), [(None, ["in_proj"]), (16, ["q_proj", "k_proj", "v_proj"])], ids=["one", "three"]
)
def test_projections_of_attention_follow_the_pattern(kdim: int | None, projections: list[str], data: Data) -> None:
    _, after, record = sparsified(attention(kdim), data, 2, 4)
    inputs = [f"attention.{projection}_weight" for projection in projections]
    names = {*inputs, "embed.weight", "keys.weight", "attention.out_proj.weight", "head.weight"}
    assert {key for key, weight in after.items() if weight.dim() > 1} == names
    assert all(follows(after[key], 2, 4) and 2 * zeros(after[key]) == after[key].numel() for key in names)
    assert record["sparse"]["layers"] == len(names)


def test_no_mask_of_the_pattern_is_left(data: Data) -> None:
    model = fresh()
    names = {key for key, _ in model.module.named_parameters()}
    before, after, _ = sparsified(model, data, 2, 4)
    assert before.keys() == after.keys()
    assert {key for key, _ in model.module.named_parameters()} == names
    assert not any(part._forward_pre_hooks for part in model.module.modules())


def test_a_network_that_no_group_fits_is_refused(data: Data) -> None:
    text = refused(lambda: pruners.nm_sparsity(fresh(), data, n=2, m=7))
    assert "pruner.m=7 divides no layer's input channels, which are 1, 16, 32, 64, 256;" in text


def problems_of(*overrides: str) -> list[str]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return problems(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(
    ("n", "m"),
    [("0", "4"), ("4", "4"), ("5", "4"), ("-1", "4"), ("1.5", "4"), ("true", "4"), ("two", "4"), ("null", "4"),
     ("2", "0"), ("2", "-4"), ("1", "1"), ("2", "4.0"), ("2", "four"), ("2", "null")],
)  # fmt: skip
def test_an_impossible_pattern_is_refused_before_anything_is_loaded(n: str, m: str) -> None:
    (problem,) = problems_of("pruner=nm_sparsity", f"pruner.n={n}", f"pruner.m={m}")
    assert "is no pattern; give whole numbers with 0 < n < m, such as 2 of 4." in problem


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 32)])
def test_a_possible_pattern_is_not_refused(n: int, m: int) -> None:
    assert problems_of("pruner=nm_sparsity", f"pruner.n={n}", f"pruner.m={m}") == []


def test_the_order_of_a_norm_is_no_pattern() -> None:
    assert problems_of("pruner=ln_structured", "pruner.n=1.5") == []
    assert problems_of("pruner=ln_structured", "pruner.n=-1") == [
        "pruner.n=-1 is out of range; give a number from 0 on."
    ]


def test_a_pattern_takes_no_amount(tmp_path: Path, launch: Launch) -> None:
    done = launch("pruner=nm_sparsity", "pruner.amount=0.5")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "pruner.amount is not known; valid are: n, m."
    assert list(tmp_path.iterdir()) == []
    (problem,) = problems_of("pruner=nm_sparsity", "++pruner.amount=0.5")
    assert "pruner.amount has no meaning beside pruner.n and pruner.m" in problem


def onnx_weights(path: Path) -> dict[str, np.ndarray]:
    """Return the weights (K, C, ...) of a graph's convolutions and products with constants."""
    graph = onnx.load(path)
    constants = tensors(graph)
    stored = {node.output[0]: node.input[0] for node in graph.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in graph.graph.node:
        name = stored.get(node.input[1], node.input[1]) if node.op_type in ("Conv", "Gemm", "MatMul") else ""
        if name in constants:
            outputs_first = node.op_type == "Conv" or any(item.name == "transB" and item.i for item in node.attribute)
            found[name] = constants[name] if outputs_first else constants[name].T
    return found


@pytest.mark.slow
def test_the_pattern_is_in_the_exported_graph(data: Data, tmp_path: Path) -> None:
    model = digits_cnn()
    pruners.nm_sparsity(model, data, n=2, m=4)
    export_onnx(model, tmp_path / "export.onnx")
    weights = onnx_weights(tmp_path / "export.onnx")
    assert len(weights) == 7
    assert {name for name, weight in weights.items() if not follows(weight, 2, 4)} == {"stem.0.0.weight"}


@pytest.mark.slow
def test_the_pattern_is_in_the_exported_transformer(data: Data, tmp_path: Path) -> None:
    """Its products take transposed weights, whose groups then run down the columns; the patches have three channels."""
    torch.manual_seed(0)
    network = VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10)
    model = Model(network.eval(), 10, Preprocess(size=8, resize=8))
    randomise(model.module)
    _, after, _ = sparsified(model, data, 2, 4)
    export_onnx(model, tmp_path / "export.onnx")
    weights = onnx_weights(tmp_path / "export.onnx")
    inside = [key for key in after if "encoder.layers" in key and after[key].dim() > 1]
    assert len(inside) == 4
    assert len(weights) == len(inside) + len(["conv_proj", "head"])
    assert {name for name, weight in weights.items() if not follows(weight, 2, 4)} == {"conv_proj.weight"}


@pytest.fixture(scope="module")
def pattern_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four jobs of a user: 2:4, fine-tuned or not, in FP32 and INT8."""
    folder = tmp_path_factory.mktemp("pattern")
    grid = ("pruner=nm_sparsity", "recovery=none,finetune", "quantizer=none,int8", "runtime=onnxruntime", "device=cpu")
    done = launch_in(folder, "-m", "tracking=none", *SHORT, *grid)
    assert done.returncode == 0, done.stderr
    return only_sweep(folder)


@pytest.mark.slow
def test_every_artifact_of_a_sweep_follows_the_pattern(pattern_sweep: Path) -> None:
    """Through export, fine-tuning and INT8; the stem has a single input channel."""
    found = results(pattern_sweep)
    assert len(found) == 4
    for job, result in enumerate(found):
        weights = onnx_weights(pattern_sweep / str(job) / "model.onnx")
        dense = {name.removesuffix("_quantized") for name, weight in weights.items() if not follows(weight, 2, 4)}
        assert (len(weights), dense) == (7, {"stem.0.0.weight"})
        stem = weights[next(name for name in weights if name.startswith("stem.0.0."))].size
        assert result["network"]["sparsity"] == (result["network"]["weights"] - stem) / 2 / result["network"]["weights"]
        record = json.loads((pattern_sweep / str(job) / "pruning.json").read_text())
        assert record["sparse"] == {"layers": 6, "weights": result["network"]["weights"] - stem}
        assert record["why_dense"] == {"stem.0.0.weight": "input channels: 1, no multiple of 4"}


@pytest.mark.slow
def test_fine_tuning_restores_what_the_pattern_costs(pattern_sweep: Path, data: Data) -> None:
    images = data.evaluation.fetch(list(range(len(data.evaluation))))
    labels = data.evaluation.labels.numpy()
    found = results(pattern_sweep)
    for job, result in enumerate(found):
        answers = onnx_logits(pattern_sweep / str(job) / "model.onnx", images).argmax(1)
        assert result["accuracy"]["top1"] == (answers == labels).mean()
    pruned, tuned = (
        {result["session"]["precision"]: result["accuracy"]["drop_points"] for result in part}
        for part in (found[:2], found[2:])
    )
    assert pruned.keys() == tuned.keys() == {"fp32", "int8"}
    assert all(drop < 1 for drop in tuned.values())
    assert all(0 < drop < 5 for drop in pruned.values())


# --- every pruner on some networks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big() -> Data:
    return big_digits()


networks = pytest.mark.parametrize(
    "name", ["digits_cnn", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "mobilenet_v2", "vit"))]
)


def data_for(name: str, request: pytest.FixtureRequest) -> Data:
    found: Data = request.getfixturevalue("data" if name == "digits_cnn" else "big")
    return found


@networks
@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_pruner_leaves_every_network_alive(name: str, path: Path, request: pytest.FixtureRequest) -> None:
    if path.stem == "obs" and name != "digits_cnn":
        pytest.skip("minutes; test_obs.py has all kinds of layers")
    data, model = data_for(name, request), small_vit() if name == "vit" else fresh(name=name)
    before = parameters(model)
    prune: Prune = instantiate(OmegaConf.load(path), _partial_=True, _convert_="all")
    prune(model, data)
    assert_alive(model, data.evaluation.fetch([0, 1, 2, 3]))
    after = network.count(model)
    assert path.stem == "none" or after.sparsity > 0.4 or after.params <= 0.6 * before
