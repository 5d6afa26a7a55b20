"""Sizes on disk of a pruned network, stored densely, in sparse formats and compressed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import zstandard

from pq_sweep.core.weights import each_once, prunable_by_name
from pq_sweep.types import Model

# zstd's own default; higher levels gain little on weights and cost much time.
ZSTD_LEVEL = 3
FLOAT = 4


def storage_sizes(model: Model, folder: Path) -> dict[str, int]:
    """Return the bytes that each format of the network takes, by the name of the format.

    `state_dict` is torch.save's file, written to `folder` for a while, and `zstd` that file compressed. The others
    store every prunable weight sparsely, whatever its sparsity, and all other tensors densely, what layers share once;
    they count values and indices, not the few bytes of headers.
    """
    state = model.module.state_dict()
    file = folder / "model.pt"
    torch.save(state, file)
    sizes = {"state_dict": file.stat().st_size, "zstd": compressed_size(file)}
    file.unlink()
    names = prunable_by_name(model.module)
    dense = sum(tensor.nbytes for name, tensor in each_once(state.items()) if name not in names)
    weights = [(state[name].shape, int(state[name].count_nonzero())) for name in names]
    return sizes | {name: dense + sum(size(*weight) for weight in weights) for name, size in SPARSE_FORMATS.items()}


def compressed_size(path: Path) -> int:
    """Return the bytes of a file after zstd on all cores; the number of cores does not change the result."""
    compressor = zstandard.ZstdCompressor(ZSTD_LEVEL, threads=len(os.sched_getaffinity(0)))
    with path.open("rb") as source, Path(os.devnull).open("wb") as nowhere:
        return int(compressor.copy_stream(source, nowhere)[1])


def _coo(shape: torch.Size, values: int) -> int:
    """Coordinates: a 64-bit index per dimension and the value, as PyTorch's to_sparse."""
    return values * (8 * len(shape) + FLOAT)


def _csr(shape: torch.Size, values: int, index: int = 8) -> int:
    """Compressed rows of the matrix (outputs, inputs): 64-bit indices, as PyTorch's to_sparse_csr."""
    return values * (index + FLOAT) + (shape[0] + 1) * index


def _csc(shape: torch.Size, values: int) -> int:
    """Compressed columns of the same matrix, as PyTorch's to_sparse_csc."""
    return _csr(torch.Size([shape[1:].numel()]), values)


def _csr_int32(shape: torch.Size, values: int) -> int:
    """Compressed rows with 32-bit indices, as SciPy stores them."""
    return _csr(shape, values, index=4)


def _bitmask(shape: torch.Size, values: int) -> int:
    """A bit for each weight, and the values that are not zero."""
    return (shape.numel() + 7) // 8 + values * FLOAT


SPARSE_FORMATS: dict[str, Callable[[torch.Size, int], int]] = {
    "coo": _coo,
    "csr": _csr,
    "csc": _csc,
    "csr_int32": _csr_int32,
    "bitmask": _bitmask,
}
