"""One job: its folder holds a result whose every figure can be worked out again from the files beside it."""

from __future__ import annotations

import functools
import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, refused
from cuda_stand_in import Machine
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from independent import onnx_logits, torch_logits
from nvml_stand_in import stand_in
from torch import Tensor

from pq_sweep.compress.removal import replay
from pq_sweep.core.files import write_json
from pq_sweep.core.result import Result
from pq_sweep.core.weights import prunable
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.inputs.own_model import accepted_change
from pq_sweep.job import run as job
from pq_sweep.job.stages import PREP, Stages, told_of
from pq_sweep.measure import memory
from pq_sweep.types import Data, Model, Split, UserError

BRIEF = (
    "tracking=none",
    "measure.batch_sizes=[1]",
    "measure.min_s=0",
    "measure.iterations=10",
    "measure.max_s=0.05",
    "measure.warmup_s=0",
    "measure.threads=1",
)
ONNX = ("pruner=l1", "pruner.amount=0.5", "runtime=onnxruntime")
JOBS: dict[str, tuple[str, ...]] = {
    "fp32": (*ONNX, "quantizer=none"),
    "fp16": (*ONNX, "quantizer=fp16"),
    "int8": (*ONNX, "quantizer=int8"),
    "torch": ("pruner=l1_global", "pruner.amount=0.7", "measure.threads=2"),
    "removed": ("pruner=remove", "pruner.amount=0.3", "recovery=bn_reestimate"),
    "seed 0": ("pruner=random", "pruner.amount=0.2", "recovery=finetune", "recovery.epochs=1"),
    "seed 0 again": ("pruner=random", "pruner.amount=0.2", "recovery=finetune", "recovery.epochs=1"),
    "seed 1": ("pruner=random", "pruner.amount=0.2", "recovery=finetune", "recovery.epochs=1", "seed=1"),
}
each_job = pytest.mark.parametrize("name", JOBS)
each_onnx_job = pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
NO_IMAGES = Data(*[Split.of_tensors(torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64))] * 2, None, ())
FAILING = ("pruner=remove", "pruner.round_to=1024")  # nothing can be removed in steps of 1024


@dataclass(frozen=True)
class Done:
    """A finished job: its folder, and what `run` returned."""

    folder: Path
    returned: Result

    @property
    def result(self) -> dict[str, Any]:
        return read(self.folder / "result.json")

    @property
    def artifact(self) -> Path:
        return self.folder / self.result["session"]["artifact"]

    @property
    def predictions(self) -> np.ndarray:
        return np.load(self.folder / "predictions.npy")

    @property
    def state(self) -> dict[str, Tensor]:
        return torch.load(self.folder / "model.pt", weights_only=True)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def baselines(sweep: Path) -> list[Path]:
    return sorted((sweep / "baseline").iterdir())


def run(folder: Path, *overrides: str) -> Done:
    """Run one job in `folder`, as Hydra would."""
    folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[*BRIEF, *overrides])
    return Done(folder, job.run(cfg, folder))


Jobs = Callable[[str], Done]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """The jobs of one sweep, each run when it is first asked for."""
    sweep = tmp_path_factory.mktemp("sweep")
    return functools.cache(lambda name: run(sweep / str(list(JOBS).index(name)), *JOBS[name]))


@pytest.fixture(scope="module")
def data() -> Data:
    return digits(digits_cnn())


@pytest.fixture(scope="module")
def images(data: Data) -> Tensor:
    return data.evaluation.fetch(list(range(len(data.evaluation))))


@pytest.fixture(scope="module")
def labels(data: Data) -> np.ndarray:
    return data.evaluation.labels.numpy()


@pytest.fixture(scope="module")
def uncompressed(images: Tensor) -> np.ndarray:
    """What the network answers before anything is done to it."""
    return torch_logits(digits_cnn().module, images).argmax(1)


# The result

PARTS = {
    "status": str,
    "fingerprint": str,
    "started": float,
    "seconds": float,
    "tries": list,
    "accuracy": dict,
    "latency": dict,
    "peak_memory_mb": float | None,
    "network": dict,
    "images": dict,
    "size_bytes": dict,
    "bits": dict,
    "prep_s": dict,
    "stage_s": dict,
    "baseline": dict,
    "session": dict,
    "hardware": list,
    "notes": list,
    "from_cache": list,
    "config": dict,
    "environment": dict,
}


@each_job
def test_a_result_has_every_part(jobs: Jobs, name: str) -> None:
    result = jobs(name).result

    on_gpu = {"memory"} if result["session"]["device"] != "cpu" else set()
    assert set(result) == set(PARTS) | on_gpu
    assert all(isinstance(result[key], kind) for key, kind in PARTS.items())
    assert result["status"] == "finished"
    alone = {"samples", "batch_size", "top1", "top1_ci95", "top5"}
    assert set(result["accuracy"]) == alone | {
        "drop_points",
        "drop_ci95_points",
        "drop_p",
        "only_baseline_right",
        "only_this_right",
        "agreement",
    }
    sizes = result["size_bytes"]
    assert set(sizes) == {"original", "compressed", "compressed_zstd", "formats", "smallest_format"}
    assert sizes["formats"][sizes["smallest_format"]] == min(sizes["formats"].values())
    assert set(result["bits"]) == {
        "packed_bytes", "bops", "rel_bops", "weight_bits", "activation_bits", "sparsity",
    }  # fmt: skip
    assert result["bits"]["packed_bytes"] < sizes["compressed"]
    assert {"evaluation": 500, "calibration": 200}.items() <= result["images"].items()
    assert {"input", "licence", "params", "nonzero_params", "weights", "sparsity", "macs"} <= set(result["network"])
    assert {"runtime", "device", "engine", "precision", "artifact"} <= set(result["session"])
    assert {"host", "python", "versions", "git", "command", "cpu", "device"} <= set(result["environment"])


@each_job
def test_what_is_returned_is_what_is_written(jobs: Jobs, name: str) -> None:
    assert json.loads(json.dumps(jobs(name).returned.plain())) == jobs(name).result


@each_job
def test_a_folder_holds_nothing_but_the_job(jobs: Jobs, name: str) -> None:
    done = jobs(name)
    told = set() if done.result["config"]["pruner"]["_target_"].endswith(".none") else {"pruning.json"}

    files = {path.name for path in done.folder.iterdir()}
    always = {"result.json", "layers.json", "predictions.npy", "samples.npz", "status.json"}
    assert files == {done.artifact.name} | always | told


@each_onnx_job
def test_accuracy_is_that_of_the_artifact_alone(jobs: Jobs, images: Tensor, labels: np.ndarray, name: str) -> None:
    answers = onnx_logits(jobs(name).artifact, images).argmax(1)
    accuracy = jobs(name).result["accuracy"]

    assert accuracy["samples"] == len(labels) == 500
    assert accuracy["top1"] == sum(int(a == b) for a, b in zip(answers, labels, strict=True)) / 500
    assert jobs(name).predictions.tolist() == answers.tolist()


@each_job
def test_samples_are_those_of_the_latency(jobs: Jobs, name: str) -> None:
    timed = jobs(name).result["latency"]["1"]
    with np.load(jobs(name).folder / "samples.npz") as samples:
        assert len(samples["b1_host"]) == timed["iterations"]
        assert np.median(samples["b1_host"] / 1e6) == timed["p50_ms"]


@each_onnx_job
def test_what_the_cpu_has_no_fast_units_for_is_stated(jobs: Jobs, name: str) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    fast = {"fp32": True, "fp16": "avx512_fp16" in flags, "int8": bool({"avx512_vnni", "avx_vnni", "amx_int8"} & flags)}
    found = jobs(name).result["hardware"]

    assert len(found) == (not fast[name])
    assert all(jobs(name).result["environment"]["device"] in sentence for sentence in found)


@each_onnx_job
def test_precision_is_that_of_the_artifact(jobs: Jobs, name: str) -> None:
    session = jobs(name).result["session"]

    assert (session["precision"], session["runtime"], session["device"]) == (name, "onnxruntime", "cpu")
    assert session["artifact"] == "model.onnx"


@each_job
def test_accuracy_follows_from_the_predictions(
    jobs: Jobs, labels: np.ndarray, uncompressed: np.ndarray, name: str
) -> None:
    accuracy, predictions = jobs(name).result["accuracy"], jobs(name).predictions
    reference = float((uncompressed == labels).mean())

    assert accuracy["top1"] == float((predictions == labels).mean())
    assert accuracy["agreement"] == float((predictions == uncompressed).mean())
    assert accuracy["drop_points"] == pytest.approx(100 * (reference - accuracy["top1"]))
    assert accuracy["top1_ci95"][0] < accuracy["top1"] < accuracy["top1_ci95"][1]
    assert accuracy["drop_ci95_points"][0] < accuracy["drop_points"] < accuracy["drop_ci95_points"][1]
    assert accuracy["only_baseline_right"] == ((uncompressed == labels) & (predictions != labels)).sum()
    assert accuracy["only_this_right"] == ((uncompressed != labels) & (predictions == labels)).sum()
    assert jobs(name).result["baseline"]["top1"] == reference


@each_job
def test_sizes_are_those_of_the_files(jobs: Jobs, name: str) -> None:
    sizes = jobs(name).result["size_bytes"]
    originals = {(folder / "model.pt").stat().st_size for folder in baselines(jobs(name).folder.parent)}

    assert sizes["compressed"] == jobs(name).artifact.stat().st_size
    assert {sizes["original"]} == originals


def test_sizes_shrink_with_precision(jobs: Jobs) -> None:
    sizes = [jobs(name).result["size_bytes"]["compressed"] for name in ("int8", "fp16", "fp32")]

    assert sizes == sorted(sizes)
    assert sizes[0] < 0.45 * sizes[2]


@pytest.mark.parametrize("name", ["torch", "removed", "seed 0"])
def test_sparsity_is_the_share_of_zeros_in_the_artifact(jobs: Jobs, name: str) -> None:
    weights = [value for value in jobs(name).state.values() if value.dim() > 1]
    zeros = sum(int((value == 0).sum()) for value in weights)

    assert jobs(name).result["network"]["sparsity"] == zeros / sum(value.numel() for value in weights)


@pytest.mark.parametrize(("name", "sparsity"), [("fp32", 0.5), ("torch", 0.7), ("removed", 0.0), ("seed 0", 0.2)])
def test_sparsity_is_what_was_asked_for(jobs: Jobs, name: str, sparsity: float) -> None:
    network = jobs(name).result["network"]

    assert network["sparsity"] == pytest.approx(sparsity, abs=0.01)
    assert network["nonzero_params"] == pytest.approx(network["params"] - sparsity * network["weights"], rel=0.01)


@pytest.mark.parametrize("name", ["torch", "removed", "seed 0"])
def test_parameters_are_those_of_the_artifact(jobs: Jobs, name: str) -> None:
    names = dict(digits_cnn().module.named_parameters())
    count = sum(value.numel() for key, value in jobs(name).state.items() if key in names)

    assert jobs(name).result["network"]["params"] == count
    assert (count < jobs(name).result["baseline"]["params"]) is (name == "removed")


@each_job
def test_prep_is_the_time_of_its_stages(jobs: Jobs, name: str) -> None:
    result = jobs(name).result
    by_runtime = {"torch": {"quantize"}, "onnxruntime": {"trace", "export", "build"}}[result["session"]["runtime"]]
    by_precision = {"fp16": {"quantize"}, "int8": {"quantize", "calibrate"}}.get(result["session"]["precision"], set())

    assert set(result["prep_s"]) == {"prune", "recover"} | by_runtime | by_precision
    assert result["prep_s"] == {key: result["stage_s"][key] for key in PREP if key in result["stage_s"]}
    assert all(seconds >= 0 for seconds in result["stage_s"].values())
    assert sum(result["prep_s"].values()) <= sum(result["stage_s"].values())
    spent = [seconds for name, seconds in result["stage_s"].items() if name not in result["from_cache"]]
    assert sum(spent) <= result["seconds"]


@pytest.mark.parametrize(("name", "threads"), [("fp32", 1), ("torch", 2)])
def test_threads_are_those_asked_for(jobs: Jobs, name: str, threads: int) -> None:
    assert jobs(name).result["environment"]["cpu"]["threads"] == threads


# The reference


@pytest.mark.slow
def test_the_baseline_is_measured_once(tmp_path: Path) -> None:
    def stamps() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (tmp_path / "sweep" / "baseline").glob("*/*.[jnp]*")}

    first = run(tmp_path / "sweep" / "0")
    before = stamps()
    second = run(tmp_path / "sweep" / "1", "pruner=l1", "quantizer=bf16")

    assert len(baselines(tmp_path / "sweep")) == 1
    assert len(before) == 4
    assert stamps() == before
    assert first.result["baseline"] == second.result["baseline"]


@pytest.mark.slow
def test_other_weights_have_their_own_baseline(tmp_path: Path) -> None:
    torch.manual_seed(5)
    torch.save(digits_cnn(weights=None).module.state_dict(), tmp_path / "other.pt")
    first = run(tmp_path / "sweep" / "0")
    second = run(tmp_path / "sweep" / "1", f"model.weights={tmp_path / 'other.pt'}")

    assert len(baselines(tmp_path / "sweep")) == 2
    assert second.result["baseline"]["top1"] < 0.5 < first.result["baseline"]["top1"]
    assert second.result["accuracy"]["drop_points"] == 0
    assert second.result["accuracy"]["agreement"] == 1


# Repeating a job


def test_the_same_seed_repeats_every_bit(jobs: Jobs) -> None:
    one, other = jobs("seed 0"), jobs("seed 0 again")

    assert one.folder != other.folder
    assert np.array_equal(one.predictions, other.predictions)
    assert list(one.state) == list(other.state)
    assert all(torch.equal(one.state[key], other.state[key]) for key in one.state)


def test_another_seed_prunes_other_weights(jobs: Jobs) -> None:
    def zeros(name: str) -> Tensor:
        return jobs(name).state["fc1.weight"] == 0

    assert not torch.equal(zeros("seed 0"), zeros("seed 1"))
    assert zeros("seed 0").sum() == zeros("seed 1").sum()


def test_the_first_job_of_a_sweep_equals_a_later_one(jobs: Jobs, tmp_path: Path) -> None:
    """It measures the baseline too, which must not touch the random numbers."""
    alone = run(tmp_path / "sweep" / "0", *JOBS["seed 0"])

    assert jobs("fp32").folder.parent != alone.folder.parent
    assert all(torch.equal(alone.state[key], value) for key, value in jobs("seed 0").state.items())


def test_a_removed_network_can_be_built_again(jobs: Jobs, images: Tensor) -> None:
    done = jobs("removed")
    model = digits_cnn()
    replay(model, read(done.folder / "pruning.json"))
    model.module.load_state_dict(done.state)

    assert torch_logits(model.module, images).argmax(1).tolist() == done.predictions.tolist()
    assert sum(getattr(part, name).numel() for part, name in prunable(model.module)) < 58_640


# Failing


def test_a_failing_job_leaves_a_record(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="removed nothing"):
        run(tmp_path / "sweep" / "0", *FAILING)
    error = read(tmp_path / "sweep" / "0" / "error.json")

    assert (error["type"], error["stage"]) == ("UserError", "prune")
    assert "removed nothing" in error["message"]
    assert "\n" not in error["message"]
    assert error["traceback"].startswith("Traceback")
    assert "removal.py" in error["traceback"]
    assert not (tmp_path / "sweep" / "0" / "result.json").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pruner=l1", "pruner.amount=1.0"), r"pruner\.amount=1\.0 is out of range"),
        (("quantizer=int8", "quantizer.images=500"), r"quantizer\.images=500 is more than dataset\.calibration=200"),
        (("runtime=torch", "quantizer=int8"), "runtime=torch cannot run precision int8"),
        (("measure.batch_sizes=[0]",), r"measure\.batch_sizes=\[0\] is not valid"),
        (("measure.repeats=0",), r"measure\.repeats=0 is out of range; give a whole number from 1 on"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tmp_path / "sweep" / "0", *overrides)

    assert {path.name for path in (tmp_path / "sweep" / "0").iterdir()} == {"error.json"}
    assert not (tmp_path / "sweep" / "baseline").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("runtime=torch", "quantizer=fp16"), "runtime=torch"),
        (("runtime=tensorrt", "quantizer=int8"), "runtime=tensorrt"),
        (("device=cuda",), "finds no CUDA device here"),
    ],
)
def test_what_only_cuda_can_is_refused_where_there_is_none(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    """With device=auto the grid's check cannot know; the job has to."""
    with pytest.raises(UserError, match=message):
        run(tmp_path / "sweep" / "0", *overrides)


def test_the_gpu_of_a_job_is_the_current_one_from_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random numbers of fine-tuning are those of the current device, and so is whatever a user's code asks for."""
    machine = Machine().install(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    memory.free_at_first.cache_clear()
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=[*BRIEF, f"device={device}", "runtime=torch"])
        plan = job.prepare(cfg, Stages(tmp_path, ""))
        assert plan.work.device == device
        assert machine.current == int(device[-1])
    stand_in(tmp_path / "driver", monkeypatch)(gpus=[{"uuid": "GPU-bb11", "name": "A100", "compute_mode": 3}])
    cfg.measure.repeats = 2
    with pytest.raises(UserError, match=r"measure\.repeats=2 needs fresh processes, and cuda:1 is in compute mode"):
        job.prepare(cfg, Stages(tmp_path, ""))
    machine.taken[1] = 5_000_000_000
    assert memory.free_at_first("cuda:1") == 40_000_000_000  # looked up before anything was taken
    memory.free_at_first.cache_clear()


@pytest.mark.slow
def test_a_job_that_succeeds_later_replaces_its_error(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        run(tmp_path / "sweep" / "0", *FAILING)
    done = run(tmp_path / "sweep" / "0")

    assert done.result["status"] == "finished"
    assert not (done.folder / "error.json").exists()


@pytest.mark.slow
def test_a_job_that_fails_later_replaces_its_result(tmp_path: Path) -> None:
    done = run(tmp_path / "sweep" / "0")
    with pytest.raises(UserError):
        run(done.folder, *FAILING)

    assert (done.folder / "error.json").exists()
    assert not (done.folder / "result.json").exists()


@pytest.mark.slow
def test_a_plain_job_leaves_no_record_of_an_earlier_removal(tmp_path: Path) -> None:
    """Whoever builds the network again from the folder would remove channels that are there."""
    run(tmp_path / "sweep" / "0", *JOBS["removed"])
    again = run(tmp_path / "sweep" / "0", "pruner=none")

    assert not (again.folder / "pruning.json").exists()


# Stages and files


def test_stages_add_up(tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    for name in ("load", "quantize", "quantize"):
        with stage(name):
            assert read(tmp_path / "status.json")["stage"] == stage.current == name

    assert list(stage.seconds) == ["load", "quantize"]
    assert list(stage.preparation.prep_s) == ["quantize"]


def test_a_stage_that_fails_is_named(tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    with pytest.raises(ZeroDivisionError), stage.keeping_errors(), stage("export"):
        1 / 0  # noqa: B018

    error = read(tmp_path / "error.json")
    assert (error["type"], error["stage"]) == ("ZeroDivisionError", "export")
    place = r"the stage export failed in test_job\.py, line \d+; use runtime=torch, which needs no graph, or see in"
    assert re.match(place, error["message"])
    assert error["message"].endswith("(ZeroDivisionError: division by zero).")
    assert stage.seconds["export"] >= 0


@pytest.mark.parametrize("name", [*PREP, "start", "load", "baseline", "accuracy", "latency b1", "memory"])
def test_a_message_of_a_library_is_led_by_what_to_do(name: str) -> None:
    message = told_of(RuntimeError("Sizes of tensors must match."), name, 0.0)["message"]
    assert message.startswith(f"the stage {name.split()[0]} failed; ")
    assert message.endswith(" (RuntimeError: Sizes of tensors must match).")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")])
def test_too_little_memory_says_what_to_lower(error: Exception) -> None:
    assert "lower measure.batch_sizes or measure.eval_batch_size" in told_of(error, "latency b8", 0.0)["message"]


def test_what_hydra_wraps_is_told_itself() -> None:
    with pytest.raises(InstantiationException) as caught:
        instantiate({"_target_": "missing_package.make"})
    message = told_of(caught.value, "load", 0.0)["message"]
    assert message.startswith("_target_=missing_package.make cannot be loaded (ModuleNotFoundError: ")
    assert "No module named 'missing_package'" in message
    assert "HYDRA_FULL_ERROR" not in message


def test_a_sentence_of_ours_stays_as_it_is_even_if_a_library_wraps_it() -> None:
    own, wrapped = UserError("choose another."), RuntimeError("Error in call to target 'x'")
    wrapped.__cause__ = own
    assert [told_of(error, "load", 0.0)["message"] for error in (own, wrapped)] == ["choose another."] * 2


def test_a_function_that_is_not_there_or_does_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_half.py").write_text("def other(): ...\n")
    (tmp_path / "my_typo.py").write_text("def make(:\n")
    (tmp_path / "my_need.py").write_text("x = 1\nimport not_installed\n")

    def told(target: str) -> str:
        with pytest.raises(InstantiationException) as caught:
            instantiate({"_target_": target, "_partial_": True})
        return str(told_of(caught.value, "baseline", 0.0)["message"])

    assert told("my_half.make") == (
        f"_target_=my_half.make cannot be loaded, as my_half ({tmp_path}/my_half.py) has no make; give module.function"
        " as it is there."
    )
    assert told("my_typo.make").startswith(
        "_target_=my_typo.make cannot be loaded (SyntaxError: invalid syntax (my_typo"
    )
    assert told("my_need.make") == (
        "_target_=my_need.make cannot be loaded (ModuleNotFoundError in my_need.py, line 2: No module named"
        " 'not_installed'); correct that in its module."
    )


CONTENT = {
    "numbers": [1, -2, 3.5e-7, 10**15],
    "nested": [[1, 2], [3]],
    "empty": [],
    "text": ["[\n 1,\n 2\n]", "ünïcode", "a\tb"],
    "none": None,
    "yes": True,
    "big": list(range(50_000)),
}


def test_json_comes_back_as_it_went(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", CONTENT)

    assert read(tmp_path / "x.json") == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert len((tmp_path / "x.json").read_text().splitlines()) < 30  # samples stand on one line


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}])
def test_what_json_cannot_hold_leaves_the_file_alone(tmp_path: Path, value: Any) -> None:
    write_json(tmp_path / "x.json", {"good": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(tmp_path / "x.json", {"bad": value})

    assert read(tmp_path / "x.json") == {"good": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path, written = tmp_path / "x.json", threading.Event()
    write_json(path, {"numbers": [0] * 20_000})

    def look() -> set[tuple[int, int]]:
        seen = set()
        while not written.is_set():
            numbers = read(path)["numbers"]
            seen |= {(number, len(numbers)) for number in set(numbers)}
        return seen

    with ThreadPoolExecutor(1) as reader:
        seen = reader.submit(look)
        for version in range(1, 30):
            write_json(path, {"numbers": [version] * 20_000})
        written.set()

    assert seen.result() <= {(version, 20_000) for version in range(30)}
    assert len(seen.result()) > 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]


def masked(model: Model, data: Data) -> None:
    torch.nn.utils.prune.l1_unstructured(model.module.fc1, "weight", amount=0.5)


def test_masks_that_a_pruner_leaves_on_are_folded() -> None:
    model = digits_cnn()
    params = sum(parameter.numel() for parameter in model.module.parameters())
    record = job.changed(masked, model, NO_IMAGES, "pruner=mine")
    assert not hasattr(model.module.fc1, "weight_orig")
    assert (model.module.fc1.weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert sum(parameter.numel() for parameter in model.module.parameters()) == params
    assert record is not None
    assert "fc1.weight" in record["notes"][0]


def gives(output: Any) -> Any:
    """Return a pruner that has the network give what `output` makes of its logits."""

    def prune(model: Model, data: Data) -> None:
        forward = model.module.forward
        model.module.forward = lambda images: output(forward(images))

    return prune


def of_type(dtype: torch.dtype) -> Any:
    return lambda model, data: model.module.to(dtype) and None


def sparse(model: Model, data: Data) -> None:
    model.module.fc2.weight = torch.nn.Parameter(model.module.fc2.weight.detach().to_sparse())


def dynamic(model: Model, data: Data) -> None:
    torch.ao.quantization.quantize_dynamic(model.module, {torch.nn.Linear}, inplace=True)


def weightless(model: Model, data: Data) -> None:
    model.module.fc2.to("meta")


def spoilt(model: Model, data: Data) -> None:
    model.module.fc2.weight.data[0] = math.nan


def cut(model: Model, data: Data) -> None:
    """Take half of a layer's channels away by slices, as pruners are often written."""
    model.module.fc1.weight = torch.nn.Parameter(model.module.fc1.weight[:32].detach())
    model.module.fc1.bias.data = model.module.fc1.bias.data[:32]
    model.module.fc2.weight.data = model.module.fc2.weight.data[:, :32]


def after(step: Any) -> list[str]:
    """Return the notes on what a pruner of one's own leaves behind."""
    model, name = digits_cnn(), "the network after pruner=mine"
    record = job.changed(step, model, NO_IMAGES, "pruner=mine") or {"notes": []}
    notes = [*record["notes"], *accepted_change(model, name, "change what it does")]
    assert model.module(model.sample(3)).shape == (3, 10)
    assert {parameter.dtype for parameter in model.module.parameters()} == {torch.float32}
    return notes


@pytest.mark.parametrize(
    ("step", "note"),
    [
        (gives(lambda y: {"logits": y}), "Of what the network gives, logits was taken as its logits."),
        (gives(lambda y: y[..., None]), "The network's logits (2, 10, 1) were brought to the shape (images, classes)."),
        (of_type(torch.bfloat16), "The network's bfloat16 weights were converted to float32."),
        (
            cut,
            "fc1.weight, fc1.bias, fc2.weight, cut out of a larger memory that a file would hold whole, became copies.",
        ),
        (sparse, "fc2.weight, stored sparsely, became dense with the same values."),
    ],
)
def test_what_a_step_leaves_with_one_plain_meaning_is_put_right(step: Any, note: str) -> None:
    assert after(step) == [note]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        (
            gives(lambda y: {"a": y, "b": y}),
            "the network after pruner=mine gives dict (a: a float32 tensor (2, 10), b:",
        ),
        (gives(lambda y: y.half() @ y.T), "fails on float32 images (2, 1, 8, 8) (RuntimeError in test_job.py, line "),
        (gives(lambda y: y.nothing), "'Tensor' object has no attribute 'nothing'); change what it does."),
        (gives(torch.nn.functional.dropout), "the network after pruner=mine draws random numbers when it answers"),
        (weightless, "fc2.weight of the network after pruner=mine has no values yet"),
        (spoilt, "the network after pruner=mine has values that are not finite, in fc2.weight; change what it does."),
        (dynamic, "the network after pruner=mine is quantized already, first in fc1 (Linear)"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_what_a_step_breaks_is_refused_in_one_sentence(step: Any, sentence: str) -> None:
    assert sentence in refused(lambda: after(step))


def test_a_record_that_no_file_can_hold_is_refused() -> None:
    step = lambda model, data: {"kept": torch.ones(2)}  # noqa: E731
    text = refused(lambda: job.changed(step, digits_cnn(), NO_IMAGES, "pruner=mine"))
    assert text.startswith("pruner=mine returns what JSON cannot hold (")


def test_a_network_that_lost_classes_is_named() -> None:
    model = digits_cnn()
    model.module.fc2 = torch.nn.Linear(model.module.fc2.in_features, 5)
    text = refused(lambda: accepted_change(model, "the network after pruner=mine", "change it"))
    assert text.startswith(
        "the network after pruner=mine gives a float32 tensor (2, 5) for two images where float32 logits"
    )


@pytest.mark.parametrize("returned", [digits_cnn(weights=None), 0.5, [1]])
def test_a_step_that_returns_no_record_is_refused(returned: Any) -> None:
    text = refused(lambda: job.changed(lambda model, data: returned, digits_cnn(), NO_IMAGES, "recovery=mine"))
    assert text.startswith(f"recovery=mine returns a {type(returned).__name__}; change model.module in place")
