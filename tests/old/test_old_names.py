"""What configs, exports, pickles and scripts of the flat package name still resolves, to the very same objects."""

from __future__ import annotations

import pickle
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import HEAVY, SHORT, imported
from conftest import ROOT, new_user, only_sweep, python, results
from hydra.utils import get_object

from pq_sweep.core.former import MODULES, VALUES

PACKAGE = ROOT / "pq_sweep"
# The modules that could be named from outside, and what the YAML files of conf/ named.
NAMES = (
    "blocks", "classes", "cli", "comparison", "datasets", "decision", "digits_cnn", "download", "environment",
    "export", "fingerprint", "hardware", "image_cache", "images", "imports", "layers", "mixed", "models", "monitor",
    "networks", "pruners", "qdq", "quantizers", "recovery", "removal", "rows", "search", "significance", "sizes",
    "timing",
)  # fmt: skip
TARGETS = (
    "datasets.cifar10", "datasets.digits", "datasets.fake", "datasets.image_folder", "datasets.imagenet",
    "datasets.imagenet_sample", "datasets.imagenette", "datasets.imagewoof", "models.auxiliary_model",
    "models.cifar_resnet", "models.digits_cnn", "models.simplenet", "models.torchvision_model", "models.vgg7",
    "pruners.l1", "pruners.l1_global", "pruners.ln_structured", "pruners.nm_sparsity", "pruners.none",
    "pruners.random", "pruners.random_structured", "quantizers.bf16", "quantizers.fp16", "quantizers.int8",
    "quantizers.int8_dynamic", "quantizers.mixed", "quantizers.none", "recovery.bn_reestimate", "recovery.finetune",
    "recovery.none", "removal.remove", "runtimes.Auto", "runtimes.OnnxRuntime", "runtimes.TensorRT",
    "runtimes.TensorRTNative", "runtimes.Torch", "search.LargestAmount", "sweep.Sweep", "timing.Protocol",
    "tracking.Mlflow", "tracking.NoTracking",
)  # fmt: skip
OBJECTS = {
    "pq_sweep.blocks.STAND_INS": "pq_sweep.compress.blocks.STAND_INS",
    "pq_sweep.cli.main": "pq_sweep.sweep.cli.main",
    "pq_sweep.datasets.image_folder": "pq_sweep.inputs.datasets.image_folder",
    "pq_sweep.digits_cnn.DigitsCNN": "pq_sweep.inputs.digits_cnn.DigitsCNN",
    "pq_sweep.models.load_weights": "pq_sweep.inputs.models.load_weights",
    "pq_sweep.models.torchvision_model": "pq_sweep.inputs.models.torchvision_model",
    "pq_sweep.monitor.Monitor": "pq_sweep.measure.monitor.Monitor",
    "pq_sweep.monitor.samples.Samples": "pq_sweep.measure.monitor.samples.Samples",
    "pq_sweep.networks.CifarResNet": "pq_sweep.inputs.networks.CifarResNet",
    "pq_sweep.pruners.LAYERS": "pq_sweep.core.weights.LAYERS",
    "pq_sweep.pruners.l1_global": "pq_sweep.compress.pruners.l1_global",
    "pq_sweep.pruners.prunable": "pq_sweep.core.weights.prunable",
    "pq_sweep.quantizers.int8": "pq_sweep.compress.quantizers.int8",
    "pq_sweep.quantizers.quantizer": "pq_sweep.compress.quantizers.quantizer",
    "pq_sweep.recovery.finetune": "pq_sweep.compress.recovery.finetune",
    "pq_sweep.removal.remove": "pq_sweep.compress.removal.remove",
    "pq_sweep.removal.replay": "pq_sweep.compress.removal.replay",
    "pq_sweep.results.Sweep": "pq_sweep.results.sweeps.Sweep",
    "pq_sweep.results.find_sweeps": "pq_sweep.results.sweeps.find_sweeps",
    "pq_sweep.results.merge": "pq_sweep.results.sweeps.merge",
    "pq_sweep.results.read_job": "pq_sweep.results.sweeps.read_job",
    "pq_sweep.results.read_sweep": "pq_sweep.results.sweeps.read_sweep",
    "pq_sweep.results.write_csv": "pq_sweep.results.spreadsheet.write_csv",
    "pq_sweep.runtimes.Auto": "pq_sweep.runtimes.auto.Auto",
    "pq_sweep.runtimes.OnnxRuntime": "pq_sweep.runtimes.ort.OnnxRuntime",
    "pq_sweep.runtimes.TensorRT": "pq_sweep.runtimes.tensorrt.TensorRT",
    "pq_sweep.runtimes.TensorRTNative": "pq_sweep.runtimes.native.TensorRTNative",
    "pq_sweep.runtimes.Torch": "pq_sweep.runtimes.eager.Torch",
    "pq_sweep.search.LargestAmount": "pq_sweep.sweep.search.LargestAmount",
    "pq_sweep.sweep.Sweep": "pq_sweep.sweep.callback.SweepCallback",
    "pq_sweep.sweep.run_job": "pq_sweep.sweep.worker.run_job",
    "pq_sweep.timing.Protocol": "pq_sweep.measure.timing.Protocol",
    "pq_sweep.tracking.Mlflow": "pq_sweep.tracking.tracker.Mlflow",
    "pq_sweep.tracking.NoTracking": "pq_sweep.tracking.tracker.NoTracking",
}
# Those of the flat package that a file of one's own imports beside the ones above.
TYPES = ("Data", "Model", "Preprocess", "Runtime", "Session", "Split", "Stage", "UserError", "Workspace")

FRESH = """
import sys
from importlib.util import find_spec

assert find_spec("pq_sweep.models") and find_spec("pq_sweep.monitor.cpu") and find_spec("pq_sweep.pruners")
assert find_spec("pq_sweep.model") is None
from pq_sweep import models, cli
from pq_sweep.models import digits_cnn
import pq_sweep.monitor.cpu
from pq_sweep.inputs import models as present

assert models is present is sys.modules["pq_sweep.models"] is pq_sweep.models
assert models.digits_cnn is digits_cnn
assert pq_sweep.monitor is sys.modules["pq_sweep.measure.monitor"]
ours = {id(module): module for name, module in sys.modules.items() if name.startswith("pq_sweep.")}.values()
files = [module.__file__ for module in ours]
assert len(files) == len(set(files)), "a module was imported twice"
for module in ours:
    assert module.__spec__.name == module.__name__, module.__spec__
    assert module.__spec__.origin == module.__file__
"""

SCRIPT = """
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore

from pq_sweep import cli, sweep
from pq_sweep.pruners import LAYERS, prunable
from pq_sweep.quantizers import int8, quantizer
from pq_sweep.types import Data, Model, Stage

CONF = Path(sys.argv.pop(1))


def first_layer(model: Model, data: Data, *, amount: float, stage: Stage) -> None:
    layer = next(layer for layer in model.module.modules() if isinstance(layer, LAYERS))
    assert any(layer is module for module, _ in prunable(model.module))
    note, about = stage.folder / "note.txt", lambda: {"amount": amount}
    assert stage.keep("kept", lambda: note.write_text("abc"), note) == 3
    assert stage.share("in both", about, lambda: note.write_text("abc"), note) == 3
    assert stage.shared("in the cache", about, lambda: note.write_text("abc"), note) == 3
    stage.cached("own", 0.1)
    layer.weight.data[: int(amount * len(layer.weight))] = 0


@quantizer("int8")
def own_int8(source, target, data, *, form, stage):
    return int8(source, target, data, form=form, stage=stage, calibration="minmax", images=8, exclude=[], percentile=99)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def launch(cfg):
    sweep.run_job(cfg)


if __name__ == "__main__":
    store = ConfigStore.instance()
    store.store(group="pruner", name="first_layer", node={"_target_": "own.first_layer", "amount": 0.5})
    store.store(group="quantizer", name="own_int8", node={"_target_": "own.own_int8"})
    store.store(group="recovery", name="former", node={"_target_": "pq_sweep.recovery.none"})
    cli.main(launch, CONF)
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_module_has_its_former_name_too(name: str) -> None:
    files = [*PACKAGE.glob(f"*/{name}.py"), *PACKAGE.glob(f"*/{name}/__init__.py")]
    (file,) = [file for file in files if file.relative_to(PACKAGE).parts[0] != "study"]  # a room of later
    room = file.relative_to(PACKAGE).parts[0]
    present = import_module(f"pq_sweep.{room}.{name}")

    assert import_module(f"pq_sweep.{name}") is present
    assert present.__spec__ is not None
    assert present.__spec__.name == present.__name__ == f"pq_sweep.{room}.{name}"
    found = find_spec(f"pq_sweep.{name}")
    assert found is not None
    assert found.origin == str(file)


@pytest.mark.parametrize("former", OBJECTS)
def test_hydra_finds_a_former_target(former: str) -> None:
    module, _, name = OBJECTS[former].rpartition(".")
    assert get_object(former) is getattr(import_module(module), name)


@pytest.mark.parametrize("target", TARGETS)
def test_hydra_finds_every_target_of_the_flat_package(target: str) -> None:
    module, _, name = target.rpartition(".")
    found = get_object(f"pq_sweep.{target}")
    assert callable(found)
    assert found.__name__ == ("SweepCallback" if target == "sweep.Sweep" else name)
    assert f".{module}" in found.__module__


def test_types_stayed_where_they_were() -> None:
    assert all(hasattr(import_module("pq_sweep.types"), name) for name in TYPES)


def test_the_tests_above_miss_no_former_name() -> None:
    assert {f"pq_sweep.{name}" for name in NAMES} == MODULES.keys()
    assert VALUES.keys() <= OBJECTS.keys()


@pytest.mark.parametrize("name", NAMES)
def test_a_former_name_hides_no_present_module(name: str) -> None:
    assert not (PACKAGE / f"{name}.py").exists()
    assert not (PACKAGE / name).exists()


@pytest.mark.parametrize("name", ["pq_sweep.nothing", "pq_sweep.models.nothing", "pq_sweep.modelss", "pq_sweep_models"])
def test_what_never_was_is_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name.rpartition(".")[2]):
        import_module(name)


@pytest.mark.parametrize("room", ["results", "sweep"])
def test_a_room_without_the_value_says_so(room: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'pq_sweep.{room}' has no attribute 'nothing'"):
        import_module(f"pq_sweep.{room}").nothing  # noqa: B018


def test_a_pickle_finds_its_class() -> None:
    from pq_sweep.inputs.digits_cnn import DigitsCNN

    assert pickle.loads(b"cpq_sweep.digits_cnn\nDigitsCNN\n.") is DigitsCNN


@pytest.mark.slow
def test_every_kind_of_import_statement_gives_the_one_module(tmp_path: Path) -> None:
    done = python(["-c", FRESH], tmp_path, new_user())
    assert done.returncode == 0, done.stderr


def test_looking_for_a_module_imports_nothing_heavy(tmp_path: Path) -> None:
    looks = (
        "from importlib.util import find_spec; assert find_spec('pq_sweep.models') and find_spec('pq_sweep.removal')"
    )
    done = python(["-X", "importtime", "-c", looks], tmp_path, new_user())

    assert done.returncode == 0, done.stderr
    assert not imported(done.stderr) & HEAVY
    assert "pq_sweep.inputs.models" not in done.stderr


@pytest.mark.slow
def test_a_script_for_the_flat_package_runs(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(SCRIPT)
    chosen = ["pruner=first_layer", "quantizer=own_int8", "recovery=former", "runtime=onnxruntime", "tracking=none"]
    done = python(["own.py", str(ROOT / "conf"), "-m", "device=cpu", *chosen, *SHORT], tmp_path, new_user())

    assert done.returncode == 0, done.stderr
    (found,) = results(only_sweep(tmp_path))
    assert found["session"]["precision"] == "int8"
    assert 0 < found["network"]["sparsity"] < 0.5
