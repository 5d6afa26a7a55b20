"""The check of a GPU on machines where nothing can be tried: without packages, and with those of a bare machine."""

from __future__ import annotations

import subprocess
import venv
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import pytest
from commands import HEAVY, Done, imported
from conftest import ROOT, TESTS, new_user
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pq_sweep.core.files import read_json
from pq_sweep.doctor.gpu_check import packages
from pq_sweep.doctor.gpu_check.machine import Machine
from pq_sweep.doctor.gpu_check.packages import MODULES, lacks, wanted
from pq_sweep.doctor.gpu_check.report import Report
from pq_sweep.doctor.gpu_check.steps import STEPS

# What docs/gpu.md says that a machine needs, beside what came with it.
BARE = ("torch", "torchvision", "onnxruntime", "onnx", "torch-pruning", *packages.TESTS)
# Brought without what it requires, as for a machine without a network.
ALONE = "hydra-submitit-launcher"
ABSENT = ("mlflow", "submitit", "tensorrt", "tensorrt_rtx_bindings", "matplotlib", "onnxscript", "pandas", "sqlalchemy",
          "requests", "pynvml")  # fmt: skip
EVERY = {f"{step.part}: {step.name}" for step in STEPS}


def needed(names: Iterable[str]) -> set[str]:
    """Return distributions and all that they require here."""
    waiting, seen = [(canonicalize_name(name), "") for name in names], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) not in seen:
            seen.add((name, extra))
            waiting += () if name == ALONE else required(name, extra)
    return {name for name, _ in seen}


def required(name: str, extra: str) -> Iterator[tuple[Any, str]]:
    for wants in map(Requirement, distribution(name).requires or ()):
        if wants.marker is None or wants.marker.evaluate({"extra": extra}):
            yield from ((canonicalize_name(wants.name), one) for one in ("", *wants.extras))


def link(found: Distribution, site: Path) -> None:
    """Link the packages and modules of a distribution; of folders that several share, what is in them."""
    base = Path(str(found.locate_file("")))
    for file in found.files or ():
        if file.parts[0] not in ("..", "__pycache__"):
            whole = len(file.parts) == 1 or (base / file.parts[0] / "__init__.py").exists()
            name = Path(*file.parts[: 1 if whole else 2])
            (site / name).parent.mkdir(exist_ok=True)
            if not (site / name).exists():
                (site / name).symlink_to(base / name)


def environment(folder: Path, *names: str) -> Path:
    """Return the Python of an environment with links to distributions of this one and all that they require."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in needed(names):
        link(distribution(name), site)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("bare"), *BARE)


def run(python: Path, *arguments: str, **env: str) -> Done:
    command, own = [str(python), *arguments], {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""} | env
    return subprocess.run(
        command, cwd=ROOT, env=new_user() | own, capture_output=True, text=True, timeout=300, check=False
    )


def report_of(done: Done, folder: Path) -> Any:
    """Return the report of a check that could try nothing, which lists every step with its reason."""
    assert done.returncode == 2, done.stdout + done.stderr
    (path,) = folder.iterdir()
    assert path.name == "no-gpu.json"
    assert f"report: {path}" in done.stdout
    found = read_json(path)
    assert found["not_tried"].keys() == EVERY
    assert {check["verdict"] for check in found["checks"]} == {"not tried"}
    assert (found["device"], found["complete"]) == (None, True)
    return found


# Without packages


def test_without_any_package_a_report_names_them_all(empty: Path, tmp_path: Path) -> None:
    done = run(empty, "-m", "pq_sweep.gpu_check", "--output", str(tmp_path))
    found = report_of(done, tmp_path)

    assert done.stderr.strip() == "nothing could be tried on a GPU; this Python has no torch"
    reason = found["not_tried"]["tests: torch"]
    assert reason.startswith("this Python has no torch; needs torch==2.10.0 (environment.yml), hydra-core>=")
    assert "sweep: digits_cnn torch: not tried this Python has no torch" in done.stdout
    for name in ("pytest>=8 (extra dev)", "pyyaml", "onnxruntime-gpu==1.20.2 (environment.yml)"):
        assert name in found["to_bring"]
        assert f"to bring: {name}" in done.stdout.splitlines()
    assert found["environment"].keys() >= {"os", "python", "cpu", "versions"}


def test_make_passes_the_folder_and_the_seconds(empty: Path, tmp_path: Path) -> None:
    given = [f"PYTHON={empty}", f"VENV={tmp_path / 'none'}", f"OUTPUT={tmp_path / 'results'}", "BUDGET_S=240"]
    done = subprocess.run(["make", "gpu-check", *given], cwd=ROOT, env=new_user(), capture_output=True, text=True)

    assert report_of(done, tmp_path / "results")["budget_s"] == 240


def test_a_mistake_on_the_command_line_is_not_taken_for_a_machine_without_gpu(empty: Path) -> None:
    assert run(empty, "-m", "pq_sweep.gpu_check", "--budget-s", "long").returncode == 1


# With the packages of a bare machine


@pytest.mark.slow
def test_a_bare_machine_without_gpu_gets_a_report_within_seconds(bare: Path, tmp_path: Path) -> None:
    absent = f"import importlib.util as u; print([m for m in {ABSENT} if u.find_spec(m)])"
    assert run(bare, "-c", absent).stdout.strip() == "[]"
    done = run(bare, "-X", "importtime", "-m", "pq_sweep.gpu_check", "--output", str(tmp_path))
    found = report_of(done, tmp_path)

    assert not imported(done.stderr) & {*HEAVY, "hydra", "omegaconf", "pytest"}
    assert found["seconds"] < 120
    assert all(" finds no CUDA device here (" in reason for reason in found["not_tried"].values())
    assert "needs" not in found["not_tried"]["tests: torch"]
    assert "needs mlflow>=3.7,<3.18 (pyproject.toml)" in found["not_tried"]["sweep: tracked"]
    assert "onnxruntime-gpu==1.31.1 in place of onnxruntime (environment-cu13.yml)" in found["to_bring"]
    assert not [name for name in found["to_bring"] if name.startswith(("torch", "hydra", "pytest"))]
    assert "sweep" in done.stdout


SWEPT = """
import sys
from dataclasses import replace
from pathlib import Path
from commands import SHORT, launch_in
from conftest import only_sweep, results
from pq_sweep.gpu_check import check
from pq_sweep.doctor.gpu_check.steps import STEPS

folder = Path(sys.argv[1])
names = ("digits_cnn torch", "tracked", "digits_cnn onnxruntime")
chosen = [replace(step, quantizers=("none",)) for step in STEPS if step.name in names]
check("cpu", folder / "results", 480, chosen)
done = launch_in(folder, "device=cpu", "runtime=torch", "tracking=none", *SHORT)
sys.exit(done.stderr if done.returncode else len(results(only_sweep(folder))) - 1)
"""


@pytest.mark.slow
def test_the_jobs_of_sweep_and_tests_run_on_a_bare_machine(bare: Path, tmp_path: Path) -> None:
    done = run(bare, "-c", SWEPT, str(tmp_path), PYTHONPATH=str(TESTS))

    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").iterdir()
    found = read_json(path)
    passed = [check["name"] for check in found["checks"] if check["verdict"] == "passed"]
    assert passed == ["digits_cnn none none torch"]
    assert found["not_tried"].keys() == {"sweep: digits_cnn onnxruntime", "sweep: tracked"}
    assert "onnxscript" in found["not_tried"]["sweep: digits_cnn onnxruntime"]


@pytest.mark.slow
def test_the_tests_for_a_gpu_can_be_collected_on_a_bare_machine(bare: Path) -> None:
    done = run(bare, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/gpu")

    assert done.returncode == 0, done.stdout
    assert "needs a CUDA device and torch finds none" in done.stdout


# Packages


@pytest.mark.parametrize(
    ("package", "cuda", "expected"),
    [
        ("onnxruntime-gpu", "12.8", "onnxruntime-gpu==1.20.2 in place of onnxruntime (environment.yml)"),
        ("onnxruntime-gpu", "13.0", "onnxruntime-gpu==1.31.1 in place of onnxruntime (environment-cu13.yml)"),
        ("tensorrt", "12.8", "tensorrt-cu12==10.4.0 (environment.yml)"),
        ("tensorrt", "13.0", "tensorrt-cu13==10.16.1.11 (environment-cu13.yml)"),
        ("nvidia-curand", "12.8", "nvidia-curand-cu12"),
        ("torchvision", "13.0", "torchvision>=0.25,<0.30 (pyproject.toml)"),
        ("pytest", "13.0", "pytest>=8 (extra dev)"),
        ("tensorrt-rtx-cu13-bindings", "13.0", "tensorrt-rtx-cu13-bindings>=1.7,<1.8 (extra rtx)"),
        ("antlr4-python3-runtime", "", "antlr4-python3-runtime"),
    ],
)
def test_what_to_bring_is_one_package_in_the_version_that_fits(package: str, cuda: str, expected: str) -> None:
    assert wanted(package, cuda) == expected


def test_every_package_that_a_step_needs_is_one_of_this_project() -> None:
    named = {package for step in STEPS for package in step.needs}
    found = {wanted(package, "13.0") for package in named}

    assert named >= set(MODULES) - {"nvidia-ml-py"}
    assert {text for text in found if "(" not in text} == {
        "pyyaml",
        "antlr4-python3-runtime",
        "triton",
    }  # of omegaconf and torch
    assert lacks(("torch", "numpy"), "13.0") == ""


def test_a_report_without_anything_tried_never_replaces_that_of_a_device(tmp_path: Path) -> None:
    present = Machine({"device": "NVIDIA L4"}, "13.0")
    unusable = Machine({"device": "NVIDIA L4"}, "13.0", absent="it is not usable")
    names = [Report(tmp_path, machine, STEPS, 480, 0).path.name for machine in (present, unusable)]

    assert names == ["nvidia-l4.json", "nvidia-l4-not-tried.json"]


def test_a_broken_device_is_a_failure_that_every_step_tells() -> None:
    machine = Machine({"device": None}, broken="cuda:0 cannot be used: crashed, killed by SIGSEGV")

    (check,) = machine.checks
    assert (check.verdict, check.reason) == ("failed", machine.broken)
    assert machine.prevents(STEPS[0]) == machine.broken
