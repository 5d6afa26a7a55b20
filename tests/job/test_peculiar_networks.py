"""What users bring: each network with one peculiarity is compressed and measured right, or refused in one sentence."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT, refused
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from peculiar_networks import NETWORKS, make
from sklearn.datasets import load_digits
from torch import Tensor

from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.digits_cnn import DigitsCNN
from pq_sweep.job.run import run
from pq_sweep.types import Model

BRIEF = ("tracking=none", "measure.batch_sizes=[1]", "measure.threads=1", "measure.iterations=2", "measure.warmup_s=0",
         "measure.min_s=0", "measure.max_s=0")  # fmt: skip
WAYS = {
    "torch": ("runtime=torch", "quantizer=none"),
    "onnx": ("runtime=onnxruntime", "quantizer=none"),
    "int8": ("runtime=onnxruntime", "quantizer=int8"),
}
# What cannot be done, and what the sentence says.
REFUSED = {
    ("tied", "remove"): "second",
    ("used_twice", "remove"): "second share parameters or run more than once",
    ("grouped", "remove"): "pruner=remove cannot follow the channels through third (Conv2d)",
    ("recurrent", "remove"): "pruner=remove cannot",
    ("bare_parameters", "remove"): "pruner=remove cannot",
}


def config(kind: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*BRIEF, *overrides])
    cfg.model = {"_target_": "peculiar_networks.make", "kind": kind}
    return cfg


@cache
def images() -> tuple[Tensor, Tensor]:
    """Return the evaluation images and labels, as the data set orders them."""
    split = digits(Model(DigitsCNN(), 10, make(kind="frozen").preprocess)).evaluation
    found, labels = next(split.batches(len(split)))
    pixels = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    assert all((pixels == image[0]).all((1, 2)).any() for image in found[::50])
    return found, labels


def plain_answers(kind: str, amount: float = 0.0) -> np.ndarray:
    """Evaluate a network image by image, with the weights below the global threshold set to zero."""
    network = make(kind=kind).module.float().eval()
    for part in network.modules():
        if hasattr(part, "parametrizations"):
            torch.nn.utils.parametrize.remove_parametrizations(part, "weight")
    layers = [part for part in network.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear)]
    weights = list({id(layer.weight): layer.weight for layer in layers}.values())
    with torch.no_grad():
        order = torch.cat([weight.abs().flatten() for weight in weights]).sort().values
        limit = order[round(amount * len(order)) - 1] if amount else -1.0
        for weight in weights:
            weight[weight.abs() <= limit] = 0
        outputs = [network(image[None]) for image in images()[0]]
    return torch.cat([output["logits"] if isinstance(output, dict) else output for output in outputs]).argmax(1).numpy()


def onnx_answers(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    (name,) = (item.name for item in session.get_inputs())
    return np.concatenate([session.run(None, {name: image[None].numpy()})[0] for image in images()[0]]).argmax(1)


@pytest.mark.slow
@pytest.mark.parametrize("pruner", ["none", "l1_global", "remove"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_it_is_measured_right_or_refused_in_one_sentence(
    kind: str, pruner: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers = {}
    for way, overrides in WAYS.items():
        folder = tmp_path / "sweep" / way
        folder.mkdir(parents=True)
        cfg = config(kind, f"pruner={pruner}", *(["pruner.amount=0.4"] if pruner != "none" else []), *overrides)
        if sentence := REFUSED.get((kind, pruner)):
            assert sentence in refused(lambda cfg=cfg, folder=folder: run(cfg, folder))
            assert sentence in json.loads((folder / "error.json").read_text())["message"]
            continue
        result = run(cfg, folder).plain()
        answers[way] = np.load(folder / "predictions.npy")
        right = float((answers[way] == images()[1].numpy()).mean())
        assert result["accuracy"]["top1"] == pytest.approx(right, abs=1e-12)
        if way != "torch":
            assert (onnx_answers(folder / "model.onnx") == answers[way]).mean() >= 0.998
    if answers:
        assert (answers["torch"] == answers["onnx"]).mean() >= 0.998
        assert (answers["torch"] == answers["int8"]).mean() >= 0.8
    if answers and pruner != "remove":
        expected = plain_answers(kind, 0.4 if pruner == "l1_global" else 0.0)
        assert (answers["torch"] == expected).mean() >= 0.998
    assert "Traceback" not in "".join(capfd.readouterr())
