"""Checkpoints: a file is told by what is in it, its code never runs, and what is no checkpoint is named."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import functools
import gzip
import os
import pickle
import re
import subprocess
import tarfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoint_files import assert_same, load_digits, prefixed, trained
from commands import SHORT
from conftest import ROOT, Launch, only_sweep, refused, results
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pq_sweep.inputs.checkpoints import read_checkpoint
from pq_sweep.inputs.digits_cnn import DigitsCNN
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.check import problems

FORMATS = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "former format"])


@pytest.mark.parametrize("name", ["w.ckpt", "w.bin", "w.tar", "w.pth.tar", "w.th", "w.pkl", "w", "w.safetensors"])
@FORMATS
def test_name_of_a_file_of_torch_does_not_matter(tmp_path: Path, name: str, legacy: bool) -> None:
    torch.save(trained(), tmp_path / name, _use_new_zipfile_serialization=not legacy)
    assert_same(digits_cnn(weights=str(tmp_path / name)).module.state_dict(), trained())


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w"])
def test_safetensors_with_metadata_under_any_name(tmp_path: Path, name: str) -> None:
    save_file(prefixed(trained(), "model."), tmp_path / name, metadata={"format": "pt", "note": "<html> {}"})
    assert_same(digits_cnn(weights=str(tmp_path / name)).module.state_dict(), trained())


class Options:
    """Options as a training script keeps them."""

    def __init__(self) -> None:
        self.depth, self.mean = 18, torch.zeros(3)


class Configuration(dict[str, Any]):
    """A dictionary whose items are attributes as well, as EasyDict and Lightning have them."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__.update(items)


@dataclasses.dataclass
class Slotted:
    """Plain data of another make."""

    __slots__ = ("depth",)
    depth: int


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)


BESIDE: dict[str, Any] = {
    "options of argparse": argparse.Namespace(lr=0.1, root=PurePosixPath("/data"), seeds=[1, 2]),
    "options of a script": Options(),
    "configuration": Configuration(depth=18, width=Configuration(stem=64)),
    "configuration of OmegaConf": OmegaConf.create({"model": {"depth": [18, 34]}}),
    "plain data": Slotted(18),
    "scalar of NumPy": np.float64(76.1),
    "whole number of NumPy": np.int64(3),
    "array of NumPy": np.arange(6).reshape(2, 3),
    "array of objects": np.array([1, "two"], dtype=object),
    "state of random numbers": [np.random.RandomState(0), np.random.default_rng(0), torch.Generator()],
    "namespace": types.SimpleNamespace(depth=18),
    "time": [datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(hours=3)],
    "containers": [collections.defaultdict(list, a=[1]), collections.deque([1, 2]), frozenset([1]), {1}, range(3)],
    "partial": functools.partial(print, "never"),
    "optimizer": optimizer(),
    "schedule": torch.optim.lr_scheduler.StepLR(optimizer(), 1),
    "class": {Options: 3},
    "version and type": [torch.__version__, torch.float16, torch.device("cpu"), torch.Size([1])],
}


@pytest.mark.parametrize("beside", BESIDE)
@FORMATS
def test_objects_beside_the_weights_are_not_needed(tmp_path: Path, beside: str, legacy: bool) -> None:
    content = {"args": BESIDE[beside], "model": trained()}
    model = load_digits(tmp_path, content, _use_new_zipfile_serialization=not legacy)
    assert_same(model.module.state_dict(), trained())


def test_network_beside_its_weights_is_not_needed(tmp_path: Path) -> None:
    assert_same(load_digits(tmp_path, {"net": DigitsCNN(), "state_dict": trained()}).module.state_dict(), trained())


def test_objects_are_replaced_by_what_does_nothing(tmp_path: Path) -> None:
    torch.save({"args": Options(), "model": trained()}, tmp_path / "weights.pth")
    before = torch.serialization.get_safe_globals()
    content = read_checkpoint(tmp_path / "weights.pth")
    assert not isinstance(content["args"], Options)
    assert vars(content["args"]) == {}
    assert torch.serialization.get_safe_globals() == before


class Calls:
    """Unpickling this object calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.called


class Sets:
    """Unpickling this object calls a method of it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["path"].touch()


CODE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "eval": (lambda path: Calls(eval, f"open({str(path)!r}, 'w')"), "builtins.eval"),
    "system": (lambda path: Calls(os.system, f"touch {path}"), "posix.system"),
    "process": (lambda path: Calls(subprocess.call, ["touch", str(path)]), "subprocess.call"),
    "method": (lambda path: Calls(Path.touch, path), "builtins.getattr"),
}


@pytest.mark.parametrize("name", CODE)
@FORMATS
def test_code_beside_the_weights_is_named_and_does_not_run(tmp_path: Path, name: str, legacy: bool) -> None:
    make, called = CODE[name]
    content = {"model": trained(), "extra": make(tmp_path / "ran")}
    text = refused(lambda: load_digits(tmp_path, content, _use_new_zipfile_serialization=not legacy))
    assert called in text
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file of this test is harmless, so the test proves nothing"


def test_code_that_fills_an_object_does_not_run(tmp_path: Path) -> None:
    model = load_digits(tmp_path, {"model": trained(), "extra": Sets(tmp_path / "ran")})
    assert_same(model.module.state_dict(), trained())
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "weights.pth", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file of this test is harmless, so the test proves nothing"


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (DigitsCNN(), "pq_sweep.inputs.digits_cnn.DigitsCNN"),
        ({"model": DigitsCNN(), "epoch": 3}, "pq_sweep.inputs.digits_cnn.DigitsCNN at model"),
        (nn.Sequential(nn.Linear(2, 2), nn.GELU()), "torch.nn.modules.container.Sequential"),
        ({"weights": np.ones(3)}, "NumPy arrays at weights"),
    ],
)
def test_pickled_objects_are_named(tmp_path: Path, content: Any, found: str) -> None:
    text = refused(lambda: load_digits(tmp_path, content))
    assert f"holds no state_dict but {'' if 'NumPy' in found else 'an object of '}{found}; save one by" in text
    text = refused(lambda: load_digits(tmp_path, content, _use_new_zipfile_serialization=False))
    assert found.partition(" at ")[0] in text


class Ema:
    """Averaged weights as a training script keeps them."""

    def __init__(self) -> None:
        self.shadow, self.generator = trained(1), torch.Generator()


PICKLED: dict[str, tuple[Any, str, str]] = {
    "an AveragedModel": (
        {"model": trained(), "other": AveragedModel(DigitsCNN())}, "other", "torch.optim.swa_utils.AveragedModel"
    ),
    "a network": ({"model": trained(), "ema": DigitsCNN().half()}, "ema", "pq_sweep.inputs.digits_cnn.DigitsCNN"),
    "an object": ({"model": trained(), "args": Options(), "swa": Ema()}, "swa", "Ema"),
    "one deeper": ({"model": trained(), "callbacks": {"ema": {"copy": Ema()}}}, "callbacks.ema.copy", "Ema"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PICKLED)
def test_averaged_weights_in_an_object_are_said_to_be_left(tmp_path: Path, kind: str) -> None:
    content, place, name = PICKLED[kind]
    (note,) = load_digits(tmp_path, content).notes
    assert f"averaged weights seem to be at {place} in an object of " in note
    assert f"{name}, which is never loaded as that can run code; to measure them, save its weights by" in note
    assert "weights_only" not in note
    (chosen,) = load_digits(tmp_path, content, "model").notes
    assert chosen.endswith("the plain weights in model were taken, as model.key says.")
    text = refused(lambda: load_digits(tmp_path, content, place))
    assert text.startswith(f"model.key={place} names an object of ")
    assert f"torch.save({place.rpartition('.')[2]}.state_dict(), path) where it is made, or" in text
    assert text.endswith("take what is readable: there are weights under model.")


def test_objects_of_one_kind_are_named_with_all_their_places(tmp_path: Path) -> None:
    text = refused(lambda: load_digits(tmp_path, {"model": DigitsCNN(), "ema": DigitsCNN(), "epoch": 3}))
    assert "an object of pq_sweep.inputs.digits_cnn.DigitsCNN at model, ema; save one by" in text


class Marked(nn.Module):
    """A network that is pickled with a call in it."""

    def __init__(self) -> None:
        super().__init__()
        self.fill = Calls(print, "never")


def test_pickled_network_with_a_call_in_it_is_named(tmp_path: Path) -> None:
    text = refused(lambda: load_digits(tmp_path, Marked()))
    assert re.search(r"\(it holds an object of \S*Marked and would call builtins.print, and code in a file", text)


def script(folder: Path) -> Path:
    torch.jit.trace(DigitsCNN().eval(), torch.zeros(1, 1, 8, 8)).save(str(folder / "net.pt"))
    return folder / "net.pt"


def archive(folder: Path) -> Path:
    torch.save(trained(), folder / "weights.pth")
    with tarfile.open(folder / "net.tar", "w") as tar:
        tar.add(folder / "weights.pth")
    return folder / "net.tar"


def arrays(folder: Path) -> Path:
    np.savez(folder / "net.npz", weight=np.ones(3))
    return folder / "net.npz"


def graph(name: str, producer: str = "") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []), producer_name=producer)
        (folder / name).write_bytes(model.SerializeToString())
        return folder / name

    return write


def cut(name: str, most: int | None, legacy: bool = False) -> Callable[[Path], Path]:
    """Write a file of weights of which not all arrived."""

    def write(folder: Path) -> Path:
        path = folder / name
        if name.endswith(".safetensors"):
            save_file(trained(), path)
        else:
            torch.save(trained(), path, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(path.read_bytes()[:most])
        return path

    return write


def written(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


def with_protocol(folder: Path) -> Path:
    torch.save(trained(), folder / "weights.pth", pickle_protocol=4)
    return folder / "weights.pth"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46830571\n"
MISTAKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "TorchScript": (script, "(a TorchScript archive or exported program, which is code and never run); save one by"),
    "ONNX": (graph("net.onnx"), "(an ONNX graph)"),
    "ONNX of torch under another name": (graph("net.pth", "pytorch"), "(an ONNX graph)"),
    "web page": (written("net.pth", b"\n <!DOCTYPE html>\n<html><body>404"), "(a web page, as a failed download"),
    "web page for safetensors": (written("net.safetensors", b"<html>"), "(a web page, as a failed download leaves it)"),
    "refusal of a storage": (written("net.pt", b'\xef\xbb\xbf<?xml version="1.0"?><Error>'), "(a web page"),
    "git-lfs": (written("net.pth", POINTER), "(a pointer of git-lfs to the file); fetch the file itself by git lfs"),
    "git-lfs for safetensors": (written("net.safetensors", POINTER), "(a pointer of git-lfs to the file)"),
    "index of shards": (written("pytorch_model.bin", b'{"weight_map": {}}'), "(JSON text, such as an index)"),
    "empty": (written("net.ckpt", b""), "(the file is empty); copy or download it again"),
    "text": (written("net.th", b"Not found"), "(it is damaged or of another kind)"),
    "text for safetensors": (written("net.safetensors", b"Not found"), "(a safetensors file that is damaged or none"),
    "zeros": (written("net.pt", bytes(2000)), "(it is damaged or of another kind)"),
    "Keras": (written("net.h5", b"\x89HDF\r\n\x1a\n"), "(an HDF5 file, as Keras writes it)"),
    "compressed": (written("net.pth.gz", gzip.compress(b"weights")), "(a compressed file); unpack it"),
    "tar": (archive, "(a tar archive); unpack it and give the file in it"),
    "arrays": (arrays, "(a zip archive that torch.save did not write)"),
    "pickled by Python": (written("net.pkl", pickle.dumps({"w": 1}, 2)), "Invalid magic number"),
    "protocol 4": (with_protocol, "(it is pickled by protocol 4, of which torch reads only 2 safely)"),
    "cut safetensors": (cut("net.safetensors", -500), "(a safetensors file that is cut short or damaged: "),
    "cut header": (cut("net.safetensors", 100), "(a safetensors file that is cut short or damaged: "),
    "cut zip": (cut("net.pth", -500), "(it is cut short or damaged); copy or download it again"),
    "half a zip": (cut("net.pth", 5000), "(it is cut short or damaged); copy or download it again"),
    "cut former format": (cut("net.pth", -500, legacy=True), "if it is damaged, copy or download it again"),
    "beginning of the former format": (cut("net.pth", 2000, legacy=True), "(it is damaged or of another kind)"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISTAKEN)
def test_what_is_no_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    write, what = MISTAKEN[name]
    path = write(tmp_path)
    text = refused(lambda: digits_cnn(weights=str(path)))
    assert text.startswith(f"model.weights={path} is no readable state_dict (")
    assert what in text
    assert not re.search(r"\x1b|weights_only|torch\.load|safe_globals", text), "torch's advice to load it all the same"


def test_folder_is_named(tmp_path: Path) -> None:
    text = refused(lambda: digits_cnn(weights=str(tmp_path)))
    assert text == f"model.weights={tmp_path} is a folder; give the path of the file with the weights in it."


@pytest.fixture
def unreadable(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "weights.pth"
    torch.save(trained(), path)
    path.chmod(0)
    yield path
    path.chmod(0o600)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_that_may_not_be_read_is_named(unreadable: Path) -> None:
    assert "is no readable state_dict (Permission denied)" in refused(lambda: digits_cnn(weights=str(unreadable)))


@pytest.mark.parametrize("name", ["last.ckpt", "pytorch_model.bin", "model_best.pth.tar", "net.th", "net.safetensors"])
def test_missing_file_of_a_usual_name_is_refused_before_anything_is_loaded(name: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        (problem,) = problems(compose("config", overrides=[f"model.weights={name}"]))
    assert problem == f"model.weights={name} is no file; give DEFAULT, null or the path of a state_dict."


@pytest.mark.slow
def test_rows_say_which_weights_were_taken(tmp_path: Path, launch: Launch) -> None:
    packaged = digits_cnn().module.state_dict()
    other = {key: value if "running" in key else -value for key, value in packaged.items()}
    torch.save({"state_dict": packaged, "state_dict_ema": other}, tmp_path / "w.ckpt")
    launch("-m", "model.weights=w.ckpt", "model.key=null,state_dict_ema", "runtime=torch", *SHORT)
    plain, averaged = results(only_sweep(tmp_path))
    assert [plain["notes"], averaged["notes"]] == [
        ["w.ckpt: the plain weights in state_dict were taken, and model.key=state_dict_ema takes the averaged ones."],
        ["w.ckpt: the averaged weights in state_dict_ema were taken, as model.key says."],
    ]
    assert plain["accuracy"]["top1"] > 0.9 > averaged["accuracy"]["top1"] == averaged["baseline"]["top1"]
