"""Sizes on disk: each equals that of a file that is really written here, by the library that the format comes from."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor, nn

from pq_sweep.compress import pruners
from pq_sweep.core.weights import prunable
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.measure import sizes
from pq_sweep.types import Model, Preprocess

AMOUNTS = (0.0, 0.5, 0.9)


@cache
def pruned(amount: float) -> Model:
    model = digits_cnn()
    pruners.l1_global(model, digits(model), amount=amount)
    return model


def by_torch(model: Model, convert: Callable[[Tensor], Tensor]) -> int:
    """Save a state_dict whose prunable weights are PyTorch's sparse tensors, without what the container takes."""
    weights = {id(getattr(part, name)) for part, name in prunable(model.module)}
    sparse_names = {name for name, value in model.module.named_parameters() if id(value) in weights}
    state = model.module.state_dict()
    return sum(parts(convert(value)) if name in sparse_names else value.nbytes for name, value in state.items())


def parts(value: Tensor) -> int:
    """Return the bytes of the tensors that a sparse tensor is saved as."""
    if value.layout is torch.sparse_coo:
        value = value.coalesce()
        return value.indices().nbytes + value.values().nbytes
    if value.layout is torch.sparse_csr:
        return value.crow_indices().nbytes + value.col_indices().nbytes + value.values().nbytes
    return value.ccol_indices().nbytes + value.row_indices().nbytes + value.values().nbytes


each_amount = pytest.mark.parametrize("amount", AMOUNTS)


@each_amount
@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("coo", lambda weight: weight.to_sparse()),
        ("csr", lambda weight: weight.flatten(1).to_sparse_csr()),
        ("csc", lambda weight: weight.flatten(1).to_sparse_csc()),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_formats_are_as_large_as_pytorchs(
    name: str, convert: Callable[[Tensor], Tensor], amount: float, tmp_path: Path
) -> None:
    assert sizes.storage_sizes(pruned(amount), tmp_path)[name] == by_torch(pruned(amount), convert)


@each_amount
def test_32_bit_rows_are_as_large_as_scipys(amount: float, tmp_path: Path) -> None:
    model = pruned(amount)
    matrices = [sparse.csr_array(getattr(part, name).detach().flatten(1)) for part, name in prunable(model.module)]
    dense = sum(value.nbytes for value in model.module.state_dict().values())
    dense -= sum(getattr(part, name).nbytes for part, name in prunable(model.module))

    expected = sum(x.data.nbytes + x.indices.nbytes + x.indptr.nbytes for x in matrices)

    assert matrices[0].indices.dtype == np.int32
    assert sizes.storage_sizes(model, tmp_path)["csr_int32"] == dense + expected


@each_amount
def test_bitmask(amount: float, tmp_path: Path) -> None:
    weights = [getattr(part, name).detach().numpy() for part, name in prunable(pruned(amount).module)]
    found = sizes.storage_sizes(pruned(amount), tmp_path)

    expected = sum(np.packbits(weight != 0).nbytes + weight[weight != 0].nbytes for weight in weights)

    dense = sum(value.nbytes for value in pruned(amount).module.state_dict().values())
    assert found["bitmask"] == dense - sum(weight.nbytes for weight in weights) + expected


@each_amount
def test_state_dict_is_the_bytes_of_the_saved_file(amount: float, tmp_path: Path) -> None:
    found = sizes.storage_sizes(pruned(amount), tmp_path)["state_dict"]

    torch.save(pruned(amount).module.state_dict(), tmp_path / "model.pt")

    assert found == (tmp_path / "model.pt").stat().st_size


@each_amount
def test_zstd_is_that_of_the_saved_file(amount: float, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    torch.save(pruned(amount).module.state_dict(), tmp_path / "saved" / "model.pt")

    found = sizes.storage_sizes(pruned(amount), tmp_path)

    assert found["zstd"] == sizes.compressed_size(tmp_path / "saved" / "model.pt") < found["state_dict"]


def test_compressed_size_is_that_of_a_file_that_can_be_unpacked(tmp_path: Path) -> None:
    import zstandard

    content = b"weights " * 10_000
    (tmp_path / "artifact").write_bytes(content)

    packed = zstandard.ZstdCompressor(sizes.ZSTD_LEVEL).compress(content)

    assert zstandard.ZstdDecompressor().decompress(packed) == content
    assert sizes.compressed_size(tmp_path / "artifact") == pytest.approx(len(packed), abs=32)


def test_formats_change_places_as_sparsity_grows(tmp_path: Path) -> None:
    """As in the papers: sparse formats are larger than dense until most weights are gone."""
    dense, half, most = (sizes.storage_sizes(pruned(amount), tmp_path) for amount in AMOUNTS)

    assert dense["coo"] > 5 * dense["state_dict"]
    assert half["coo"] > half["csr"] > half["state_dict"] > half["bitmask"]
    assert most["coo"] < most["state_dict"]
    assert most["bitmask"] < most["csr_int32"] < most["csr"]


def test_attention_projections_count_as_weights(tmp_path: Path) -> None:
    attention = nn.MultiheadAttention(8, 2)
    model = Model(attention, 2, Preprocess())

    weights = attention.in_proj_weight.numel() + attention.out_proj.weight.numel()
    biases = attention.in_proj_bias.nbytes + attention.out_proj.bias.nbytes

    assert sizes.storage_sizes(model, tmp_path)["coo"] == weights * 20 + biases


def test_the_files_are_gone_afterwards(tmp_path: Path) -> None:
    sizes.storage_sizes(pruned(0.5), tmp_path)

    assert list(tmp_path.iterdir()) == []
