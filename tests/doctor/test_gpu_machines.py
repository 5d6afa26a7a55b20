"""The check of a GPU on machines where nothing can be tried: without packages, and with those of a bare machine."""

from __future__ import annotations

import re
import subprocess
import time
import venv
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
from commands import HEAVY, Done, imported
from conftest import ROOT, TESTS, new_user
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_environments import environment_of

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
    try:
        return environment(tmp_path_factory.mktemp("bare"), *BARE)
    except PackageNotFoundError as absent:
        pytest.skip(f"needs {absent.name}, as a bare machine has it")


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
    assert reason.startswith("this Python has no torch; needs torch==")
    assert " (environment.yml), hydra-core>=" in reason
    assert "sweep: digits_cnn torch: not tried this Python has no torch" in done.stdout
    assert {"pytest>=8 (extra dev)", "pyyaml"} <= set(found["to_bring"])
    assert [line for line in done.stdout.splitlines() if line.startswith("to bring: ")] == [
        f"to bring: {name}" for name in found["to_bring"]
    ]
    assert found["environment"].keys() >= {"os", "python", "cpu", "versions"}


def test_make_passes_the_folder_and_the_seconds(empty: Path, tmp_path: Path) -> None:
    given = [f"PYTHON={empty}", f"VENV={tmp_path / 'none'}", f"OUTPUT={tmp_path / 'results'}", "BUDGET_S=240"]
    done = subprocess.run(["make", "gpu-check", *given], cwd=ROOT, env=new_user(), capture_output=True, text=True)

    assert report_of(done, tmp_path / "results")["budget_s"] == 240


def test_a_torch_that_does_not_load_is_a_failure(empty: Path, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    done = run(empty, "-m", "pq_sweep.gpu_check", "--output", str(tmp_path / "results"), PYTHONPATH=str(tmp_path))

    assert done.returncode == 1
    found = read_json(tmp_path / "results" / "no-gpu.json")
    (failed,) = (check for check in found["checks"] if check["verdict"] == "failed")
    assert failed["reason"] == "cuda:0 cannot be used: libcudart.so.13: cannot open shared object file"
    assert all(reason.startswith(failed["reason"]) for reason in found["not_tried"].values())
    assert found["not_tried"].keys() == EVERY


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
    assert "; needs mlflow>=" in found["not_tried"]["sweep: tracked"]
    brought = "\n".join(found["to_bring"])
    assert re.search(r"^onnxruntime-gpu==\S+ in place of onnxruntime \(environment[\w-]*.yml\)$", brought, re.M)
    assert re.search(r"^nvidia-ml-py>=", brought, re.M)
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


@pytest.mark.parametrize(("cuda", "file"), [("12.8", "environment.yml"), ("13.0", "environment-cu13.yml")])
def test_what_depends_on_cuda_is_brought_in_the_version_of_the_environment_that_fits(cuda: str, file: str) -> None:
    environment = environment_of(file)

    tensorrt = f"{environment.tensorrt}=={environment.pins[environment.tensorrt]} ({file})"
    assert wanted("tensorrt", cuda) == tensorrt
    assert wanted("torch", cuda) == f"torch=={environment.pins['torch']} ({file})"
    pin = f"onnxruntime-gpu=={environment.pins['onnxruntime-gpu']}"
    assert wanted("onnxruntime-gpu", cuda) == f"{pin} in place of onnxruntime ({file})"


@pytest.mark.parametrize(
    ("package", "expected"),
    [
        ("nvidia-curand", r"nvidia-curand-cu12"),
        ("torchvision", r"torchvision>=.+ \(pyproject.toml\)"),
        ("pytest", r"pytest>=8 \(extra dev\)"),
        ("tensorrt-rtx-cu13-bindings", r"tensorrt-rtx-cu13-bindings>=.+ \(extra rtx\)"),
        ("antlr4-python3-runtime", r"antlr4-python3-runtime"),
    ],
)
def test_what_to_bring_is_one_package_with_the_file_that_asks_for_it(package: str, expected: str) -> None:
    assert re.fullmatch(expected, wanted(package, "12.8"))


@pytest.mark.parametrize(("version", "is_right"), [("10.4.0", True), ("11.4.0", False)])
def test_a_tensorrt_that_is_not_supported_is_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, is_right: bool
) -> None:
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "__init__.py").touch()
    about = tmp_path / "tensorrt_cu13_bindings.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: tensorrt-cu13-bindings\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)

    assert packages.is_there.__wrapped__("tensorrt") is is_right


def test_every_package_that_a_step_needs_is_one_of_this_project() -> None:
    named = {package for step in STEPS for package in step.needs}
    found = {wanted(package, "13.0") for package in named}

    assert named >= set(MODULES) - {"nvidia-ml-py"}
    assert {text for text in found if "(" not in text} == {
        "pyyaml",
        "antlr4-python3-runtime",
        "triton",
        "onnx-ir",
    }  # of omegaconf, torch and onnxscript
    assert lacks(("torch", "numpy"), "13.0") == ""


def test_a_report_without_anything_tried_never_replaces_that_of_a_device(tmp_path: Path) -> None:
    present = Machine({"device": "NVIDIA L4"}, "13.0")
    unusable = Machine({"device": "NVIDIA L4"}, "13.0", absent="it is not usable")
    names = [Report(tmp_path, machine, STEPS, 480, time.monotonic()).path.name for machine in (present, unusable)]

    assert names == ["nvidia-l4.json", "nvidia-l4-not-tried.json"]


def test_a_broken_device_is_a_failure_that_every_step_tells() -> None:
    machine = Machine({"device": None}, broken="cuda:0 cannot be used: crashed, killed by SIGSEGV")

    (check,) = machine.checks
    assert (check.verdict, check.reason) == ("failed", machine.broken)
    assert machine.prevents(STEPS[0]) == machine.broken
