"""order=quantize_first: a quantized graph loses the weights that stand for the smallest values, and nothing else."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from commands import SHORT, launch_in
from conftest import ROOT, only_sweep
from hydra import compose, initialize_config_dir
from independent import onnx_logits, tensors
from random_networks import small_vit
from torch import nn

from pq_sweep.compress import pruners
from pq_sweep.compress.order import prune_graph
from pq_sweep.core.stored import Stored, stored_weights
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.check import problems
from pq_sweep.job.run import quantizer_of
from pq_sweep.job.stages import Stages
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Data, Model, UserError

Pruner = Callable[..., Any]
PRUNERS = {"l1": pruners.l1, "l1_global": pruners.l1_global, "random": pruners.random}
each_pruner = pytest.mark.parametrize("name", PRUNERS)
INTEGERS = ("int8", "weights", "weights quantizer.bits=2", "mixed", "int8 quantizer.exclude=[last]", "int8_dynamic")
FLOATS = ("none", "fp16")


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "export.onnx"
    export_onnx(digits_cnn(), path)
    return path


@pytest.fixture(scope="module")
def int8(source: Path, data: Data) -> Path:
    return quantized("int8", source, data)


def quantized(quantizer: str, source: Path, data: Data, *overrides: str) -> Path:
    """Write a graph as a job would, and return its path."""
    target = source.with_name(f"{abs(hash((quantizer, overrides)))}.onnx")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"quantizer={quantizer.split()[0]}", *quantizer.split()[1:], *overrides])
    quantizer_of(cfg)(source, target, data, form="cpu", stage=Stages(source.parent, ""))
    return target


def pruned(graph: Path, folder: Path, pruner: Pruner, seed: int = 0, **options: Any) -> tuple[Path, dict[str, Any]]:
    path = folder / "pruned.onnx"
    path.write_bytes(graph.read_bytes())
    return path, prune_graph(path, partial(pruner, data=None, **options), seed)


def weights_of(path: Path) -> dict[str, Stored]:
    return {weight.name: weight for weight in stored_weights(onnx.load(path).graph)}


def share_of_zeros(weight: Stored) -> float:
    return float((weight.values() == 0).mean())


# What changes


@pytest.mark.slow
@each_pruner
def test_nothing_to_prune_leaves_the_very_file(int8: Path, tmp_path: Path, name: str) -> None:
    path, record = pruned(int8, tmp_path, PRUNERS[name], amount=0.0)

    assert path.read_bytes() == int8.read_bytes()
    assert record["zeros"] == sum(int((weight.values() == 0).sum()) for weight in weights_of(int8).values())


@each_pruner
def test_only_integers_become_zero(int8: Path, tmp_path: Path, name: str) -> None:
    path, _ = pruned(int8, tmp_path, PRUNERS[name], amount=0.5)
    before, after = onnx.load(int8), onnx.load(path)
    old, new = tensors(before), tensors(after)
    matrices = {weight.item.name for weight in stored_weights(before.graph)}

    assert before.graph.node == after.graph.node
    assert old.keys() == new.keys()
    for tensor, values in old.items():
        if tensor in matrices:
            assert ((new[tensor] == values) | (new[tensor] == 0)).all()
            assert (new[tensor] != values).any()
        else:
            assert np.array_equal(new[tensor], values)


def test_each_layer_loses_the_smallest_values_and_not_the_smallest_codes(int8: Path, tmp_path: Path) -> None:
    path, _ = pruned(int8, tmp_path, pruners.l1, amount=0.5)
    by_code = 0
    for name, weight in weights_of(int8).items():
        values, codes = np.abs(weight.values()), np.abs(weight.codes())
        gone = (weights_of(path)[name].codes() == 0) & (weight.codes() != 0)
        kept = weights_of(path)[name].codes() != 0
        assert share_of_zeros(weights_of(path)[name]) == pytest.approx(0.5, abs=0.5 / values.size + 1e-9)
        assert values[gone].max() <= values[kept].min()
        by_code += int(codes[gone].max() > codes[kept].min())
    assert by_code >= 3  # so the order of values is another one than that of codes


def test_global_pruning_compares_values_over_all_layers(int8: Path, tmp_path: Path) -> None:
    path, record = pruned(int8, tmp_path, pruners.l1_global, amount=0.7)
    before, after = weights_of(int8), weights_of(path)
    gone = [np.abs(before[name].values())[(after[name].codes() == 0) & (before[name].codes() != 0)] for name in after]
    kept = [np.abs(before[name].values())[after[name].codes() != 0] for name in after]

    assert np.concatenate(gone).max() <= np.concatenate(kept).min()
    assert record["zeros"] / record["weights"] == pytest.approx(0.7, abs=1e-3)
    assert len({round(share_of_zeros(weight), 2) for weight in after.values()}) > 3


def test_the_classifier_may_lose_another_share(int8: Path, tmp_path: Path) -> None:
    for pruner in PRUNERS.values():
        path, record = pruned(int8, tmp_path, pruner, amount=0.3, amount_last=0.1)
        *others, last = weights_of(path).values()
        natural = share_of_zeros([*weights_of(int8).values()][-1])

        assert 0.1 - 1e-3 <= share_of_zeros(last) <= 0.1 + natural
        total = sum(weight.codes().size for weight in others)
        zeros = sum(share_of_zeros(weight) * weight.codes().size for weight in others)
        assert 0.3 - 1e-3 <= zeros / total <= 0.3 + 0.05
        assert record["asked"]["weights"] == pytest.approx(
            (0.3 * total + 0.1 * last.codes().size) / (total + last.codes().size)
        )


def test_random_weights_are_those_of_the_seed(int8: Path, tmp_path: Path) -> None:
    found = []
    for seed in (0, 0, 1):
        state = torch.get_rng_state()
        found.append(pruned(int8, tmp_path, pruners.random, seed, amount=0.5)[0].read_bytes())
        assert torch.equal(torch.get_rng_state(), state)

    assert found[0] == found[1] != found[2]


@pytest.mark.slow
def test_matrices_that_are_stored_transposed_lose_rows_of_torch(tmp_path: Path, data: Data) -> None:
    """A linear layer over tokens is a product with its transposed weight: neurons are its columns."""
    model = small_vit()
    export_onnx(model, tmp_path / "export.onnx")
    calibration = model.sample(4)
    images = Data(data.evaluation, data.evaluation.of_tensors(calibration, torch.zeros(4, dtype=torch.long)), None, ())
    graph = quantized("int8 quantizer.images=4", tmp_path / "export.onnx", images)
    path, _ = pruned(graph, tmp_path, pruners.ln_structured, amount=0.5, n=1, dim=0)
    turned = [weight for weight in weights_of(path).values() if weight.outputs == weight.codes().ndim - 1]

    assert turned
    for weight in weights_of(path).values():
        slices = np.moveaxis(weight.codes(), weight.outputs, 0).reshape(weight.codes().shape[weight.outputs], -1)
        assert 0.45 <= float((slices == 0).all(1).mean()) <= 0.55
    assert np.isfinite(onnx_logits(path, calibration)).all()


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", INTEGERS + FLOATS)
def test_graphs_of_every_precision_are_pruned(source: Path, data: Data, quantizer: str) -> None:
    graph = quantized(quantizer, source, data, "order=quantize_first", "pruner=l1", "pruner.amount=0.6")
    found = weights_of(graph)
    images = data.evaluation.fetch(list(range(50)))

    assert len(found) == 7
    for weight in found.values():
        assert 0.6 - 1 / weight.codes().size <= share_of_zeros(weight) <= 0.9
    assert np.isfinite(onnx_logits(graph, images)).all()


# Jobs


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job of each order, and one that prunes nothing."""
    folder = tmp_path_factory.mktemp("orders")
    grid = ("order=prune_first,quantize_first", "pruner=l1", "pruner.amount=0.0,0.7", "quantizer=int8")
    done = launch_in(folder, "-m", *grid, "runtime=onnxruntime", *SHORT)
    assert done.returncode == 0, done.stderr
    return only_sweep(folder)


@pytest.mark.slow
def test_a_job_counts_zeros_in_the_integers(sweep: Path) -> None:
    results = [json.loads((sweep / str(number) / "result.json").read_text()) for number in range(4)]
    graphs = [weights_of(sweep / str(number) / "model.onnx") for number in range(4)]
    for number in (2, 3):
        codes = np.concatenate([weight.codes().ravel() for weight in graphs[number].values()])
        assert results[number]["network"]["sparsity"] == pytest.approx(float((codes == 0).mean()), abs=1e-9)

    assert results[3]["network"]["sparsity"] == pytest.approx(0.7, abs=0.02)
    assert (sweep / "0" / "model.onnx").read_bytes() == (sweep / "2" / "model.onnx").read_bytes()
    assert json.loads((sweep / "3" / "pruning.json").read_text())["asked"] == {"weights": 0.7}


@pytest.mark.slow
def test_jobs_of_both_orders_are_told_apart(sweep: Path) -> None:
    with (sweep / "results.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]

    assert [row["order"] for row in rows] == ["prune_first", "prune_first", "quantize_first", "quantize_first"]
    assert rows[1]["name"] == "digits_cnn l1 0.7 int8 onnxruntime"
    assert rows[3]["name"] == "digits_cnn int8 then l1 0.7 onnxruntime"


def problems_of(*overrides: str) -> str:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return " ".join(problems(compose("config", overrides=["order=quantize_first", *overrides])))


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["pruner=remove", "quantizer=int8"], "cannot take channels out, as pruner=remove does"),
        (["runtime=torch", "pruner=l1"], "runtime=torch runs the network without one"),
        (["runtime=auto", "device=cpu", "pruner=l1"], "runtime=torch runs the network without one"),
        (["recovery=finetune", "quantizer=int8"], "leaves nothing to recover"),
        (["pruner=l1", "pruner.every_weight=true", "quantizer=int8"], "every_weight=true cannot be"),
        (["order=backwards"], "order=backwards is not known; valid are: prune_first, quantize_first."),
        (["pruner=l1", "pruner.amount_last=1.0", "quantizer=int8"], "pruner.amount_last=1.0 is out of range"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(overrides: list[str], why: str) -> None:
    assert why in problems_of(*overrides)


def test_what_can_be_is_not_refused() -> None:
    for quantizer in ("int8", "weights", "mixed", "fp16"):
        assert problems_of("pruner=l1_global", "pruner.amount_last=0.1", f"quantizer={quantizer}") == ""


def test_a_pruner_of_ones_own_that_changes_shapes_is_refused(int8: Path, tmp_path: Path) -> None:
    def halve(model: Model, data: Data) -> None:
        for layer in model.module.children():
            layer.weight = nn.Parameter(layer.weight[: len(layer.weight) // 2])  # type: ignore[arg-type, index]

    with pytest.raises(UserError, match="needs a pruner that sets weights to zero, and this one changes their shapes"):
        pruned(int8, tmp_path, halve)
