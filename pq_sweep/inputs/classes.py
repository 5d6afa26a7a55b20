"""Which logit belongs to which class of the data, and image orders of which every part shows every class."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from torch import Tensor

from pq_sweep.core.sentences import listed
from pq_sweep.types import Model, UserError


def match_classes(model: Model, classes: tuple[str, ...]) -> Tensor | None:
    """Return the logit of each class of the data, or None if the data has all classes of the model, in order.

    Folders named by WordNet ids are looked up among ImageNet's 1,000, other names among the model's class names. A
    model that does not name its classes is assumed to have them in the order of the data.
    """
    wnids = imagenet_wnids() if model.num_classes == 1000 else ()
    known = wnids if classes[0] in wnids else model.classes or ()
    missing = [name for name in classes if name not in known]
    if not missing:
        columns = [known.index(name) for name in classes]
        return None if columns == list(range(model.num_classes)) else torch.tensor(columns)
    if len(classes) == model.num_classes and not known:
        return None
    raise UserError(
        f"the model has {model.num_classes} classes and the data {len(classes)}, and {missing[0]!r} is none of the"
        " model's; name the class folders as the model does (or by WordNet id), or set model.num_classes and weights."
    )


def without_images(labels: Tensor, classes: tuple[str, ...]) -> str | None:
    """Say which classes no image to evaluate belongs to, if there are any."""
    counts = torch.bincount(labels, minlength=len(classes)).tolist()
    names = [name for name, count in zip(classes, counts, strict=False) if not count]
    return (
        f"classes without an image to evaluate: {len(names)} of {len(classes)} ({listed(names, 5)})." if names else None
    )


def imagenet_wnids() -> tuple[str, ...]:
    """Return the WordNet ids of ImageNet's 1,000 classes in torchvision's order."""
    return tuple(files("pq_sweep.inputs").joinpath("imagenet_wnids.txt").read_text().split())


def stratified_order(labels: list[int], *, seed: int) -> np.ndarray:
    """Return all indices in a seeded order whose every prefix has the classes in nearly their own proportions."""
    rng = np.random.default_rng(seed)
    array = np.asarray(labels)
    rank = np.empty(len(array))
    for label in np.unique(array):
        members = rng.permutation(np.flatnonzero(array == label))
        rank[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(rank, kind="stable")
