"""Models: each function returns a Model, the trained network with its preprocessing and classes."""

from __future__ import annotations

import pickle
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pq_sweep.inputs.download import fetch, public
from pq_sweep.types import Model, Preprocess, UserError, choose

State = dict[str, Tensor]

# Classifiers of GoogLeNet and Inception that only training uses.
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
INSTEAD = "or give model.weights=/path or model.weights=null"
# Torchvision's weights come under its own licence unless their description names another.
TORCHVISION_LICENCE = "https://github.com/pytorch/vision/blob/main/LICENSE"
APACHE_LICENCE = "https://www.apache.org/licenses/LICENSE-2.0"  # this project's own
SIMPLENET_LICENCE = "https://github.com/Coderx7/SimpleNet_Pytorch"
DRAWING = (Tensor.normal_, Tensor.uniform_, Tensor.erfinv_)
HOW_TO_SAVE = "save one by torch.save(model.state_dict(), path)."


class Undrawn(TorchFunctionMode):
    """Skips drawing random weights for networks made within it, which get loaded ones: drawing can take a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DRAWING:
            return args[0]
        if getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"]  # functions of torch.nn.init pass their tensor by this name
        return func(*args, **(kwargs or {}))


def digits_cnn(*, weights: str | None = "DEFAULT") -> Model:
    """Return the embedded network for 8x8 digits; DEFAULT stands for the packaged weights, null for random ones."""
    from pq_sweep.inputs.digits_cnn import DigitsCNN

    preprocess = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
    packaged = files("pq_sweep.inputs").joinpath("weights/digits_cnn.safetensors")
    model = Model(DigitsCNN().eval(), 10, preprocess, tuple(str(digit) for digit in range(10)), APACHE_LICENCE)
    if weights:
        load_weights(model.module, Path(str(packaged)) if weights == "DEFAULT" else Path(weights))
    return model


def torchvision_model(
    *,
    name: str,
    weights: str | None = "DEFAULT",
    num_classes: int = 1000,
    options: dict[str, Any] | None = None,
) -> Model:
    """Return a torchvision classifier (https://pytorch.org/vision/stable/models.html) by its name there.

    `weights` is DEFAULT or another of torchvision's weights of this model (downloaded once), the path of a state_dict,
    or null for random weights. Images are prepared as the weights say or, with a path or null, as torchvision's first
    weights of this model say. The network is built with `options`.
    """
    import torchvision
    from torchvision.models import get_model, get_model_weights, list_models

    choose("model.name", name, tuple(list_models(torchvision.models)))
    published = get_model_weights(name)
    chosen = published.__members__.get(weights or "")
    if chosen is not None and num_classes != len(chosen.meta["categories"]):
        raise UserError(
            f"model.num_classes={num_classes} does not fit model.weights={weights}; give weights as a path, or null."
        )
    with Undrawn() if weights else nullcontext():
        if chosen is None:
            module = get_model(name, weights=None, num_classes=num_classes, **(options or {}))
        else:
            module = _published(name, chosen, options or {})
    if weights and chosen is None:
        load_weights(module, Path(weights))
    first = next(iter(published))
    names = tuple(first.meta["categories"]) if num_classes == 1000 else None
    source = chosen or first
    licence = source.meta.get("license", TORCHVISION_LICENCE)
    return Model(module.eval(), num_classes, _preprocess(source.transforms()), names, licence)


def auxiliary_model(*, name: str, weights: str | None, num_classes: int) -> Model:
    """Return GoogLeNet or Inception v3 without the classifiers that only training uses; see torchvision_model."""
    options = {"aux_logits": False, "transform_input": True, "init_weights": False}
    return torchvision_model(name=name, weights=weights, num_classes=num_classes, options=options)


def _published(name: str, weights: Any, options: dict[str, Any]) -> nn.Module:
    """Return a torchvision network with weights that are downloaded once, into the folder where torchvision looks."""
    from torchvision.models import get_model

    fetch_weights(weights.url)  # checks the hash in the name, so that torchvision finds a file that is whole
    return get_model(name, weights=weights, **options)


def simplenet(*, size: str, mode: str, scale: float, weights: str | None, num_classes: int = 1000) -> Model:
    """Return a SimpleNet (Hasanpour et al. 2016), such as simplenetv1_5m_m1: size 5m, mode m1, scale 1.

    `weights` is null for random ones, a path, or the address of published ones, downloaded once.
    """
    from pq_sweep.inputs.networks import SIMPLENET, SIMPLENET_STRIDES, SimpleNet

    choose("model.size", size, tuple(SIMPLENET))
    choose("model.mode", mode, tuple(SIMPLENET_STRIDES))
    module = SimpleNet(size, mode, scale, num_classes).eval()
    if weights:
        load_weights(module, fetch_weights(weights))
    classes = _imagenet_classes() if num_classes == 1000 else None
    return Model(module, num_classes, Preprocess(interpolation="bicubic"), classes, SIMPLENET_LICENCE)


def _imagenet_classes() -> tuple[str, ...]:
    """Return the names of ImageNet's 1,000 classes in torchvision's order."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def cifar_resnet(*, n: int, weights: str | None, num_classes: int = 10) -> Model:
    """Return the ResNet with 6n+2 layers for 32x32 images; `weights` is null or a path."""
    from pq_sweep.inputs.networks import CifarResNet

    return _cifar(CifarResNet(n, num_classes), weights, num_classes)


def vgg7(*, weights: str | None, num_classes: int = 10) -> Model:
    """Return VGG7 for 32x32 images; `weights` is null or a path."""
    from pq_sweep.inputs.networks import VGG7

    return _cifar(VGG7(num_classes), weights, num_classes)


def _cifar(module: nn.Module, weights: str | None, num_classes: int) -> Model:
    if weights:
        load_weights(module, Path(weights))
    preprocess = Preprocess(size=32, resize=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    return Model(module.eval(), num_classes, preprocess, licence=APACHE_LICENCE)


def fetch_weights(weights: str) -> Path:
    """Return the path of weights, downloading them into torch.hub's folder if they are given by address."""
    if "://" not in weights:
        return Path(weights)
    name = public(weights).rpartition("/")[2]
    return fetch(weights, Path(torch.hub.get_dir()) / "checkpoints" / name, hint=INSTEAD)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state_dict (.pt, .pth or .safetensors; never a pickled object) into `module`; all keys have to match."""
    expected = module.state_dict()
    state = {key: value for key, value in read_state(path).items() if key in expected or not key.startswith(AUXILIARY)}
    wrong = sorted(key for key in expected.keys() | state.keys() if _shape(expected, key) != _shape(state, key))
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{path} does not fit the model: {len(wrong)} of {len(expected)} entries differ, first {key} with shape"
            f" {_shape(state, key)} instead of {_shape(expected, key)}; check model and model.num_classes."
        )
    module.load_state_dict(state)


def read_state(path: Path) -> State:
    """Read tensors from a file without running any code in it."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"model.weights={path} is no file; give DEFAULT, null or the path of a state_dict.")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is no readable state_dict (damaged, or with more in it than tensors, which is never loaded);"
            f" {HOW_TO_SAVE}"
        ) from error
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no readable state_dict ({reason}); {HOW_TO_SAVE}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} holds no state_dict; {HOW_TO_SAVE}")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _preprocess(transforms: Any) -> Preprocess:
    """Translate torchvision's ImageClassification transforms."""
    return Preprocess(
        size=transforms.crop_size[0],
        resize=transforms.resize_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )


def _shape(state: State, key: str) -> tuple[int, ...] | str:
    return tuple(state[key].shape) if key in state else "missing"
