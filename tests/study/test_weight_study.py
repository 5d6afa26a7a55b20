"""The study of weights as a command: what it writes and says, on networks of the package, own ones and ImageNet's."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import browser
import pytest
import torch
from conftest import ROOT, SHARED, refused
from torch import nn
from torchvision.models import list_models

from pq_sweep.inputs.models import torchvision_network
from pq_sweep.study import Case
from pq_sweep.study.__main__ import cases, started
from pq_sweep.study.weights import bits_of, names_of, run
from pq_sweep.study.weights.advice import advice, summary
from pq_sweep.study.weights.networks import Network, Tensor, Width, look_at
from pq_sweep.types import Model

FIGURES = {
    "figure1_distributions", "figure1_error", "figure1_snr", "figure2_pruning", "figure2_quantization",
    "figure2_regions", "figure3_tensors", "figure3_kurtosis",
}  # fmt: skip
# Mean share of zeros of quantized tensors in %, at 8, 4 and 2 bits, and how many are better pruned at 2 bits.
ZOO = {
    "squeezenet1_1": ((2.5, 20.7, 48.0), (0, 26)),
    "mobilenet_v2": ((3.2, 21.3, 51.0), (7, 53)),
    "resnet18": ((6.5, 33.4, 59.2), (5, 21)),
}


class Everything(nn.Module):
    """A network with a layer of each kind that has weights, and one that shares the weight of another."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.same = nn.Conv2d(3, 4, 3)
        self.same.weight = self.conv.weight
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.video = nn.Conv3d(1, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.BatchNorm2d(4)
        self.table = nn.Embedding(5, 8)


def everything(*, scale: str = "1") -> Model:
    module = Everything()
    with torch.no_grad():
        module.up.weight *= float(scale)
    return Model(module, 2)


@pytest.fixture(autouse=True)
def own_search_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what a command does to the search path of its process from the tests that follow."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("pq_sweep.core.sources.fix_search_path", lambda: None)


def asked(*words: str) -> list[Case]:
    return cases("weights", list(words))


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run the study of the packaged network, of one with random weights and of one that cannot be loaded.

    Return the folder of its files, and what it showed.
    """
    base = tmp_path_factory.mktemp("study")
    (base / "model").mkdir()
    (base / "model" / "broken.yaml").write_text(f"# Broken\n_target_: {__name__}.everything\nscale: infinity\n")
    folder = base / "new" / "folder"
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PQ_SWEEP_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert not run(asked("--config-dir", str(base), "model=digits_cnn,broken,resnet20", f"output={folder}"))
    return folder, shown.getvalue()


@pytest.fixture(scope="module")
def written(study: tuple[Path, str]) -> Path:
    return study[0]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "weights.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_row_for_every_tensor_and_width(written: Path) -> None:
    found = rows(written)
    assert {row["network"] for row in found} == {"digits_cnn", "resnet20"}
    tensors = {(row["network"], row["tensor"]) for row in found}
    assert len(found) == 7 * len(tensors)
    first = found[0]
    assert (first["tensor"], first["layer"], first["shape"], first["weights"]) == (
        "stem.0.0.weight", "Conv2d", "16x1x3x3", "144",
    )  # fmt: skip
    assert all(float(row["quantization_db"]) > float(row["pruning_db"]) for row in found if int(row["bits"]) > 3)


def test_every_column_is_documented(written: Path) -> None:
    page = (ROOT / "docs" / "studies.md").read_text().partition("\n## Layers")[0]
    described = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert [name for name in described if name in rows(written)[0]] == list(rows(written)[0])


def test_figures_are_drawn_and_on_the_page(written: Path) -> None:
    page = (written / "weights.html").read_text()
    assert {path.stem for path in written.glob("*.svg")} == FIGURES
    assert set(re.findall(r'data-figure="(\w+)"', page)) == FIGURES
    (specs,) = re.findall(r'<script type="application/json" id="specs">(.*?)</script>', page, re.DOTALL)
    assert len(json.loads(specs)[0]) == len(FIGURES)
    assert "stem.0.0.weight" in page
    assert all("<svg" in path.read_text() for path in written.glob("*.svg"))


@pytest.mark.slow
@pytest.mark.chromium
def test_the_page_draws_every_figure_and_asks_for_nothing(written: Path) -> None:
    with browser.started() as chromium:
        seen = chromium.open((written / "weights.html").as_uri(), viewport={"width": 1200, "height": 6000})
        seen.page.wait_for_function(
            "[...document.querySelectorAll('.chart')].every(one => one.dataset.drawn === 'yes')"
        )
        assert seen.page.locator(".chart svg.marks").count() == len(FIGURES)
        assert seen.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert (seen.complaints, seen.requests) == ([], [])


def test_random_weights_are_called_random(written: Path) -> None:
    sentences = (written / "advice.txt").read_text()
    assert sentences.count("random") == 1
    assert sentences.index("resnet20:") < sentences.index("random")


# --- sentences -------------------------------------------------------------------------------------------------------


def tensor(better: str, bits: tuple[int, ...] = (2, 3, 4, 5)) -> Tensor:
    """Return a tensor that is better quantized (q), pruned (p) or either (e) at each bit width."""
    ratios = {"q": (9.0, 5.0), "p": (5.0, 9.0), "e": (7.0, 7.0)}
    widths = tuple(
        Width(each, 0.1, ratios[how][0], 0.2, ratios[how][1]) for each, how in zip(bits, better, strict=True)
    )
    return Tensor("w", "Linear", (4,), 4, 0.0, 3.0, widths)


@pytest.mark.parametrize(
    ("better", "sentence"),
    [
        ("qqqq", "quantize at 2 to 5 bits."),
        ("pqqq", "quantize from 3 bits on; prune at 2 bits, which keeps 12.5 % of the weights."),
        ("ppqq", "quantize from 4 bits on; prune at 2 and 3 bits, which keeps 12.5 and 18.75 % of the weights."),
        ("pppq", "quantize at 5 bits; prune at 2 to 4 bits, which keeps 12.5 to 25 % of the weights."),
        ("pqpq", "quantize at 3 and 5 bits; prune at 2 and 4 bits, which keeps 12.5 and 25 % of the weights."),
        ("pppp", "prune at 2 to 5 bits, which keeps 12.5 to 31.25 % of the weights."),
        ("peqq", "quantize from 4 bits on; prune at 2 bits, which keeps 12.5 % of the weights;"
                 " take either at 3 bits, as both lose the same."),
    ],
)  # fmt: skip
def test_what_to_do_with_a_tensor(better: str, sentence: str) -> None:
    assert advice(tensor(better)) == sentence


@pytest.mark.parametrize(
    ("better", "sentence"),
    [
        (["qqqq"], "net: quantize at 2 to 5 bits, where its only tensor keeps at least as much as after pruning to the"
                   " same size."),
        (["qqqq", "ppqq"], "net: quantize from 4 bits on, where each of its 2 tensors keeps at least as much as after"
                           " pruning to the same size; at 2 bits 1 of 2 tensors (50 % of the weights) is better pruned;"
                           " at 3 bits 1 (50 % of the weights)."),
        (["qqqp"], "net: no width suits all tensors; at 5 bits 1 of 1 tensors (100 % of the weights) is better"
                   " pruned."),
    ],
)  # fmt: skip
def test_what_to_do_with_a_network(better: list[str], sentence: str) -> None:
    assert summary(Network("net", tuple(map(tensor, better)), (), 0.0)) == sentence


# --- which networks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_natural_sparsity_of_networks_of_imagenet(name: str) -> None:
    path = SHARED / "weights" / f"{name}.pth"
    if not path.exists():
        pytest.skip(f"needs {path}")
    model = torchvision_network(name=name, weights=str(path), num_classes=None)
    network = look_at(name, model.module, [2, 4, 8])
    zeros, (pruned, tensors) = ZOO[name]
    assert [100 * network.natural_sparsity(bits) for bits in (8, 4, 2)] == pytest.approx(zeros, abs=0.1)
    assert (len(network.pruned(2)), len(network.tensors)) == (pruned, tensors)
    assert not network.pruned(8)


def test_the_networks_of_the_paper_are_known_to_torchvision() -> None:
    command = (ROOT / "docs" / "studies.md").read_text().replace("\\\n", "")
    (names,) = re.findall(r"model=torchvision model\.name=(\S+)", command)
    assert len(names.split(",")) == 45
    assert set(names.split(",")) <= set(list_models())


def test_every_layer_that_pruners_prune_is_looked_at_once() -> None:
    found = {tensor.name: tensor.layer for tensor in look_at("net", Everything(), [4]).tensors}
    assert found == {
        "conv.weight": "Conv2d",
        "up.weight": "ConvTranspose2d",
        "video.weight": "Conv3d",
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear",
    }
    assert refused(lambda: look_at("net", nn.BatchNorm2d(3), [4])).startswith("net has no weights of convolutions")


def test_one_of_several_that_cannot_be_looked_at_is_left_out_and_named(study: tuple[Path, str]) -> None:
    folder, shown = study
    sentence = f"broken is left out: the network of {__name__}.everything has values that are not finite, in up.weight"
    assert sentence in " ".join(shown.split())
    assert sentence in " ".join((folder / "weights.html").read_text().split())
    assert "digits_cnn: quantize" in shown
    assert str(folder / "weights.html") in shown.replace("\n", "")


def test_one_that_cannot_be_looked_at_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(f"# Mine\n_target_: {__name__}.everything\nscale: one\n")
    words = ["--config-dir", str(tmp_path), "model=mine", "model.scale=infinity"]
    assert started("weights", [*words, f"output={tmp_path / 'out'}"]) == 1
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"the network of {__name__}.everything has values that are not finite, in up.weight")


def case(model: dict[str, Any], words: str, **more: Any) -> Case:
    from omegaconf import OmegaConf

    return Case(
        OmegaConf.create({"model": model, **more}), {"model": "chosen"}, tuple(words.split()), OmegaConf.create()
    )


def test_networks_are_told_apart() -> None:
    alike = [case({"name": "a"}, f"model=a model.weights={path} bits=[2]") for path in ("/x", "/y")]
    assert names_of(alike) == ["a model.weights=/x", "a model.weights=/y"]
    assert names_of([case({"_target_": "my.net"}, "model._target_=my.net"), case({}, "")]) == ["net", "chosen"]
    assert refused(lambda: names_of([case({"name": "a"}, "model=a")] * 2)) == "a is given twice; leave one out."


@pytest.mark.parametrize("bits", ["[0]", "[1]", "9", "[2,9]", "[]", "null", "[4.5]", "x", "[true]"])
def test_bits_out_of_range_are_refused(bits: str) -> None:
    sentence = refused(lambda: bits_of(asked(f"bits={bits}")))
    assert sentence.endswith("is not valid; give whole numbers from 2 to 8, such as bits=[2,4,8].")


def test_bits_are_a_list_or_one_number() -> None:
    assert bits_of(asked("bits=[4,2,4]")) == [2, 4]
    assert bits_of(asked("bits=3")) == [3]
    assert refused(lambda: bits_of(asked("bits=2,4"))) == (
        "bits=2,4 is a sweep, and a study takes bits once; give bits=[2,4]."
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model=resnet1"], "model=resnet1 is not known; valid are: "),
        (
            ["model=resnet18", "model=vgg7"],
            "gives model twice; give it once, several values by commas: model=resnet18,vgg7.",
        ),
        (
            ["hydra/launcher=slurm"],
            "hydra/launcher=slurm starts jobs, and this study takes seconds here; leave it out.",
        ),
        (["model=torchvision"], "model.name has no value; give model.name=..."),
        (["model=torchvision", "model.name=resnet1"], "model.name=resnet1 is not known; valid are: alexnet, "),
        (["model.weights=/nowhere.pth"], "model.weights=/nowhere.pth is no file; give DEFAULT, null or the path"),
        (["pruner=l1"], "pruner is no option of the study weights, whose groups of options are: model."),
        (["output=/proc/nothing/here"], "the output folder /proc/nothing/here cannot be written ("),
        (["output="], "output= names no folder; give one."),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_mistakes_are_told_in_one_sentence(
    words: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = [] if any(word.startswith("output") for word in words) else [f"output={tmp_path / 'out'}"]
    assert started("weights", [*words, *own]) == 1
    out, err = capsys.readouterr()
    assert part in err
    assert len(err.splitlines()) == 1
    assert not out


def test_without_options_the_packaged_network_is_looked_at_in_a_folder_of_the_moment() -> None:
    (case,) = asked()
    assert (case.choices["model"], bits_of([case])) == ("digits_cnn", [2, 3, 4, 5, 6, 7, 8])
    assert re.fullmatch(r"multirun/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", case.cfg.output)
