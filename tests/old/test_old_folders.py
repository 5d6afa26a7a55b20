"""A sweep, an export and a cache that the flat package wrote: all that a user does with them works on.

They lie in `data/` as they were written, but for the names of the machine and of its folders.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Done
from conftest import ROOT, new_user, python
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_digits
from stored_runs import parent_and_jobs

from pq_sweep.core.cache import Cache
from pq_sweep.core.result import Result
from pq_sweep.job.check import problems
from pq_sweep.job.run import run
from pq_sweep.tracking import Mlflow
from pq_sweep.tracking.tracker import tracker_of

DATA = Path(__file__).parent / "data"
SWEEP = Path("multirun") / "small"
SHIPPED = DATA / "shipped"
ID = "577626589e7b4b7eade475a7c8d8a2cd"
# What a job has whatever the machine is like and however fast it is.
LASTING = ("job", "name", "status", "model", "pruner", "quantizer", "amount", "sparsity", "params", "macs",
           "original_size_mb", "evaluation_images", "size_mb/state_dict", "size_mb/csr", "size_mb/bitmask")  # fmt: skip

Row = dict[str, str]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The working folder of the time, whose checkout is this one today."""
    shutil.copytree(DATA / "multirun", tmp_path / "multirun")
    manifest = tmp_path / SWEEP / "sweep.json"
    text = manifest.read_text().replace("/home/user/sweeps", str(tmp_path)).replace("/home/user/pq_sweep", str(ROOT))
    manifest.write_text(text)
    return tmp_path


def table(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ran(folder: Path, *arguments: str, timeout: float = 300, **variables: str) -> Done:
    """Run a module of the package as a command that has to go well."""
    done = python(["-m", *arguments], folder, new_user() | variables, timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_the_data_is_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 100_000


def test_the_table_is_rebuilt_column_for_column_and_value_for_value(work: Path) -> None:
    (work / SWEEP / "results.csv").unlink()
    done = ran(work, "pq_sweep.results", str(SWEEP), COLUMNS="250")

    assert "multirun/small: 4 done" in done.stdout
    rebuilt, kept = (table(folder / SWEEP / "results.csv") for folder in (work, DATA))
    assert [list(row) for row in rebuilt] == [list(row) for row in kept]
    assert rebuilt == kept
    assert len(kept) == 4


@pytest.mark.parametrize("folder", [*(SWEEP / job for job in "0123"), Path("shipped")], ids=str)
def test_a_result_is_read_without_loss(folder: Path) -> None:
    plain = json.loads((DATA / folder / "result.json").read_text())
    assert json.loads(json.dumps(Result.of(plain).plain())) == plain


@pytest.mark.slow
def test_the_recommendation_has_the_figures_of_the_table(work: Path) -> None:
    rows = {row["job"]: row for row in table(DATA / SWEEP / "results.csv")}
    done = ran(work, "pq_sweep.recommend", str(SWEEP), "--max-accuracy-drop", "1", "--json")
    answer = json.loads(done.stdout)

    assert (answer["winner"]["job"], answer["runner_up"]["job"]) == ("3", "2")
    assert answer["others"].keys() == {"0", "1", "2"}
    for place in ("winner", "runner_up"):
        told, row = answer[place], rows[answer[place]["job"]]
        columns = {
            "accuracy": "accuracy",
            "accuracy_drop": "accuracy_drop_points",
            "error": "error_percent",
            "latency": "latency_ms/b1",
            "size": "engine_size_mb",
            "memory": "peak_memory_mb",
            "prep_time": "prep_time_s",
        }
        assert {key: told[key] for key in columns} == {key: float(row[name]) for key, name in columns.items()}
        assert told["name"] == row["name"]
        assert told["speedup"] == pytest.approx(float(rows["0"]["latency_ms/b1"]) / float(row["latency_ms/b1"]))
        assert told["command"].startswith("python launch.py pruner=l1_global quantizer=")
    shown = ran(work, "pq_sweep.recommend", str(SWEEP), "--max-accuracy-drop", "1", COLUMNS="200").stdout
    assert "job 3, digits_cnn l1_global 0.5 int8" in shown


@pytest.mark.slow
def test_the_report_has_the_figures_of_the_table(work: Path) -> None:
    ran(work, "pq_sweep.report", str(SWEEP), "--tables", "tables")

    page = (work / SWEEP / "report.html").read_text()
    columns = {"top-1 %": "Accuracy", "drop points": "accuracy_drop_points", "ms b1": "latency_ms/b1",
               "size MB": "engine_size_mb", "zstd MB": "engine_size_zstd_mb", "prep s": "prep_time_s",
               "memory MB": "peak_memory_mb", "MACs": "macs", "params": "params", "sparsity": "sparsity"}  # fmt: skip
    reported, kept = table(work / "tables" / "comparison.csv"), table(DATA / SWEEP / "results.csv")
    for shown, row in zip(reported, kept, strict=True):
        assert {key: float(shown[key]) for key in columns} == pytest.approx(
            {key: float(row[name]) for key, name in columns.items()}, rel=1e-3
        )
        assert [shown[key] for key in ("job", "pruner", "quantizer", "runtime", "status")] == [
            row[key] for key in ("job", "pruner", "quantizer", "runtime", "status")
        ]
    layers = json.loads((DATA / SWEEP / "2" / "layers.json").read_text())
    assert all(f'"{name.removesuffix(".weight")}"' in page for name in layers["after"])


def test_the_tracking_of_the_time_is_made_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = tracker_of(work / SWEEP)
    assert isinstance(tracker, Mlflow)
    assert (tracker.store, tracker.experiment) == (f"sqlite:///{work}/mlflow.db", "pq_sweep")


def log_as_then(uri: str, sweep: Path, jobs: list[str]) -> dict[str, str]:
    """Log the sweep and some of its jobs with the tags that they had; return the runs of these jobs."""
    client = MlflowClient(uri)
    experiment = client.create_experiment("pq_sweep", str(sweep.parents[1] / "mlartifacts"))
    about = {"pq_sweep.kind": "sweep", "pq_sweep.sweep": ID, "pq_sweep.folder": "/home/user/sweeps/multirun/small"}
    parent = client.create_run(experiment, tags=about, run_name="multirun/small").info.run_id
    client.set_terminated(parent, "FINISHED")
    runs = {}
    for job in jobs:
        started = json.loads((sweep / job / "result.json").read_text())["started"]
        tags = {
            "mlflow.parentRunId": parent,
            "pq_sweep.sweep": ID,
            "pq_sweep.job": job,
            "pq_sweep.started": f"{started:.6f}",
            "pq_sweep.status": "finished",
        }
        runs[job] = client.create_run(experiment, int(started * 1000), tags).info.run_id
        client.set_terminated(runs[job], "FINISHED")
    return runs


@pytest.mark.slow
def test_a_sync_logs_what_is_missing_and_doubles_nothing(work: Path) -> None:
    uri, kept = f"sqlite:///{work}/mlflow.db", {row["job"]: row for row in table(DATA / SWEEP / "results.csv")}
    then = log_as_then(uri, work / SWEEP, ["0", "1"])
    for experiment, number in (("pq_sweep", 2), ("fresh", 4), ("fresh", 0)):
        told = ran(work, "pq_sweep.tracking", "sync", str(SWEEP), "--uri", uri, "--experiment", experiment).stdout
        assert told == f"{SWEEP}: {number} of 4 jobs logged now\n"

    parent, jobs = parent_and_jobs(uri)
    assert {job: jobs[job].info.run_id for job in then} == then
    assert jobs.keys() == kept.keys()
    assert parent.data.tags["pq_sweep.finished"] == "4"
    parent, jobs = parent_and_jobs(uri, "fresh")
    assert parent.data.tags["pq_sweep.sweep"] == ID
    for job, row in kept.items():
        assert logged(jobs[job]) == {name: float(row[name]) for name in logged(jobs[job])}
        assert jobs[job].data.metrics["accuracy"] == float(row["accuracy"])


def logged(job: Run) -> dict[str, float]:
    return {name: value for name, value in job.data.metrics.items() if math.isfinite(value)}


@pytest.mark.slow
def test_the_config_of_the_time_runs(work: Path) -> None:
    config: Any = OmegaConf.load(work / SWEEP / "3" / ".hydra" / "config.yaml")
    assert config.pruner._target_ == "pq_sweep.pruners.l1_global"
    assert problems(config) == []
    run(config, work)

    then, now = (json.loads((folder / "result.json").read_text()) for folder in (work / SWEEP / "3", work))
    assert now["config"] == then["config"]
    for key in ("network", "images"):
        assert now[key] == then[key]
    assert now["size_bytes"]["formats"]["csr"] == then["size_bytes"]["formats"]["csr"]
    assert now["session"]["quantizer"] == then["session"]["quantizer"] | {"rounding": "nearest"}
    assert now["accuracy"]["top1"] == pytest.approx(then["accuracy"]["top1"], abs=0.01)


@pytest.mark.slow
def test_the_sweep_is_started_again_in_its_folder(work: Path) -> None:
    """The code is another, so its jobs are not taken for those that it would run: all run anew."""
    before = json.loads((work / SWEEP / "sweep.json").read_text())
    ran(work, "pq_sweep.results", str(SWEEP), "--resubmit-failed", timeout=600)

    after = json.loads((work / SWEEP / "sweep.json").read_text())
    assert before["id"] == after["id"] == ID
    assert (after["created"], after["working_folder"]) == (before["created"], before["working_folder"])
    assert len(after["jobs"]) == 4
    for then, now in zip(before["jobs"], after["jobs"], strict=True):
        same = ("folder", "name", "choices", "overrides")
        assert {key: now[key] for key in same} == {key: then[key] for key in same}
        assert now["fingerprint"] != then["fingerprint"]
    rows, kept = (table(folder / SWEEP / "results.csv") for folder in (work, DATA))
    for row, was in zip(rows, kept, strict=True):
        assert {key: row[key] for key in LASTING} == {key: was[key] for key in LASTING}
        assert float(row["accuracy"]) == pytest.approx(float(was["accuracy"]), abs=0.01)
        assert row["started"] != was["started"]
    _, jobs = parent_and_jobs(f"sqlite:///{work}/mlflow.db")
    assert len(jobs) == 4


@pytest.fixture
def digit(tmp_path: Path) -> Path:
    """A seven as an image file."""
    digits = load_digits()
    pixels = (digits.images[7] * 15.9).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "seven.png")
    return tmp_path / "seven.png"


@pytest.mark.slow
def test_an_export_answers_as_its_network_does(tmp_path: Path, digit: Path) -> None:
    """An export of today of the same job does too, and says in its card with which version it goes together."""
    shutil.copytree(SHIPPED, tmp_path / "sweep" / "0")
    ran(tmp_path, "pq_sweep.recommend", "sweep", "--export", "again")
    network = shipped_network()
    pixels = torch.from_numpy(np.asarray(Image.open(digit), np.float32) / 255)
    logits = network(pixels[None, None])[0]
    best = [f"{logits[index]:.4f} {index}" for index in logits.argsort(descending=True)[:5].tolist()]
    for folder in (SHIPPED, tmp_path / "again"):
        done = python([str(folder / "run.py"), str(digit)], tmp_path, new_user())
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == best

    card, script = ((tmp_path / "again" / name).read_text() for name in ("README.md", "run.py"))
    assert "from pq_sweep.compress.removal import replay" in script
    assert "it was written by pq_sweep 0.1.0" in card
    assert (tmp_path / "again" / "model.yaml").read_text() == (SHIPPED / "model.yaml").read_text()


def shipped_network() -> torch.nn.Module:
    """Return the network of the export, built from modules as they are called today."""
    from pq_sweep.compress.removal import replay
    from pq_sweep.inputs.models import digits_cnn

    model = digits_cnn(weights=None)
    replay(model, json.loads((SHIPPED / "pruning.json").read_text()))
    model.module.load_state_dict(torch.load(SHIPPED / "model.pt", weights_only=True))
    return model.module.eval().requires_grad_(False)


def test_an_export_is_as_good_as_its_card_says() -> None:
    from pq_sweep.inputs.datasets import digits
    from pq_sweep.inputs.models import digits_cnn

    network, right = shipped_network(), 0
    for images, labels in digits(digits_cnn(weights=None), calibration=200).evaluation.batches(100):
        right += int((network(images).argmax(1) == labels).sum())
    assert "| accuracy | 50.80% |" in (SHIPPED / "README.md").read_text()
    assert right / 500 == pytest.approx(0.508, abs=0.004)


@pytest.mark.slow
def test_the_cache_of_the_time_is_listed_read_and_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(DATA / "cache", cache)
    (record,) = cache.glob("stages/*/*/record.json")
    told = json.loads(record.read_text())
    day = time.time() - 86400

    assert " exported │       1 │" in ran(tmp_path, "pq_sweep.cache", "ls", PQ_SWEEP_CACHE=str(cache)).stdout
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(cache))
    os.utime(record, (day, day))
    assert Cache({}).take("exported", told["about"], tmp_path) == told
    assert (tmp_path / "export.onnx").read_bytes() == (record.parent / "export.onnx").read_bytes()
    assert record.stat().st_mtime > day + 80000
    os.utime(record, (day, day))
    for option, number in (("--unused-days=2", 0), ("--unused-days=0.5", 1)):
        done = ran(tmp_path, "pq_sweep.cache", "prune", option, PQ_SWEEP_CACHE=str(cache))
        assert f"removed {number} entries" in done.stdout
        assert record.exists() == (number == 0)
