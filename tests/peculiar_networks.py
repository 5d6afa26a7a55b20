"""Networks as users bring them, each with one peculiarity, for 8x8 digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from pq_sweep.types import Model, Preprocess


class Small(nn.Module):
    """Two convolutions and a head, on which the others build."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.second(F.relu(self.norm(self.first(images))))), 2)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.features(images).flatten(1))


class InTraining(Small):
    """Dropout, and handed over in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.8), self.head)


class GivesDictionary(Small):
    def forward(self, images: Tensor) -> Any:
        features = self.features(images)
        return {"logits": self.head(features.flatten(1)), "features": features}


class Tied(Small):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Conv2d(16, 16, 3, padding=1)
        self.third.weight = self.second.weight

    def features(self, images: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.third(F.relu(self.second(F.relu(self.first(images)))))), 2)


class UsedTwice(Small):
    """One layer runs twice."""

    def features(self, images: Tensor) -> Tensor:
        return super().features(self.shrink(F.relu(self.second(F.relu(self.second(self.grow(images)))))))

    def __init__(self) -> None:
        super().__init__()
        self.grow, self.shrink = nn.Conv2d(1, 16, 1), nn.Conv2d(16, 1, 1)


class BufferNamedMean(Small):
    """Normalises inside, by buffers whose names an exporter makes up for its own values as well."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.3).view(1, 1, 1, 1))
        self.register_buffer("input", torch.tensor(0.5).view(1, 1, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        features = super().features((images - self.mean) / self.input)
        return features - features.mean((2, 3), keepdim=True) * self.mean


class WeightNorm(Small):
    def __init__(self) -> None:
        super().__init__()
        self.second = parametrizations.weight_norm(self.second)


class Recurrent(nn.Module):
    """Most weights are an LSTM's, which no pruner touches."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.head = nn.LSTM(8, 48, batch_first=True), nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.rows(images[:, 0])[0][:, -1])


class BareParameters(Small):
    """A scale and a shift of its own, and a product by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.mix = nn.Parameter(torch.rand(16, 1, 1) + 0.5), nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.linear((self.features(images) * self.scale).flatten(1), self.mix).relu())


class Grouped(Small):
    """Depthwise and grouped convolutions with a shuffle of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.third = nn.Conv2d(16, 16, 1, groups=4)

    def features(self, images: Tensor) -> Tensor:
        features = F.relu(self.second(F.relu(self.norm(self.first(images)))))
        shuffled = features.view(-1, 4, 4, 8, 8).transpose(1, 2).flatten(1, 2)
        return F.adaptive_avg_pool2d(F.relu(self.third(shuffled)), 2)


class OddNames(Small):
    """Layers called as users call them, one of them in a dictionary with a dot-free odd name."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.ModuleDict({"conv-2 (new)": nn.Conv2d(16, 16, 1), "weight_quantized": nn.Conv2d(16, 16, 1)})

    def features(self, images: Tensor) -> Tensor:
        features = super().features(images)
        for layer in self.logits.values():
            features = F.relu(layer(features))
        return features


def frozen() -> nn.Module:
    return Small().requires_grad_(False)


def half() -> nn.Module:
    return Small().half()


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "in_training": InTraining,
    "dictionary": GivesDictionary,
    "tied": Tied,
    "used_twice": UsedTwice,
    "buffer_named_mean": BufferNamedMean,
    "weight_norm": WeightNorm,
    "recurrent": Recurrent,
    "bare_parameters": BareParameters,
    "grouped": Grouped,
    "odd_names": OddNames,
    "frozen": frozen,
    "half": half,
}


def make(*, kind: str) -> Model:
    """Return a network with random weights, seeded, whose statistics and logits differ from image to image."""
    torch.manual_seed(0)
    network = NETWORKS[kind]().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    return Model(network.train(kind == "in_training"), 10, Preprocess(8, 8, 1, (0.0,), (1.0,)))
