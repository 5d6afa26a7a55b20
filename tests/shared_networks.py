"""Networks that use a parameter at several places, each in its own way, and the names of the layers that do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from random_networks import randomise
from torch import Tensor, nn
from torch.nn import functional as F

from pq_sweep.types import Model, Preprocess

DIGITS = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))


class TiedConvs(nn.Module):
    """Two convolutions with one weight, between a stem and a head of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight
        self.free = nn.Conv2d(8, 12, 1)
        self.last = nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(F.relu(self.stem(x))))))
        x = F.relu(self.last(F.relu(self.free(x))))
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class TiedMemory(TiedConvs):
    """Two Parameters that hold the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.b.weight = nn.Parameter(self.a.weight.data)


class TwiceRun(TiedConvs):
    """One convolution that runs twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.b = self.a


class TiedLinears(nn.Module):
    """An encoder whose weight decodes as well, transposed, by code of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(64, 16)
        self.first, self.second = nn.Linear(64, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(F.relu(self.encode(x.flatten(1))), self.encode.weight.t())
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


class TiedEmbedding(nn.Module):
    """An embedding of the pixels' brightness whose table is the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 24)
        self.inner, self.outer = nn.Linear(24, 32), nn.Linear(32, 20)
        self.narrow = nn.Linear(20, 24)
        self.scores = nn.Linear(24, 16, bias=False)
        self.scores.weight = self.table.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        found = self.table((x.flatten(1).sigmoid() * 15.99).long()).mean(1)
        return self.head(self.scores(self.narrow(F.relu(self.outer(F.relu(self.inner(found)))))))


@dataclass(frozen=True)
class Case:
    """How a network is made, the names of what is shared, and its number of parameters, each counted once."""

    make: Callable[[], nn.Module]
    shared: tuple[str, ...]
    params: int


_TIED = (8 * 9 + 8) + (8 * 8 * 9) + 2 * 8 + (8 * 12 + 12) + (12 * 6 + 6) + (24 * 10 + 10)
CASES = {
    "one Parameter of two convolutions": Case(TiedConvs, ("a", "b"), _TIED),
    "one memory of two Parameters": Case(TiedMemory, ("a", "b"), _TIED),
    "a layer that runs twice": Case(TwiceRun, ("a = b",), _TIED - 8),
    "a weight that code uses too": Case(
        TiedLinears, ("encode",), (64 * 16 + 16) + (64 * 20 + 20) + (20 * 12 + 12) + (12 * 10 + 10)
    ),
    "a linear layer and an embedding": Case(
        TiedEmbedding, ("table", "scores"), 16 * 24 + (24 * 32 + 32) + (32 * 20 + 20) + (20 * 24 + 24) + (16 * 10 + 10)
    ),
}


def shared_network(case: str, seed: int = 0) -> Model:
    """Return a network of `CASES` with random weights of this seed."""
    torch.manual_seed(seed)
    module = CASES[case].make().eval()
    randomise(module)
    return Model(module, 10, DIGITS)
