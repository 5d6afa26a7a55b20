"""Whole sweeps as a user starts, interrupts and looks at them."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import LAUNCH, SHORT, imported, launch_in, new_user
from conftest import ROOT, Launch, Ran, hear_signals, only_sweep, python, results
from hydra import compose, initialize_config_dir
from hydra.core.utils import JobReturn, JobStatus
from mlflow import MlflowClient
from mlflow.entities import Run
from omegaconf import DictConfig, OmegaConf

from pq_sweep.inputs.models import digits_cnn
from pq_sweep.results.spreadsheet import PQ_BENCH
from pq_sweep.sweep.callback import SweepCallback
from pq_sweep.sweep.grid import compose_grid

GRID = ("-m", "pruner=none,l1_global,remove", "quantizer=none,fp16,int8", "runtime=onnxruntime")
METRICS = {
    "accuracy",
    "accuracy_top5",
    "latency_ms/b1",
    "throughput/b1",
    "engine_size_mb",
    "original_size_mb",
    "prep_time_s",
    "prep_time_s/prune",
    "sparsity",
    "params",
    "macs",
    "peak_memory_mb",
}
COLUMNS = (
    "job", "model", "dataset", "pruner", "quantizer", "runtime", "device", "amount", "top-1 %", "drop", "points",
    "ms b1", "ms b8", "ms b32", "p50/p99", "images/s", "original", "size", "sparsity", "params", "thousand", "prep s",
)  # fmt: skip


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("grid")
    return folder, launch_in(folder, *GRID, *SHORT, "tracking=none", timeout=600)


@pytest.fixture(scope="module")
def half_failing(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A sweep whose first job fails and whose second does not."""
    folder = tmp_path_factory.mktemp("half")
    chosen = ("pruner=l1_global", "pruner.amount=0.1", "measure.interval=${pruner.amount}")
    return folder, launch_in(folder, "-m", "dataset.calibration=5000,200", *chosen, *SHORT)


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def logged(uri: str) -> tuple[Run, list[Run]]:
    """Return the only parent run of an MLflow store and its children by job; there are no other runs."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("pq_sweep")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = (run for run in runs if run.data.tags.get("pq_sweep.kind") == "sweep")
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 1 + len(children)
    return parent, sorted(children, key=lambda run: int(run.data.tags["pq_sweep.job"]))


def store_in(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def table_row(text: str, job: int) -> str:
    (row,) = re.findall(rf"^│ {job} +│.*$", text, re.MULTILINE)
    return row


@pytest.mark.slow
def test_readme_sweep_finishes(readme_sweep: Ran) -> None:
    folder, done = readme_sweep
    assert done.returncode == 0, done.stderr
    assert [result["status"] for result in results(only_sweep(folder))] == ["finished"] * 3
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_readme_sweep_prints_every_column(readme_sweep: Ran) -> None:
    _, done = readme_sweep
    assert ": 3 done" in done.stdout
    header = done.stdout[done.stdout.index("┏") : done.stdout.index("┡")]
    assert [name for name in COLUMNS if name not in header] == []
    for job, amount in enumerate(("0.1", "0.5", "0.9")):
        assert re.search(rf"│ +{re.escape(amount)} │", table_row(done.stdout, job))


@pytest.mark.slow
def test_readme_sweep_writes_the_csv(readme_sweep: Ran) -> None:
    sweep = only_sweep(readme_sweep[0])
    header = (sweep / "results.csv").read_text().splitlines()[0].split(",")
    assert tuple(header[: len(PQ_BENCH)]) == PQ_BENCH
    rows = rows_of(sweep)
    assert [(row["Model"], row["Pruner"], row["Amount"]) for row in rows] == [
        ("digits_cnn", "l1_global", amount) for amount in ("0.1", "0.5", "0.9")
    ]
    assert all(row[name] for row in rows for name in PQ_BENCH)


@pytest.mark.slow
def test_readme_sweep_loses_accuracy_with_the_amount(readme_sweep: Ran) -> None:
    found = results(only_sweep(readme_sweep[0]))
    little, half, most = (result["accuracy"]["top1"] for result in found)
    assert little >= half > most
    assert little > 0.98
    assert half > 0.95
    assert most < 0.3
    assert [result["network"]["sparsity"] for result in found] == pytest.approx([0.1, 0.5, 0.9], abs=1e-3)
    drops = [result["accuracy"]["drop_points"] for result in found]
    baseline = found[0]["baseline"]["top1"]
    assert drops == pytest.approx([100 * (baseline - top1) for top1 in (little, half, most)])


@pytest.mark.slow
def test_readme_sweep_measures_the_baseline_once(readme_sweep: Ran) -> None:
    sweep = only_sweep(readme_sweep[0])
    assert len(list((sweep / "baseline").iterdir())) == 1
    baselines = [result["baseline"] for result in results(sweep)]
    assert all(baseline == baselines[0] for baseline in baselines)


@pytest.mark.slow
def test_readme_sweep_is_in_mlflow(readme_sweep: Ran) -> None:
    folder, done = readme_sweep
    parent, children = logged(store_in(folder))
    assert parent.info.status == "FINISHED"
    assert [run.info.status for run in children] == ["FINISHED"] * 3
    for run, result, amount in zip(children, results(only_sweep(folder)), ("0.1", "0.5", "0.9"), strict=True):
        assert run.data.metrics.keys() >= METRICS
        assert ("latency_p99_ms/b1" in run.data.metrics) == (result["latency"]["1"]["iterations"] >= 662)
        assert (run.data.params["pruner"], run.data.params["pruner.amount"]) == ("l1_global", amount)
        files = {item.path for item in MlflowClient(store_in(folder)).list_artifacts(run.info.run_id)}
        assert files >= {"config.yaml", "result.json"}
    assert f"MLflow UI: python -m pq_sweep.tracking ui --uri {store_in(folder)} (or: make ui)" in done.stdout


@pytest.mark.slow
def test_grid_has_a_row_per_combination(grid: Ran) -> None:
    folder, done = grid
    assert done.returncode == 0, done.stderr
    expected = [
        (pruner, quantizer, "onnxruntime")
        for pruner in ("-", "l1_global", "remove")
        for quantizer in ("-", "fp16", "int8")
    ]
    rows = rows_of(only_sweep(folder))
    assert [(row["Pruner"], row["Quantizer"], row["runtime"]) for row in rows] == expected


@pytest.mark.slow
def test_grid_sizes_follow_the_precision(grid: Ran) -> None:
    found = results(only_sweep(grid[0]))
    for fp32, fp16, int8 in zip(found[::3], found[1::3], found[2::3], strict=True):
        sizes = [result["size_bytes"]["compressed"] for result in (int8, fp16, fp32)]
        assert sizes == sorted(set(sizes))
        assert sizes[2] == int8["session"]["exported_bytes"]
    for int8 in (found[2], found[5]):  # what is left of a removed network is mostly graph, not weights
        assert int8["size_bytes"]["compressed"] <= 0.45 * int8["session"]["exported_bytes"]
    files = [(only_sweep(grid[0]) / str(job) / "model.onnx").stat().st_size for job in range(9)]
    assert files == [result["size_bytes"]["compressed"] for result in found]


@pytest.mark.slow
def test_grid_removal_makes_the_network_smaller(grid: Ran) -> None:
    found = results(only_sweep(grid[0]))
    for dense, zeroed, removed in zip(found[:3], found[3:6], found[6:], strict=True):
        assert removed["network"]["params"] <= 0.6 * dense["network"]["params"]
        assert removed["network"]["macs"] < dense["network"]["macs"] == zeroed["network"]["macs"]
        assert zeroed["network"]["params"] == dense["network"]["params"]
        assert zeroed["network"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.slow
def test_failing_job_does_not_stop_the_other(half_failing: Ran) -> None:
    folder, done = half_failing
    sweep = only_sweep(folder)
    assert done.returncode == 1
    assert not (sweep / "0" / "result.json").exists()
    assert json.loads((sweep / "1" / "result.json").read_text())["status"] == "finished"
    error = json.loads((sweep / "0" / "error.json").read_text())
    assert (error["type"], error["stage"]) == ("UserError", "load")
    assert "Traceback (most recent call last)" in (sweep / "0" / "job.log").read_text()


@pytest.mark.slow
def test_an_override_may_take_what_only_its_job_has(half_failing: Ran) -> None:
    """The defaults have no pruner.amount."""
    sweep = only_sweep(half_failing[0])
    given = json.loads((sweep / "sweep.json").read_text())["jobs"][1]["overrides"]
    assert any(word.startswith("measure.interval=$") for word in given)
    assert json.loads((sweep / "1" / "result.json").read_text())["config"]["measure"]["interval"] == 0.1


@pytest.mark.slow
def test_failing_job_is_marked_in_table_and_csv(half_failing: Ran) -> None:
    folder, done = half_failing
    assert "1 done, 1 failed" in done.stdout
    assert "failed" in table_row(done.stdout, 0)
    assert "failed" not in table_row(done.stdout, 1)
    assert re.search(r"^job 0 \(.*\) failed at load: dataset\.calibration=5000 does not fit", done.stdout, re.MULTILINE)
    failed, finished = rows_of(only_sweep(folder))
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert "dataset.calibration=5000" in failed["error"]
    assert failed["Accuracy"] == ""
    assert float(finished["Accuracy"]) > 98


@pytest.mark.slow
def test_failing_job_is_failed_in_mlflow(half_failing: Ran) -> None:
    parent, children = logged(store_in(half_failing[0]))
    assert [run.info.status for run in children] == ["FAILED", "FINISHED"]
    assert parent.info.status == "FAILED"
    assert "dataset.calibration=5000" in children[0].data.tags["pq_sweep.error"]


@pytest.mark.slow
def test_single_run_lands_in_a_folder_of_its_own(tmp_path: Path, launch: Launch) -> None:
    done = launch("tracking=none", *SHORT)
    assert done.returncode == 0, done.stderr
    (result,) = tmp_path.rglob("result.json")
    assert re.fullmatch(r"multirun/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d/0/result\.json", str(result.relative_to(tmp_path)))
    assert ": 1 done" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"multirun"}
    assert not list(tmp_path.rglob(".*.[0-9]*"))


@pytest.mark.slow
def test_sweep_does_not_write_into_the_folder_of_another(tmp_path: Path, launch: Launch) -> None:
    taken = [tmp_path / f"{datetime.now() + timedelta(seconds=s):multirun/%Y-%m-%d/%H-%M-%S}" for s in range(60)]
    for folder in taken:
        folder.mkdir(parents=True)
    done = launch("tracking=none", *SHORT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d\d-\d\d-\d\d-2", only_sweep(tmp_path).name)
    assert len(results(only_sweep(tmp_path))) == 1
    assert not any(path for folder in taken for path in folder.iterdir())


@contextmanager
def three_jobs(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a sweep of three jobs of which the second would measure for minutes."""
    overrides = ["-m", *SHORT[:-1], "measure.max_s=null", "measure.min_s=0,300,0", "tracking=none"]
    process = subprocess.Popen(
        [sys.executable, LAUNCH, *overrides],
        cwd=folder,
        env=new_user(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=hear_signals,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_stage(folder: Path, process: subprocess.Popen[str], job: int, stage: str) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        statuses = [json.loads(path.read_text()) for path in folder.glob(f"multirun/*/*/{job}/status.json")]
        if any(status["stage"] == stage for status in statuses):
            return
        time.sleep(0.05)
    pytest.fail(f"job {job} did not come to {stage}")


def interrupt(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal in the middle of the second of three jobs; return exit code and output."""
    with three_jobs(folder) as process:
        wait_for_stage(folder, process, 1, "latency b1")
        os.killpg(process.pid, number)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output


def shown_by_module(folder: Path) -> str:
    done = python(["-m", "pq_sweep.results", "multirun"], folder, new_user())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_killed_sweep_keeps_what_it_has(tmp_path: Path) -> None:
    code, _ = interrupt(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    (result,) = results(only_sweep(tmp_path))
    assert result["status"] == "finished"
    with np.load(only_sweep(tmp_path) / "0" / "samples.npz") as samples:
        assert len(samples["b1_host"]) == result["latency"]["1"]["iterations"]
    assert "1 done, 2 missing" in shown_by_module(tmp_path)
    assert [row["status"] for row in rows_of(only_sweep(tmp_path))] == ["finished", "missing", "missing"]

    done = python(["-m", "pq_sweep.tracking", "sync", "multirun"], tmp_path, new_user())

    assert done.returncode == 0, done.stderr
    assert "1 of 3 jobs logged now" in done.stdout
    parent, (child,) = logged(store_in(tmp_path))
    assert parent.data.tags["pq_sweep.missing"] == "2"
    assert (child.data.tags["pq_sweep.job"], child.info.status) == ("0", "FINISHED")


def wait_for_new(sweep: Path, name: str, process: subprocess.Popen[bytes], seconds: float = 120) -> None:
    """Wait until a process that has just started writes such a file for one of its jobs, or is over."""
    start, end = time.time(), time.monotonic() + seconds
    while process.poll() is None and not any(path.stat().st_mtime > start for path in sweep.glob(f"*/{name}")):
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_a_sweep_that_is_killed_ten_times_ends_with_every_job_run_once(tmp_path: Path) -> None:
    amounts = ",".join(f"0.{number:02}" for number in range(5, 65, 5))
    command = [sys.executable, LAUNCH, "-m", "pruner=l1_global", f"pruner.amount={amounts}", "hydra.sweep.dir=sweep"]
    command += [*SHORT, "tracking=none", "runtime=torch"]
    source, first = random.Random(0), dict[str, bytes]()
    for kill in range(10):
        known = set(first)
        process = subprocess.Popen(command, cwd=tmp_path, env=new_user(), start_new_session=True)
        if kill % 3:  # else it is still starting
            wait_for_new(tmp_path / "sweep", ("status.json", "result.json")[kill % 2], process)
        with suppress(subprocess.TimeoutExpired):
            process.wait(source.uniform(0, 1))
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
        for path in (tmp_path / "sweep").glob("*/result.json"):
            assert path.read_bytes() == first.setdefault(path.parent.name, path.read_bytes())
        assert known <= set(first)
    done = python(command[1:], tmp_path, new_user())
    rows = rows_of(tmp_path / "sweep")

    assert done.returncode == 0, done.stderr
    assert [row["status"] for row in rows] == ["finished"] * 12
    assert sorted(float(row["amount"]) for row in rows) == [number / 100 for number in range(5, 65, 5)]
    for name, content in first.items():
        assert (tmp_path / "sweep" / name / "result.json").read_bytes() == content
    assert {row["job"] for row in rows if row["reused"] == "yes"} == set(first)


@pytest.mark.slow
def test_interrupted_sweep_shows_what_it_has(tmp_path: Path) -> None:
    code, output = interrupt(tmp_path, signal.SIGINT)
    assert code == 130
    assert len(results(only_sweep(tmp_path))) == 1
    assert "interrupted; finished jobs are kept" in output
    assert "1 done, 2 missing" in output
    assert "98." in table_row(output, 0)
    assert "missing" in table_row(output, 1)
    assert "Traceback" not in output
    assert "1 done, 2 missing" in shown_by_module(tmp_path)


@pytest.mark.slow
def test_sweep_in_the_place_of_an_earlier_one_replaces_its_jobs(tmp_path: Path, launch: Launch) -> None:
    common = ("tracking=none", "hydra.sweep.dir=here", *SHORT)
    assert launch("dataset.calibration=5000", *common).returncode == 1
    assert (tmp_path / "here" / "0" / "error.json").exists()
    done = launch("dataset.calibration=200", *common)
    assert done.returncode == 0, done.stdout
    assert not (tmp_path / "here" / "0" / "error.json").exists()
    assert [row["status"] for row in rows_of(tmp_path / "here")] == ["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [(), ("hydra.mode=RUN",), ("-m",)])
def test_the_folder_of_a_single_run_is_that_of_its_sweep(mode: tuple[str, ...], tmp_path: Path, launch: Launch) -> None:
    """What is finished there is not run again."""
    command = (*mode, "hydra.run.dir='a b/first'", "tracking=none", *SHORT)
    first, again = launch(*command), launch(*command)
    assert first.returncode == again.returncode == 0, first.stdout + first.stderr
    assert len(results(tmp_path / "a b" / "first")) == 1
    assert "reused: finished earlier" not in first.stdout + first.stderr
    assert "reused: finished earlier" in again.stdout + again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"a b"}
    assert [path.name for path in (tmp_path / "a b").iterdir()] == ["first"]


@pytest.mark.slow
def test_jobs_at_the_same_time_lie_in_the_folder_of_the_run(tmp_path: Path, launch: Launch) -> None:
    """A launcher keeps its own files there as well."""
    done = launch("hydra/launcher=local_parallel", "hydra.run.dir=s", "pruner=none,l1", "tracking=none", *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(results(tmp_path / "s")) == 2
    assert list((tmp_path / "s").glob(".submitit/*/*.err"))
    assert {path.name for path in tmp_path.iterdir()} == {"s"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RUN", "MULTIRUN"])
def test_two_folders_for_one_sweep_are_refused(mode: str, tmp_path: Path, launch: Launch) -> None:
    done = launch(f"hydra.mode={mode}", "hydra.run.dir=a", "hydra.sweep.dir=b", "tracking=none", *SHORT)
    assert done.returncode == 1
    assert done.stderr == (
        "hydra.run.dir=a and hydra.sweep.dir=b both name the sweep's folder; leave out one of them.\n"
    )
    assert not list(tmp_path.iterdir())


def composed(*overrides: str) -> list[DictConfig]:
    """Return the jobs that `launch.py` would run."""
    swept = [word for word in overrides if "," in word]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*set(overrides) - {*swept}], return_hydra_config=True)
        config.hydra.overrides.task = list(overrides)
        return list(compose_grid(config))


def test_prune_and_quantize_is_nine_jobs() -> None:
    chosen: list[dict[str, Any]] = [job.hydra.runtime.choices for job in composed("experiment=prune_and_quantize")]
    assert [(job["pruner"], job["quantizer"]) for job in chosen] == [
        (pruner, quantizer) for pruner in ("none", "l1_global", "remove") for quantizer in ("none", "fp16", "int8")
    ]
    assert {job["runtime"] for job in chosen} == {"onnxruntime"}


@pytest.mark.slow
@pytest.mark.parametrize("words", [*permutations(["quantizer=none,int8", "pruner.amount=0.1,0.5", "seed=1,2"])])
def test_jobs_that_share_a_stage_run_next_to_each_other(words: tuple[str, ...]) -> None:
    """However the command line was written: what is loaded changes least often, what is quantized most often."""
    jobs = composed("runtime=onnxruntime", *words, "pruner=l1_global")
    ran = [(job.seed, job.pruner.amount, job.hydra.runtime.choices.quantizer) for job in jobs]
    assert ran == [*product((1, 2), (0.1, 0.5), ("none", "int8"))]
    assert [job.hydra.job.num for job in jobs] == [*range(8)]
    given = [word.partition("=")[0] for word in ("runtime=", *words, "pruner=")]
    assert all([word.partition("=")[0] for word in job.hydra.overrides.task] == given for job in jobs)


@pytest.mark.slow
def test_jobs_run_in_the_order_of_their_numbers(tmp_path: Path, launch: Launch) -> None:
    """Those that share an export are neighbours, in the folders as in time."""
    grid = ["quantizer=none,int8", "pruner=none,l1_global", "runtime=onnxruntime", "tracking=none", *SHORT]
    done = launch("-m", *grid, env={"PQ_SWEEP_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stdout + done.stderr
    ran = sorted(results(only_sweep(tmp_path)), key=lambda result: result["started"])
    choices = [(result["config"]["pruner"]["_target_"], result["session"]["precision"]) for result in ran]
    pruners = ("pq_sweep.compress.pruners.none", "pq_sweep.compress.pruners.l1_global")
    assert choices == [*product(pruners, ("fp32", "int8"))]
    assert ["export" in result["from_cache"] for result in ran] == [False, True, False, True]
    assert [row["job"] for row in rows_of(only_sweep(tmp_path))] == ["0", "1", "2", "3"]


def test_a_job_that_is_over_leaves_no_config_with_its_launcher() -> None:
    """A launcher keeps what Hydra returns of each job: with configs in it a sweep would grow by 0.2 MB a job."""
    config = OmegaConf.create({"seed": 0})
    returned = JobReturn(cfg=config, hydra_cfg=config, overrides=["seed=0"], status=JobStatus.COMPLETED)
    SweepCallback().on_job_end(config, returned)
    assert (returned.cfg, returned.hydra_cfg, returned.overrides) == (None, None, ["seed=0"])


@pytest.mark.slow
def test_jobs_at_the_same_time(tmp_path: Path, launch: Launch) -> None:
    measured = {"PYTHONPROFILEIMPORTTIME": "1"}
    done = launch("-m", "hydra/launcher=local_parallel", "pruner=none,l1", *SHORT, timeout=600, env=measured)
    assert done.returncode == 0, done.stderr
    rows = rows_of(only_sweep(tmp_path))
    assert [(row["Pruner"], row["status"]) for row in rows] == [("-", "finished"), ("l1", "finished")]
    assert ": 2 done" in done.stdout
    assert len(list((only_sweep(tmp_path) / "baseline").iterdir())) == 1
    _, children = logged(store_in(tmp_path))
    assert [run.info.status for run in children] == ["FINISHED", "FINISHED"]
    for output in only_sweep(tmp_path).glob(".submitit/*/*.err"):
        assert {"torch", "mlflow"} & imported(output.read_text()) == {"torch"}  # the launcher logs jobs


@pytest.mark.slow
def test_the_uncompressed_model_is_timed_in_turn(tmp_path: Path, launch: Launch) -> None:
    ways = ("runtime=onnxruntime", "quantizer=int8", "quantizer.images=8", "tracking=none")
    done = launch("measure.paired=true", *ways, *SHORT)
    assert done.returncode == 0, done.stderr
    (result,) = results(only_sweep(tmp_path))
    pair = result["paired"]["1"]
    assert pair["speedup_ci95"] is None  # of five pairs nothing can be said
    assert 0.1 < pair["speedup"] < 10
    with np.load(only_sweep(tmp_path) / "0" / "samples.npz") as samples:
        assert pair["speedup"] == np.median(samples["b1_paired_dense"] / samples["b1_paired"])
    (row,) = rows_of(only_sweep(tmp_path))
    assert float(row["speedup/b1"]) == pair["speedup"]
    assert "paired b1 interval" in row["unstable"]
    assert not (only_sweep(tmp_path) / "0" / "dense").exists()
    assert "export" in result["prep_s"]


@pytest.mark.slow
def test_changed_weights_get_their_own_baseline(tmp_path: Path) -> None:
    """A sweep that runs again in its folder must not compare with what the weights were before."""
    command = ("model.weights=w.pt", "hydra.sweep.dir=again", "tracking=none", *SHORT)
    for model in (digits_cnn(), digits_cnn(weights=None)):
        torch.save(model.module.state_dict(), tmp_path / "w.pt")
        done = launch_in(tmp_path, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    (result,) = results(tmp_path / "again")
    assert result["baseline"]["top1"] < 0.5
    assert result["accuracy"]["agreement"] == 1.0
