"""The version sets: they keep to pyproject.toml, fit each other, and pip finds them."""

from __future__ import annotations

import json
import platform
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, new_user, python
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from pq_sweep.core.environment import PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# A set for GPUs, and the one in which the same versions are tested on a CPU.
ON_CPU = {"environment.yml": "constraints-oldest.txt", "environment-cu13.yml": "constraints.txt"}
# Up to where kernels for V100 (sm_70) are in the packages, and up to which Python such a TensorRT is built.
FOR_V100 = {"torch": "<2.11", "onnxruntime-gpu": "<1.27", "tensorrt-cu12": "<10.5", "python": "<3.13"}
# On the index as source alone. TensorRT's libraries are not there at all: 10.4 fetches them while it is installed, and
# 10.16 needs `-libs`, which cannot even say what they need where NVIDIA's own index is out of reach.
SOURCES = ("antlr4-python3-runtime", "tensorrt-cu12", "tensorrt-cu13")

Versions = dict[str, Version]


@dataclass(frozen=True)
class Environment:
    """What a conda file asks for: a Python, pinned packages, and this project with some of its extras."""

    python: str
    pins: Versions
    extras: list[str]

    @property
    def tensorrt(self) -> str:
        """Return the name of the TensorRT that is pinned."""
        (name,) = (name for name in self.pins if name.startswith("tensorrt-"))
        return name


@pytest.mark.parametrize("extra", ["cpu", "gpu", "rtx"])
def test_a_job_depends_on_the_version_of_what_runs_its_graph(extra: str) -> None:
    """A job in the folder of a sweep runs anew after another version was installed."""
    brought = {Requirement(text).name for text in PROJECT["optional-dependencies"][extra]}
    assert brought - {"nvidia-curand"} <= set(PACKAGES)


def environment_of(name: str) -> Environment:
    *conda, packages = yaml.safe_load((ROOT / name).read_text())["dependencies"]
    *pinned, project = packages["pip"]
    (interpreter,) = (entry.partition("=")[2] for entry in conda if entry.startswith("python="))
    option, path = shlex.split(project)
    assert option == "--editable"
    extras = re.fullmatch(r"\.\[([\w,]+)\]", path)
    assert extras
    return Environment(interpreter, pins(pinned), extras[1].split(","))


def pins(lines: Iterable[str]) -> Versions:
    """Return the version by package of lines that are all `name==version`."""
    pairs = (line.split("==") for line in lines)
    return {canonicalize_name(name, validate=True): Version(version) for name, version in pairs}


def constraints(name: str) -> Versions:
    return pins((ROOT / name).read_text().splitlines())


def required(*extras: str) -> list[Requirement]:
    groups = (PROJECT["optional-dependencies"][extra] for extra in extras)
    return [Requirement(line) for lines in (PROJECT["dependencies"], *groups) for line in lines]


def ranges(*extras: str) -> dict[str, SpecifierSet]:
    """Return the versions that pyproject.toml allows by package."""
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in required(*extras)}


def outside(found: Versions, allowed: dict[str, SpecifierSet]) -> dict[str, str]:
    both = found.keys() & allowed.keys()
    return {name: f"{found[name]} is not {allowed[name]}" for name in both if not allowed[name].contains(found[name])}


environments = pytest.mark.parametrize("name", ON_CPU)
both_constraints = pytest.mark.parametrize("name", ON_CPU.values())


def test_every_set_is_under_test() -> None:
    assert {path.name for path in ROOT.glob("environment*.yml")} == set(ON_CPU)
    assert {path.name for path in ROOT.glob("constraints*.txt")} == set(ON_CPU.values())


def test_all_environments_have_the_same_python_and_pyproject_allows_it() -> None:
    (minor,) = {environment_of(name).python for name in ON_CPU}
    (lowest,) = SpecifierSet(PROJECT["requires-python"])
    assert lowest.operator == ">="
    assert SpecifierSet(f"=={minor}.*").contains(lowest.version)


@environments
def test_an_environment_keeps_to_the_ranges_of_pyproject(name: str) -> None:
    environment = environment_of(name)
    same_code = {"onnxruntime-gpu": ranges("cpu")["onnxruntime"]}  # where no extra says more
    allowed = same_code | ranges(*environment.extras)
    assert not outside(environment.pins, allowed)
    assert environment.pins.keys() - allowed.keys() <= {"tensorrt-cu12"}


def test_the_set_for_v100_keeps_its_kernels() -> None:
    environment = environment_of("environment.yml")
    found = environment.pins | {"python": Version(environment.python)}
    assert FOR_V100.keys() <= found.keys()
    assert not outside(found, {package: SpecifierSet(limit) for package, limit in FOR_V100.items()})


@environments
def test_tests_on_a_cpu_run_the_versions_of_the_gpu_set(name: str) -> None:
    """ONNX Runtime's builds for CPU and GPU share minor versions alone: there is no 1.20.2 for the CPU."""
    on_gpu, on_cpu = environment_of(name).pins, constraints(ON_CPU[name])
    assert (on_cpu["torch"], on_cpu["torchvision"]) == (on_gpu["torch"], on_gpu["torchvision"])
    assert on_cpu["onnxruntime"].release[:2] == on_gpu["onnxruntime-gpu"].release[:2]


@both_constraints
def test_constraints_hold_everything_required_at_an_allowed_version(name: str) -> None:
    found, allowed = constraints(name), ranges("cpu", "dev")
    assert not allowed.keys() - found.keys()
    assert not outside(found, allowed)


def test_the_oldest_set_is_at_the_lower_bounds() -> None:
    bounds = {
        package: SpecifierSet(f"=={bound.version}.*")
        for package, allowed in ranges("cpu").items()
        for bound in allowed
        if bound.operator == ">="
    }
    assert bounds.keys() == ranges("cpu").keys()
    assert not outside(constraints("constraints-oldest.txt"), bounds)


def arguments(name: str) -> list[str]:
    """Return what pip is to resolve: an environment, or with the constraints of this name what `make` installs."""
    if name not in ON_CPU:
        return ["--constraint", str(ROOT / name), *map(str, required("cpu", "dev"))]
    environment = environment_of(name)
    pinned = [f"{package}=={version}" for package, version in environment.pins.items()]
    wanted = [*pinned, *map(str, required(*environment.extras))]
    return [re.sub(r"^(tensorrt-cu\d+)", r"\1-bindings", line) for line in wanted]


def resolve(pip: Path, *arguments: str) -> Versions:
    """Return what pip would install; `fast-deps` reads metadata where pip would else download gigabytes of wheels."""
    options = ["-qq", "--dry-run", "--ignore-installed", "--report=-", "--use-feature=fast-deps"]
    source = ["--only-binary=:all:", f"--no-binary={','.join(SOURCES)}"]
    done = python([str(pip), "install", *options, *source, *arguments], pip.parent, new_user())
    assert done.returncode == 0, done.stderr
    packages = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {canonicalize_name(package["name"]): Version(package["version"]) for package in packages}


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pip of its own: before 25.3 a dry run downloads every wheel in the end."""
    if not platform.python_version().startswith(f"{environment_of('environment.yml').python}."):
        pytest.skip(f"the sets are not for Python {platform.python_version()}, with which the tests run")
    folder = tmp_path_factory.mktemp("pip")
    done = python(["-m", "pip", "install", "--quiet", "--target", str(folder), "pip>=25.3"], folder, new_user())
    if done.returncode:
        pytest.skip(f"needs a package index, and not even pip is to be had: {done.stderr.strip().splitlines()[-1]}")
    return folder / "pip"


@pytest.fixture(scope="module")
def resolved(pip: Path) -> Iterator[dict[str, Future[Versions]]]:
    """What pip would install for each set, all at once: most of the time it waits for the index."""
    with ThreadPoolExecutor() as pool:
        names = (*ON_CPU, "constraints-oldest.txt")  # the other constraints are tried by `make install`
        yield {name: pool.submit(resolve, pip, *arguments(name)) for name in names}


@pytest.mark.slow
@environments
def test_pip_finds_an_environment_whose_parts_fit(name: str, pip: Path, resolved: dict[str, Future[Versions]]) -> None:
    """All but TensorRT's libraries, which are not on the index; its Python bindings stand for them."""
    environment = environment_of(name)
    tensorrt = f"{environment.tensorrt}=={environment.pins[environment.tensorrt]}"
    found = resolved[name].result() | resolve(pip, "--no-deps", tensorrt)
    assert environment.pins.items() <= found.items()
    assert {package for package in found if package.startswith("onnxruntime")} == {"onnxruntime-gpu"}
    (cuda,) = {suffix[0] for package in found if (suffix := re.findall(r"-cu(\d+)", package))}
    assert environment.tensorrt.endswith(cuda)
    # What ONNX Runtime's providers link and torch does not load is loaded from these.
    assert {re.sub(r"-cu\d+$", "", package) for package in found} >= {"nvidia-cudnn", "nvidia-curand"}


@pytest.mark.slow
def test_pip_misses_a_version_that_does_not_exist(pip: Path) -> None:
    for package in ("onnxruntime-gpu==1.20.99", "tensorrt-cu12==10.4.99"):
        with pytest.raises(AssertionError, match=f"No matching distribution found for {package}"):
            resolve(pip, "--no-deps", package)


@pytest.mark.slow
def test_the_oldest_set_pins_everything_that_pip_would_install(resolved: dict[str, Future[Versions]]) -> None:
    name = "constraints-oldest.txt"
    assert resolved[name].result() == constraints(name)
