"""Your own model, data set, pruner and quantizer, in one file outside the package.

python examples/custom_run.py                                     the sweep below
python examples/custom_run.py model=shapes_cnn dataset=shapes     any other job or sweep, as with launch.py
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.data import Dataset

from pq_sweep.compress.quantizers import quantizer
from pq_sweep.sweep import cli
from pq_sweep.sweep.worker import run_job
from pq_sweep.types import Data, Model, Preprocess, Split, Stage

SHAPES = ("circle", "square", "triangle")
SWEEP = (
    "-m model=shapes_cnn dataset=shapes pruner=none,weak_filters quantizer=none,convolutions_int8 runtime=onnxruntime"
)


# 1. A data set: any torch Dataset of (image, label) pairs, brought to what the model takes.


class Shapes(Dataset[tuple[Tensor, int]]):
    """Grey drawings of circles, squares and triangles, each at its own place and size, with noise."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.targets = [index % len(SHAPES) for index in range(count)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        rng = np.random.default_rng([self.seed, index])
        image = Image.new("L", (self.size, self.size))
        x, y = rng.uniform(0.4, 0.6, 2) * self.size
        radius = rng.uniform(0.2, 0.35) * self.size
        draw, kind = ImageDraw.Draw(image), self.targets[index]
        if SHAPES[kind] == "circle":
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
        else:
            draw.regular_polygon((x, y, radius), {"square": 4, "triangle": 3}[SHAPES[kind]], fill=255)
        noise = rng.normal(0, 0.3, (1, self.size, self.size))
        return torch.tensor(np.asarray(image)[None] / 255 + noise, dtype=torch.float32), kind


def shapes(model: Model, *, images: int, calibration: int) -> Data:
    """Return drawings; each part has a seed of its own, so that no image is in two parts."""
    counts = {"evaluation": images, "calibration": calibration, "train": 3 * images}
    parts = {
        name: Split.of_dataset(Shapes(count, model.preprocess.size, seed))
        for seed, (name, count) in enumerate(counts.items())
    }
    return Data(**parts, classes=SHAPES)


# 2. A model: a network, its number of classes, and what it takes.


def shapes_cnn(*, width: int, seed: int) -> Model:
    """Return a small network, trained here in a second or two; usually you would load a state_dict."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, width), (width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.MaxPool2d(6), nn.Flatten(), nn.Linear(2 * width, len(SHAPES)))
    preprocess = Preprocess(size=24, resize=24, channels=1, mean=(0.0,), std=(1.0,))
    model = Model(network, len(SHAPES), preprocess, SHAPES)
    split = Split.of_dataset(Shapes(600, model.preprocess.size, seed=99))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(4):
        for images, labels in split.batches(50, order=torch.randperm(len(split)).tolist()):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    network.eval()
    return model


# 3. A pruner: changes `model.module` in place.


def weak_filters(model: Model, data: Data, *, amount: float) -> None:
    """Zero the convolution filters that respond least to the calibration images."""
    layers = [layer for layer in model.module.modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        answers: list[Tensor] = []
        hook = layer.register_forward_hook(partial(note_strength, answers))
        with torch.no_grad():
            for images, _ in data.calibration.batches(50):
                model.module(images)
        hook.remove()
        strength = torch.stack(answers).mean(0)
        weak = strength.argsort()[: int(amount * len(strength))]
        layer.weight.data[weak] = 0


def note_strength(answers: list[Tensor], layer: nn.Module, inputs: object, output: Tensor) -> None:
    """Note the mean response of each filter."""
    answers.append(output.abs().mean((0, 2, 3)))


# 4. A quantizer: reads the FP32 graph at `source` and writes `target`; @quantizer says which precision it makes.


@quantizer("int8")
def convolutions_int8(
    source: Path, target: Path, data: Data, *, form: str, stage: Stage, images: int
) -> dict[str, int]:
    """Quantize only convolutions, with ranges that leave out the rarest activations."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader:
        feed: Iterator[dict[str, np.ndarray]] = (
            {"input": batch.numpy()} for batch, _ in data.calibration.take(images).batches(1)
        )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feed, None)

    with stage("quantize"):
        prepared = target.with_suffix(".prepared.onnx")
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=CalibrationMethod.Percentile,
        )
        prepared.unlink()


# 5. Their names and defaults: here in code; a YAML for each in a folder given by --config-dir does the same.


def register() -> None:
    """Add the four components to their groups."""
    store = ConfigStore.instance()
    here = Path(__file__).stem
    store.store(group="model", name="shapes_cnn", node={"_target_": f"{here}.shapes_cnn", "width": 16, "seed": 0})
    store.store(group="dataset", name="shapes", node={"_target_": f"{here}.shapes", "images": 300, "calibration": 60})
    store.store(group="pruner", name="weak_filters", node={"_target_": f"{here}.weak_filters", "amount": 0.25})
    target = f"{here}.convolutions_int8"
    store.store(group="quantizer", name="convolutions_int8", node={"_target_": target, "images": 60})


CONF = Path(__file__).resolve().parent.parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def launch(cfg: DictConfig) -> None:
    """Run one job."""
    run_job(cfg)


if __name__ == "__main__":
    register()
    sys.argv += SWEEP.split() if len(sys.argv) == 1 else []
    cli.main(launch, CONF)
