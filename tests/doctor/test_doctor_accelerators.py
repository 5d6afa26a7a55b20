"""What the doctor finds of GPUs, torch, ONNX Runtime and TensorRT is true, and what they lack is told."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from machines import A100, H100, TORCH_210, TORCH_215, V100, advice, machine, on, remedy

from pq_sweep.doctor import Facts, accelerators, children
from pq_sweep.doctor.accelerators import NO_TENSORRT, provider_error
from pq_sweep.doctor.children import ChildError, in_child
from pq_sweep.doctor.examine import judged
from pq_sweep.doctor.judge import has_kernels
from pq_sweep.runtimes import OnnxRuntime, TensorRT
from pq_sweep.runtimes.ort import CPU, CUDA, TENSORRT


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose modules and packages this process and its children see before all others."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


# GPUs


def test_without_nvml_its_package_is_named(here: Path) -> None:
    (here / "pynvml.py").write_text("raise ImportError")
    (sentence,) = advice("gpu", machine(gpu=in_child(accelerators.__name__, "look_at_gpus")), "not here")
    assert "pip install nvidia-ml-py" in sentence


def test_without_a_driver_there_is_no_gpu() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("needs a machine without a driver")
    found = in_child(accelerators.__name__, "look_at_gpus")
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
nvmlDeviceGetComputeMode = lambda index: 3 * (GPUS[index][1] < (8, 0))

def nvmlDeviceGetMigMode(index):
    if GPUS[index][1] < (8, 0):
        raise NVMLError("Not Supported")
    return [1, 1]
"""


def test_the_drivers_gpus_are_told(here: Path) -> None:
    """NVML is played, as there is no GPU to ask."""
    (here / "pynvml.py").write_text(NVML)
    found = in_child(accelerators.__name__, "look_at_gpus")
    assert (found["driver"], found["newest_cuda"]) == ("580.95.05", "13.1")
    assert found["gpus"] == [
        {"name": "Tesla V100", "uuid": "GPU-0", "compute_capability": "7.0", "memory_gb": 34.4}
        | {"mig": None, "persistence": True, "compute_mode": "exclusive_process"},
        {"name": "NVIDIA A100", "uuid": "GPU-1", "compute_capability": "8.0", "memory_gb": 34.4}
        | {"mig": True, "persistence": True, "compute_mode": "default"},
    ]
    divided, exclusive = advice("gpu", machine(gpu=found))
    assert divided.startswith("gpu 1 is in MIG mode")
    assert exclusive.startswith("gpu 0 lets one process in at a time")


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
    found = accelerators.look_at_onnxruntime()
    assert found["packages"] == both
    assert found["providers"][CPU] == ""
    sentence = remedy("onnxruntime", machine(onnxruntime=found))
    assert "overwrite each other; pip uninstall" in sentence
    assert sentence.endswith("then pip install '.[cpu]'.")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_provider_without_its_device_does_not_run() -> None:
    with pytest.raises(ChildError, match=r"^CUDAExecutionProvider cannot run convolution\.onnx: ") as caught:
        in_child(accelerators.__name__, "run_on", CUDA)
    reason, found, _ = str(caught.value).partition(": ")[2].partition("; see environment.yml")
    assert found, "it no longer ends with the environments, which the doctor leaves to its remedies"
    assert provider_error(CUDA) == reason


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="needs a machine without TensorRT")
def test_tensorrt_is_not_tried_where_it_is_not_installed() -> None:
    assert provider_error(TENSORRT) == NO_TENSORRT
    assert advice("tensorrt", machine(tensorrt=accelerators.look_at_tensorrt()), "not here") == []


@pytest.mark.slow
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
    monkeypatch.setattr(children, "CHILD_S", 2.0 if "pause" in module else 60.0)
    error = provider_error(TENSORRT)
    assert error.startswith(expected)
    with pytest.raises(ChildError, match=expected):
        accelerators.look_at_tensorrt()
    providers = {"providers": {CPU: "", CUDA: "", TENSORRT: error}}
    assert expected in remedy("onnxruntime", on(A100, onnxruntime=providers))


def test_the_library_that_is_missing_is_named(here: Path) -> None:
    """Played, as there is no TensorRT to load."""
    missing = "libcurand.so.10: cannot open shared object file: No such file or directory"
    (here / "tensorrt.py").write_text(f"raise ImportError({missing!r})")
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
        "CUDAExecutionProvider does not run (Found no NVIDIA driver on your system); use the versions of"
        " environment-cu13.yml (pip install '.[gpu]')."
    )
    assert "environment.yml" in remedy("onnxruntime", on(A100, V100, **found))


def test_a_driver_too_old_for_the_newest_set_gets_the_older_one() -> None:
    providers = {"providers": {CPU: "", CUDA: "CUDA driver version is insufficient for CUDA runtime version"}}
    found = on(A100, onnxruntime=providers)
    found["gpu"] |= {"newest_cuda": "12.2"}
    assert remedy("onnxruntime", found).endswith("; use the versions of environment.yml.")
    found["gpu"] |= {"newest_cuda": "13.0"}
    assert "environment-cu13.yml" in remedy("onnxruntime", found)


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
        ("9.3.0", A100, "libnvinfer.so.10"),
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
    assert section.verdict == "ok", section
    return section.details


ALL_RUN = {"onnxruntime": {"providers": {CPU: "", CUDA: "", TENSORRT: ""}}}


def test_a_v100_lacks_what_a_v100_lacks() -> None:
    runs = precisions(on(V100, V100, **ALL_RUN))["cuda:0,1 (Tesla V100-SXM2-32GB, 7.0)"]
    assert runs["torch"] == ["fp32", "fp16", "bf16 (no BF16 tensor cores)"]
    assert runs["onnxruntime"] == ["fp32", "fp16"]
    assert runs["tensorrt"] == ["fp32", "fp16", "int8 (no INT8 tensor cores)", "mixed (no INT8 tensor cores)"]
    assert runs["hardware has"] == ["FP16 tensor cores"]


def test_tensorrt_itself_runs_without_its_provider_if_its_version_fits() -> None:
    found = {name: precisions(on(V100, tensorrt={"version": name})) for name in ("10.4.0", "10.16.1", "11.0.0")}
    native = {name: details[f"cuda:0 ({V100['name']}, 7.0)"]["tensorrt_native"] for name, details in found.items()}
    fast, slow = ["fp32", "fp16"], ["int8 (no INT8 tensor cores)", "mixed (no INT8 tensor cores)"]
    assert native == {"10.4.0": fast + slow, "10.16.1": [], "11.0.0": []}


@pytest.mark.parametrize(("gpu", "lacks"), [(A100, ["FP8 tensor cores"]), (H100, [])])
def test_newer_gpus_run_everything_as_it_is(gpu: Facts, lacks: list[str]) -> None:
    details = precisions(on(gpu, **ALL_RUN))
    (runs,) = [runs for name, runs in details.items() if name.startswith("cuda:0 ")]
    assert runs["tensorrt"] == list(TensorRT.precisions["cuda"])
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
    sets = ["avx512_vnni", "amx_bf16", "avx512_fp16"]
    (modern,) = precisions(machine(cpu={"instruction_sets": sets})).values()
    *fast, slow = modern["onnxruntime"]
    assert (modern["torch"], fast) == (["fp32", "bf16"], [*OnnxRuntime.precisions["cpu"]][: len(fast)])
    assert slow == "int4, w2, w3, w4, w5, w6, w7, w8 (no kernels for integer weights alone)"
    arm = {"architecture": "aarch64", "instruction_sets": ["asimddp", "bf16", "asimdhp"]}
    assert list(precisions(machine(cpu=arm)).values()) == [modern]
    (unknown,) = precisions(machine(cpu={"architecture": "riscv64", "instruction_sets": []})).values()
    assert unknown == modern | {"onnxruntime": list(OnnxRuntime.precisions["cpu"])}
