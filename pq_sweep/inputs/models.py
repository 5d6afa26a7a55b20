"""Models: each function returns a Model, the trained network with its preprocessing and classes."""

from __future__ import annotations

from contextlib import nullcontext
from importlib.resources import files
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pq_sweep.inputs.download import fetch, public
from pq_sweep.inputs.state_dicts import load_weights
from pq_sweep.types import Model, Preprocess, UserError, choose

INSTEAD = "or give model.weights=/path or model.weights=null"
# Torchvision's weights come under its own licence unless their description names another.
TORCHVISION_LICENCE = "https://github.com/pytorch/vision/blob/main/LICENSE"
APACHE_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"  # this project's own
SIMPLENET_LICENCE = "https://github.com/Coderx7/SimpleNet_Pytorch"
# Options of GoogLeNet and Inception v3 without the classifiers that only training uses.
WITHOUT_AUXILIARY = {"aux_logits": False, "transform_input": True, "init_weights": False}
AUXILIARY = ("googlenet", "inception_v3")
DRAWING = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)


class Undrawn(TorchFunctionMode):
    """Skips drawing random weights for networks made within it, which get loaded ones: drawing can take a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWING:
            return args[0]
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"]  # functions of torch.nn.init pass their tensor by this name
        return func(*args, **(kwargs or {}))


def digits_cnn(*, weights: str | None = "DEFAULT", key: str | None = None) -> Model:
    """Return the embedded network for 8x8 digits; DEFAULT stands for the packaged weights, null for random ones.

    `weights` may be a path, with `key` as in torchvision_model.
    """
    from pq_sweep.inputs.digits_cnn import DigitsCNN

    preprocess = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
    packaged = files("pq_sweep.inputs").joinpath("weights/digits_cnn.safetensors")
    module = DigitsCNN()
    notes = _load(module, str(packaged) if weights == "DEFAULT" else weights, key)
    return Model(module.eval(), 10, preprocess, tuple(map(str, range(10))), APACHE_LICENCE, notes)


def torchvision_model(
    *,
    name: str,
    weights: str | None = "DEFAULT",
    num_classes: int = 1000,
    options: dict[str, Any] | None = None,
    key: str | None = None,
) -> Model:
    """Return a torchvision classifier (https://pytorch.org/vision/stable/models.html) by its name there.

    `weights` is DEFAULT or another of torchvision's weights of this model (downloaded once), the path of a state_dict,
    or null for random weights. Images are prepared as the weights say or, with a path or null, as torchvision's first
    weights of this model say. The network is built with `options`. `key` chooses among the weights in a file, such as
    plain and averaged ones; it is dotted where they are nested.
    """
    import torchvision
    from torchvision.models import get_model, get_model_weights, list_models

    choose("model.name", name, tuple(list_models(torchvision.models)))
    published = get_model_weights(name)
    chosen = published.__members__.get(weights or "")
    if chosen is not None:
        _refuse_key(key, weights)
        _require_classes(num_classes, chosen, weights)
    with Undrawn() if weights else nullcontext():
        if chosen is None:
            module = get_model(name, weights=None, num_classes=num_classes, **(options or {}))
        else:
            module = _published(name, chosen, options or {})
    notes = _load(module, weights if chosen is None else None, key)
    first = next(iter(published))
    names = tuple(first.meta["categories"]) if num_classes == 1000 else None
    source = chosen or first
    licence = source.meta.get("license", TORCHVISION_LICENCE)
    return Model(module.eval(), num_classes, _preprocess(source.transforms()), names, licence, notes)


def _require_classes(num_classes: int, published: Any, weights: str | None) -> None:
    """Refuse another number of classes than published weights have."""
    if num_classes != len(published.meta["categories"]):
        raise UserError(
            f"model.num_classes={num_classes} does not fit model.weights={weights}; give weights as a path, or null."
        )


def auxiliary_model(*, name: str, weights: str | None, num_classes: int, key: str | None = None) -> Model:
    """Return GoogLeNet or Inception v3 without the classifiers that only training uses; see torchvision_model."""
    return torchvision_model(name=name, weights=weights, num_classes=num_classes, options=WITHOUT_AUXILIARY, key=key)


def torchvision_network(*, name: str, weights: str | None, num_classes: int | None, key: str | None = None) -> Model:
    """Return any network of torchvision by its name, also one for detection, segmentation, video or optical flow.

    Its options are as in torchvision_model; num_classes=null stands for those of the published weights. What is no
    classifier is for studies of weights alone: a job refuses it.
    """
    import torchvision
    from torchvision.models import get_model_builder, list_models

    quantized = list_models(torchvision.models.quantization)
    choose("model.name", name, tuple(other for other in list_models() if other not in quantized))
    if name in list_models(torchvision.models):
        options = WITHOUT_AUXILIARY if name in AUXILIARY else None
        return torchvision_model(name=name, weights=weights, num_classes=num_classes or 1000, options=options, key=key)
    return _other_network(name, get_model_builder(name), weights, num_classes, key)


def _other_network(name: str, builder: Any, weights: str | None, num_classes: int | None, key: str | None) -> Model:
    """Return a network of torchvision that is no classifier; the part of torchvision that has it says what it is."""
    from torchvision.models import get_model_weights

    published = get_model_weights(name)
    first = next(iter(published))
    classes = len(first.meta.get("categories", ()))
    chosen = published.__members__.get(weights or "")
    if num_classes not in (None, classes) and (chosen is not None or not classes):
        raise UserError(f"model.num_classes={num_classes} does not fit model.weights={weights}; leave it out.")
    # Without the first, torchvision would download weights for the part of the network that sees.
    wanted = {"weights_backbone": None, "num_classes": num_classes or classes}
    options = {key: value for key, value in wanted.items() if key in signature(builder).parameters}
    if chosen is not None:
        _refuse_key(key, weights)
    with Undrawn() if weights else nullcontext():
        module = builder(weights=None, **options) if chosen is None else _published(name, chosen, {})
    notes = _load(module, weights if chosen is None else None, key)
    licence = first.meta.get("license", TORCHVISION_LICENCE)
    task = builder.__module__.split(".")[2].replace("_", " ")
    return Model(module.eval(), num_classes or classes or 1, licence=licence, notes=notes, task=task)


def _published(name: str, weights: Any, options: dict[str, Any]) -> nn.Module:
    """Return a torchvision network with weights that are downloaded once, into the folder where torchvision looks."""
    from torchvision.models import get_model

    fetch_weights(weights.url)  # checks the hash in the name, so that torchvision finds a file that is whole
    return get_model(name, weights=weights, **options)


def simplenet(
    *, size: str, mode: str, scale: float, weights: str | None, num_classes: int = 1000, key: str | None = None
) -> Model:
    """Return a SimpleNet (Hasanpour et al. 2016), such as simplenetv1_5m_m1: size 5m, mode m1, scale 1.

    `weights` is null for random ones, a path, or the address of published ones, downloaded once; `key` is as in
    torchvision_model.
    """
    from pq_sweep.inputs.networks import SIMPLENET, SIMPLENET_STRIDES, SimpleNet

    choose("model.size", size, tuple(SIMPLENET))
    choose("model.mode", mode, tuple(SIMPLENET_STRIDES))
    module = SimpleNet(size, mode, scale, num_classes).eval()
    notes = _load(module, weights and str(fetch_weights(weights)), key)
    classes = _imagenet_classes() if num_classes == 1000 else None
    return Model(module, num_classes, Preprocess(interpolation="bicubic"), classes, SIMPLENET_LICENCE, notes)


def _imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes in torchvision's order."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def cifar_resnet(*, n: int, weights: str | None, num_classes: int = 10, key: str | None = None) -> Model:
    """Return the ResNet with 6n+2 layers for 32x32 images; `weights` is null or a path, `key` as for torchvision."""
    from pq_sweep.inputs.networks import CifarResNet

    return _cifar(CifarResNet(n, num_classes), weights, num_classes, key)


def vgg7(*, weights: str | None, num_classes: int = 10, key: str | None = None) -> Model:
    """Return VGG7 for 32x32 images; `weights` is null or a path, `key` as for torchvision."""
    from pq_sweep.inputs.networks import VGG7

    return _cifar(VGG7(num_classes), weights, num_classes, key)


def _cifar(module: nn.Module, weights: str | None, num_classes: int, key: str | None) -> Model:
    notes = _load(module, weights, key)
    preprocess = Preprocess(size=32, resize=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    return Model(module.eval(), num_classes, preprocess, licence=APACHE_LICENCE, notes=notes)


def _load(module: nn.Module, weights: str | None, key: str | None) -> tuple[str, ...]:
    """Load the weights in a file, if there is one, and return what the row has to say about it."""
    if weights:
        return load_weights(module, Path(weights), key)
    _refuse_key(key, weights)
    return ()


def _refuse_key(key: str | None, weights: str | None) -> None:
    """Refuse a key where there is no file of the user's in which it could choose."""
    if key:
        raise UserError(
            f"model.key={key} chooses among the weights in a file, and model.weights={weights or 'null'} is none;"
            " give a path, or leave model.key out."
        )


def fetch_weights(weights: str) -> Path:
    """Return the path of weights, downloading them into torch.hub's folder if they are given by address."""
    if "://" not in weights:
        return Path(weights)
    name = public(weights).rpartition("/")[2]
    return fetch(weights, Path(torch.hub.get_dir()) / "checkpoints" / name, hint=INSTEAD)


def _preprocess(transforms: Any) -> Preprocess:
    """Translate torchvision's ImageClassification transforms."""
    return Preprocess(
        size=transforms.crop_size[0],
        resize=transforms.resize_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
