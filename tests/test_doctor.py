"""The doctor: what it finds here is true, and what can hang, crash or be missing is told in its section."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from commands import HEAVY, Done, imported
from conftest import new_user, python
from rich.console import Console

from pq_sweep import doctor
from pq_sweep.doctor import (
    CPU,
    CUDA,
    JUDGES,
    NO_TENSORRT,
    TENSORRT,
    ChildError,
    Facts,
    Section,
    cgroup_cpus,
    draw,
    examine,
    has_kernels,
    in_child,
    judged,
    provider_error,
    shown,
    unmet,
    without_home,
)
from pq_sweep.runtimes import OnnxRuntime, Torch

DEAD_STORE = "postgresql+psycopg2://user:s3cret@127.0.0.1:9/pq"
TORCH_210 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
TORCH_215 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
V100 = {"name": "Tesla V100-SXM2-32GB", "compute_capability": "7.0", "error": ""}
A100 = {"name": "NVIDIA A100-SXM4-40GB", "compute_capability": "8.0", "error": ""}
H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "error": ""}


@pytest.fixture(scope="module")
def quiet_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH without SLURM's tools."""
    folder = tmp_path_factory.mktemp("bin")
    git = shutil.which("git")
    assert git
    (folder / "git").symlink_to(git)
    return str(folder)


def consult(folder: Path, path: str, *arguments: str, **env: str) -> Done:
    return python(["-m", "pq_sweep.doctor", *arguments], folder, new_user() | {"PATH": path} | env)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, quiet_path: str) -> Done:
    """The report on this machine with a store that is down, as text."""
    return consult(tmp_path_factory.mktemp("told"), quiet_path, MLFLOW_TRACKING_URI=DEAD_STORE)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, quiet_path: str) -> list[Section]:
    """The report on this machine, as JSON; there is no problem."""
    done = consult(tmp_path_factory.mktemp("report"), quiet_path, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return [Section(**section) for section in json.loads(done.stdout)["sections"]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose modules and packages this process and its children see before all others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def machine(**changes: Facts) -> dict[str, Facts]:
    """What is found on a machine of two cores without a GPU, with some sections changed."""
    provider = {"version": "1.31.1", "packages": {"onnxruntime": "1.31.1"}, "providers": {CPU: ""}}
    found: dict[str, Facts] = {
        "python": {"python": "3.11.4", "unmet": []},
        "cpu": {"name": "EPYC", "architecture": "x86_64", "cores_usable": 2, "cgroup_cpus": None}
        | {"instruction_sets": ["avx2"]},
        "gpu": {"nvml": "no NVIDIA driver", "gpus": []},
        "torch": {"version": "2.15.0", "cuda": "13.0", "cudnn": 92600, "architectures": TORCH_215, "visible": None}
        | {"error": "Found no NVIDIA driver on your system.", "devices": []},
        "onnxruntime": provider,
        "tensorrt": {"version": None},
        "disk": {"cache": {"path": "~/cache", "free_gb": 65.0, "network": "", "error": ""}},
        "slurm": {"tools": []},
        "tracking": {"store": "sqlite:///mlflow.db", "from": "the working folder", "network": "", "error": ""},
    }
    return {name: facts | changes.get(name, {}) for name, facts in found.items()}


def on(*gpus: Facts, architectures: list[str] = TORCH_215, **changes: Facts) -> dict[str, Facts]:
    """What is found on a machine with GPUs."""
    torch = {"devices": list(gpus), "architectures": architectures, "error": ""}
    return machine(gpu={"gpus": [gpu | {"mig": None} for gpu in gpus]}, torch=torch, **changes)


def remedy(name: str, found: dict[str, Facts]) -> str:
    """Return the one remedy of a section that is a problem."""
    section = judged(name, found)
    assert section.verdict == "problem", section
    (sentence,) = section.remedies
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


def advice(name: str, found: dict[str, Facts], verdict: str = "ok") -> list[str]:
    """Return the remedies of a section that is no problem."""
    section = judged(name, found)
    assert section.verdict == verdict, section
    return section.remedies


def leaves(value: Any) -> list[str]:
    """Return all texts and numbers of nested values, as they are shown."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [shown(value)] if inner is None else [leaf for item in inner for leaf in leaves(item)]


def squeezed(text: str) -> str:
    return "".join(text.split())


# The command


@pytest.mark.slow
def test_a_problem_is_told_by_the_exit_code_and_no_password_is(told: Done) -> None:
    assert told.returncode == 1
    assert told.stdout.splitlines()[-1] == "1 problem: tracking"
    assert "postgresql+psycopg2://user:***@127.0.0.1:9/pq" in told.stdout
    assert "s3cret" not in told.stdout
    assert told.stderr == ""


@pytest.mark.slow
def test_the_text_pastes_into_a_bug_report(told: Done) -> None:
    lines = told.stdout.splitlines()
    assert max(map(len, lines)) <= 118
    assert not any(line != line.rstrip() for line in lines)
    assert "\x1b" not in told.stdout
    assert told.stdout.isascii()


@pytest.mark.slow
def test_text_and_json_have_the_same_sections(told: Done, report: list[Section]) -> None:
    assert [section.name for section in report] == list(JUDGES)
    words = [line.split() for line in told.stdout.splitlines() if not line.startswith(" ")][:-1]
    heads = [" ".join(line[: 1 + len(section.verdict.split())]) for line, section in zip(words, report, strict=True)]
    verdicts = {section.name: section.verdict for section in report} | {"tracking": "problem"}
    assert heads == [f"{verdict} {name}" for name, verdict in verdicts.items()]


@pytest.mark.slow
def test_the_text_says_all_that_json_says(report: list[Section], capsys: pytest.CaptureFixture[str]) -> None:
    draw(report, Console(width=118))
    printed = squeezed(capsys.readouterr().out)
    for section in report:
        for value in [*leaves(section.details), *section.details, *section.remedies]:
            known = section.details.get(value, value) not in (None, "", {})
            assert not known or squeezed(value) in printed


def test_every_problem_has_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    sections = [judged(name, {}) for name in JUDGES]
    draw(sections, Console(width=60))
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"{len(JUDGES)} problems: {', '.join(JUDGES)}"
    assert all(squeezed(f"-> {section.remedies[0]}") in squeezed(printed) for section in sections)


def test_a_terminal_gets_ticks(capsys: pytest.CaptureFixture[str]) -> None:
    draw([judged("cpu", machine()), judged("slurm", machine())], Console(force_terminal=True, width=118))
    assert [line.count("✓") for line in capsys.readouterr().out.splitlines() if "ok" in line] == [1]


@pytest.mark.slow
def test_what_runs_here_is_what_the_runtimes_promise(report: list[Section]) -> None:
    sections = {section.name: section for section in report}
    assert sections["onnxruntime"].details[CPU] == "runs"
    (runs,) = [details for name, details in sections["precisions"].details.items() if name.startswith("cpu (")]
    for runtime, name in ((Torch, "torch"), (OnnxRuntime, "onnxruntime")):
        assert [text.partition(" ")[0] for text in runs[name]] == list(runtime.precisions["cpu"])
    assert sections["cpu"].details["cores_usable"] == len(os.sched_getaffinity(0))


def test_the_command_itself_imports_no_framework(tmp_path: Path) -> None:
    done = python(["-X", "importtime", "-m", "pq_sweep.doctor", "--help"], tmp_path, new_user())
    assert done.returncode == 0
    assert not imported(done.stderr) & HEAVY


# Processes of their own


def test_a_child_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHILD_S", 1.0)
    start = time.monotonic()
    with pytest.raises(ChildError, match=r"^no answer within 1 s$"):
        in_child("signal", "pause")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("os", "abort"), r"^crashed, killed by SIGABRT"),
        (("sys", "exit", "it went wrong"), r"^crashed, exit code 1: it went wrong$"),
        (("sys", "exit"), r"^ended without an answer$"),
        (("importlib", "import_module", "no_such_module"), r"^No module named 'no_such_module'$"),
    ],
)
def test_a_child_that_fails_says_how(call: tuple[str, ...], message: str) -> None:
    with pytest.raises(ChildError, match=message):
        in_child(*call)


def test_a_child_may_chatter_before_it_answers(here: Path) -> None:
    (here / "chatter.py").write_text(
        "def answer():\n    print('loading')\n    return {'a': [1, None], 'b': 'b' * 999}\n"
    )
    assert in_child("chatter", "answer") == {"a": [1, None], "b": "b" * 999}


def test_a_section_that_fails_or_hangs_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Facts:
        raise OSError("postgresql://me:s3cret@host is\nbroken")

    def hang() -> Facts:
        Event().wait()
        return {}

    looks: dict[str, Callable[[], Facts]] = {name: facts.copy for name, facts in machine().items()}
    monkeypatch.setattr(doctor, "LOOKS", looks | {"disk": fail, "tracking": hang})
    monkeypatch.setattr(doctor, "LOOK_S", 0.5)
    sections = {section.name: section for section in examine()}
    assert [name for name, section in sections.items() if section.verdict == "problem"] == ["disk", "tracking"]
    assert sections["disk"].details == {"error": "postgresql://me:***@host is"}
    assert "no answer within" in sections["tracking"].remedies[0]


# Python


def test_packages_that_do_not_fit_are_named() -> None:
    wanted = ["torch<2.16,>=2.10", "mlflow<3.18", "Scikit_Learn>=1.4", "rich>=13", "tensorrt>=10; extra == 'gpu'"]
    there = {"torch": "2.15.0+cu130", "mlflow": "3.18.0", "scikit-learn": "1.7"}
    assert list(unmet(wanted, there)) == ["mlflow<3.18 (here: 3.18.0)", "rich>=13 (here: none)"]
    assert "mlflow<3.18 (here: 3.18.0)" in remedy("python", machine(python={"unmet": ["mlflow<3.18 (here: 3.18.0)"]}))


def test_the_packages_here_fit() -> None:
    wanted = doctor.requirements()
    assert any(line.startswith("torch") for line in wanted)
    assert list(unmet(wanted, doctor.installed())) == []


def test_the_home_folder_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert without_home("/home/me/work") == "~/work"
    assert without_home("sqlite:////home/me/mlflow.db") == "sqlite:///~/mlflow.db"
    assert without_home("/home/merlin/work") == "/home/merlin/work"
    monkeypatch.setenv("HOME", "/")
    assert without_home("/data/work") == "/data/work"


# CPU


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/job/step", {"job/cpu.max": "150000 100000", "job/step/cpu.max": "max 100000"}, 1.5),
        ("0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "50000 100000"}, 0.5),
        ("0::/job", {"job/cpu.max": "max 100000"}, None),
        ("0::/../outside/the/container", {"cpu.max": "200000 100000"}, 2.0),
        ("4:memory:/a\n1:cpu,cpuacct:/a", {"cpu,cpuacct/a/cpu.cfs_quota_us": "75000"}
         | {"cpu,cpuacct/a/cpu.cfs_period_us": "50000"}, 1.5),
        ("1:cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("1:cpuset:/a\n0::/", {}, None),
    ],
)  # fmt: skip
def test_the_least_quota_above_a_process_counts(
    tmp_path: Path, membership: str, files: dict[str, str], expected: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cgroup_cpus(membership, tmp_path) == expected


def test_threads_above_the_quota_are_advised_against() -> None:
    (sentence,) = advice("cpu", machine(cpu={"cgroup_cpus": 1.5}))
    assert "measure.threads=1" in sentence
    assert advice("cpu", machine(cpu={"cgroup_cpus": 2.0})) == []


# GPUs


def test_without_nvml_its_package_is_named(here: Path) -> None:
    (here / "pynvml.py").write_text("raise ImportError")
    (sentence,) = advice("gpu", machine(gpu=in_child("pq_sweep.doctor", "look_at_gpus")), "not here")
    assert "pip install nvidia-ml-py" in sentence


def test_without_a_driver_there_is_no_gpu() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("needs a machine without a driver")
    found = in_child("pq_sweep.doctor", "look_at_gpus")
    assert found == {"nvml": "no NVIDIA driver", "gpus": []}
    assert advice("gpu", machine(gpu=found), "not here") == []


NVML = """
from types import SimpleNamespace

class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_DriverNotLoaded(NVMLError): pass

GPUS = [("Tesla V100", (7, 0)), ("NVIDIA A100", (8, 0))]
nvmlInit = lambda: None
nvmlSystemGetDriverVersion = lambda: "580.95.05"
nvmlSystemGetCudaDriverVersion = lambda: 13010
nvmlDeviceGetCount = lambda: len(GPUS)
nvmlDeviceGetHandleByIndex = lambda index: index
nvmlDeviceGetName = lambda index: GPUS[index][0]
nvmlDeviceGetUUID = lambda index: f"GPU-{index}"
nvmlDeviceGetCudaComputeCapability = lambda index: GPUS[index][1]
nvmlDeviceGetMemoryInfo = lambda index: SimpleNamespace(total=34_359_738_368)
nvmlDeviceGetPersistenceMode = lambda index: 1

def nvmlDeviceGetMigMode(index):
    if GPUS[index][1] < (8, 0):
        raise NVMLError("Not Supported")
    return [1, 1]
"""


def test_the_drivers_gpus_are_told(here: Path) -> None:
    """NVML is played, as there is no GPU to ask."""
    (here / "pynvml.py").write_text(NVML)
    found = in_child("pq_sweep.doctor", "look_at_gpus")
    assert (found["driver"], found["newest_cuda"]) == ("580.95.05", "13.1")
    assert found["gpus"] == [
        {"name": "Tesla V100", "uuid": "GPU-0", "compute_capability": "7.0", "memory_gb": 34.4}
        | {"mig": None, "persistence": True},
        {"name": "NVIDIA A100", "uuid": "GPU-1", "compute_capability": "8.0", "memory_gb": 34.4}
        | {"mig": True, "persistence": True},
    ]
    (sentence,) = advice("gpu", machine(gpu=found))
    assert sentence.startswith("gpu 1 is in MIG mode")


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 0), TORCH_210, True),
        ((7, 0), TORCH_215, False),
        ((8, 0), TORCH_215, True),
        ((8, 9), TORCH_215, True),  # by sm_86
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((10, 3), ["sm_100a", "compute_100a"], False),
        ((10, 3), ["sm_100f"], True),
        ((12, 0), ["compute_100f"], False),
        ((12, 1), ["sm_120"], True),
        ((7, 0), [], False),
    ],
)
def test_kernels_run_on_their_own_generation(
    capability: tuple[int, int], architectures: list[str], expected: bool
) -> None:
    assert has_kernels(capability, architectures) is expected


def test_a_v100_needs_the_older_torch() -> None:
    found = remedy("torch", on(V100 | {"error": "no kernel image is available for execution on the device"}))
    assert "torch 2.15.0 on cuda:0 (Tesla V100-SXM2-32GB, sm_70) has no kernels" in found
    assert "environment.yml" in found
    assert advice("torch", on(V100, architectures=TORCH_210)) == []


def test_a_gpu_too_new_or_too_old_for_torch_is_told() -> None:
    assert "install a newer torch" in remedy("torch", on(H100, architectures=["sm_70", "sm_80"]))
    assert "use device=cpu" in remedy("torch", on({"name": "P100", "compute_capability": "6.0", "error": "no kernel"}))


def test_a_gpu_with_kernels_that_fails_is_told() -> None:
    assert "fails: CUDA-capable device(s) is/are busy; see" in remedy(
        "torch", on(A100, A100 | {"error": "CUDA-capable device(s) is/are busy."})
    )


@pytest.mark.parametrize(
    ("torch", "words"),
    [
        ({"cuda": None, "error": "Torch not compiled with CUDA enabled"}, "was built without CUDA"),
        (
            {"error": "The NVIDIA driver on your system is too old."},
            "is too old); update the driver to one for CUDA 13.0",
        ),
    ],
)
def test_torch_that_does_not_find_the_drivers_gpus_is_a_problem(torch: Facts, words: str) -> None:
    gpus = {"gpus": [A100 | {"mig": False}]}
    assert words in remedy("torch", machine(torch=torch, gpu=gpus))
    assert advice("torch", machine(torch=torch | {"visible": ""}, gpu=gpus)) == []
    assert advice("torch", machine(torch=torch)) == []


# ONNX Runtime and TensorRT


def test_packages_of_onnxruntime_that_overwrite_each_other_are_a_problem(here: Path) -> None:
    both = {"onnxruntime": "0.1", "onnxruntime-gpu": "0.2"}
    for name, version in both.items():
        folder = here / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    found = doctor.look_at_onnxruntime()
    assert found["packages"] == both
    assert found["providers"][CPU] == ""
    sentence = remedy("onnxruntime", machine(onnxruntime=found))
    assert "overwrite each other; pip uninstall" in sentence
    assert sentence.endswith("then pip install '.[cpu]'.")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_provider_without_its_device_does_not_run() -> None:
    with pytest.raises(ChildError, match=r"^CUDAExecutionProvider cannot run convolution\.onnx: ") as caught:
        in_child("pq_sweep.doctor", "run_on", CUDA)
    assert provider_error(CUDA) == str(caught.value).partition(": ")[2]


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="needs a machine without TensorRT")
def test_tensorrt_is_not_tried_where_it_is_not_installed() -> None:
    assert provider_error(TENSORRT) == NO_TENSORRT
    assert advice("tensorrt", machine(tensorrt=doctor.look_at_tensorrt()), "not here") == []


@pytest.mark.gpu
def test_the_gpu_here_runs(report: list[Section]) -> None:
    sections = {section.name: section for section in report}
    index = torch.cuda.current_device()
    device = sections["torch"].details[f"cuda:{index}"]
    assert (device["name"], device["error"]) == (torch.cuda.get_device_name(index), "")
    (runs,) = [
        details
        for name, details in sections["precisions"].details.items()
        if name.startswith("cuda:") and device["name"] in name
    ]
    assert [text.partition(" ")[0] for text in runs["torch"]] == list(Torch.precisions["cuda"])


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("import os; os.abort()", "crashed, killed by SIGABRT"),
        ("import signal; signal.pause()", "no answer within 2 s"),
        ("raise ImportError('libnvinfer.so.10: too old\\nand more')", "libnvinfer.so.10: too old"),
    ],
)
def test_libraries_that_crash_hang_or_miss_are_told(
    here: Path, monkeypatch: pytest.MonkeyPatch, module: str, expected: str
) -> None:
    (here / "tensorrt.py").write_text(module)
    monkeypatch.setattr(doctor, "CHILD_S", 2.0 if "pause" in module else 60.0)
    error = provider_error(TENSORRT)
    assert error.startswith(expected)
    with pytest.raises(ChildError, match=expected):
        doctor.look_at_tensorrt()
    providers = {"providers": {CPU: "", CUDA: "", TENSORRT: error}}
    assert expected in remedy("onnxruntime", on(A100, onnxruntime=providers))


LOAD_ERROR = """
import sys
print("[E] Failed to load library libonnxruntime_providers_tensorrt.so with error: MISSING", file=sys.stderr)
raise RuntimeError("fallback to CPU EP has been explicitly disabled")
"""


def test_the_library_that_onnxruntime_misses_is_named(here: Path) -> None:
    """It is in what it prints, not in the exception; played, as there is no provider to load."""
    missing = "libcurand.so.10: cannot open shared object file: No such file or directory"
    (here / "tensorrt.py").write_text(LOAD_ERROR.replace("MISSING", missing))
    error = provider_error(TENSORRT)
    assert error == missing
    sentence = remedy("onnxruntime", on(A100, onnxruntime={"providers": {CPU: "", CUDA: "", TENSORRT: error}}))
    assert "install what libcurand.so.10 belongs to" in sentence


def test_providers_for_gpus_need_not_run_without_one() -> None:
    providers = {CPU: "", CUDA: "Found no NVIDIA driver on your system.", TENSORRT: NO_TENSORRT}
    found = {"onnxruntime": {"providers": providers}}
    assert advice("onnxruntime", machine(**found)) == []
    sentence = remedy("onnxruntime", on(A100, **found))
    assert sentence == (
        "CUDAExecutionProvider does not run (Found no NVIDIA driver on your system); pip install '.[gpu]'."
    )
    assert "environment.yml" in remedy("onnxruntime", on(A100, V100, **found))


def test_a_cpu_package_on_a_gpu_is_no_problem_but_told() -> None:
    (sentence,) = advice("onnxruntime", on(A100))
    assert "has no CUDAExecutionProvider" in sentence


def test_onnxruntime_that_is_not_installed_is_not_here() -> None:
    (sentence,) = advice("onnxruntime", machine(onnxruntime={"packages": {}, "providers": {}}), "not here")
    assert "pip install '.[cpu]'" in sentence


@pytest.mark.parametrize(
    ("version", "gpu", "words"),
    [
        ("10.4.0", V100, ""),
        ("10.5.0", V100, "does not support V100"),
        ("10.13.3.9", V100, "does not support V100"),
        ("10.13.3.9", A100, ""),
        ("11.0.0.114", A100, "libnvinfer.so.10"),
        ("11.0.0.114", V100, "libnvinfer.so.10"),
    ],
)
def test_the_version_of_tensorrt_has_to_fit(version: str, gpu: Facts, words: str) -> None:
    found = on(gpu, tensorrt={"version": version})
    if words:
        assert words in remedy("tensorrt", found)
    else:
        assert advice("tensorrt", found) == []


# Precisions


def precisions(found: dict[str, Facts]) -> Facts:
    section = judged("precisions", found)
    assert section.verdict == "ok"
    return section.details


ALL_RUN = {"onnxruntime": {"providers": {CPU: "", CUDA: "", TENSORRT: ""}}}


def test_a_v100_lacks_what_a_v100_lacks() -> None:
    runs = precisions(on(V100, V100, **ALL_RUN))["cuda:0,1 (Tesla V100-SXM2-32GB, 7.0)"]
    assert runs["torch"] == ["fp32", "fp16", "bf16 (no BF16 tensor cores)"]
    assert runs["onnxruntime"] == ["fp32", "fp16"]
    assert runs["tensorrt"] == ["fp32", "fp16", "int8 (no INT8 tensor cores)", "mixed (no INT8 tensor cores)"]
    assert runs["hardware has"] == ["FP16 tensor cores"]


@pytest.mark.parametrize(("gpu", "lacks"), [(A100, ["FP8 tensor cores"]), (H100, [])])
def test_newer_gpus_run_everything_as_it_is(gpu: Facts, lacks: list[str]) -> None:
    details = precisions(on(gpu, **ALL_RUN))
    (runs,) = [runs for name, runs in details.items() if name.startswith("cuda:0 ")]
    assert runs["tensorrt"] == ["fp32", "fp16", "int8", "mixed"]
    assert runs["hardware lacks"] == lacks


def test_what_does_not_load_runs_nothing() -> None:
    broken = {"onnxruntime": {"providers": {CPU: "", CUDA: "libcudnn.so.9 is missing", TENSORRT: NO_TENSORRT}}}
    details = precisions(on(A100, A100 | {"error": "busy"}, **broken))
    runs = details[f"cuda:0 ({A100['name']}, 8.0)"]
    assert (runs["torch"], runs["onnxruntime"], runs["tensorrt"]) == (["fp32", "fp16", "bf16"], [], [])
    assert details[f"cuda:1 ({A100['name']}, 8.0, does not work)"]["torch"] == []


def test_instruction_sets_make_the_difference_on_a_cpu() -> None:
    (plain,) = precisions(machine()).values()
    assert plain["torch"] == ["fp32", "bf16 (no BF16 instructions)"]
    assert "int8 (no VNNI)" in plain["onnxruntime"]
    (modern,) = precisions(machine(cpu={"instruction_sets": ["avx512_vnni", "amx_bf16"]})).values()
    assert (modern["torch"], modern["onnxruntime"]) == (["fp32", "bf16"], list(OnnxRuntime.precisions["cpu"]))
    (other,) = precisions(machine(cpu={"architecture": "aarch64", "instruction_sets": []})).values()
    assert other == modern


# Disk


def test_folders_are_looked_at(tmp_path: Path) -> None:
    found = doctor._folder(tmp_path / "not" / "made" / "yet")
    assert found["error"] == ""
    assert found["free_gb"] == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_problem() -> None:
    found = doctor._folder(Path("/proc"))
    assert found["error"]
    assert "set PQ_SWEEP_CACHE" in remedy("disk", machine(disk={"cache": found}))


def test_a_full_disk_is_a_problem() -> None:
    cache = machine()["disk"]["cache"] | {"free_gb": 0.3}
    assert "0.3 GB free" in remedy("disk", machine(disk={"cache": cache}))


@pytest.mark.slow
def test_the_cache_is_where_jobs_look_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "mine"))
    assert doctor.look_at_disk()["cache"]["path"] == without_home(str(tmp_path / "mine"))


# SLURM


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put SLURM's tools on an otherwise empty PATH, each as a line of shell."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(**scripts: str) -> None:
        for name, line in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / name).chmod(0o755)

    return put


SINFO = 'case "$*" in --version) echo slurm 22.05.8;; *) echo "v100*   up  2 nodes gpu:v100:1";; esac'


def test_no_slurm_is_no_problem(tools: Callable[..., None]) -> None:
    assert advice("slurm", machine(slurm=doctor.look_at_slurm()), "not here") == []


def test_slurm_that_answers_is_told(tools: Callable[..., None]) -> None:
    tools(sbatch="exit 1", sinfo=SINFO, sacct="exit 0")
    section = judged("slurm", machine(slurm=doctor.look_at_slurm()))
    assert (section.verdict, section.remedies) == ("ok", [])
    assert section.details["tools"] == ["sbatch", "sinfo", "sacct"]
    assert section.details["version"] == "slurm 22.05.8"
    assert section.details["partitions"] == ["v100* up 2 nodes gpu:v100:1"]
    assert section.details["accounting"] == "answers"


@pytest.mark.parametrize("sacct", [{}, {"sacct": "echo Slurm accounting storage is disabled >&2; exit 1"}])
def test_slurm_without_accounting_is_no_problem_but_told(tools: Callable[..., None], sacct: dict[str, str]) -> None:
    tools(sinfo=SINFO, **sacct)
    found = doctor.look_at_slurm()
    assert found["accounting"] == (
        "Slurm accounting storage is disabled" if sacct else "sacct: No such file or directory"
    )
    (sentence,) = advice("slurm", machine(slurm=found))
    assert "without accounting" in sentence


@pytest.mark.parametrize(
    ("sinfo", "words"),
    [
        ("echo sinfo: error: a >&2; echo sinfo: fatal: no configuration source >&2; exit 1", "no configuration source"),
        ("exec /bin/sleep 60", "no answer within 1 s"),
    ],
)
def test_slurm_that_does_not_answer_is_a_problem(
    tools: Callable[..., None], monkeypatch: pytest.MonkeyPatch, sinfo: str, words: str
) -> None:
    monkeypatch.setattr(doctor, "SLURM_S", 1.0)
    tools(sinfo=sinfo, sacct="exit 0")
    start = time.monotonic()
    assert words in remedy("slurm", machine(slurm=doctor.look_at_slurm()))
    assert time.monotonic() - start < 10


# Tracking


def test_the_default_store_is_in_the_working_folder(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = doctor.look_at_tracking()
    assert (found["store"], found["error"]) == (without_home(f"sqlite:///{here}/mlflow.db"), "")
    assert not list(here.iterdir())


def test_a_server_that_hangs_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pq_sweep.stores.REACH_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:  # which never answers
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:s3cret@{address}")
        found = doctor.look_at_tracking()
    assert found["store"] == f"http://user:***@{address}"
    sentence = remedy("tracking", machine(tracking=found))
    assert "timed out" in sentence
    assert "tracking=none" in sentence
    assert "s3cret" not in str(found)


def test_sqlite_on_a_network_file_system_is_told() -> None:
    (sentence,) = advice("tracking", machine(tracking={"network": "nfs4"}))
    assert "SQLite on nfs4" in sentence
