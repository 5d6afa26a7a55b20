"""Mismatches: in how far a state_dict does not fit a network, and what the likely cause is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from pq_sweep.types import UserError

GENERAL = "check model and its options, such as model.num_classes"
QUANTIZED = re.compile(
    r"(^|\.)(_packed_params(\..*)?|zero_point|fake_quant_enabled|observer_enabled|(in|de)?qweight|qzeros)$"
    r"|activation_post_process|weight_fake_quant"
)
POSITIONS = re.compile(r"pos(ition)?_?(al_)?(embed|bias|index)")
NORMALISED = re.compile(r"(^|\.)(weight_[guv]|weight_orig|parametrizations\..*)$")


def quantized(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Say which entries are quantized where the network has floating point numbers, or nothing."""
    for name, tensor in state.items():
        if name in expected and expected[name].is_floating_point() and not tensor.is_floating_point():
            return f"{str(tensor.dtype).removeprefix('torch.')} in {name}, where the model has floating point numbers"
        if QUANTIZED.search(name) and name not in expected:
            return f"the state of a quantized network, such as {name}"
    return ""


def reshaped(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Name the entries of another shape than the network's."""
    return sorted(name for name in expected if name in state and state[name].shape != expected[name].shape)


@dataclass(frozen=True)
class Mismatch:
    """What a network expects and a state_dict has; `beside` are entries outside of `key`, under which its weights lie.

    `missing` and `unexpected` are what is left after torch's renaming of former names.
    """

    expected: Mapping[str, Tensor]
    state: Mapping[str, Tensor]
    missing: Sequence[str]
    unexpected: Sequence[str]
    beside: Mapping[str, Tensor]
    key: str

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.reshaped)

    @cached_property
    def reshaped(self) -> list[str]:
        """Name the entries of another shape that torch itself does not reshape, as it does numbers of before 0.4."""
        found = reshaped(self.state, self.expected)
        return [name for name in found if (self.expected[name].dim(), self.state[name].dim()) != (0, 1)]

    @cached_property
    def surplus(self) -> dict[str, Tensor]:
        """Return the entries for which the network has no place."""
        return {name: self.state[name] for name in sorted(self.unexpected)} | dict(sorted(self.beside.items()))

    def error(self, path: Path) -> UserError:
        """Return the error that counts what differs, with the first of each kind and the likely cause."""
        place = f" (its weights at {self.key})" if self.key else ""
        return UserError(
            f"model.weights={path}{place} does not fit the model: {', '.join(self._differences())};"
            f" {next(self._causes())}."
        )

    def _differences(self) -> Iterator[str]:
        if first := min(self.missing, default=""):
            yield f"{len(self.missing)} of {len(self.expected)} entries missing, first {first}{self._wanted(first)}"
        if first := next(iter(self.surplus), ""):
            yield f"{len(self.surplus)} unexpected, first {first} with {_shape(self.surplus[first])}"
        if first := next(iter(self.reshaped), ""):
            shapes = f"{_shape(self.state[first])} instead of {tuple(self.expected[first].shape)}"
            yield f"{len(self.reshaped)} of another shape, first {first} with {shapes}"

    def _wanted(self, name: str) -> str:
        return f" with {_shape(self.expected[name])}" if name in self.expected else ""

    def _causes(self) -> Iterator[str]:
        """Yield the likely cause, and what would be right, the likeliest first."""
        named = not (self.missing or self.surplus)
        if found := [name for name in self.surplus if NORMALISED.search(name)]:
            yield f"{found[0]} belongs to a parametrized layer, so save the network without its parametrizations"
        if len(self.state.keys() & self.expected.keys()) * 4 < len(self.expected):
            yield f"hardly any name fits, so these are weights of another model; {GENERAL}"
        if self.beside and not (self.missing or self.unexpected or self.reshaped):
            first = next(iter(self.beside))
            yield f"if {first} is no part of the network, model.key={self.key} takes what lies there alone"
        if named and (classes := self._classes()):
            there, here = classes
            yield f"the file has {there} classes and the model {here}, so give model.num_classes={there}, if it has one"
        if self.missing and all(name.endswith(("running_mean", "running_var")) for name in self.missing):
            yield "BatchNorm's statistics are missing, as if only parameters were saved; save model.state_dict()"
        if self._in_last_layer(self.missing) and not (self.surplus or self.reshaped):
            yield f"the file has no last layer, as a backbone without classifier; {GENERAL}"
        if named and all(POSITIONS.search(name) for name in self.reshaped):
            yield f"only positions differ, so these weights are for another size of images; {GENERAL}"
        if named and self.reshaped == list(self.expected)[:1]:
            yield f"only the first layer differs, so these weights may be for other images; {GENERAL}"
        if named:
            yield f"all names fit, so these may be weights of a wider or narrower variant; {GENERAL}"
        if not self.reshaped:
            yield f"these may be weights of a deeper, shallower or changed variant; {GENERAL}"
        yield f"these may be weights of a variant of another depth and width; {GENERAL}"

    def _classes(self) -> tuple[int, int] | None:
        """Return the classes of file and model if their number is all that differs, in the last layer."""
        if not self._in_last_layer(self.reshaped):
            return None
        pairs = {(*_rows(self.state[name]), *_rows(self.expected[name])) for name in self.reshaped}
        sizes = {(pair[0], pair[2]) for pair in pairs}
        same = all(pair[1] == pair[3] for pair in pairs)
        return sizes.pop() if same and len(sizes) == 1 else None

    def _in_last_layer(self, names: Sequence[str]) -> bool:
        layers = [name.rpartition(".")[0] for name in self.expected]
        return bool(names) and {name.rpartition(".")[0] for name in names} == set(layers[-1:])


def _shape(tensor: Tensor) -> str:
    return f"shape {tuple(tensor.shape)}"


def _rows(tensor: Tensor) -> tuple[int, torch.Size]:
    """Return the first size of a tensor and the others."""
    return (tensor.shape[0] if tensor.dim() else 0), tensor.shape[1:]
