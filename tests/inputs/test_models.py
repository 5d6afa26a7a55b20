"""Models: what is read from a file is exactly what runs, and a file that does not fit is refused with a sentence."""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from checkpoint_files import State, assert_same, prefixed, trained
from conftest import ROOT, refused
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import nn

from pq_sweep.inputs.digits_cnn import DigitsCNN
from pq_sweep.inputs.models import (
    cifar_resnet,
    digits_cnn,
    fetch_weights,
    simplenet,
    torchvision_model,
    torchvision_network,
    vgg7,
)
from pq_sweep.inputs.own_model import accepted_model
from pq_sweep.types import Model, UserError


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("plain.pt", torch.save),
        ("plain.pth", torch.save),
        ("checkpoint.pt", lambda state, path: torch.save({"state_dict": state, "epoch": 3, "loss": 0.1}, path)),
        ("parallel.pt", lambda state, path: torch.save(prefixed(state), path)),
        ("parallel_checkpoint.pt", lambda state, path: torch.save({"state_dict": prefixed(state)}, path)),
        ("plain.safetensors", save_file),
        ("parallel.safetensors", lambda state, path: save_file(prefixed(state), path)),
    ],
)
def test_every_kind_of_file_is_loaded(tmp_path: Path, name: str, save: Callable[[State, Path], None]) -> None:
    save(trained(), tmp_path / name)
    assert_same(digits_cnn(weights=str(tmp_path / name)).module.state_dict(), trained())


class CreatesFile:
    """Unpickling this object creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_not_executed(tmp_path: Path, name: str, legacy: bool) -> None:
    path, created = tmp_path / name, tmp_path / "created"
    content = trained() | {"fc2.bias": CreatesFile(created)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    assert str(path) in refused(lambda: digits_cnn(weights=str(path)))
    assert not created.exists()
    torch.load(shutil.copy(path, tmp_path / "copy.pt"), weights_only=False)
    assert created.exists(), "the file of this test is harmless, so the test proves nothing"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"no weights at all", pickle.dumps([1, 2], 2)], ids=["empty", "text", "pickle"]
)
def test_corrupt_file_is_named(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    assert str(path) in refused(lambda: digits_cnn(weights=str(path)))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(trained(), path)
    path.write_bytes(path.read_bytes()[:-5000])
    assert str(path) in refused(lambda: digits_cnn(weights=str(path)))


@pytest.mark.parametrize(
    "content", [DigitsCNN(), [torch.zeros(1)], {"epoch": 3}, {"state_dict": {"epoch": 3}}, torch.zeros(3)], ids=type
)
def test_file_without_a_state_dict_says_how_to_save_one(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    text = refused(lambda: digits_cnn(weights=str(path)))
    assert str(path) in text
    assert "torch.save(model.state_dict(), path)" in text


@pytest.mark.parametrize(
    ("state", "first"),
    [
        (DigitsCNN(num_classes=7).state_dict(), "fc2.bias"),
        (nn.Linear(3, 4).state_dict(), "bias"),
        ({}, "body.0.weight"),
        ({key: value for key, value in trained().items() if key != "fc1.bias"}, "fc1.bias"),
        (trained() | {"head.bias": torch.zeros(10)}, "head.bias"),
    ],
    ids=["other class count", "other architecture", "empty", "one entry missing", "one entry too many"],
)
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, state: State, first: str) -> None:
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    text = refused(lambda: digits_cnn(weights=str(path)))
    assert str(path) in text
    assert f"first {first} with" in text
    assert "model.num_classes" in text


@pytest.mark.parametrize("name", ["absent.pt", "absent.safetensors", "IMAGENET1K_V9"])
def test_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / name)
    assert path in refused(lambda: digits_cnn(weights=path))
    assert path in refused(lambda: torchvision_model(name="squeezenet1_1", weights=path))


def test_unknown_name_of_weights_is_refused() -> None:
    assert "IMAGENET1K_V9" in refused(lambda: torchvision_model(name="squeezenet1_1", weights="IMAGENET1K_V9"))


def test_unknown_name_of_a_model_is_refused() -> None:
    assert "resnet19" in refused(lambda: torchvision_model(name="resnet19", weights=None))


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_published_weights_with_other_classes_are_refused(weights: str) -> None:
    text = refused(lambda: torchvision_model(name="resnet18", weights=weights, num_classes=10))
    assert "model.num_classes=10" in text
    assert f"model.weights={weights}" in text


@pytest.mark.parametrize("weights", ["DEFAULT", None])
def test_key_without_a_file_is_refused(weights: str | None) -> None:
    text = refused(lambda: torchvision_model(name="resnet18", weights=weights, key="state_dict_ema"))
    assert text.startswith("model.key=state_dict_ema chooses among the weights in a file")


def test_packaged_weights_have_no_key() -> None:
    assert "its weights lie under none, so leave it out" in refused(lambda: digits_cnn(key="ema"))


def test_torchvision_weights_from_a_file(tmp_path: Path) -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(7)
    state = squeezenet1_1(num_classes=3).state_dict()
    torch.save(state, tmp_path / "weights.pt")
    before = torch.get_rng_state()
    model = torchvision_model(name="squeezenet1_1", weights=str(tmp_path / "weights.pt"), num_classes=3)
    assert_same(model.module.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn only to be replaced
    assert model.classes is None
    assert not model.module.training


def test_random_weights_are_torchvisions() -> None:
    from torchvision.models import squeezenet1_1

    torch.manual_seed(7)
    state = squeezenet1_1(num_classes=3).state_dict()
    torch.manual_seed(7)
    model = torchvision_model(name="squeezenet1_1", weights=None, num_classes=3)
    assert_same(model.module.state_dict(), state)


def test_imagenet_classes_are_named() -> None:
    model = torchvision_model(name="squeezenet1_1", weights=None)
    assert model.classes is not None
    assert [len(model.classes), model.classes[0], model.classes[217]] == [1000, "tench", "English springer"]


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "squeezenet1_1"])
def test_preprocessing_is_what_the_weights_say(name: str) -> None:
    from torchvision.models import get_model_weights

    published = get_model_weights(name).IMAGENET1K_V1.transforms()
    found = torchvision_model(name=name, weights=None).preprocess
    assert ([found.size], [found.resize]) == (published.crop_size, published.resize_size)
    assert (list(found.mean), list(found.std)) == (published.mean, published.std)
    assert found.interpolation == published.interpolation.value


def test_sample_is_seeded_and_fits() -> None:
    model = digits_cnn()
    first = model.sample()
    torch.manual_seed(9)
    assert torch.equal(first, model.sample())
    assert model.module(model.sample(3)).shape == (3, 10)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have no network, and an empty folder where torch keeps downloaded weights; return that folder."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    monkeypatch.setattr(requests.Session, "get", unreachable)
    return tmp_path / "hub" / "checkpoints"


def publish(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Let two networks of torchvision have `path` as their published weights, named by their hash."""
    from torchvision.models import SqueezeNet1_1_Weights
    from torchvision.models.segmentation import LRASPP_MobileNet_V3_Large_Weights

    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    url = f"https://example.invalid/models/squeezenet1_1-{digest[:8]}.pth"
    for published in (SqueezeNet1_1_Weights.DEFAULT, LRASPP_MobileNet_V3_Large_Weights.DEFAULT):
        monkeypatch.setattr(published.value, "url", url)


def place_named_in(text: str) -> Path:
    found = re.search(r"put (\S+) at (\S+),", text)
    assert found is not None
    assert Path(found[2]).name == found[1]
    return Path(found[2])


downloaded = pytest.mark.parametrize(
    "make",
    [
        partial(torchvision_model, name="squeezenet1_1"),
        partial(torchvision_network, name="lraspp_mobilenet_v3_large", weights="DEFAULT", num_classes=None),
        partial(simplenet, size="5m", mode="m1", scale=0.5, weights="https://example.invalid/files/simplenet.pth"),
    ],
    ids=["torchvision DEFAULT", "segmentation DEFAULT", "address"],
)


@downloaded
def test_offline_says_which_file_to_put_where(
    offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[..., Model]
) -> None:
    """Following the sentence works."""
    torch.manual_seed(7)
    state = make(weights=None).module.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    publish(monkeypatch, tmp_path / "weights.pth")
    text = refused(make)
    assert "cannot be downloaded (no network); put " in text
    assert text.endswith(", or give model.weights=/path or model.weights=null.")
    place = place_named_in(text)
    assert place.parent == offline
    shutil.copy(tmp_path / "weights.pth", place)
    assert_same(make().module.state_dict(), state)


def test_other_weights_under_a_published_name_are_refused(offline: Path) -> None:
    """The file is whole and fits the network, but it is not what the name says."""
    make = partial(torchvision_model, name="squeezenet1_1")
    place = place_named_in(refused(make))
    torch.save(make(weights=None).module.state_dict(), place)
    assert f"{place} has the sha256 " in refused(make)


def test_token_of_an_address_is_not_told(offline: Path) -> None:
    text = refused(lambda: fetch_weights("https://me:pa55w@example.invalid/files/net.pth?key=t0ken"))
    assert place_named_in(text) == offline / "net.pth"
    assert not re.search("pa55w|t0ken", text)


@downloaded
def test_damaged_download_is_named(offline: Path, make: Callable[..., Model]) -> None:
    place = place_named_in(refused(make))
    place.write_bytes(b"half a file")
    assert str(place) in refused(make)


MODELS = sorted(path for path in (ROOT / "conf" / "model").glob("*.yaml") if "name: ???" not in path.read_text())


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_knows_what_it_takes_and_on_which_terms(path: Path) -> None:
    with torch.device("meta"):  # shapes without the work of drawing weights
        model: Model = instantiate(OmegaConf.merge(OmegaConf.load(path), {"weights": None}))

    expected = {"inception_v3": 299, "digits_cnn": 8, "vgg7": 32, "resnet20": 32, "resnet56": 32}.get(path.stem, 224)
    assert model.preprocess.size == expected <= model.preprocess.resize
    assert model.licence
    assert model.licence.startswith("https://")
    if model.num_classes == 1000:
        assert model.classes is not None
        assert (len(model.classes), model.classes[0]) == (1000, "tench")


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_every_model_takes_a_key(path: Path) -> None:
    options = OmegaConf.merge(OmegaConf.load(path), {"weights": None, "key": "ema"})
    with torch.device("meta"), pytest.raises(InstantiationException) as caught:
        instantiate(options)
    assert str(caught.value.__cause__).startswith("model.key=ema chooses among the weights in a file")


def test_a_network_without_published_weights_takes_any_ten_classes() -> None:
    assert vgg7(weights=None).classes is cifar_resnet(n=3, weights=None).classes is None


# --- any network of torchvision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "task", "classes"),
    [
        ("convnext_tiny", "classification", 1000),
        ("googlenet", "classification", 1000),
        ("ssdlite320_mobilenet_v3_large", "detection", 91),
        ("lraspp_mobilenet_v3_large", "segmentation", 21),
        ("r3d_18", "video", 400),
        ("raft_small", "optical flow", 1),
    ],
)
def test_any_network_of_torchvision(name: str, task: str, classes: int) -> None:
    with torch.device("meta"):
        model = torchvision_network(name=name, weights=None, num_classes=None)
        assert (model.task, model.num_classes) == (task, classes)
        assert not any("aux" in key for key in model.module.state_dict())


def test_a_network_that_is_no_classifier_takes_a_file_and_other_classes(tmp_path: Path) -> None:
    made = torchvision_network(name="lraspp_mobilenet_v3_large", weights=None, num_classes=3)
    torch.save(made.module.state_dict(), path := tmp_path / "net.pth")
    model = torchvision_network(name="lraspp_mobilenet_v3_large", weights=str(path), num_classes=3)
    assert all(torch.equal(value, made.module.state_dict()[key]) for key, value in model.module.state_dict().items())
    with pytest.raises(UserError, match=r"does not fit the model: .*model.num_classes"):
        torchvision_network(name="lraspp_mobilenet_v3_large", weights=str(path), num_classes=None)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"name": "quantized_resnet18"}, "model.name=quantized_resnet18 is not known; valid are: alexnet, "),
        ({"name": "r3d_18", "num_classes": 3}, "model.num_classes=3 does not fit model.weights=DEFAULT; leave it out."),
        ({"name": "raft_small", "num_classes": 3, "weights": None}, "model.num_classes=3 does not fit"),
        ({"name": "r3d_18", "key": "ema"}, "model.key=ema chooses among the weights in a file"),
    ],
)
def test_what_no_network_of_torchvision_has_is_refused(options: dict[str, Any], part: str) -> None:
    assert refused(lambda: torchvision_network(**{"weights": "DEFAULT", "num_classes": None} | options)).startswith(
        part
    )


def test_jobs_refuse_what_is_no_classifier() -> None:
    model = torchvision_network(name="lraspp_mobilenet_v3_large", weights=None, num_classes=None)
    assert refused(lambda: accepted_model(model, "models.make")) == (
        "the network of models.make (LRASPP) is for segmentation, and jobs take classifiers; python -m pq_sweep.study"
        " weights looks at its weights."
    )
