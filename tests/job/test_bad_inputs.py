"""What a user can get wrong: one sentence that says what would be right, exit code 1, no traceback, no result."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import HEAVY, LAUNCH, SHORT, Done, imported, launch_in, said
from conftest import TESTS, Launch, only_sweep, python
from independent import runtime
from PIL import Image

from pq_sweep.types import UserError

IMAGENET = ("n01440764", "n01443537", "n01484850")
FOLDER = "dataset=image_folder"

# Seen while composing: (id, overrides, part of the sentence).
REFUSED: list[tuple[str, list[str], str]] = [
    ("amount above 1", ["pruner=l1", "pruner.amount=1.5"], "pruner.amount=1.5 is out of range; give the share"),
    ("amount below 0", ["pruner=l1", "pruner.amount=-0.1"], "pruner.amount=-0.1 is out of range"),
    ("amount 1", ["pruner=l1", "pruner.amount=1.0"], "pruner.amount=1.0 is out of range"),
    ("amount is a word", ["pruner=l1", "pruner.amount=abc"], "pruner.amount=abc is out of range"),
    ("no amount", ["pruner=l1", "pruner.amount=null"], "pruner.amount"),
    ("impossible pattern", ["pruner=nm_sparsity", "pruner.n=4"], "pruner.n=4 of pruner.m=4 is no pattern"),
    ("negative batch size", ["measure.batch_sizes=[1,-8]"], "measure.batch_sizes=[1, -8] is not valid"),
    ("no batch size", ["measure.batch_sizes=[]"], "measure.batch_sizes=[] is not valid; give whole numbers"),
    ("batch sizes are words", ["measure.batch_sizes=[a,b]"], "measure.batch_sizes=['a', 'b'] is not valid"),
    ("batch size is true", ["measure.batch_sizes=[true]"], "measure.batch_sizes=[True] is not valid"),
    ("batch sizes are no list", ["measure.batch_sizes=1 4"], "measure.batch_sizes=1 4 is not valid, as it is no list"),
    ("evaluation batch of 0", ["measure.eval_batch_size=0"], "measure.eval_batch_size=0 is out of range"),
    ("evaluation batch of 1.5", ["measure.eval_batch_size=1.5"], "measure.eval_batch_size=1.5"),
    ("no threads", ["measure.threads=0"], "measure.threads=0 is out of range"),
    ("no least time", ["measure.min_s=null"], "measure.min_s=null is not valid; give a number."),
    ("samples end early", ["measure.min_s=5", "measure.max_s=1"], "measure.min_s=5 is more than measure.max_s=1"),
    ("negative seed", ["seed=-1"], "seed=-1 is out of range; give a whole number"),
    ("seed too large", ["seed=99999999999999999999"], "seed=99999999999999999999 is out of range"),
    ("unknown quantizer", ["quantizer=int7"], "quantizer=int7 is not known; valid are: bf16, fp16, fp8, int4"),
    ("unknown runtime", ["runtime=tflite"], "runtime=tflite is not known; valid are: auto, onnxruntime"),
    (
        "option of another runtime",
        ["-m", "runtime=onnxruntime,tensorrt_rtx", "++runtime.build_only=true"],
        "runtime.build_only is no option of the runtime onnxruntime, whose options are: tf32, options; leave it out",
    ),
    ("option of no runtime", ["+runtime.torch.fast=true"], "runtime.torch.fast is no option of the runtime torch"),
    ("unknown device", ["device=tpu"], "device=tpu is not known; valid are: auto, cpu, cuda, cuda:N"),
    ("unknown experiment", ["experiment=table_9"], "experiment=table_9 is not known; valid are: "),
    ("unknown calibration", ["quantizer=int8", "quantizer.calibration=mse"], "valid are: minmax, entropy, percentile"),
    ("unknown importance", ["pruner=remove", "pruner.importance=fisher"], "pruner.importance=fisher is not known"),
    ("slices of no dimension", ["pruner=ln_structured", "pruner.dim=7"], "pruner.dim=7"),
    (
        "percentile above 100",
        ["quantizer=int8", "quantizer.calibration=percentile", "quantizer.percentile=200"],
        "percentile=200",
    ),
    ("group without choice", ["pruner=null"], "null"),
    ("group taken out", ["~dataset"], "dataset"),
    ("component that is not there", ["pruner._target_=nowhere.prune"], "nowhere"),
    ("int8 on torch", ["runtime=torch", "quantizer=int8"], "runtime=torch cannot run precision int8"),
    ("fp16 on torch CPU", ["runtime=torch", "quantizer=fp16", "device=cpu"], "runtime=torch cannot run precision fp16"),
    ("fp8 on torch", ["runtime=torch", "quantizer=fp8"], "fp8 runs with: runtime=onnxruntime device=cpu, runtime=tens"),
    (
        "int4 by a provider",
        ["runtime=tensorrt", "quantizer=int4", "device=cuda"],
        "runtime=tensorrt cannot run precision",
    ),
    (
        "int4 of other blocks",
        ["quantizer=int4", "quantizer.block=32"],
        "quantizer.block=32 is not known; valid are: 64",
    ),
    ("bf16 on ONNX Runtime", ["runtime=onnxruntime", "quantizer=bf16"], "Precision bf16 runs with: runtime=torch"),
    ("TensorRT on CPU", ["runtime=tensorrt", "device=cpu"], "runtime=tensorrt cannot run precision fp32 on device=cpu"),
    ("too few to calibrate", ["quantizer=int8", "quantizer.images=201"], "is more than dataset.calibration=200"),
    ("no calibration images", ["dataset.calibration=0", "quantizer=int8"], "is more than dataset.calibration=0"),
    ("negative calibration", ["dataset.calibration=-1"], "dataset.calibration=-1 is out of range"),
    ("nothing to evaluate", [FOLDER, "dataset.root=.", "dataset.evaluation=0"], "dataset.evaluation=0 is out of range"),
    (
        "unknown size of images",
        ["dataset=imagenette", "dataset.size=64"],
        "dataset.size=64 is not known; valid are: 160",
    ),
    ("unknown precision to keep", ["quantizer=mixed", "quantizer.keep=fp8"], "valid are: fp32, fp16"),
    ("mixed on torch", ["runtime=torch", "quantizer=mixed"], "runtime=torch cannot run precision mixed"),
    (
        "option of a swept group",
        ["-m", "quantizer=int8,mixed", "quantizer.images=4"],
        "where quantizer itself is swept, write ++quantizer.images=...",
    ),
    ("missing checkpoint", ["model.weights=nowhere/net.pth"], "model.weights=nowhere/net.pth is no file"),
    ("missing checkpoint here", ["model.weights=nowhere.pt"], "model.weights=nowhere.pt is no file"),
    ("empty checkpoint name", ["model.weights="], "model.weights="),
    ("empty checkpoint", ["model.weights=./a_file"], "a_file is no readable state_dict (the file is empty); copy or"),
    ("no dataset root", [FOLDER], "dataset.root has no value; give dataset.root="),
    ("missing dataset root", [FOLDER, "dataset.root=nowhere"], "dataset.root=nowhere is not a folder"),
    ("dataset root is a file", [FOLDER, "dataset.root=a_file"], "dataset.root=a_file is not a folder"),
    ("output under a file", ["hydra.sweep.dir=a_file/out"], "the output folder a_file/out cannot be written"),
    ("output is a file", ["hydra.sweep.dir=a_file"], "the output folder a_file cannot be written"),
    ("nested job folders", ["hydra.sweep.subdir=a/b"], "hydra.sweep.subdir=a/b is nested"),
    ("one folder for two jobs", ["-m", "hydra.sweep.subdir=x", "seed=0,1"], "hydra.sweep.subdir=x"),
    ("two experiments", ["-m", "experiment=prune_and_quantize,prune_and_quantize"], "start one sweep for each"),
    (
        "unreadable override",
        ["pruner.amount=[0.1"],
        "the override 'pruner.amount=[0.1' cannot be read; write key=value",
    ),
    ("no override", ["pruner l1"], "the override 'pruner l1' cannot be read"),
]

# Seen in a job: (grid, overrides of the job, part of the sentence). Jobs of a grid share a process.
FAILED: list[tuple[str, tuple[str, ...], str]] = [
    ("checkpoints", ("model.weights=noise.pth",), "noise.pth is no readable state_dict"),
    ("checkpoints", ("model.weights=other.pth",), "other.pth does not fit the model: "),
    ("checkpoints", ("model.weights=evil.pth",), "evil.pth is no readable state_dict"),
    ("checkpoints", ("model.weights=list.pth",), "list.pth holds no state_dict; save one by torch.save"),
    ("checkpoints", ("model.weights=NOWHERE",), "model.weights=NOWHERE is no file; give DEFAULT, null or"),
    ("folders", ("dataset.root=no_classes",), "no_classes holds no images; expected one sub-folder per class"),
    ("folders", ("dataset.root=empty_class",), "has class folders without images: n01443537; fill or remove"),
    ("folders", ("dataset.root=three_classes",), "the model has 1000 classes and the data 3, and 'bird' is none"),
    ("folders", ("dataset.root=unreadable",), "dataset.calibration=2 does not fit: unreadable has 0 usable images"),
    ("folders", ("dataset.root=few",), "few has no usable image to evaluate beside the 2 of dataset.calibration"),
    ("machine", ("dataset.calibration=5000", "device=auto", "runtime=auto"), "digits keeps up to 200 images"),
    (
        "machine",
        ("dataset.calibration=200", "device=auto", "runtime=auto"),
        "the model has 1000 classes and the data 10",
    ),
    (
        "machine",
        ("dataset.calibration=200", "device=cuda", "runtime=auto"),
        "finds no CUDA device here; use device=cpu",
    ),
    (
        "machine",
        ("dataset.calibration=200", "device=auto", "runtime=tensorrt"),
        "runtime=tensorrt cannot run precision fp32",
    ),
    ("machine", ("dataset.calibration=200", "device=cuda", "runtime=tensorrt"), "finds no CUDA device here"),
]
ON_CPU_ONLY = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
RESNET = ("model=resnet18", "model.weights=null")


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return Path.mkdir, (Path("evil_was_here"),)  # type: ignore[return-value]


def write_checkpoints(folder: Path) -> None:
    (folder / "noise.pth").write_bytes(bytes(range(7, 250)) * 20)
    torch.save(torch.nn.Linear(3, 2).state_dict(), folder / "other.pth")
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({"stem.weight": Evil()}, folder / "evil.pth")


def write_images(root: Path, classes: tuple[str, ...], count: int) -> None:
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (8, 8), (index, number, 0)).save(root / name / f"{number}.png")


def write_folders(folder: Path) -> None:
    (folder / "no_classes").mkdir()
    write_images(folder / "empty_class", IMAGENET, 3)
    for path in (folder / "empty_class" / IMAGENET[1]).iterdir():
        path.unlink()
    write_images(folder / "three_classes", ("bird", "cat", "dog"), 2)
    write_images(folder / "few", IMAGENET[:2], 1)
    write_images(folder / "unreadable", IMAGENET[:2], 3)
    for path in (folder / "unreadable").rglob("*.png"):
        path.write_text(f"no image {path}")


GRIDS = {
    "checkpoints": ["model=digits_cnn"],
    "folders": [*RESNET, FOLDER, "dataset.calibration=2"],
    "machine": [*RESNET, "quantizer=none"],
}


def axes(grid: str) -> list[str]:
    """Return the overrides of a grid that has all jobs of FAILED."""
    values: dict[str, dict[str, None]] = {}
    for key, _, value in (item.partition("=") for name, job, _ in FAILED if name == grid for item in job):
        values.setdefault(key, {})[value] = None
    return [f"{key}={','.join(found)}" for key, found in values.items()]


@pytest.fixture(scope="module")
def failing_sweep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Done]]:
    """Run the sweep of a grid, once."""

    @cache
    def run(grid: str) -> tuple[Path, Done]:
        folder = tmp_path_factory.mktemp(grid)
        write_checkpoints(folder)
        write_folders(folder)
        return folder, launch_in(folder, "-m", "tracking=none", *SHORT, *GRIDS[grid], *axes(grid))

    return run


def find_job(sweep: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    jobs = json.loads((sweep / "sweep.json").read_text())["jobs"]
    (found,) = (job for job in jobs if set(overrides) <= set(job["overrides"]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("overrides", "sentence"), [bad[1:] for bad in REFUSED], ids=[bad[0] for bad in REFUSED])
def test_refused_before_the_first_job(
    tmp_path: Path, environment: dict[str, str], overrides: list[str], sentence: str
) -> None:
    (tmp_path / "a_file").touch()
    flags = [item for item in overrides if item.startswith("-")]
    short = ("tracking=none", *SHORT)  # for what should have been refused and runs
    command = [LAUNCH, *flags, *short, *(item for item in overrides if item not in flags)]
    done = python(["-X", "importtime", *command], tmp_path, environment)
    lines = said(done.stderr)
    assert (done.returncode, len(lines)) == (1, 1), [*lines[-5:], done.stdout[-300:]]
    assert "Traceback (most recent" not in done.stdout
    assert sentence in lines[0]
    assert "full_key" not in lines[0]
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]
    assert not HEAVY & imported(done.stderr)


@pytest.mark.slow
@ON_CPU_ONLY
@pytest.mark.parametrize(("grid", "overrides", "sentence"), FAILED, ids=[" ".join(job) for _, job, _ in FAILED])
def test_fails_in_its_job(
    failing_sweep: Callable[[str], tuple[Path, Done]], grid: str, overrides: tuple[str, ...], sentence: str
) -> None:
    folder, done = failing_sweep(grid)
    job = find_job(only_sweep(folder), overrides)
    assert done.returncode == 1
    assert "Traceback (most recent" not in done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(f"job {job['folder']} ("))
    assert "failed at" in line
    assert sentence in line
    job_folder = only_sweep(folder) / job["folder"]
    message = json.loads((job_folder / "error.json").read_text())["message"]
    assert sentence in message
    assert not re.search(r"\x1b|weights_only", message), "torch's advice to load the file all the same"
    assert "Traceback (most recent" in (job_folder / "job.log").read_text()
    left = {path.name for path in job_folder.iterdir()}
    assert not left & {"model.pt", "model.onnx", "result.json", "predictions.npy"}


@pytest.mark.slow
@ON_CPU_ONLY
@pytest.mark.parametrize("grid", GRIDS)
def test_no_job_of_a_failing_sweep_finishes(failing_sweep: Callable[[str], tuple[Path, Done]], grid: str) -> None:
    folder, done = failing_sweep(grid)
    assert ": 0 done, " in done.stdout
    assert not list(folder.rglob("result.json"))


@pytest.mark.slow
@ON_CPU_ONLY
def test_code_in_a_checkpoint_does_not_run(failing_sweep: Callable[[str], tuple[Path, Done]], tmp_path: Path) -> None:
    folder, _ = failing_sweep("checkpoints")
    assert not (folder / "evil_was_here").exists()
    code = "import torch; torch.load('evil.pth', weights_only=False)"
    python(["-c", code], folder, {"PYTHONPATH": str(TESTS)})
    assert (folder / "evil_was_here").exists(), "the checkpoint is not malicious at all"


@pytest.mark.slow
def test_every_problem_of_a_grid_is_listed_once(tmp_path: Path, launch: Launch) -> None:
    done = launch(
        "-m", "pruner=none,l1", "pruner.amount=0.5,1.5,2", "seed=0,-1", "quantizer=none,int8", "runtime=torch"
    )
    problems = {
        "pruner.amount=1.5 is out of range": "(8 of 24 jobs)",
        "pruner.amount=2 is out of range": "(8 of 24 jobs)",
        "seed=-1 is out of range": "(12 of 24 jobs)",
        "runtime=torch cannot run precision int8": "(12 of 24 jobs)",
    }
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert len(lines) == len(problems)
    assert all(sum(start in line and line.endswith(end) for line in lines) == 1 for start, end in problems.items())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="says what happens without TensorRT")
def test_tensorrt_without_tensorrt_says_what_to_install() -> None:
    with pytest.raises(UserError, match=r"runtime=tensorrt needs TensorRT; see environment\.yml"):
        runtime("tensorrt").require("cuda:0")
