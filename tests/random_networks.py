"""Networks with random weights whose answers depend on the image, data for them, and what tests ask of them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn, torchvision_model
from pq_sweep.types import Data, Model, Preprocess, Split

State = dict[str, Tensor]


def randomise(module: nn.Module) -> None:
    """Draw all weights and BatchNorm statistics: torchvision's ViT head is zero, which would hide every error.

    No two biases of a layer are equal, so that they tell its channels apart.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, nn.BatchNorm2d | nn.LayerNorm):
            part.weight.data.uniform_(0.5, 1.5)
        if isinstance(part, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.LayerNorm) and part.bias is not None:
            part.bias.data = torch.linspace(-0.2, 0.2, len(part.bias))[torch.randperm(len(part.bias))]
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]


def fresh(seed: int = 0, name: str = "digits_cnn") -> Model:
    """Return a network for ten classes with random weights of this seed, whose answers depend on the image."""
    torch.manual_seed(seed)
    torchvision = partial(torchvision_model, name=name, num_classes=10)
    model = (digits_cnn if name == "digits_cnn" else torchvision)(weights=None)
    randomise(model.module)
    return model


def small_vit() -> Model:
    """Return torchvision's Vision Transformer as in ViT-Ti/16, with random weights and two of twelve equal layers."""
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    module = VisionTransformer(224, 16, num_layers=2, num_heads=3, hidden_dim=192, mlp_dim=768, num_classes=10)
    randomise(module)
    return Model(module.eval(), 10, Preprocess())


class Attention(nn.Module):
    """A patch embedding, one attention and a linear classifier, for (B, 1, 8, 8) images."""

    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 24)
        self.keys = nn.Linear(24, kdim or 24)
        self.attention = nn.MultiheadAttention(24, 3, kdim=kdim, vdim=kdim, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1).unflatten(1, (4, 16)))
        keys = self.keys(x)
        return self.head(self.attention(x, keys, keys, need_weights=False)[0].mean(1))


def attention(kdim: int | None = None) -> Model:
    torch.manual_seed(0)
    return Model(Attention(kdim).eval(), 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))


class TwoConvs(nn.Sequential):
    """Map (B, 3, 8, 8) to five logits."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        convs = (nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1), nn.ReLU())
        super().__init__(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def two_convs() -> Model:
    return Model(TwoConvs().eval(), 5, Preprocess(size=8, resize=8))


def state_of(model: Model) -> State:
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.module.parameters())


def assert_alive(model: Model, images: Tensor) -> None:
    """Answers have ten finite logits and depend on the image; single logits may be constant, their row being zero."""
    with torch.no_grad():
        output = model.module(images)
    assert output.shape == (len(images), 10)
    assert output.isfinite().all()
    assert output.std(0).max() > 1e-4 * output.abs().max() > 0


def big_digits() -> Data:
    """Return a few digits as torchvision's networks take them."""
    full = digits(torchvision_model(name="squeezenet1_1", weights=None, num_classes=10), calibration=8)
    images, labels = next(full.evaluation.batches(4))
    calibration = Split.of_tensors(*next(full.calibration.batches(8)))
    return Data(Split.of_tensors(images.clone(), labels), calibration, None, full.classes)
