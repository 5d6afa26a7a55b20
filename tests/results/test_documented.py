"""docs/results.md has every field, column and file that jobs leave, and none that they do not.

What only a GPU gives comes from the same code on stand-ins for CUDA, NVML and TensorRT.
"""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import SHORT
from conftest import ROOT
from cuda_stand_in import Machine
from gpu_stand_in import as_a100
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from image_folders import black_png, fill
from independent import runtime, workspace
from nvml_stand_in import stand_in
from sweep_folders import announced, write_error, write_manifest, write_result, write_status
from torch import nn

from pq_sweep.compress.quantizers import fp8, none
from pq_sweep.core import environment
from pq_sweep.core.cache import Cache
from pq_sweep.core.folder import BaselineFolder, Inside, JobFolder, SweepFolder
from pq_sweep.inputs.datasets import digits
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job import describe
from pq_sweep.job.run import run
from pq_sweep.job.stages import Stages
from pq_sweep.measure.latency import speed
from pq_sweep.measure.memory import free_at_first
from pq_sweep.measure.monitor.identity import CONSTANT, IDENTITY
from pq_sweep.measure.network import count
from pq_sweep.results.spreadsheet import write_csv
from pq_sweep.results.standing import Watch, remember
from pq_sweep.runtimes import rtx
from pq_sweep.runtimes.cuda import TF32_OVERRIDE
from pq_sweep.types import Model, Preprocess

PAGE = (ROOT / "docs" / "results.md").read_text()
BUILDS = find_spec(rtx.API) is not None  # TensorRT-RTX has no wheels for other systems than Linux on x86-64

Keys = tuple[str, ...]
Result = dict[str, Any]


# What is documented


def rows(first: str) -> list[str]:
    """Return the rows of all tables of the page whose first column has this name."""
    tables = re.findall(rf"^\| {first} \|.*\n\|[-|]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    return [row for table in tables for row in table.splitlines()]


def named(first: str) -> list[str]:
    """Return what the first cells of those rows name."""
    return [name for row in rows(first) for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def pattern(name: str) -> re.Pattern[str]:
    """Return a pattern of a name in which `<batch>` and the like stand for something."""
    return re.compile("(.+)".join(map(re.escape, re.split(r"<\w+>", name))))


FIELDS = {name: tuple(pattern(part) for part in name.replace("[]", ".[]").split(".")) for name in named("field")}


def meets(parts: tuple[re.Pattern[str], ...], keys: Keys) -> bool:
    """Say whether a documented path, of as many parts, is that of these keys."""
    return all(part.fullmatch(key) for part, key in zip(parts, keys, strict=True))


def is_documented(keys: Keys, value: Any) -> bool:
    """Say whether a row is about a value, or about the parts that it would have if there were any."""
    for parts in FIELDS.values():
        whole = parts[-1].pattern == re.escape("*") and len(keys) >= len(parts)
        wanted = parts[:-1] if whole else parts
        if value in (None, {}, []):
            wanted = wanted[: len(keys)]
        if (whole or len(wanted) == len(keys)) and meets(wanted, keys[: len(wanted)]):
            return True
    return False


def stands_for(name: str, keys: Keys) -> bool:
    """Say whether a documented path leads to a value, or to what holds it."""
    parts = FIELDS[name][:-1] if name.endswith(".*") else FIELDS[name]
    return len(keys) >= len(parts) and meets(parts, keys[: len(parts)])


# What there is


def leaves(value: Any, *keys: str) -> Iterator[tuple[Keys, Any]]:
    """Yield every value of a result that has no further parts, with the keys that lead to it."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from leaves(part, *keys, key)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for part in value:
            yield from leaves(part, *keys, "[]")
    else:
        yield keys, value


def job(folder: Path, *options: str) -> Result:
    """Run a job in a folder and return what it wrote."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=[*SHORT, *options])
    folder.mkdir(parents=True)
    run(config, folder)
    return read(folder / "result.json")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def plain(value: Any) -> Any:
    """Return a value as `result.json` has it."""
    return json.loads(json.dumps(value, default=lambda part: part.plain()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for all jobs here, which share a cache that is not the user's."""
    found = tmp_path_factory.mktemp("documented")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PQ_SWEEP_CACHE", str(found / "cache"))
        yield found


@pytest.fixture(scope="module")
def compressed(folder: Path) -> Result:
    """A job that leaves all that a CPU can: removal, INT8, repeats, pairs and all percentiles."""
    wanted = ("pruner=remove", "quantizer=int8", "runtime=onnxruntime", "device=cpu", "measure.iterations=700")
    return job(
        folder / "sweep" / "0",
        *wanted,
        "measure.max_s=5",
        "measure.paired=true",
        "measure.repeats=2",
        "measure.interval=1",
    )


@pytest.fixture(scope="module")
def photographs(folder: Path) -> Result:
    """A job on image files, of which one is none and one is black, under SLURM, by torch."""
    images = fill(folder / "images", {"0": 6, "1": 6})
    (images / "0" / "broken.png").write_bytes(b"no image")
    (images / "0" / "black.png").write_bytes(black_png(8, 8))
    with pytest.MonkeyPatch.context() as slurm:
        for name in environment.SLURM:
            slurm.setenv(name, "7")
        wanted = (
            "runtime=torch",
            "device=cpu",
            "dataset=image_folder",
            f"dataset.root={images}",
            "dataset.calibration=2",
        )
        return job(folder / "sweep" / "1", *wanted)


class Images:
    """Images that are wherever they are sent."""

    def __len__(self) -> int:
        return 1

    def to(self, *_: Any, **__: Any) -> Images:
        return self

    cpu = pin_memory = to


class OnCuda:
    """A session on the first GPU of a machine, on which its calls take 10 ms; the host takes as long to wait for it."""

    device = "cuda:0"

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def __call__(self, images: Images) -> Images:
        self.machine.torch_op(self.device, device_ns=10_000_000)
        time.sleep(0.01)
        return images


@pytest.fixture(scope="module")
def gpu(folder: Path) -> tuple[Result, dict[str, Any]]:
    """What latency, memory and machine come to on a GPU, and the samples."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        wanted = [*SHORT, "measure.min_s=1.2", "measure.max_s=2", "measure.paired=true"]
        protocol = instantiate(compose("config", overrides=wanted).measure, _convert_="all")
    data: Any = SimpleNamespace(evaluation=[None])
    with pytest.MonkeyPatch.context() as patch:
        stand_in(folder / "driver", patch)(others=[])
        machine = Machine().install(patch)
        free_at_first.cache_clear()
        free_at_first("cuda:0")
        machine.taken[0] = 2_000_000_000
        patch.setattr("pq_sweep.measure.latency.latency_images", lambda *_: Images())
        session: Any = OnCuda(machine)
        (folder / "gpu").mkdir()
        found, samples = speed(session, data, protocol, Stages(folder / "gpu", ""), lambda: nullcontext(session))
        about = describe.describe("cuda:0", 1)
    return plain(found) | {"environment": plain(about)}, samples


@pytest.fixture(scope="module")
def sessions(folder: Path) -> list[Result]:
    """What the sessions of a GPU say of themselves."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PQ_SWEEP_CACHE", str(folder / "cache"))
        patch.setenv(TF32_OVERRIDE, "0")
        as_a100(patch)
        model = digits_cnn()
        for name in ("tensorrt", "tensorrt_native", "onnxruntime"):
            work = workspace(folder / name)
            work.stage.cache = Cache({})
            options = {"options": {"cudnn_conv_algo_search": "HEURISTIC"}} if name == "onnxruntime" else {}
            chosen = runtime(name, **options)
            if name == "onnxruntime":  # its graph is there; on the stand-in it is loaded for CUDA
                on_cuda = replace(work, device="cuda:0")
                session = chosen.load(folder / "tensorrt" / "model.onnx", none, on_cuda, {})
            else:
                session = chosen.open(model, none, digits(model), work)
            found.append({"session": plain(session.details)})
    return found


@pytest.fixture(scope="module")
def only_built(folder: Path) -> list[Result]:
    """What a session of TensorRT-RTX says of an engine for another machine, if the library is there."""
    if not BUILDS:
        return []
    work, model = workspace(folder / "tensorrt_rtx"), digits_cnn()
    work.stage.cache = Cache({})
    builder = runtime("tensorrt_rtx", build_only=True, compute_capability="8.9")
    return [{"session": plain(builder.open(model, none, digits(model), work).details)}]


@pytest.fixture(scope="module")
def simulated(folder: Path) -> Result:
    """What a session says of itself that simulates its precision."""
    work, model = workspace(folder / "simulated"), digits_cnn()
    what = partial(fp8, calibration="minmax", images=4, exclude=[], percentile=99.9)
    return {"session": plain(runtime("onnxruntime").open(model, what, digits(model), work).details)}


class Spectrum(nn.Linear):
    """A network whose Fourier transform is not counted."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(super().forward(images)).real.mean((1, 2))


@pytest.fixture(scope="module")
def uncounted() -> Result:
    counts = plain(count(Model(Spectrum(8, 8), 5, Preprocess(size=8, resize=8, channels=1, mean=(0,), std=(1,)))))
    return {"network": counts, "baseline": counts}


@pytest.fixture(scope="module")
def found(
    compressed: Result,
    photographs: Result,
    gpu: tuple[Result, dict[str, Any]],
    sessions: list[Result],
    only_built: list[Result],
    simulated: Result,
    uncounted: Result,
) -> list[Result]:
    """All results and parts of results."""
    nvml: Result = {"environment": {"gpu": {"nvml": dict.fromkeys(CONSTANT | IDENTITY, 0)}}}
    nvml["environment"]["gpu"]["nvml"]["mig_instance"] = dict.fromkeys(
        ("gpu_uuid", "gpu_instance", "compute_instance"), 0
    )
    return [compressed, photographs, gpu[0], nvml, *sessions, *only_built, simulated, uncounted]


# What holds them together


@pytest.mark.slow
def test_every_field_is_documented(found: list[Result]) -> None:
    missing = {".".join(keys) for result in found for keys, value in leaves(result) if not is_documented(keys, value)}
    assert not missing


@pytest.mark.slow
def test_every_documented_field_is_there(found: list[Result]) -> None:
    there = [keys for result in found for keys, _ in leaves(result)]
    absent = {name for name in FIELDS if not any(stands_for(name, keys) for keys in there)}
    assert absent == (set() if BUILDS else {"session.build_only", "session.compute_capability"})


@pytest.mark.slow
def test_what_repeats_another_part_has_no_field_of_its_own(gpu: tuple[Result, dict[str, Any]]) -> None:
    (latency,) = gpu[0]["latency"].values()
    assert latency["host_to_host"].keys() < latency.keys()


def test_nothing_is_documented_twice() -> None:
    for first in ("field", "column"):
        names = named(first)
        assert [name for name in names if names.count(name) > 1] == []
        assert all(row.count("|") == 5 for row in rows(first))


def test_a_field_that_nobody_documented_is_found() -> None:
    assert is_documented(("latency", "8", "p50_ms"), 1.0)
    assert is_documented(("session", "quantizer", "layers", "[]", "name"), "conv1")
    assert is_documented(("environment", "gpu"), None)
    assert not is_documented(("environment", "gpu"), "A100")
    assert not is_documented(("latency", "8", "p51_ms"), 1.0)
    assert not is_documented(("latency", "8"), 1.0)
    assert not is_documented(("tries", "[]", "ended"), 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "onnxruntime"])
def test_every_field_that_a_gpu_gives_is_documented(tmp_path: Path, name: str) -> None:
    result = job(tmp_path / "0", f"runtime={name}", "device=cuda", "measure.paired=true")
    assert {".".join(keys) for keys, value in leaves(result) if not is_documented(keys, value)} == set()


@pytest.fixture
def columns(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compressed: Result,
    photographs: Result,
    gpu: tuple[Result, dict[str, Any]],
) -> list[str]:
    """Return the columns of a sweep with jobs in every state, one with figures of a GPU too, one as if only built."""
    on_gpu = compressed | {name: gpu[0][name] for name in ("memory", "latency")}
    machine = gpu[0]["environment"]
    product = machine["gpu"] | {"name": "NVIDIA A100-SXM4-40GB"}  # of which there are peaks
    on_gpu["environment"] = machine | {"gpu": product}
    (latency,) = on_gpu["latency"].values()
    figures = {"p50_ci95_ms": [1, 2], "p90_ms": 3, "p99_ms": 4, "energy_per_image_j": 5}
    on_gpu["latency"] = {"1": latency | figures}
    jobs = [announced(str(number), node_type="v100", bits=4, order="quantize_first") for number in range(5)]
    for number, entry in enumerate(jobs):
        entry["overrides"] = [f"repeat={number}", f"quantizer.images={number}"]
    sweep = write_manifest(tmp_path / "sweep", *jobs)
    (sweep / "sweep.json").write_text(json.dumps(read(sweep / "sweep.json") | {"started": time.time()}))
    write_result(sweep, "0", on_gpu)
    write_result(
        sweep, "1", photographs | {"session": photographs["session"] | {"compute_capability": "8.9", "simulated": "a"}}
    )
    write_error(sweep, "2")
    lost = {"stderr": ["killed"], "slurm": {"slurm_job": "12_2", "state": "FAILED", "exit_code": "0:9", "node": "v1"}}
    (sweep / "2" / "error.json").write_text(json.dumps(read(sweep / "2" / "error.json") | lost))
    write_status(sweep, "3", pid=1)
    remember(sweep, {"4": {"id": "12_4", "pickle": "none", "stderr": "none", "submitted": time.time()}})
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '12_4|PENDING||Priority'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with write_csv(Watch(sweep).look()).open() as file:
        return next(csv.reader(file))


@pytest.mark.slow
def test_every_column_is_documented_and_there(columns: list[str]) -> None:
    known = {name: pattern(name) for name in named("column")}
    assert {column for column in columns if not any(form.fullmatch(column) for form in known.values())} == set()
    assert {name for name, form in known.items() if not any(map(form.fullmatch, columns))} == set()


def files(first: str) -> set[str]:
    return {name.rstrip("/") for name in named(first)}


@pytest.mark.slow
@pytest.mark.usefixtures("compressed", "photographs")
def test_every_file_is_documented(folder: Path) -> None:
    sweep = folder / "sweep"
    left = {path.name for job in ("0", "1") for path in (sweep / job).iterdir()}
    assert left <= files("file of a job")
    assert {path.name for path in sweep.glob("baseline/*/*")} == files("file of `baseline/<hash>/`")


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        (JobFolder, "file of a job"),
        (SweepFolder, "file of a sweep"),
        (BaselineFolder, "file of `baseline/<hash>/`"),
    ],
)
def test_every_file_that_the_code_names_is_documented(kind: type, first: str) -> None:
    known = {part.name.partition("/")[0] for part in vars(kind).values() if isinstance(part, Inside)}
    assert known
    assert known - files(first) == set()


@pytest.mark.slow
@pytest.mark.usefixtures("compressed")
def test_small_files_are_described_whole(folder: Path, tmp_path: Path) -> None:
    stage = Stages(tmp_path / "job", "")
    stage.folder.mkdir()
    with suppress(ValueError), stage.keeping_errors(), stage("prune"):
        raise ValueError
    layers = read(folder / "sweep" / "0" / "layers.json")
    keys = {name: set(read(stage.folder / name)) for name in ("error.json", "status.json")}
    keys["layers.json"] = {*layers, *next(iter(layers["after"].values()))}
    told = {
        name: set(re.findall(r"`(\w+)`", row)) for name in keys for row in rows("file of a job") if f"`{name}" in row
    }
    assert {name: found - told[name] for name, found in keys.items()} == {name: set() for name in keys}


@pytest.mark.slow
@pytest.mark.usefixtures("compressed")
def test_every_array_of_samples_is_documented(folder: Path, gpu: tuple[Result, dict[str, Any]]) -> None:
    names = [*np.load(folder / "sweep" / "0" / "samples.npz").files, *gpu[1]]
    clocks = {re.sub(r"^(repeat\d+_)?b\d+_", "b<batch>_", name) for name in names}
    assert {name for name in clocks if f"`{name}`" not in PAGE} == set()
    assert clocks == set(re.findall(r"`(b<batch>_\w+)`", PAGE))
