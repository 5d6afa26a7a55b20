"""Networks that hide their weights are refused by what they are; what is wrapped around a network is taken off."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import refused
from torch import Tensor, nn
from torch.ao.quantization import (
    DeQuantStub,
    QuantStub,
    convert,
    get_default_qat_qconfig,
    get_default_qconfig,
    prepare,
    prepare_qat,
    quantize_dynamic,
)

from pq_sweep.inputs.own_model import accepted_model
from pq_sweep.types import Model, Preprocess

SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.act, self.head = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Linear(144, 10)
        self.come, self.go = QuantStub(), DeQuantStub()

    def forward(self, images: Tensor) -> Tensor:
        return self.go(self.head(self.act(self.conv(self.come(images))).flatten(1)))


def accepted(module: nn.Module) -> Model:
    return accepted_model(Model(module, 10, SMALL), "mine.make")


# --- exported and quantized ------------------------------------------------------------------------------------------


def exported() -> nn.Module:
    return torch.export.export(Net().eval(), (IMAGES,)).module()


def statically(done: bool) -> nn.Module:
    net = Net().eval()
    net.qconfig = get_default_qconfig("qnnpack")  # type: ignore[assignment]
    prepared = prepare(net)
    prepared(IMAGES)
    return convert(prepared) if done else prepared


def for_training() -> nn.Module:
    net = Net().train()
    net.qconfig = get_default_qat_qconfig("qnnpack")  # type: ignore[assignment]
    return prepare_qat(net)


def int8_weight() -> nn.Module:
    net = Net()
    net.head.weight = nn.Parameter(net.head.weight.mul(100).to(torch.int8), requires_grad=False)
    return net


def plain_tensor() -> nn.Module:
    net = Net()
    values = net.head.weight.detach()
    del net.head.weight
    net.head.weight = values  # type: ignore[assignment]
    return net


def sparse_buffer() -> nn.Module:
    net = Net()
    net.register_buffer("edges", torch.eye(3).to_sparse())
    return net


EXPORTED = "holds an exported program of torch.export, whose graph can be neither pruned nor trained nor put in eval"
QUANTIZED = {
    "exported": (exported, EXPORTED),
    "exported within": (lambda: nn.Sequential(exported(), nn.Linear(10, 10)), EXPORTED),
    "unflattened": (lambda: torch.export.unflatten(torch.export.export(Net().eval(), (IMAGES,))), EXPORTED),
    "dynamic": (lambda: quantize_dynamic(Net(), {nn.Linear}), "is quantized already, first in head (Linear), which"),
    "static": (lambda: statically(True), "is quantized already, first in conv (Conv2d), which hides its FP32 weights"),
    "prepared": (lambda: statically(False), "is prepared for quantization, first in conv.activation_post_process ("),
    "prepared to train": (
        for_training,
        "is prepared for quantization, first in conv (Conv2d), which watches or rounds",
    ),
    "int8": (int8_weight, "head.weight of the network of mine.make holds int8 numbers"),
    "plain tensor": (plain_tensor, "head.weight of the network of mine.make is a plain tensor, which no file would"),
    "sparse buffer": (sparse_buffer, "the buffer edges of the network of mine.make is torch.sparse_coo; make it dense"),
}


@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_hides_its_weights_is_called_by_its_name(case: str) -> None:
    make, sentence = QUANTIZED[case]
    assert sentence in refused(lambda: accepted(make()))


def test_a_network_that_could_be_quantized_and_a_traced_graph_are_fine() -> None:
    assert accepted(Net().eval()).notes == ()
    assert accepted(torch.fx.symbolic_trace(Net().eval())).notes == ()


class Stubborn(Net):
    def train(self, mode: bool = True) -> nn.Module:
        raise NotImplementedError("I am what I am.")


def test_a_network_that_refuses_its_modes_is_told_so() -> None:
    text = refused(lambda: accepted(Stubborn()))
    assert "cannot be put in eval mode (NotImplementedError: I am what I am); let its eval() and train()" in text


# --- sparse weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_weights_become_dense_and_stay_shared(sparse: Callable[[Tensor], Tensor]) -> None:
    net = Net()
    net.second = nn.Linear(144, 10)
    with torch.no_grad():
        net.head.weight[net.head.weight < 0] = 0
    expected = net.head.weight.detach().clone()
    net.head.weight = net.second.weight = nn.Parameter(sparse(expected), requires_grad=False)
    found = accepted(net.eval())
    assert found.notes == ("head.weight, stored sparsely, became dense with the same values.",)
    assert torch.equal(net.head.weight, expected)
    assert net.head.weight is net.second.weight
    assert not net.head.weight.requires_grad


# --- memory that parameters share in part ----------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.head, self.more = nn.Linear(64, 10, bias=False), nn.Linear(64, 10, bias=False)
        self.head.weight, self.more.weight = nn.Parameter(first), nn.Parameter(second)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1)) + self.more(images.flatten(1))


WHOLE = torch.randn(20, 64)


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        (WHOLE[:10], WHOLE[5:15], "head.weight and more.weight"),
        (WHOLE[:10], torch.as_strided(WHOLE, (10, 64), (64, 1), 32), "head.weight and more.weight"),
        (torch.randn(1, 64).expand(10, 64), torch.randn(10, 64), "values of head.weight"),
    ],
    ids=["rows", "shifted", "expanded"],
)
def test_parameters_that_share_a_part_of_their_memory_are_refused(first: Tensor, second: Tensor, named: str) -> None:
    text = refused(lambda: accepted(Two(first, second)))
    assert text.startswith(f"{named} of the network of mine.make share ")
    assert "give each a memory of its own by clone(), or share a whole parameter" in text


@pytest.mark.parametrize(
    ("first", "second"),
    [(WHOLE[:10], WHOLE[10:]), (WHOLE[::2], WHOLE[1::2])],
    ids=["side by side", "in turns"],
)
def test_parameters_side_by_side_are_fine(first: Tensor, second: Tensor) -> None:
    assert accepted(Two(first, second).eval()).notes == ()


def saved_bytes(module: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()


def test_slices_of_a_larger_memory_become_copies() -> None:
    """A file holds the whole of each memory of which a network holds a slice."""
    whole = torch.randn(10_000, 64)
    net, plain = Two(whole[:10], whole[20:30]).eval(), Two(torch.randn(10, 64), torch.randn(10, 64))
    expected = net(IMAGES)
    assert saved_bytes(net) > 100 * saved_bytes(plain)
    (note,) = accepted(net).notes
    assert note == "head.weight, more.weight, cut out of a larger memory that a file would hold whole, became copies."
    assert saved_bytes(net) == pytest.approx(saved_bytes(plain), rel=0.05)
    assert torch.equal(net(IMAGES), expected)


def test_slices_that_are_one_memory_go_on_sharing_it() -> None:
    net = Two(WHOLE[:10], WHOLE[:10]).eval()
    assert len(accepted(net).notes) == 1
    assert net.head.weight is not net.more.weight
    assert net.head.weight.data_ptr() == net.more.weight.data_ptr()


def test_a_buffer_that_is_a_part_of_a_parameter_is_refused() -> None:
    net = Net()
    net.register_buffer("row", net.head.weight.data[3])
    assert "head.weight and row of the network of mine.make share part" in refused(lambda: accepted(net))


# --- wrappers --------------------------------------------------------------------------------------------------------


class Decorated(Net):
    @torch.compile
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def inner_wrapped() -> nn.Module:
    net = Net()
    net.conv, net.head = torch.compile(net.conv), nn.DataParallel(net.head)  # type: ignore[assignment]
    return net


def compiled_in_place() -> nn.Module:
    net = Net()
    net.compile()
    net.conv.compile()
    return net


def compiled_forward() -> nn.Module:
    net = Net()
    net.forward = torch.compile(net.forward)  # type: ignore[method-assign]
    return net


@pytest.mark.parametrize(
    ("make", "notes"),
    [
        (
            lambda: torch.compile(nn.DataParallel(Net())),
            ["was taken out of its OptimizedModule", "of its DataParallel"],
        ),
        (inner_wrapped, ["conv of the network was taken out of its OptimizedModule.", "head of the network was taken"]),
        (compiled_in_place, ["torch.compile was taken off the network, conv."]),
        (compiled_forward, ["torch.compile was taken off the network."]),
        (Decorated, ["torch.compile was taken off the network."]),
    ],
    ids=["around", "inside", "in place", "forward", "decorator"],
)
def test_what_is_compiled_or_wrapped_is_taken_off(make: Callable[[], Any], notes: list[str]) -> None:
    expected, found = accepted(Net().eval()), accepted(make().eval())
    assert len(found.notes) == len(notes)
    assert all(note in told for note, told in zip(notes, found.notes, strict=True))
    assert found.module.state_dict().keys() == expected.module.state_dict().keys()
    assert accepted(copy.deepcopy(found.module)).notes == ()
    assert torch.equal(found.module(IMAGES), expected.module(IMAGES))
