"""The embedded model: a small residual network for the 8x8 digits; `make weights` trains its weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm around an identity path."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


def conv_bn_relu(inputs: int, outputs: int) -> nn.Sequential:
    """Return a 3x3 convolution, BatchNorm and ReLU that keep height and width."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class DigitsCNN(nn.Module):
    """Map (B, 1, 8, 8) digits to (B, 10) logits with 59 thousand parameters."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn_relu(1, 16), conv_bn_relu(16, 32))
        self.residual = Residual(32)
        self.pool = nn.MaxPool2d(2)
        self.body = conv_bn_relu(32, 64)
        self.fc1 = nn.Linear(64 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.residual(self.stem(x)))
        x = self.pool(self.body(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))
