"""Real networks on real photographs: what the papers found, found again. Skipped where the shared data is absent."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
import torchvision
from conftest import ROOT, new_user, only_sweep, python, results
from PIL import Image

from pq_sweep.core.stored import stored_weights

TOP1 = {"resnet18": 0.962, "mobilenet_v2": 0.982, "squeezenet1_1": 0.924}  # of the 500, as the data's manifest says
# Threads that wait for each other take many times longer on a busy machine.
SHORT = ("measure.batch_sizes=[1]", "measure.threads=1", "measure.iterations=5", "measure.min_s=0", "measure.max_s=0.1",
         "tracking=none")  # fmt: skip
RUNTIMES = ("quantizer=none", "runtime=onnxruntime,torch")
QUANTIZED = ("quantizer=fp16,int8", "runtime=onnxruntime")
AMOUNTS = (0.5, 0.7)
# Photographs; fewer than all are stratified. The quickest network answers all, and pruners are further apart than a
# hundred can hide.
EVERY, SOME, FEW = 500, 100, 60

Sweep = Callable[..., tuple[Path, list[dict[str, Any]]]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Run a sweep on the 500 photographs, once, and return its folder and its jobs' results."""
    shared = ROOT.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip("needs real weights and photographs in shared/data, which are not here")
    home = {"PQ_SWEEP_CACHE": str(tmp_path_factory.mktemp("cache"))}

    @cache
    def run(model: str, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(model)
        chosen = [f"model={model}", f"model.weights={shared}/weights/{model}.pth", "dataset=imagenette"]
        arguments = [str(ROOT / "launch.py"), "-m", *chosen, f"dataset.root={shared}/imagenette160", *SHORT, *overrides]
        done = python(arguments, folder, new_user() | home, timeout=1800)
        assert done.returncode == 0, done.stdout + done.stderr
        return only_sweep(folder), results(only_sweep(folder))

    return run


def plain_loop(name: str, shared: Path, images: Iterable[str]) -> dict[str, int]:
    """Evaluate image by image with torchvision alone; return the class index (of ten) by file."""
    model = torchvision.models.get_model(name)
    model.load_state_dict(torch.load(shared / "weights" / f"{name}.pth", weights_only=True))
    return answers_of(model.eval(), name, shared, images)


def answers_of(model: torch.nn.Module, name: str, shared: Path, images: Iterable[str]) -> dict[str, int]:
    """Return what a network says of each image, prepared as torchvision does for a network of this name."""
    transform = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].transforms()
    wnids = (shared / "imagenet_wnids.txt").read_text().split()
    root = shared / "imagenette160"
    columns = torch.tensor([wnids.index(folder.name) for folder in sorted((root / "val").iterdir())])
    answers = {}
    for name in images:
        with Image.open(root / name) as image, torch.inference_mode():
            logits = model(transform(image.convert("RGB"))[None])[0, columns]
        answers[name] = int(logits.argmax())
    return answers


class Photographs:
    """What holds for each network; its tests share its sweeps, so they are one class."""

    name: ClassVar[str]
    points: ClassVar[float]  # what INT8 may cost
    images: ClassVar[int]

    def dense(self, sweep: Sweep) -> tuple[Path, list[dict[str, Any]]]:
        return sweep(self.name, f"dataset.evaluation={self.images}", *RUNTIMES)

    def test_every_answer_is_that_of_a_plain_torchvision_loop(self, sweep: Sweep, shared_data: Path) -> None:
        folder, (dense, torch_job) = self.dense(sweep)
        with next(folder.glob("baseline/*/images.csv")).open() as file:
            images = [row["image"] for row in csv.DictReader(file)]

        expected = plain_loop(self.name, shared_data, images)

        classes = sorted({Path(image).parent.name for image in images})
        right = sum(classes[answer] == Path(image).parent.name for image, answer in expected.items())
        assert len(images) == self.images
        assert dense["accuracy"]["top1"] == torch_job["accuracy"]["top1"] == right / self.images
        assert right / self.images == pytest.approx(TOP1[self.name], abs=0 if self.images == EVERY else 0.04)
        baseline = np.load(next(folder.glob("baseline/*/predictions.npy")))
        assert dict(zip(images, baseline.tolist(), strict=True)) == expected
        assert dict(zip(images, np.load(folder / "0" / "predictions.npy").tolist(), strict=True)) == expected

    def test_quantization_costs_little(self, sweep: Sweep) -> None:
        _, (dense, _) = self.dense(sweep)
        _, (fp16, int8) = sweep(self.name, f"dataset.evaluation={min(self.images, SOME)}", *QUANTIZED)

        assert fp16["accuracy"]["drop_points"] <= 0.3
        assert int8["accuracy"]["drop_points"] <= self.points
        sizes = [job["size_bytes"]["compressed"] / dense["size_bytes"]["compressed"] for job in (fp16, int8)]
        assert sizes[0] == pytest.approx(0.5, abs=0.02)
        assert 0.24 < sizes[1] < 0.3


def pruned(
    sweep: Sweep, pruners: tuple[str, ...], amounts: tuple[float, ...], *more: str
) -> Iterator[dict[float, float]]:
    """Yield by amount how much more accurate resnet18 is after each pruner than uncompressed, by torch."""
    images = f"dataset.evaluation={SOME}"
    grid = (f"pruner={','.join(pruners)}", f"pruner.amount={','.join(map(str, amounts))}")
    _, jobs = sweep("resnet18", images, *grid, *more)
    assert {job["accuracy"]["samples"] for job in jobs} == {SOME}
    assert jobs[0]["baseline"]["top1"] == pytest.approx(TOP1["resnet18"], abs=0.03)
    found = iter(-job["accuracy"]["drop_points"] / 100 for job in jobs)
    for _ in pruners:
        yield {amount: next(found) for amount in amounts}


BY_SIZE, WORSE = ("l1_global", "l1"), ("random", "remove")


class TestResnet18(Photographs):
    name, points, images = "resnet18", 1.0, SOME

    def test_pruning_keeps_the_papers_order(self, sweep: Sweep) -> None:
        everywhere, layerwise = pruned(sweep, BY_SIZE, AMOUNTS)
        random, removed = pruned(sweep, WORSE, AMOUNTS[:1])

        assert abs(everywhere[0.5]) <= 0.02
        assert everywhere[0.5] > layerwise[0.5] > random[0.5]
        assert everywhere[0.7] > layerwise[0.7]
        assert layerwise[0.5] > removed[0.5]  # zeros cost less than channels, nothing being repaired

    def test_batchnorm_repairs_what_pruning_broke(self, sweep: Sweep) -> None:
        _, broken = pruned(sweep, BY_SIZE, AMOUNTS)
        (repaired,) = pruned(sweep, ("l1",), AMOUNTS, "recovery=bn_reestimate", "recovery.images=300")

        assert repaired[0.7] - broken[0.7] > 0.5
        assert repaired[0.5] > broken[0.5]


class TestSqueezenet(Photographs):
    name, points, images = "squeezenet1_1", 2.0, EVERY

    def test_later_sweeps_decode_nothing_and_answer_the_same(self, sweep: Sweep) -> None:
        first, (one, _) = self.dense(sweep)
        again = (f"dataset.evaluation={self.images}", "runtime=onnxruntime", "seed=0,1")
        second, (two, three) = sweep(self.name, *again)

        assert two["images"]["decoded"] == three["images"]["decoded"] == 0
        assert two["images"]["from_cache"] >= self.images  # and the images for calibration
        assert one["accuracy"] == two["accuracy"]
        assert (first / "0" / "predictions.npy").read_bytes() == (second / "0" / "predictions.npy").read_bytes()


class TestMobilenet(Photographs):
    name, points, images = "mobilenet_v2", 2.0, SOME

    def test_mixed_precision(self, sweep: Sweep) -> None:
        """Two points of the calibration images are allowed, the worst layers stay, and most are in 8 bit."""
        options = (f"dataset.evaluation={self.images}", "quantizer=mixed", "quantizer.max_drop=2")
        folder, (job,) = sweep(self.name, *options, "runtime=onnxruntime")
        record = job["session"]["quantizer"]
        noise = {layer["name"]: layer["snr_db"] for layer in record["layers"]}
        kept = {layer["name"] for layer in record["layers"] if layer["precision"] == "fp32"}

        assert len(noise) == 53
        assert kept == set(sorted(noise, key=lambda name: noise[name])[: len(kept)])
        assert record["calibration_drop_points"] <= 2
        assert job["accuracy"]["drop_points"] <= 3
        assert (folder / "0" / "precisions.svg").stat().st_size > 1000


class TestLowBits:
    """Integers in the file stand for what the job answered, and are ranked by that when they are pruned."""

    def test_weights_of_four_bits_answer_as_their_values_do_in_torch(self, sweep: Sweep, shared_data: Path) -> None:
        taken = (f"dataset.evaluation={FEW}", "runtime=onnxruntime")
        folder, _ = sweep("resnet18", *taken, "quantizer=weights", "quantizer.bits=4")
        predicted = np.load(folder / "0" / "predictions.npy")
        graph = onnx.load(folder / "0" / "model.onnx")
        model = torchvision.models.resnet18().eval()
        for name, part in list(model.named_modules()):
            if isinstance(part, torch.nn.Conv2d):
                part.bias = torch.nn.Parameter(torch.zeros(part.out_channels))
            if isinstance(part, torch.nn.BatchNorm2d):
                parent, _, own = name.rpartition(".")
                setattr(model.get_submodule(parent), own, torch.nn.Identity())  # folded into the convolutions
        constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.graph.initializer}
        for node in graph.graph.node:
            if node.op_type in ("Conv", "Gemm"):
                layer: Any = model.get_submodule(node.input[1].removesuffix(".weight"))
                codes, scale = (
                    constants[f"{node.input[1]}_{part}"].astype("float32") for part in ("quantized", "scale")
                )
                layer.weight.data = torch.from_numpy(codes * scale.reshape(-1, *[1] * (codes.ndim - 1)))
                layer.bias.data = torch.tensor(constants[node.input[2]])
        with next(folder.glob("baseline/*/images.csv")).open() as file:
            images = [row["image"] for row in csv.DictReader(file)]

        assert (folder / "0" / "model.onnx").stat().st_size == pytest.approx(5.9e6, rel=0.02)
        assert list(answers_of(model, "resnet18", shared_data, images).values()) == predicted.tolist()

    def test_pruned_integers_are_ranked_by_value(self, sweep: Sweep) -> None:
        """Ranked by the integers themselves, of which each channel has its own scale, most answers would be lost."""
        taken = (f"dataset.evaluation={FEW}", "runtime=onnxruntime", "order=prune_first,quantize_first")
        folder, (before, after) = sweep("resnet18", *taken, "quantizer=int8", "pruner=l1", "pruner.amount=0.5")
        graph = onnx.load(folder / "1" / "model.onnx")
        zeros = [float((weight.codes() == 0).mean()) for weight in stored_weights(graph.graph)]

        assert min(zeros) >= 0.49
        assert after["accuracy"]["agreement"] > 0.8
        # The order makes no difference.
        assert after["accuracy"]["agreement"] == pytest.approx(before["accuracy"]["agreement"], abs=0.1)
