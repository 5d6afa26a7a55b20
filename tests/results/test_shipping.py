"""What is shipped runs alone, and answers as the job did."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import SHORT, launch_in
from conftest import new_user, only_sweep, python
from PIL import Image
from sklearn.datasets import load_digits

JOBS = {
    "int8": ["quantizer=int8", "quantizer.images=16", "runtime=onnxruntime"],
    "fp8": ["quantizer=fp8", "quantizer.images=16", "runtime=onnxruntime"],
    "removed": ["pruner=remove", "pruner.amount=0.25", "runtime=torch"],
    "bf16": ["quantizer=bf16", "runtime=torch"],
}
COUNT = 4  # images of each digit, of which every second is shown to run.py


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as image files, stretched to another shape, a folder for each class."""
    folder, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for label in range(10):
        (folder / str(label)).mkdir()
        for number in np.flatnonzero(digits.target == label)[: 2 * COUNT]:
            pixels = Image.fromarray((digits.images[number] * 15.9).astype(np.uint8))
            pixels.resize((23, 17), Image.Resampling.BICUBIC).save(folder / str(label) / f"{number}.png")
    return folder


def shipped(folder: Path, images: Path, job: str) -> Path:
    """Run a job on the images and return the folder that the recommendation exports."""
    data = ["dataset=image_folder", f"dataset.root={images}", f"dataset.calibration={10 * COUNT}"]
    done = launch_in(folder, *data, *JOBS[job], *SHORT, "device=cpu", "tracking=none")
    assert done.returncode == 0, done.stdout + done.stderr
    # A job that simulates its precision has no latency that it could be chosen by.
    chosen = ["--export", "shipped", *(["--minimize", "size"] if job == "fp8" else [])]
    done = python(["-m", "pq_sweep.recommend", "multirun", *chosen], folder, new_user())
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "shipped"


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_the_script_of_a_shipped_model_answers_as_the_job_did(tmp_path: Path, images: Path, job: str) -> None:
    target = shipped(tmp_path, images, job)
    alone = Path(shutil.move(target, tmp_path / "elsewhere"))
    sweep = only_sweep(tmp_path)
    with next(sweep.glob("baseline/*/images.csv")).open() as file:
        names = [row["image"] for row in csv.DictReader(file)]
    predictions = np.load(sweep / "0" / "predictions.npy")
    assert len(set(predictions[::7])) > 1
    for name, expected in list(zip(names, predictions, strict=True))[::7]:
        done = python([str(alone / "run.py"), str(images / name)], tmp_path, new_user())
        assert done.returncode == 0, done.stderr
        first, *others = done.stdout.splitlines()
        assert first.split()[1] == str(expected)
        assert len(others) == 4
        scores = [float(line.split()[0]) for line in [first, *others]]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_the_card_says_what_it_is_and_how_it_came_to_be(tmp_path: Path, images: Path) -> None:
    target = shipped(tmp_path, images, "removed")
    card, result = (target / "README.md").read_text(), json.loads((target / "result.json").read_text())
    names = {
        "README.md",
        "config.yaml",
        "labels.txt",
        "model.pt",
        "model.yaml",
        "pruning.json",
        "result.json",
        "run.py",
    }

    assert {path.name for path in target.iterdir()} == names
    assert (target / "labels.txt").read_text().split() == [str(digit) for digit in range(10)]
    assert f"| accuracy | {result['accuracy']['top1']:.2%} |" in card
    assert result["session"]["sha256"] in card
    assert "short side to 8 pixels (bilinear)" in card
    assert "python launch.py dataset=image_folder" in card
    assert "Apache" in card or "apache" in card
    assert not any(line != line.rstrip() for line in card.splitlines())
    for one, other in pairwise(card.splitlines()):  # Markdown wants an empty line around a table and before a heading
        assert not other.startswith("#") or not one
        assert not one.startswith("|") or not other or other.startswith("|")
    assert "weights: null" in (target / "model.yaml").read_text()
    lines = [
        line
        for line in (target / "run.py").read_text().splitlines()
        if line and not line.startswith(("import", "from"))
    ]
    assert len(lines) <= 24
    again = python(["-m", "pq_sweep.recommend", "multirun", "--export", "shipped"], tmp_path, new_user())
    assert again.returncode == 1
    assert again.stderr == "--export shipped is not empty; give a folder that is not there yet.\n"


@pytest.mark.parametrize(
    ("options", "shipped"),
    [
        ({"_target_": "pq_sweep.inputs.models.vgg7", "weights": "w.pt", "key": "ema"}, {"weights": None, "key": None}),
        ({"_target_": "pq_sweep.models.vgg7", "weights": "w.pt", "num_classes": 3}, {"weights": None}),
        ({"_target_": "own.network", "weights": "w.pt", "key": 3}, {"weights": None}),
        ({"_target_": "own.network", "key": 3}, {}),
    ],
)
def test_a_shipped_network_loads_no_file(options: dict[str, Any], shipped: dict[str, Any]) -> None:
    from pq_sweep.results.shipping import _unloaded

    assert _unloaded(options) == options | shipped


def test_a_model_without_labels_has_their_numbers(tmp_path: Path) -> None:
    from sweep_folders import real_result

    from pq_sweep.core.result import Result
    from pq_sweep.results.shipping import describe

    told: dict[str, Any] = {"name": "n", "command": "c", "batch": 1, "pruning": None}
    result = real_result()
    assert describe(Result.of(result), told)["labels"] == [str(digit) for digit in range(10)]
    result["network"] |= {"labels": None, "classes": 3}
    assert describe(Result.of(result), told)["labels"] == ["0", "1", "2"]
    result["network"]["labels"] = ["great white\nshark", "tench"]
    assert describe(Result.of(result), told)["labels"] == ["great white shark", "tench"]
