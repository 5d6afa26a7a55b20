"""Networks that torchvision does not have: SimpleNet, and the CIFAR networks of the GETA paper."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

# SimpleNet for ImageNet (Hasanpour et al. 2016): widths of 3x3 convolutions, negative for 1x1 ones, and "pool".
SIMPLENET: dict[str, tuple[int | str, ...]] = {
    "5m": (64, 128, 128, 128, 128, 128, "pool", 256, 256, 256, 512, "pool", -2048, -256, 256),
    "9m": (128, 192, 192, 192, 192, 192, "pool", 320, 320, 320, 640, "pool", -2560, -320, 320),
}
# Layers of stride 2 in the variants m1 (fast) and m2.
SIMPLENET_STRIDES = {"m1": (0, 1, 2), "m2": (0, 1, 3)}


class SimpleNet(nn.Module):
    """Thirteen plain convolutions; `features` has the layout of the published weights.

    The published network takes its last pooling window from the tensor's size at run time and cannot be exported for
    that reason; a global maximum gives the same and can be exported.
    """

    def __init__(self, size: str, mode: str, scale: float = 1.0, num_classes: int = 1000) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for index, width in enumerate(SIMPLENET[size]):
            if isinstance(width, str):
                layers += [nn.MaxPool2d(2), nn.Identity()]
                continue
            outputs, kernel = round(abs(width) * scale), 3 if width > 0 else 1
            stride = 2 if index in SIMPLENET_STRIDES[mode] else 1
            conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=1)
            # Each block of the published layout ends with a dropout that is never used.
            layers += [conv, nn.BatchNorm2d(outputs, momentum=0.05), nn.ReLU(), nn.Identity()]
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        # The published AdaptiveMaxPool2d(1), in the form that torch 2.10 can export.
        return self.classifier(self.features(x).amax((2, 3)))


class CifarBlock(nn.Module):
    """Two 3x3 convolutions around an identity path, or around a 1x1 projection where the width doubles."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = 1 if inputs == outputs else 2
        self.conv1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if self.stride == 2:  # option B of the paper: torch-pruning can follow a projection, but not padding
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet for 32x32 images with 6n+2 layers (He et al. 2016, section 4.2): n=3 is ResNet-20, n=9 ResNet-56."""

    def __init__(self, n: int, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16, *([16] * n), *([32] * n), *([64] * n)]
        self.blocks = nn.Sequential(*(CifarBlock(a, b) for a, b in pairwise(widths)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class VGG7(nn.Module):
    """Six 3x3 convolutions (2x128, 2x256, 2x512, each pair pooled) and two linear layers (Li et al. 2016)."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (128, 128, 256, 256, 512, 512):
            layers += [nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if inputs == outputs else []
            inputs = outputs
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(512 * 4 * 4, 1024)
        self.fc2 = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(self.features(x).flatten(1))))
