"""What a user's model function returns: put right and said where that is plain, refused in one sentence otherwise."""

from __future__ import annotations

import copy
import json
from collections import namedtuple
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import refused
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from pq_sweep.inputs.own_model import accepted_model
from pq_sweep.runtimes.export import export_onnx
from pq_sweep.types import Model, Preprocess

SMALL = Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,))
Pair = namedtuple("Pair", "logits aux")  # as torchvision's GoogLeNet gives one


@dataclass
class Output:
    logits: Tensor
    loss: None = None


class Net(nn.Module):
    """A small network whose answer `shape` turns into what `forward` returns."""

    def __init__(self, shape: Any = lambda logits: logits, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.drop = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.9)
        self.head, self.shape = nn.Linear(8 * 36, classes), shape

    def forward(self, images: Tensor) -> Any:
        return self.shape(self.head(self.drop(self.norm(self.conv(images)).flatten(1))))


def model_of(module: Any, classes: Any = 10, **options: Any) -> Model:
    if isinstance(module, nn.Module):
        module.eval()
    return Model(module, classes, **{"preprocess": SMALL} | options)


def accepted(given: Any) -> Model:
    return accepted_model(given, "mine.make")


def answers(model: Model) -> Tensor:
    with torch.no_grad():
        return model.module(model.sample(5))


@pytest.mark.parametrize("classes", [1, 10])
def test_a_sound_network_is_left_as_it_is(classes: int) -> None:
    model = model_of(Net(classes=classes), classes)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    found = accepted(model)
    assert found.module is model.module
    assert found.notes == ()
    assert not found.module._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.module.state_dict().items())


def test_a_network_in_training_mode_is_put_in_eval_mode() -> None:
    expected = answers(model_of(Net()))
    model = model_of(Net())
    model.module.train()
    before = copy.deepcopy(model.module.state_dict())
    found = accepted(model)
    assert torch.equal(answers(found), expected)
    assert found.notes == ("The network came in training mode and was put in eval mode.",)
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.module.state_dict().items())


def test_a_single_part_in_training_mode_is_noticed() -> None:
    model = model_of(Net())
    model.module.drop.train()
    assert accepted(model).notes == ("The network came in training mode and was put in eval mode.",)
    assert not model.module.drop.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_become_float32(dtype: torch.dtype) -> None:
    expected = answers(model_of(Net().to(dtype).float()))
    found = accepted(model_of(Net().to(dtype)))
    assert torch.equal(answers(found), expected)
    assert found.notes == (f"The network's {str(dtype).removeprefix('torch.')} weights were converted to float32.",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (lambda y: {"logits": y, "features": y.flatten()}, "logits was taken"),
        (lambda y: {"logits": y, "aux": y + 1}, "logits was taken"),
        (lambda y: {"scores": y, "loss": None}, "scores was taken"),
        (lambda y: (y, y.sum(1)), "entry 0 was taken"),
        (lambda y: [None, y], "entry 1 was taken"),
        (lambda y: Pair(y, y + 1), "logits was taken"),
        (Output, "logits was taken"),
    ],
    ids=["logits", "logits and aux", "one entry", "tuple", "list", "named tuple", "dataclass"],
)
def test_the_one_entry_of_logits_is_taken(shape: Any, said: str, tmp_path: Path) -> None:
    expected = answers(model_of(Net()))
    found = accepted(model_of(Net(shape)))
    assert said in found.notes[0]
    assert torch.equal(answers(found), expected)
    assert torch.equal(answers(replace(found, module=copy.deepcopy(found.module))), expected)
    export_onnx(found, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {"input": found.sample(5).numpy()})
    assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)


def test_a_wrapper_is_taken_off() -> None:
    expected = answers(model_of(Net()))
    for wrapped in (nn.DataParallel(Net()), torch.compile(Net())):
        found = accepted(model_of(wrapped))
        assert type(found.module) is Net
        assert torch.equal(answers(found), expected)
        assert type(wrapped).__name__ in found.notes[0]


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(images)


class AlwaysDropping(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(images))


class OfTheBatch(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8, track_running_stats=False)


class TwoAtATime(Net):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.view(2, 1, 8, 8))


class Listed(nn.Module):
    """Keeps a layer in a plain list, where neither state_dict nor pruners find it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = [nn.Linear(64, 16)], nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.layers[0](images.flatten(1)))


class ForgetsToReturn(Net):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


def made_for_inference() -> Model:
    with torch.inference_mode():
        return model_of(Net())


def spoilt(name: str, value: float) -> Net:
    net = Net()
    net.state_dict()[name].view(-1)[0] = value
    return net


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))


REFUSED = {
    "no Model": (lambda: Net(), "mine.make gives a test_own_model.Net; return pq_sweep.types.Model(module"),
    "nothing": (lambda: None, "mine.make gives None; return pq_sweep.types.Model(module"),
    "no module": (lambda: model_of(Net().forward), "module of mine.make gives a method"),
    "a path": (lambda: model_of("net.pt"), "module of mine.make gives 'net.pt'"),
    "classes as text": (lambda: model_of(Net(), "10"), "num_classes='10'; give a whole number"),
    "names": (lambda: Model(Net(), 10, SMALL, ("a", "b")), "2 names of classes and num_classes=10"),
    "script": (lambda: model_of(torch.jit.script(nn.Flatten())), "holds TorchScript, which"),
    "trace": (lambda: model_of(torch.jit.trace(Net().eval(), torch.zeros(1, 1, 8, 8))), "holds TorchScript, which"),
    "no parameters": (lambda: model_of(nn.Flatten()), "has no parameters"),
    "lazy": (lambda: model_of(lazy()), "1.weight of the network of mine.make has no values yet"),
    "meta": (lambda: model_of(Net().to("meta")), "conv.weight of the network of mine.make has no values yet"),
    "wider head": (lambda: model_of(Net(classes=1000)), "give num_classes=1000, or a network with another head"),
    "narrower head": (lambda: model_of(Net(classes=2)), "give num_classes=2, or a network with another head"),
    "two candidates": (lambda: model_of(Net(lambda y: (y, y))), "gives tuple (0: a float32 tensor (2, 10), 1:"),
    "no candidate": (lambda: model_of(Net(lambda y: {"out": y.sum()})), "gives dict (out: a float32 tensor ()) where"),
    "nothing back": (lambda: model_of(Net(lambda y: None)), "gives NoneType (nothing) where one tensor (B, 10)"),
    "numbers": (lambda: model_of(Net(lambda y: y.argmax(1))), "return the logits, not the class numbers"),
    "maps": (lambda: model_of(Net(lambda y: y[..., None, None].expand(-1, -1, 2, 1))), "tensor (2, 10, 2, 1) for two"),
    "channels": (lambda: model_of(Net(), preprocess=replace(SMALL, channels=3)), "(size=8, channels=3)"),
    "size": (lambda: model_of(Net(), preprocess=replace(SMALL, size=16, resize=16)), "images (2, 1, 16, 16)"),
    "fixed batch": (lambda: model_of(TwoAtATime()), "fails on float32 images (1, 1, 8, 8)"),
    "half inside": (lambda: model_of(Net(lambda y: y @ torch.ones(10, 10).half())), "fails on float32 images"),
    "listed": (lambda: model_of(Listed()), "uses weights that it does not hold itself, first of shape (16, 64)"),
    "inner script": (lambda: model_of(nn.Sequential(torch.jit.script(nn.Flatten()), nn.Linear(64, 10))), "TorchScript"),
    "inference": (made_for_inference, "was made under torch.inference_mode()"),
    "sides": (lambda: model_of(Net(), preprocess=replace(SMALL, size=(8, 6))), "give whole numbers of pixels"),
    "resize": (lambda: model_of(Net(), preprocess=replace(SMALL, resize=4)), "resize at least size"),
    "no resize": (lambda: model_of(Net(), preprocess=replace(SMALL, resize=None)), "give whole numbers of pixels"),
    "interpolation": (lambda: model_of(Net(), preprocess=replace(SMALL, interpolation="cubic")), "valid are: nearest,"),
    "std": (lambda: model_of(Net(), preprocess=replace(SMALL, std=(0.0,))), "give standard deviations other than 0"),
    "NaN": (lambda: model_of(spoilt("conv.weight", float("nan"))), "not finite, in conv.weight; check its weights"),
    "infinite": (lambda: model_of(spoilt("head.bias", float("inf"))), "not finite, in head.bias"),
    "statistics": (lambda: model_of(spoilt("norm.running_var", float("inf"))), "not finite, in norm.running_var"),
    "overflow": (lambda: model_of(Net(lambda y: y * 1e38 * 1e38)), "logits that are not finite"),
    "counting": (lambda: model_of(Counting()), "changes calls when it answers, even in eval mode"),
    "dropping": (lambda: model_of(AlwaysDropping()), "draws random numbers when it answers"),
    "of the batch": (lambda: model_of(OfTheBatch()), "answers an image differently beside other images"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "sentence"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_anything_else_is_refused_in_one_sentence(given: Any, sentence: str) -> None:
    assert sentence in refused(lambda: accepted(given()))


def test_logits_of_another_type_become_float32() -> None:
    expected = answers(model_of(Net()))
    found = accepted(model_of(Net(lambda y: y.bfloat16())))
    assert answers(found).dtype == torch.float32
    assert torch.equal(answers(found), expected.bfloat16().float())
    assert found.notes == ("The network's bfloat16 logits were converted to float32.",)


def test_values_of_torchvision_and_numpy_become_plain() -> None:
    preprocess = Preprocess((8, 8), np.int64(8), 1, np.zeros(1), torch.ones(1), InterpolationMode.BICUBIC)
    found = accepted(Model(Net().eval(), np.int64(10), preprocess))
    assert found.preprocess == Preprocess(8, 8, 1, (0.0,), (1.0,), "bicubic")
    assert json.loads(json.dumps(asdict(found.preprocess)))["size"] == 8
    assert type(found.num_classes) is int


@pytest.mark.parametrize("values", [0.5, (0.5,), (0.5, 0.5, 0.5), [0.5]])
def test_one_value_stands_for_all_channels(values: Any) -> None:
    grey = accepted(model_of(Net(), preprocess=Preprocess(8, 8, 1, values, values)))
    assert (grey.preprocess.mean, grey.preprocess.std) == ((0.5,), (0.5,))
    colours = nn.Sequential(nn.Conv2d(3, 1, 1), Net())
    found = accepted(model_of(colours, preprocess=Preprocess(8, 8, 3, values, values))).preprocess
    assert (found.mean, found.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("preprocess", "sentence"),
    [
        (
            Preprocess(8, 8, channels=1),
            "channels=1 and mean=(0.485, 0.456, 0.406); give the value of each channel",
        ),
        (Preprocess(8, 8, 1, mean=(0.0,)), "channels=1 and std=(0.229, 0.224, 0.225); give the value of each channel"),
        (Preprocess(8, 8, 3, mean=(0.1, 0.2)), "was trained with, such as mean=(0.5, 0.5, 0.5)."),
        (Preprocess(8, 8, 1, mean=None), "channels=1 and mean=None; give the value of each channel"),
        (Preprocess(8, 8, 1, mean="imagenet"), "mean='imagenet'; give the value of each channel"),
        (Preprocess(8, 8, 0), "channels=0; give 1 for grey or 3 for colours."),
        (Preprocess(8, 8, "grey"), "channels='grey'; give 1 for grey or 3 for colours."),
    ],
    ids=str,
)
def test_values_that_fit_no_channels_are_refused(preprocess: Preprocess, sentence: str) -> None:
    """Of a grey network, the default of Preprocess is that of colours."""
    assert sentence in refused(lambda: accepted(model_of(Net(), preprocess=preprocess)))


@pytest.mark.slow
def test_a_network_whose_train_returns_nothing_is_exported(tmp_path: Path) -> None:
    found = accepted(model_of(ForgetsToReturn()))
    export_onnx(found, tmp_path / "model.onnx")
    assert onnxruntime.InferenceSession(tmp_path / "model.onnx").get_outputs()[0].name == "logits"


def test_a_mask_may_be_infinite() -> None:
    net = Net()
    net.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))
    assert accepted(model_of(net)).notes == ()
