"""What steps need and this Python lacks: each thing as the one package that pip brings, in the version that fits."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterable
from ctypes.util import find_library
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pq_sweep.core.sentences import listed
from pq_sweep.doctor.gpu_check import ROOT

# By pip's name, the module that is imported.
MODULES = {
    "torch": "torch",
    "hydra-core": "hydra",
    "omegaconf": "omegaconf",
    "antlr4-python3-runtime": "antlr4",
    "pyyaml": "yaml",
    "hydra-submitit-launcher": "hydra_plugins.hydra_submitit_launcher",
    "numpy": "numpy",
    "filelock": "filelock",
    "tqdm": "tqdm",
    "rich": "rich",
    "safetensors": "safetensors",
    "zstandard": "zstandard",
    "pillow": "PIL",
    "scipy": "scipy",
    "scikit-learn": "sklearn",
}
JOBS = tuple(MODULES)
TESTS = (*JOBS, "pytest")
MODULES |= {
    "pytest": "pytest",
    "torchvision": "torchvision",
    "torch-pruning": "torch_pruning",
    "mlflow": "mlflow",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "onnx-ir": "onnx_ir",
    "onnxruntime": "onnxruntime",
    "tensorrt": "tensorrt",
    "onnxruntime-ep-nv-tensorrt-rtx-cu13": "onnxruntime_ep_nv_tensorrt_rtx",
    "tensorrt-rtx-cu13-bindings": "tensorrt_rtx_bindings",
    "nvidia-ml-py": "pynvml",
    "triton": "triton",
}
EXPORT = ("onnx", "onnxscript", "onnx-ir")
GRAPH = (*EXPORT, "onnxruntime")
ORT = (*EXPORT, "onnxruntime-gpu", "nvidia-curand")
# What the runtimes need beyond torch.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "torch": (),
    "onnxruntime": ORT,
    "tensorrt": (*ORT, "tensorrt"),
    "tensorrt_native": (*GRAPH, "tensorrt"),
    "tensorrt_rtx": (*GRAPH, "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings"),
}
# What is measured without it, with gaps.
USEFUL = ("nvidia-ml-py",)
# Each of them has TensorRT's version; 11 is not supported.
TENSORRTS = ("tensorrt", *(f"tensorrt-cu{cuda}{part}" for cuda in (12, 13) for part in ("", "-bindings")))
PROVIDER = "capi/libonnxruntime_providers_cuda.so"
CURAND = "libcurand.so.10"


def lacks(packages: Iterable[str], cuda: str) -> str:
    """Say which packages are needed that this Python lacks, or return "" if none is."""
    missing = to_bring(packages, cuda)
    return f"needs {listed(missing)}" if missing else ""


def to_bring(packages: Iterable[str], cuda: str) -> list[str]:
    """Return what pip has to bring for packages, for torch's version of CUDA, each with the file that asks for it."""
    return [wanted(package, cuda) for package in packages if not is_there(package)]


@cache
def is_there(package: str) -> bool:
    """Say whether a package is installed, without importing it."""
    other = {"onnxruntime-gpu": _has_provider, "nvidia-curand": _has_curand, "tensorrt": _has_tensorrt}
    return other[package]() if package in other else is_module(MODULES[package])


def is_module(name: str) -> bool:
    """Say whether there is a module, without importing it."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package that the module would be in
        return False


def _has_provider() -> bool:
    """Say whether ONNX Runtime is one for CUDA, by whichever name it was installed."""
    found = find_spec("onnxruntime")
    return bool(found and found.origin and (Path(found.origin).parent / PROVIDER).exists())


def _has_curand() -> bool:
    """Say whether cuRAND, which ONNX Runtime for CUDA links, is in a package or the system's."""
    folders = [folder for place in sys.path for folder in Path(place).glob("nvidia/*/lib")]
    folders += map(Path, filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)))
    return any((folder / CURAND).exists() for folder in folders) or find_library("curand") is not None


def _has_tensorrt() -> bool:
    """Say whether TensorRT is there, in no version but 10."""
    return is_module("tensorrt") and all(found.startswith("10.") for found in map(_version, TENSORRTS) if found)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def wanted(package: str, cuda: str) -> str:
    """Return what pip has to bring for a package, and in brackets the file or extra that asks for it."""
    environment = "environment-cu13.yml" if cuda.startswith("13") else "environment.yml"
    pins = _pins(environment)
    name = _named(package, pins)
    if name in pins:
        instead = " in place of onnxruntime" if package == "onnxruntime-gpu" and is_there("onnxruntime") else ""
        return f"{name}=={pins[name]}{instead} ({environment})"
    return _required().get(name, name)


def _named(package: str, pins: dict[str, str]) -> str:
    """Return the name that a package has for a version of CUDA."""
    if package == "tensorrt":
        return next(name for name in pins if name.startswith("tensorrt-"))
    if package == "nvidia-curand":
        return package if package in pins else "nvidia-curand-cu12"
    return "onnxruntime-gpu" if package == "onnxruntime" else package


@cache
def _pins(environment: str) -> dict[str, str]:
    """Return the versions of an environment file, without torchvision's, which follows from that of torch."""
    pins = dict(re.findall(r"^ +- ([\w-]+)==(\S+)$", (ROOT / environment).read_text(), re.MULTILINE))
    return {name: pin for name, pin in pins.items() if name != "torchvision"}


@cache
def _required() -> dict[str, str]:
    """Return the requirements of this project by name, each with its place there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    places = {"pyproject.toml": project["dependencies"]}
    places |= {f"extra {extra}": requirements for extra, requirements in project["optional-dependencies"].items()}
    asked = [(text.partition(";")[0], place) for place, texts in places.items() for text in texts]
    return {re.split(r"[<>=!~]", text)[0]: f"{text} ({place})" for text, place in reversed(asked)}
