"""The fingerprint of a job: the same as long as nothing changes that its result depends on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
from conftest import ROOT, new_user, python
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from pq_sweep.core import fingerprint as module
from pq_sweep.core.fingerprint import digest, files_state, fingerprint, resolved

BASE = ("pruner=l1_global", "quantizer=int8")
PRINT = """
import sys
from hydra import compose, initialize_config_dir
from pq_sweep.core.fingerprint import fingerprint

with initialize_config_dir(sys.argv[1], version_base="1.3"):
    print(fingerprint(compose("config", overrides=sys.argv[2:])))
"""

# Two jobs that go through most of what there is: both ways of pruning, both of recovery, and a fresh process's part.
JOBS = """
import sys
from pathlib import Path
from omegaconf import OmegaConf
from pq_sweep.job import fresh
from pq_sweep.job.run import run

for path in map(Path, sys.argv[1:]):
    folder = path.with_suffix("")
    folder.mkdir()
    run(OmegaConf.load(path), folder)
print(*(module.__file__ for name, module in sorted(sys.modules.items()) if name.startswith("pq_sweep")), sep="\\n")
"""
SHORT = (
    "measure.batch_sizes=[1]",
    "measure.iterations=5",
    "measure.min_s=0",
    "measure.max_s=0",
    "device=cpu",
    "tracking=none",
)
RUN = (
    "pruner=remove recovery=bn_reestimate quantizer=mixed quantizer.images=16 runtime=onnxruntime measure.paired=true",
    "pruner=l1_global recovery=finetune recovery.epochs=1 runtime=torch",
)

Change = Callable[[Path], object]


@pytest.fixture(autouse=True)
def fresh_eyes() -> None:
    """A process looks at code and folders once; these tests change them meanwhile."""
    module.look_again()


def of(*overrides: str, hydra: bool = False) -> str:
    module.look_again()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return fingerprint(compose("config", overrides=list(overrides), return_hydra_config=hydra))


def in_another_process(folder: Path, *overrides: str) -> str:
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "PYTHONHASHSEED": "7"}
    done = python(["-c", PRINT, str(ROOT / "conf"), *overrides], folder, env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_is_the_same_in_every_process(tmp_path: Path) -> None:
    assert in_another_process(tmp_path, *BASE) == of(*BASE)


@pytest.mark.parametrize(
    "other",
    [
        "seed=1",
        "pruner.amount=0.6",
        "quantizer=fp16",
        "quantizer.images=32",
        "recovery=bn_reestimate",
        "measure.iterations=7",
        "device=cpu",
        "node=a100",
        "dataset.calibration=100",
        "+pruner.extra=1",
    ],
)
def test_every_option_counts(other: str) -> None:
    assert of(*BASE, other) != of(*BASE)


@pytest.mark.parametrize(
    "other",
    [
        "tracking=none",
        "tracking.experiment=other",
        "resume=false",
        "hydra.sweep.dir=elsewhere",
        "hydra/launcher=local_parallel",
    ],
)
def test_where_results_go_does_not_count(other: str) -> None:
    assert of(*BASE, other, hydra=True) == of(*BASE, hydra=True) == of(*BASE)


def later(path: Path) -> None:
    """Let a file look as if it had been written a second later."""
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def keeping_time(change: Change) -> Change:
    """Change a file or folder and give it back the time it had."""

    def changed(path: Path) -> None:
        stat = path.stat()
        change(path)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    return changed


@pytest.mark.parametrize("change", [later, keeping_time(lambda path: path.write_bytes(b"longer weights"))])
def test_weights_count(tmp_path: Path, change: Change) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"weights")
    before = of(f"model.weights={weights}")
    assert of(f"model.weights={weights}") == before
    change(weights)
    assert of(f"model.weights={weights}") != before


def test_weights_in_the_home_folder_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights.pth").write_bytes(b"weights")
    before = of("model.weights='~/weights.pth'")
    later(tmp_path / "weights.pth")
    assert of("model.weights='~/weights.pth'") != before


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    root = tmp_path / "photographs"
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            (root / split / name / "0.jpg").touch()
            os.utime(root / split / name, (1e9, 1e9))  # long ago, whatever the clock's steps
    return root


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "val" / "cat" / "1.jpg").touch(),
        lambda root: (root / "train" / "dog" / "0.jpg").unlink(),
        lambda root: (root / "val" / "cow").mkdir(),
        lambda root: (root / "val" / "cat").rename(root / "val" / "lynx"),
    ],
)
def test_images_that_come_and_go_count(photographs: Path, change: Change) -> None:
    folder = ("dataset=image_folder", f"dataset.root={photographs}")
    before = of(*folder)
    assert of(*folder) == before
    change(photographs)
    assert of(*folder) != before


def test_what_is_not_there_yet_has_a_fingerprint(tmp_path: Path) -> None:
    """Data may be downloaded by the first job; from then on it counts."""
    missing = ("dataset=image_folder", f"dataset.root={tmp_path / 'photographs'}")
    before = of(*missing)
    (tmp_path / "photographs").mkdir()
    assert of(*missing) != before


@pytest.mark.slow
def test_code_of_ones_own_counts(tmp_path: Path) -> None:
    mine = tmp_path / "my_pruners.py"
    mine.write_text("def prune(model, data): ...\n")
    override = "++pruner._target_=my_pruners.prune"
    before = in_another_process(tmp_path, override)
    assert in_another_process(tmp_path, override) == before
    mine.write_text("def prune(model, data): ...  # differently\n")
    assert in_another_process(tmp_path, override) != before


def test_code_of_this_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes results does; what starts jobs and shows what they found does not."""
    pruners, terminal, own = (
        tmp_path / name for name in ("compress/pruners.py", "results/terminal.py", "core/fingerprint.py")
    )
    for path in (pruners, terminal, own):
        path.parent.mkdir()
        path.write_text("# as it is\n")
    monkeypatch.setattr(module, "__file__", str(own))
    before = of(*BASE)
    terminal.write_text("# redrawn\n")
    assert of(*BASE) == before
    pruners.write_text("# repaired\n")
    assert of(*BASE) != before


@pytest.mark.slow
def test_a_change_in_any_module_that_a_job_imports_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the rooms around jobs is imported by one, and every other file counts."""
    for number, overrides in enumerate(RUN):  # composed here, as Hydra looks at its plugins meanwhile
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            OmegaConf.save(compose("config", overrides=[*SHORT, *overrides.split()]), tmp_path / f"{number}.yaml")
    done = python(["-c", JOBS, *map(str, sorted(tmp_path.glob("*.yaml")))], tmp_path, new_user())
    assert done.returncode == 0, done.stderr
    package = ROOT / "pq_sweep"
    used = [Path(line).relative_to(package) for line in done.stdout.split() if line.endswith(".py")]
    assert {"job/run.py", "compress/removal.py", "compress/mixed.py", "compress/recovery.py"} <= set(map(str, used))
    copy = tmp_path / "pq_sweep"
    copytree(package, copy, ignore=ignore_patterns("__pycache__"))
    monkeypatch.setattr(module, "__file__", str(copy / "core" / "fingerprint.py"))
    before = module.code({})
    for path in used:
        source = (copy / path).read_bytes()
        (copy / path).write_bytes(source + b"# changed")
        module.look_again()
        assert module.code({}) != before, f"{path} runs in jobs and does not count"
        (copy / path).write_bytes(source)
    module.look_again()
    assert module.code({}) == before


def test_modules_around_jobs_exist() -> None:
    """A name that was changed would count without anybody seeing it."""
    there = {path.name for path in Path(module.__file__).parents[1].iterdir()}
    assert set(module.AROUND_JOBS) <= there


def test_versions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = of(*BASE)
    monkeypatch.setattr(module, "versions", lambda: {"torch": "99"})
    assert of(*BASE) != before


def test_what_is_resolved_is_plain_and_without_effectless_groups() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        values = resolved(compose("config", overrides=list(BASE), return_hydra_config=True))
    assert {"tracking", "resume", "hydra"}.isdisjoint(values)
    assert values["pruner"]["amount"] == 0.5
    assert type(values["measure"]["batch_sizes"]) is list


def test_files_without_weights_and_root_are_none() -> None:
    assert files_state({"model": {"weights": None}, "dataset": {}, "seed": 0}) == []


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2, {"c": 3, "d": 4}]}) == digest({"b": [2, {"d": 4, "c": 3}], "a": 1})
    assert digest([1, 2]) != digest([2, 1])
