"""How far the outputs of a network's layers are from those of the network that it came from, by SNR and CKA.

Kuzmin et al., Pruning vs Quantization: Which is Better?, NeurIPS 2023, appendix H.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pq_sweep.compress.mixed import snr_db
from pq_sweep.compress.observing import Call
from pq_sweep.core.generators import left_alone
from pq_sweep.core.sentences import listed
from pq_sweep.core.weights import LAYERS, network_state
from pq_sweep.types import Data, Model, Record, UserError

# Layers that are looked at if none are named.
SPREAD = 5
# Images in the network at a time.
BATCH = 32
# Values that are kept of what a layer gives for an image, and of what all layers give for all images: 256 MB.
VALUES_OF_IMAGE, VALUES = 16_384, 64_000_000
# Outputs whose images differ by less than this share of them differ by the rounding of float32 alone.
ROUNDING = 1e-6

CONVOLUTIONS = tuple(kind for kind in LAYERS if kind is not nn.Linear)

T = TypeVar("T")
Shapes = list[tuple[int, ...]]


def cka(first: Tensor, second: Tensor) -> float | None:
    """Return the linear CKA of what two networks make of the same images, (N, P) and (N, Q): from 0 to 1.

    It is <K, L> / (|K| |L|) of the Gram matrices of centred outputs, so 1 for a rotated, shifted or scaled copy, and
    None if one of them is the same for all images. Kornblith et al., Similarity of Neural Network Representations
    Revisited, ICML 2019.
    """
    return _aligned(_gram(first), _gram(second))


def _gram(outputs: Tensor) -> Tensor | None:
    """Return the Gram matrix (N, N) of centred outputs (N, P), or None if they are the same for all images."""
    values = outputs.double()
    centred = values - values.mean(0)
    constant = bool(centred.norm() <= ROUNDING * values.norm())
    return None if constant else centred @ centred.T


def _aligned(first: Tensor | None, second: Tensor | None) -> float | None:
    if first is None or second is None:
        return None
    return min(1.0, float((first * second).sum() / (first.norm() * second.norm())))


@dataclass(frozen=True)
class Outputs:
    """What a layer gave for all images: values (N, P), the shapes of its outputs for an image, and where they are from.

    That are so many `positions` of so many in `all_positions`, with all channels.
    """

    values: Tensor
    shapes: Shapes
    positions: int
    all_positions: int

    @cached_property
    def gram(self) -> Tensor | None:
        return _gram(self.values)


class Probe:
    """The outputs of some layers of a network for some images, which the network's later ones are compared with.

    `names` are the layers; none stands for five convolutions and linear layers from the first to the last before the
    classifier. A look changes nothing: neither weights, nor modes, nor random numbers. `before_s` is what the pass of
    the original network took, and `looked_s` what all looks took.
    """

    def __init__(self, model: Model, images: Tensor, names: Iterable[str] = ()) -> None:
        start = time.perf_counter()
        self.model, self.images = model, images
        self.identity = network_state(model)
        self.rows: list[Record] = []
        self.looked_s = 0.0
        with _as_in_use(model.module):
            self.most = _positions(model, images, list(dict.fromkeys(names)))
            self.original = self._outputs(model.module)
        self.before_s = time.perf_counter() - start

    def look(self, epoch: int, call: Call | None = None) -> None:
        """Compare the network as it is now with the original, in a row for each layer.

        `call` maps images to what the network gives, if that is not the network itself.
        """
        start = time.perf_counter()
        with _as_in_use(self.model.module):
            found = self._outputs(call or self.model.module)
        about = {"images": len(self.images)}
        for name, before in self.original.items():
            self.rows.append({"epoch": epoch, "layer": name} | _compared(before, found.get(name)) | about)
        self.looked_s += time.perf_counter() - start

    def _outputs(self, call: Call) -> dict[str, Outputs]:
        """Return what each layer that runs gives for the images, at the same positions each time."""
        parts = dict(self.model.module.named_modules())
        there = {name: parts[name] for name in self.most if name in parts}
        device = next(self.model.module.parameters()).device
        batches: dict[str, list[Outputs]] = defaultdict(list)
        for batch in self.images.split(BATCH):
            for name, calls in _run(call, batch.to(device), there, partial(_kept, self.most, len(batch))).items():
                batches[name].append(_joined(calls, 1))
        return {name: _joined(found, 0) for name, found in batches.items()}


def images_to_probe(data: Data, count: int) -> Tensor:
    """Return up to `count` calibration images, or training images if there are none: (N, C, H, W), never evaluated.

    They are fetched once, as a data set may change its images at random each time.
    """
    source = data.calibration if len(data.calibration) else data.train
    if source is None or len(source) < 2:
        raise UserError(
            "recovery.probe=true needs two calibration or training images and the data has fewer; give"
            " dataset.calibration=64 or so, or recovery.probe=false."
        )
    with left_alone():
        return torch.cat([images.cpu() for images, _ in source.take(count).batches(BATCH)])


def _compared(before: Outputs, now: Outputs | None) -> Record:
    """Return SNR (dB) and CKA of a layer's outputs against the original's; what is not defined is None, and told."""
    whole: Record = {"positions": before.positions, "all_positions": before.all_positions}
    empty = {"snr_db": None, "cka": None, **whole}
    if now is None:
        return empty | {"note": "the layer does not run any more"}
    if not now.values.isfinite().all():
        return empty | {"note": "outputs are not finite"}
    same = now.shapes == before.shapes
    snr = snr_db(before.values, now.values) if same else None
    alike = _aligned(before.gram, now.gram)
    notes = [] if same else [f"no SNR, as outputs are {_spelled(now.shapes)} and were {_spelled(before.shapes)}"]
    constant = [who for who, outputs in (("the original's", before), ("these", now)) if outputs.gram is None]
    notes += [f"no CKA, as {' and '.join(constant)} outputs are the same for all images"] if constant else []
    return {"snr_db": snr, "cka": alike, **whole, "note": "; ".join(notes)}


def _spelled(shapes: Shapes) -> str:
    return " and ".join("x".join(map(str, shape)) for shape in shapes)


@contextmanager
def _as_in_use(module: nn.Module) -> Iterator[None]:
    """Have a network answer as it would in use, and leave its modes and all random numbers as they were."""
    whole, modes = module.training, {part: part.training for part in module.modules()}
    module.eval()
    try:
        with left_alone(), torch.no_grad():
            yield
    finally:
        module.train(whole)
        for part, mode in modes.items():
            part.training = mode


def _run(
    call: Call, images: Tensor, parts: dict[str, nn.Module], keep: Callable[[str, nn.Module, Any], T]
) -> dict[str, list[T]]:
    """Return what `keep` makes of each output of parts of a network, by name in the order in which the parts end.

    An output is only good within the call: what follows may change it in place.
    """
    found: dict[str, list[T]] = defaultdict(list)

    def hook(name: str) -> Callable[..., None]:
        return lambda part, inputs, output: found[name].append(keep(name, part, output))

    with ExitStack() as hooks:
        for name, part in parts.items():
            hooks.callback(part.register_forward_hook(hook(name)).remove)
        call(images)
    return found


def _kept(most: Mapping[str, int], images: int, name: str, part: nn.Module, output: Tensor) -> Outputs:
    """Return what is kept of an output of a layer: at most so many positions of each image, chosen once for all."""
    flat = _by_position(part, output, images)
    kept = flat if flat.shape[1] <= most[name] else flat[:, _chosen(flat.shape[1], most[name])]
    values = kept.flatten(1).to("cpu", torch.float32, copy=True)
    return Outputs(values, [_shape(output, images)], kept.shape[1], flat.shape[1])


def _joined(found: list[Outputs], dimension: int) -> Outputs:
    """Return calls of a layer for the same images as one (dimension 1), or its outputs for several batches (0)."""
    values, first = torch.cat([each.values for each in found], dimension), found[0]
    if dimension == 0:
        return replace(first, values=values)
    shapes = [shape for each in found for shape in each.shapes]
    return Outputs(values, shapes, sum(one.positions for one in found), sum(one.all_positions for one in found))


def _by_position(part: nn.Module, output: Tensor, images: int) -> Tensor:
    """Return an output as (images, positions, channels), whatever comes first in it and however it is laid out.

    Windows of attention stand beside images; they are further positions of theirs.
    """
    first = isinstance(part, CONVOLUTIONS) or (output.dim() > 3 and not isinstance(part, nn.Linear | nn.LayerNorm))
    flat = output.flatten(2).transpose(1, 2) if first else output
    return flat.reshape(images, -1, flat.shape[-1] if flat.dim() > 1 else 1)


def _shape(output: Tensor, images: int) -> tuple[int, ...]:
    """Return the shape of what an output has for one image."""
    windows = output.shape[0] // images
    return (*([windows] if windows > 1 else []), *output.shape[1:])


@cache
def _chosen(positions: int, most: int) -> Tensor:
    """Choose positions, the same ones each time and in no pattern that an image could have."""
    return torch.randperm(positions, generator=torch.Generator().manual_seed(0))[:most].sort().values


def _positions(model: Model, images: Tensor, names: list[str]) -> dict[str, int]:
    """Return the layers to look at, and how many positions of each are kept at most."""
    shapes = _layers(model, images)
    parts = dict(model.module.named_modules())
    usual = [name for name in shapes if isinstance(parts[name], LAYERS)]
    if not usual:
        raise UserError(
            "recovery.probe=true finds no convolution or linear layer that gives a tensor for each image; give"
            " recovery.probe=false."
        )
    if unknown := [name for name in names if name not in shapes]:
        raise UserError(
            f"recovery.probe_layers names {listed(unknown)}, of which this network gives no tensor for each image;"
            f" valid are: {', '.join(usual)}, and the blocks that they are in."
        )
    chosen = names or _spread(usual[:-1] or usual)
    share = min(VALUES_OF_IMAGE, VALUES // (len(images) * len(chosen)))
    return {name: max(1, share // shapes[name]) for name in chosen}


def _spread(names: list[str]) -> list[str]:
    """Return a few names, the first and the last among them."""
    count = min(SPREAD, len(names))
    return [names[round(place * (len(names) - 1) / max(1, count - 1))] for place in range(count)]


def _layers(model: Model, images: Tensor) -> dict[str, int]:
    """Return each part that gives a tensor for each image, in the order in which they end, and its channels in sum."""
    parts = {name: part for name, part in model.module.named_modules() if name}
    some = images[:2].to(next(model.module.parameters()).device)

    def channels(count: int) -> dict[str, list[Any]]:
        return _run(model.module, some[:count], parts, partial(_shape_and_channels, count))

    one, two = channels(1), channels(2)
    return {
        name: sum(number for _, number in calls)
        for name, calls in two.items()
        if None not in calls and one.get(name) == calls
    }


def _shape_and_channels(images: int, name: str, part: nn.Module, output: Any) -> tuple[tuple[int, ...], int] | None:
    """Return the shape of an output for one image and its channels, or None if it is not made of whole images."""
    if not isinstance(output, Tensor) or not output.numel() or not output.dim() or output.shape[0] % images:
        return None
    return _shape(output, images), _by_position(part, output, images).shape[-1]
