"""Machines as the doctor finds them, as plain data, and what it says of them."""

from __future__ import annotations

from pq_sweep.doctor import Facts
from pq_sweep.doctor.examine import judged
from pq_sweep.runtimes.ort import CPU

TORCH_210 = ["sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
TORCH_215 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
V100 = {"name": "Tesla V100-SXM2-32GB", "compute_capability": "7.0", "error": ""}
A100 = {"name": "NVIDIA A100-SXM4-40GB", "compute_capability": "8.0", "error": ""}
H100 = {"name": "NVIDIA H100 80GB HBM3", "compute_capability": "9.0", "error": ""}


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
        "tensorrt_rtx": {"version": None},
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
