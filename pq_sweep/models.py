"""Models: each function returns a Model, the trained network with its preprocessing and classes."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pq_sweep.types import Model, Preprocess, UserError

State = dict[str, Tensor]

HOW_TO_SAVE = "save one by torch.save(model.state_dict(), path)."


def digits_cnn(*, weights: str | None = "DEFAULT") -> Model:
    """Return the embedded network for 8x8 digits; DEFAULT are the packaged weights, null random ones."""
    from pq_sweep.digits_cnn import DigitsCNN

    preprocess = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
    packaged = files("pq_sweep").joinpath("weights/digits_cnn.safetensors")
    model = Model(DigitsCNN().eval(), 10, preprocess, tuple(str(digit) for digit in range(10)))
    if weights:
        load_weights(model.module, Path(str(packaged)) if weights == "DEFAULT" else Path(weights))
    return model


def torchvision_model(*, name: str, weights: str | None = "DEFAULT", num_classes: int = 1000) -> Model:
    """Return a torchvision classifier (https://pytorch.org/vision/stable/models.html) by its name there.

    `weights` is DEFAULT or another of torchvision's weights of this model (downloaded once), the path of a
    state_dict, or null for random weights. Images are prepared as the weights say; with a path or null as
    torchvision's first weights of this model say.
    """
    from torchvision.models import get_model, get_model_weights

    published = get_model_weights(name)
    chosen = published.__members__.get(weights or "")
    if chosen is not None and num_classes != len(chosen.meta["categories"]):
        raise UserError(
            f"model.num_classes={num_classes} does not fit model.weights={weights}; give weights as a path, or null."
        )
    try:
        module = get_model(name, weights=chosen, **({} if chosen else {"num_classes": num_classes})).eval()
    except OSError as error:
        raise UserError(f"the weights of {name} cannot be downloaded ({error}); {_place(chosen)}") from error
    if weights and chosen is None:
        load_weights(module, Path(weights))
    first = next(iter(published))
    names = tuple(first.meta["categories"]) if num_classes == 1000 else None
    return Model(module, num_classes, _preprocess((chosen or first).transforms()), names)


def load_weights(module: nn.Module, path: Path) -> None:
    """Load a state_dict (.pt, .pth or .safetensors; never a pickled object) into `module`, every key of it."""
    state = read_state(path)
    expected = module.state_dict()
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

            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
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


def _place(chosen: Any) -> str:
    """Say where a file that cannot be downloaded has to lie."""
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
    return f"put {Path(chosen.url).name} at {target}, or give model.weights=/path or model.weights=null."


def _shape(state: State, key: str) -> tuple[int, ...] | str:
    return tuple(state[key].shape) if key in state else "missing"
