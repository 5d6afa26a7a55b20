"""The published onnxruntime-gpu on a machine without a GPU: where it falls back in silence, pq_sweep refuses.

Each version that an environment pins is installed into a folder of its own. It has the import name of the CPU package,
so everything about it runs in processes that find that folder first; what they find out comes back as JSON.
"""

from __future__ import annotations

import ctypes
import functools
import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TESTS, new_user, python
from independent import workspace
from onnx import TensorProto, helper
from packaging.version import Version
from provider_options import DOCUMENTED

from pq_sweep.runtimes import TensorRT, ort, ort_session
from pq_sweep.runtimes.tensorrt import one_engine

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
LIBRARIES = {CUDA: "libonnxruntime_providers_cuda.so", TENSORRT: "libonnxruntime_providers_tensorrt.so"}
NO_SUCH = "no_such_option"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, on which the providers may load"),
]
each_provider = pytest.mark.parametrize("provider", LIBRARIES)


@dataclass(frozen=True)
class Wheel:
    """An installed onnxruntime-gpu, and a folder for the graph and for what processes leave."""

    version: str
    folder: Path
    work: Path

    def run(self, function: Callable[[Path], Any]) -> Any:
        """Call a function of this module where `onnxruntime` is this wheel, and return what it returns."""
        path = os.pathsep.join(map(str, (self.folder, ROOT, TESTS, Path(__file__).parent)))
        code = f"import test_gpu_wheel as module; module.tell(module.{function.__name__})"
        done = python(["-c", code, str(self.work)], self.work, new_user() | {"PYTHONPATH": path})
        assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
        answer = json.loads(done.stdout.splitlines()[-1])  # onnxruntime itself prints as well
        assert Path(answer["file"]).is_relative_to(self.folder)
        assert answer["version"] == self.version
        return answer["value"]


@functools.cache
def once(wheel: Wheel, function: Callable[[Path], Any]) -> Any:
    """Call a function whose answer several tests look at."""
    return wheel.run(function)


def pinned(environment: str) -> dict[str, str]:
    """Return the pinned packages of an environment that the tests' own Python lacks, but for TensorRT."""
    wanted = r"(onnxruntime-gpu|nvidia-curand)==([\w.]+)"
    return dict(re.findall(wanted, (ROOT / environment).read_text()))


def installed(packages: list[str], folder: Path) -> Path:
    """Install packages without what they need into a folder, or skip where there is no index to take them from."""
    options = ["--quiet", "--no-deps", "--target", str(folder)]
    done = python(["-m", "pip", "install", *options, *packages], folder.parent, new_user(), timeout=900)
    if "No matching distribution" in done.stderr:
        pytest.skip(f"needs a package index that has {packages}: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Wheel]]:
    """Install the onnxruntime-gpu of an environment once; together they take a gigabyte, so they go at the end."""
    folders: list[Path] = []

    @functools.cache
    def make(environment: str) -> Wheel:
        work, pins = tmp_path_factory.mktemp("wheel"), pinned(environment)
        folders.append(work)
        save_graph(work / "model.onnx")
        site = installed([f"{package}=={version}" for package, version in pins.items()], work / "site")
        return Wheel(pins["onnxruntime-gpu"], site, work)

    yield make
    for folder in folders:
        shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["environment.yml", "environment-cu13.yml"])
def wheel(request: pytest.FixtureRequest, wheel_of: Callable[[str], Wheel]) -> Wheel:
    return wheel_of(request.param)


def save_graph(path: Path) -> None:
    """Save two nodes that no optimizer makes one of."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("input", "logits")]
    nodes = [helper.make_node("Exp", ["input"], ["between"]), helper.make_node("Softmax", ["between"], ["logits"])]
    graph = helper.make_graph(nodes, "two", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)


# What runs in a process of its own


def tell(function: Callable[[Path], Any]) -> None:
    """Print what a function returns and whose onnxruntime it had."""
    import onnxruntime

    value = function(Path(sys.argv[1]))
    print(json.dumps({"file": onnxruntime.__file__, "version": onnxruntime.__version__, "value": value}))


def attempt(call: Callable[[], Any]) -> dict[str, Any]:
    """Return what a call returns, or what it raises."""
    try:
        return {"value": call()}
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)}


def bare(work: Path, providers: Iterable[Any], **keywords: Any) -> Any:
    """Open a session without pq_sweep."""
    import onnxruntime

    return onnxruntime.InferenceSession(work / "model.onnx", providers=list(providers), **keywords)


def asked(work: Path, provider: str) -> dict[str, Any]:
    """Let pq_sweep open a session on the first GPU, whose streams are all that is made up."""
    job = replace(workspace(work / provider), device="cuda:0")
    with mock.patch.object(ort, "own_stream", return_value=SimpleNamespace(cuda_stream=7)):
        return attempt(lambda: ort_session(work / "model.onnx", provider, {}, job).get_providers())


def fallbacks(work: Path) -> dict[str, list[str]]:
    lists = {"cuda": [CUDA], "tensorrt": [TENSORRT], "both": [TENSORRT, CUDA]}
    opened = {name: bare(work, providers) for name, providers in lists.items()}
    opened["cuda, enable_fallback=0"] = bare(work, [CUDA], enable_fallback=0)
    return {name: session.get_providers() for name, session in opened.items()}


def refusals(work: Path) -> dict[str, Any]:
    import onnxruntime

    found = {provider: asked(work, provider) for provider in LIBRARIES}
    left = sorted(str(path.relative_to(work)) for provider in LIBRARIES for path in (work / provider).iterdir())
    return {"listed": onnxruntime.get_available_providers(), "found": found, "left": left}


def without_the_setting(work: Path) -> dict[str, Any]:
    """Ask for CUDA where onnxruntime is never told that falling back to the CPU is forbidden."""
    import onnxruntime

    class Forgetful(onnxruntime.SessionOptions):
        def add_session_config_entry(self, key: str, value: str) -> None:
            if key != "session.disable_cpu_ep_fallback":
                super().add_session_config_entry(key, value)

    with mock.patch.object(onnxruntime, "SessionOptions", Forgetful):
        return asked(work, CUDA)


class Moved:
    """A session whose own record of where its nodes are is changed to `providers`, node by node."""

    def __init__(self, session: Any, providers: list[str]) -> None:
        self.session, self.providers = session, providers

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def get_provider_graph_assignment_info(self) -> list[Any]:
        groups = self.session.get_provider_graph_assignment_info()
        pairs = zip(groups, self.providers, strict=True)
        return [SimpleNamespace(ep_name=name, get_nodes=group.get_nodes) for group, name in pairs]

    def end_profiling(self) -> str:
        profile = Path(self.session.end_profiling())
        events = json.loads(profile.read_text())
        ran = [event["args"] for event in events if event["args"].get("provider")]
        for arguments, name in zip(ran, self.providers, strict=True):
            arguments["provider"] = name
        profile.write_text(json.dumps(events))
        return str(profile)


RECORDS = {"none": [CPU, CPU], "all on CUDA": [CUDA, CUDA], "one": [TENSORRT, CPU], "all": [TENSORRT, TENSORRT]}


def placements(work: Path) -> dict[str, Any]:
    """Ask for TensorRT and show sessions of which more and more ran on it."""
    return {name: attempt(functools.partial(shown, work, providers)) for name, providers in RECORDS.items()}


def shown(work: Path, providers: list[str]) -> dict[str, int]:
    session = Moved(ort_session(work / "model.onnx", CPU, {}, workspace(work / "placed")), providers)
    return ort.placed_on(TENSORRT, session, ort.Unbound(session), torch.zeros(1, 4))


def placed(work: Path) -> dict[str, Any]:
    """Count the nodes of a session that did get what it asked for, and go on with it."""
    job = workspace(work / "counted")
    session = ort_session(work / "model.onnx", CPU, {}, job)
    call, images = ort.Unbound(session), torch.zeros(1, 4)
    nodes = ort.placed_on(CPU, session, call, images)
    return {"nodes": nodes, "left": len(list(job.folder.glob("nodes*"))), "logits": call(images).tolist()}


def sample_options(folder: Path) -> dict[str, str]:
    """Return all options that pq_sweep itself gives the TensorRT provider."""
    folder.mkdir(exist_ok=True)
    runtime = TensorRT(profile="range", optimization_level=5, sparsity=True, tf32=False, options={})
    shapes = {name: (size, 3, 8, 8) for name, size in (("min", 1), ("opt", 4), ("max", 8))}
    return runtime.provider_options(["fp16", "int8", "bf16"], shapes, folder / "b8", folder)


def engine_after_a_fallback(work: Path) -> dict[str, Any]:
    """Run TensorRT's session on bare onnxruntime, then look for the engine as runtime=tensorrt does."""
    options = {name: value for name, value in sample_options(work / "engine").items() if "bf16" not in name}
    logits = bare(work, [(TENSORRT, options)]).run(None, {"input": np.zeros((1, 4), dtype=np.float32)})[0]
    return {"logits": logits.tolist(), "engine": attempt(lambda: str(one_engine(work / "engine" / "b8", [])))}


def try_all(work: Path) -> dict[str, Any]:
    """Try all that ends with a refusal, on a machine that lacks some library.

    With all of them, the CUDA provider of 1.20.2 would end the process: it does not survive a missing driver.
    """
    tries = (refusals, without_the_setting, fallbacks, engine_after_a_fallback, placements, placed)
    with mock.patch.object(ort, "PRELOADED", ()):
        return {function.__name__: function(work) for function in tries}


# Falling back


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "both", "cuda, enable_fallback=0"])
def test_onnxruntime_itself_runs_on_the_cpu_without_an_error(wheel: Wheel, name: str) -> None:
    """Else the tests below would prove nothing."""
    assert once(wheel, try_all)["fallbacks"][name] == [CPU]


@each_provider
def test_a_provider_that_is_listed_and_cannot_load_is_refused(wheel: Wheel, provider: str) -> None:
    answer = once(wheel, try_all)["refusals"]

    assert provider in answer["listed"]
    assert answer["found"][provider]["raised"] == "RuntimeMismatch"


@each_provider
def test_a_refusal_is_one_sentence_with_the_missing_library_and_the_remedy(wheel: Wheel, provider: str) -> None:
    text = once(wheel, try_all)["refusals"]["found"][provider]["text"]

    assert re.match(rf"{provider} cannot run model\.onnx: lib\w+\.so\.\d+: cannot open shared object file", text)
    assert "environment.yml" in text
    assert text.endswith(".")
    assert not re.search(r"\n|\. ", text)


def test_a_refusal_leaves_no_file(wheel: Wheel) -> None:
    assert once(wheel, try_all)["refusals"]["left"] == []


def test_a_session_that_did_fall_back_is_refused(wheel: Wheel) -> None:
    """The second check, should onnxruntime ever take the setting for something else."""
    answer = once(wheel, try_all)["without_the_setting"]

    assert answer["raised"] == "RuntimeMismatch"
    assert re.match(rf"{CUDA} cannot run model.onnx: lib\w+\.so\.\d+: cannot open shared", answer["text"])


def test_an_engine_that_is_missing_is_refused(wheel: Wheel) -> None:
    answer = once(wheel, try_all)["engine_after_a_fallback"]

    assert np.allclose(answer["logits"], 0.25)  # as if nothing had happened
    assert answer["engine"]["raised"] == "RuntimeMismatch"
    assert answer["engine"]["text"].startswith("TensorRT built 0 engines where one for the whole graph was expected")


# Placement


@pytest.mark.parametrize("name", ["none", "all on CUDA", "one"])
def test_a_graph_that_is_not_all_where_it_was_asked_for_is_refused(wheel: Wheel, name: str) -> None:
    answer = once(wheel, try_all)["placements"][name]

    assert answer["raised"] == "RuntimeMismatch"
    assert answer["text"].startswith(f"asked for {TENSORRT} and got ")
    assert all(provider in answer["text"] for provider in RECORDS[name])


def test_a_graph_that_is_all_where_it_was_asked_for_is_accepted(wheel: Wheel) -> None:
    assert once(wheel, try_all)["placements"]["all"] == {"value": {TENSORRT: 2}}


def test_counting_nodes_leaves_a_session_as_it_was(wheel: Wheel) -> None:
    answer = once(wheel, try_all)["placed"]

    assert answer["nodes"] == {CPU: 2}
    assert answer["left"] == 0
    assert np.allclose(answer["logits"], 0.25)


# What the providers link

# Where a library comes from that a provider links: what `import torch` loads (looked up in /proc/self/maps with the
# torch of each environment), what the driver brings, and TensorRT, whose libraries are in no package of the index.
TORCH_LOADS = {
    "environment.yml": {"libcublas.so.12", "libcublasLt.so.12", "libcudart.so.12", "libcudnn.so.9", "libcufft.so.11",
                        "libcurand.so.10", "libnvrtc.so.12"},
    "environment-cu13.yml": {"libcublas.so.13", "libcublasLt.so.13", "libcudart.so.13", "libcudnn.so.9"},
}  # fmt: skip
DRIVER = {"libcuda.so.1"}
OF_TENSORRT = {"libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"}


def linked(capi: Path, provider: str) -> set[str]:
    """Name the libraries that a provider links and that the system has not."""
    done = subprocess.run(["ldd", str(capi / LIBRARIES[provider])], capture_output=True, text=True, check=True)
    return set(re.findall(r"(\S+) => not found", done.stdout))


@each_provider
@pytest.mark.parametrize("environment", TORCH_LOADS)
def test_every_library_that_a_provider_links_comes_from_somewhere(
    wheel_of: Callable[[str], Wheel], environment: str, provider: str
) -> None:
    names = linked(wheel_of(environment).folder / "onnxruntime" / "capi", provider)
    preloaded = {name for name in names if any(Path("cudnn/lib", name).match(pattern) for pattern in ort.PRELOADED)}

    assert names > {"libcublas.so.12"} or names > {"libcublas.so.13"}
    assert names - preloaded <= TORCH_LOADS[environment] | DRIVER | OF_TENSORRT


@pytest.fixture(scope="module", params=TORCH_LOADS)
def here(request: pytest.FixtureRequest, wheel_of: Callable[[str], Wheel]) -> Wheel:
    """The wheel of the environment whose torch runs the tests.

    With the other environment's torch it would take gigabytes more: `make test-oldest` runs with that of
    environment.yml, `make test` with that of environment-cu13.yml.
    """
    (wanted,) = re.findall(r"- torch==([\w.]+)", (ROOT / request.param).read_text())
    if torch.__version__.partition("+")[0] != wanted:
        pytest.skip(f"needs torch {wanted} of {request.param}, and torch {torch.__version__} runs the tests")
    return wheel_of(request.param)


def unloaded(work: Path) -> dict[str, list[str]]:
    """Load all that the providers link, and name what cannot be loaded.

    The providers themselves stay outside: that of 1.20.2 does not survive being loaded without a driver.
    """
    import onnxruntime

    ort.preload_gpu_libraries()
    capi = Path(onnxruntime.__file__).parent / "capi"
    return {provider: sorted(filter(is_missing, linked(capi, provider))) for provider in LIBRARIES}


def is_missing(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return True
    return False


def test_only_the_driver_and_tensorrt_are_missing_here(here: Wheel) -> None:
    missing = here.run(unloaded)

    assert set(missing[CUDA]) <= DRIVER
    assert {"libnvinfer.so.10", "libnvonnxparser.so.10"} <= set(missing[TENSORRT]) <= OF_TENSORRT


# Options


def has(library: Path, name: str) -> bool:
    """Say whether a library contains this text and nothing around it."""
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"\0" + name.encode() + b"\0") >= 0


@each_provider
def test_a_documented_option_is_in_the_versions_that_are_said_to_have_it(wheel: Wheel, provider: str) -> None:
    capi = wheel.folder / "onnxruntime" / "capi"
    libraries = [capi / LIBRARIES[provider], *capi.glob("onnxruntime_pybind11_state*.so")]
    found = {name for name in DOCUMENTED[provider] if any(has(library, name) for library in libraries)}

    assert len(libraries) == 2
    assert found == {
        name for name, since in DOCUMENTED[provider].items() if Version(since or "0") <= Version(wheel.version)
    }
    assert not any(has(library, NO_SUCH) for library in libraries)


# Enough for the providers to load and read their options, which they do before they look for a GPU: without a driver
# and TensorRT, neither of which can be had here, the loader would refuse them before.
STAND_INS = {
    "libcuda.so.1": "int cuTensorMapEncodeTiled(void) { return 100; }",
    "libnvinfer.so.10": """
        static void *nothing(void *self, int *count) { if (count) *count = 0; return 0; }
        static void *methods[64], **registry = methods;
        void *getPluginRegistry(void) { for (int i = 0; i < 64; i++) methods[i] = nothing; return &registry; }
        void *createInferBuilder_INTERNAL(void) { return 0; }
        void *createInferRefitter_INTERNAL(void) { return 0; }
        void *createInferRuntime_INTERNAL(void) { return 0; }
        int getInferLibVersion(void) { return 101601; }
    """,
    "libnvonnxparser.so.10": """
        void *createNvOnnxParser_INTERNAL(void) { return 0; }
        void *createNvOnnxParserRefitter_INTERNAL(void) { return 0; }
    """,
}


@pytest.fixture(scope="module")
def reader(wheel_of: Callable[[str], Wheel]) -> Wheel:
    """The onnxruntime-gpu that takes torch's CUDA libraries, with what else it takes to read options."""
    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("needs a C compiler for stand-ins of the driver and TensorRT")
    wheel = wheel_of("environment-cu13.yml")
    libraries = wheel.work / "libraries"
    libraries.mkdir()
    for name, code in STAND_INS.items():
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-x", "c", "-", "-o", str(libraries / name)]
        subprocess.run(command, input=code, text=True, check=True)
    if errors := [error for error in wheel.run(load_errors).values() if error]:
        pytest.skip(f"needs CUDA libraries that torch {torch.__version__} does not have: {errors[0]}")
    return wheel


def load_errors(work: Path) -> dict[str, str]:
    """Load what the providers link and return what is still amiss with each."""
    ort.preload_gpu_libraries()
    for name in STAND_INS:
        ctypes.CDLL(str(work / "libraries" / name), mode=ctypes.RTLD_GLOBAL)
    return {provider: ort.library_error(provider) for provider in LIBRARIES}


def reading(work: Path, provider: str, options: dict[str, str]) -> str:
    """Return what onnxruntime says of options; there is always something, as there is no GPU."""
    return str(attempt(lambda: bare(work, [(provider, options)], enable_fallback=0).get_providers())["text"])


def names_read(work: Path) -> dict[str, Any]:
    names = {provider: [*DOCUMENTED[provider], NO_SUCH] for provider in LIBRARIES}
    return {
        provider: {name: reading(work, provider, {name: "1"}) for name in names[provider]} for provider in LIBRARIES
    }


def values_read(work: Path) -> dict[str, Any]:
    wrong = {"tf32": reading(work, CUDA, {"use_tf32": "maybe"})}
    wrong["sparsity"] = reading(work, TENSORRT, {"trt_sparsity_enable": "1"})
    right = {f"tf32={value}": reading(work, CUDA, {"use_tf32": value}) for value in "01"}
    right["a switch"] = reading(work, CUDA, ort.texts({"prefer_nhwc": True}))
    right["TensorRT"] = reading(work, TENSORRT, sample_options(work / "engine"))
    return {"wrong": wrong, "right": right}


def read_options(work: Path) -> dict[str, Any]:
    load_errors(work)
    return {"names": names_read(work), "values": values_read(work), "asked": asked(work, CUDA)}


UNKNOWN = {CUDA: 'Unknown provider option: "{}"', TENSORRT: "Invalid TensorRT EP option: {}"}


@each_provider
def test_a_provider_knows_every_documented_option(reader: Wheel, provider: str) -> None:
    said = once(reader, read_options)["names"][provider]

    assert [name for name, text in said.items() if UNKNOWN[provider].format(name) in text] == [NO_SUCH]


@pytest.mark.parametrize("name", ["tf32", "sparsity"])
def test_a_provider_refuses_wrong_values(reader: Wheel, name: str) -> None:
    assert re.search("Failed to parse|should be 'True' or 'False'", once(reader, read_options)["values"]["wrong"][name])


@pytest.mark.parametrize("name", ["tf32=0", "tf32=1", "a switch", "TensorRT"])
def test_a_provider_accepts_the_values_of_pq_sweep(reader: Wheel, name: str) -> None:
    """It goes on to look for a GPU."""
    text = once(reader, read_options)["values"]["right"][name]

    assert "CUDA driver version is insufficient" in text
    assert not re.search("Failed to parse|should be|option", text)


def test_a_machine_whose_driver_does_not_work_is_refused(reader: Wheel) -> None:
    answer = once(reader, read_options)["asked"]

    assert answer["raised"] == "RuntimeMismatch"
    assert answer["text"].startswith(f"{CUDA} cannot run model.onnx: ")
    assert "CUDA driver version is insufficient" in answer["text"]
    assert "\n" not in answer["text"]
