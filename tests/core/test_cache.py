"""What jobs share: the same as made anew, missed by whatever differs, whole or not there."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import SHORT, launch_in
from conftest import ROOT, new_user, python
from hydra import compose, initialize_config_dir
from image_folders import fill as fill_images
from safetensors.torch import load_file, save_file

from pq_sweep.compress import removal
from pq_sweep.core import cache, fingerprint
from pq_sweep.core.cache import Cache
from pq_sweep.core.environment import cache_home
from pq_sweep.core.weights import network_state, network_structure
from pq_sweep.job import run as job
from pq_sweep.job import steps as resume
from pq_sweep.types import Model, Preprocess

pytestmark = pytest.mark.slow

WEIGHTS = ROOT / "pq_sweep" / "inputs" / "weights" / "digits_cnn.safetensors"
INT8 = ("quantizer=int8", "runtime=onnxruntime", "quantizer.images=16")
JOBS = {
    "fp32": ("runtime=onnxruntime",),
    "fp16": ("quantizer=fp16", "runtime=onnxruntime"),
    "int8": INT8,
    "entropy": (*INT8, "quantizer.calibration=entropy"),
    "mixed": ("quantizer=mixed", "runtime=onnxruntime", "quantizer.images=16", "quantizer.max_drop=0.1"),
    "removed": ("pruner=remove", "pruner.importance=taylor", "recovery=finetune", "recovery.epochs=1"),
    "random": ("pruner=random", "pruner.amount=0.3", "recovery=finetune", "recovery.epochs=1", *INT8),
    "paired": (*INT8, "measure.paired=true"),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a job in this process, in a sweep of its own, and return its result."""
    folder = folder / "0"
    folder.mkdir(parents=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["tracking=none", *SHORT, *overrides])
    job.run(config, folder)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


Before = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run a job once for all tests that begin with it, and return its folder, beside which its cache lies."""

    @lru_cache
    def make(*overrides: str) -> Path:
        folder = tmp_path_factory.mktemp("before")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PQ_SWEEP_CACHE", str(folder / "cache"))
            patch.setattr(resume, "WORTH_KEEPING_S", 0.0 if "pruner=random" in overrides else resume.WORTH_KEEPING_S)
            run(folder / "a", *overrides)
        return folder

    return make


@pytest.fixture
def before(made: Callable[..., Path], tmp_path: Path) -> Before:
    """Have a job be there that was run before, in the folder `a`, and return its result."""

    def copied(*overrides: str) -> dict[str, Any]:
        shutil.copytree(made(*overrides), tmp_path, dirs_exist_ok=True)
        result: dict[str, Any] = json.loads((tmp_path / "a" / "0" / "result.json").read_text())
        return result

    return copied


def artifact(folder: Path, result: dict[str, Any]) -> bytes:
    return (folder / "0" / result["session"]["artifact"]).read_bytes()


def records(kind: str = "*") -> list[Path]:
    return sorted(cache.home().glob(f"{kind}/[!.]*/record.json"))


# The same with and without


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_what_is_shared_is_what_would_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setattr(resume, "WORTH_KEEPING_S", 0.0)
    folders = {way: tmp_path / way for way in ("off", "first", "second")}
    found = {
        way: run(folder, *JOBS[name], f"cache={'off' if way == 'off' else 'on'}") for way, folder in folders.items()
    }
    first, second = found["first"], found["second"]

    for way, folder in folders.items():
        assert artifact(folder, found[way]) == artifact(folders["off"], found["off"])
        assert found[way]["accuracy"] == found["off"]["accuracy"]
        assert found[way]["baseline"] == found["off"]["baseline"]
        assert (folder / "0" / "layers.json").read_bytes() == (folders["off"] / "0" / "layers.json").read_bytes()
        predictions = [np.load(one / "0" / "predictions.npy") for one in (folder, folders["off"])]
        assert np.array_equal(*predictions)
    assert found["off"]["from_cache"] == first["from_cache"] == []
    assert second["from_cache"]
    for stage in set(second["from_cache"]) & set(second["prep_s"]):  # what a stage cost when it was made
        assert second["prep_s"][stage] == pytest.approx(first["prep_s"][stage])


@pytest.mark.slow
def test_without_a_cache_nothing_is_kept(tmp_path: Path) -> None:
    run(tmp_path / "a", *INT8, "cache=off")

    assert records() == []


def test_a_word_that_is_neither_on_nor_off_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache=never is not known; valid are: on, off"):
        run(tmp_path / "a", "cache=never")


@pytest.mark.slow
def test_jobs_that_differ_later_share_what_is_before(before: Before, tmp_path: Path) -> None:
    before(*INT8)
    plain = run(tmp_path / "b", "runtime=onnxruntime")
    mixed = run(tmp_path / "c", *JOBS["mixed"])

    assert plain["from_cache"] == ["trace", "export", "check_export"]
    assert set(mixed["from_cache"]) == {"trace", "export", "check_export", "calibrate"}
    assert len(records("traced")) == len(records("exported")) == len(records("ranges")) == len(records("baseline")) == 1
    assert len(records("quantized")) == 3


@pytest.mark.slow
def test_networks_that_differ_in_weights_share_the_graph_without_them(tmp_path: Path) -> None:
    chosen = ("pruner=l1_global", "runtime=onnxruntime")
    run(tmp_path / "a", *chosen, "pruner.amount=0.3")
    found = {way: run(tmp_path / way, *chosen, "pruner.amount=0.6", f"cache={way}") for way in ("on", "off")}

    assert found["on"]["from_cache"] == ["trace"]
    assert artifact(tmp_path / "on", found["on"]) == artifact(tmp_path / "off", found["off"])
    removed = run(tmp_path / "removed", "pruner=remove", "runtime=onnxruntime")
    assert removed["from_cache"] == []


def test_a_pruned_network_is_the_same_from_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Torch's pruning puts a layer's weight behind its bias."""
    monkeypatch.setattr(resume, "WORTH_KEEPING_S", 0.0)
    chosen = ("pruner=l1_global", "runtime=onnxruntime")
    run(tmp_path / "a", *chosen)

    assert run(tmp_path / "b", *chosen)["from_cache"] == ["prune", "recover", "trace", "export", "check_export"]


@pytest.mark.parametrize("importance", ["taylor", "sensitivity"])
def test_gradients_are_taken_once_for_all_amounts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, importance: str
) -> None:
    taken: list[bool] = []
    real = removal._gradients
    monkeypatch.setattr(removal, "_gradients", lambda *a, **k: (taken.append(True), real(*a, **k))[1])
    chosen = ("pruner=remove", f"pruner.importance={importance}", "dataset.calibration=20")
    found = {way: run(tmp_path / way, *chosen, "pruner.amount=0.25", f"cache={way}") for way in ("on", "off")}
    again = run(tmp_path / "other", *chosen, "pruner.amount=0.5")

    assert len(taken) == 2
    assert artifact(tmp_path / "on", found["on"]) == artifact(tmp_path / "off", found["off"])
    assert "prune" in again["from_cache"]
    assert all(path.is_relative_to(cache_home()) for path in tmp_path.rglob("gradients.pt"))


# What misses


def changed_weight(folder: Path) -> tuple[str, ...]:
    weights = load_file(WEIGHTS)
    first = next(name for name in weights if name.endswith("weight"))
    weights[first].view(-1)[0] += 1e-3
    save_file(weights, folder / "w.safetensors")
    return (f"model.weights={folder / 'w.safetensors'}",)


def test_a_changed_weight_misses(before: Before, tmp_path: Path) -> None:
    before(*INT8)

    # The graph without its weights is that of any weights.
    assert run(tmp_path / "b", *INT8, *changed_weight(tmp_path))["from_cache"] == ["trace"]


@pytest.mark.parametrize("option", ["quantizer.images=17", "quantizer.calibration=entropy", "quantizer.exclude=[last]"])
def test_a_changed_option_misses(before: Before, tmp_path: Path, option: str) -> None:
    before(*INT8)
    run(tmp_path / "b", *INT8, option)

    assert len(records("quantized")) == 2


@pytest.mark.parametrize("which", ["calibration", "evaluation"])
def test_a_changed_image_misses(tmp_path: Path, which: str) -> None:
    for part, seed in (("train", 0), ("val", 50)):
        fill_images(tmp_path / "images" / part, {"0": 4, "1": 4}, seed)
    data = ("dataset=image_folder", f"dataset.root={tmp_path / 'images'}", "dataset.calibration=4", *INT8)
    data = (*data, "quantizer.images=4")
    run(tmp_path / "a", *data)
    fill_images(tmp_path / "images" / {"calibration": "train", "evaluation": "val"}[which], {"0": 4, "1": 4}, seed=99)
    run(tmp_path / "b", *data)

    assert len(records("baseline")) == (2 if which == "evaluation" else 1)
    assert len(records("quantized")) == len(records("ranges")) == (2 if which == "calibration" else 1)


@pytest.mark.slow
def test_another_version_of_a_library_misses(monkeypatch: pytest.MonkeyPatch, before: Before, tmp_path: Path) -> None:
    before(*INT8)
    other = cache.versions() | {"onnx": "1.0.0"}
    monkeypatch.setattr(cache, "versions", lambda: other)

    assert run(tmp_path / "b", *INT8)["from_cache"] == []


@pytest.mark.slow
def test_other_code_misses(monkeypatch: pytest.MonkeyPatch, before: Before, tmp_path: Path) -> None:
    before(*INT8)
    monkeypatch.setattr(cache, "code", lambda options: fingerprint.code(options) + "x")

    assert run(tmp_path / "b", *INT8)["from_cache"] == []


def test_a_component_of_ones_own_is_part_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "own_model.py"
    module.write_text("def own():\n    pass\n")
    options = {"model": {"_target_": "own_model.own"}}
    before = fingerprint.code(options)
    module.write_text("def own():\n    return 1\n")
    fingerprint.look_again()

    assert fingerprint.code(options) != before


@pytest.mark.slow
@pytest.mark.parametrize("change", ["seed=1", "pruner.amount=0.4", "recovery.lr=0.003", "dataset.calibration=100"])
def test_training_is_shared_only_by_what_is_the_same(
    monkeypatch: pytest.MonkeyPatch, before: Before, tmp_path: Path, change: str
) -> None:
    monkeypatch.setattr(resume, "WORTH_KEEPING_S", 0.0)
    before(*JOBS["random"])
    found = run(tmp_path / "b", *JOBS["random"], change)

    assert "recover" not in found["from_cache"]


def test_which_logits_compete_tells_data_apart() -> None:
    from pq_sweep.inputs.datasets import digits
    from pq_sweep.inputs.models import digits_cnn

    data = digits(digits_cnn())
    other = replace(data, columns=torch.tensor([1, 0, *range(2, 10)]))

    assert data.identity(data.evaluation) == digits(digits_cnn()).identity(data.evaluation)
    assert data.identity(data.evaluation) != other.identity(other.evaluation)
    assert data.identity(data.evaluation) != data.identity(data.calibration)


def test_an_option_without_plain_values_finds_nothing(tmp_path: Path) -> None:
    kept, about = Cache({}), {"option": object()}
    kept.put("kind", about, tmp_path, {"value": 1, "seconds": {}}, [])

    assert kept.take("kind", about, tmp_path)
    assert kept.take("kind", {"option": object()}, tmp_path) is None


def test_a_quick_step_asks_for_no_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To tell images apart takes longer than most pruning."""
    run(tmp_path / "a", "pruner=l1_global")
    run(tmp_path / "b", "pruner=l1_global")

    assert not records("prune")
    assert not records("slow")


# --- accidents --------------------------------------------------------------------------------------------------------


def test_a_truncated_file_is_made_again_with_a_warning(
    before: Before, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = before(*INT8)
    (graph,) = cache.home().glob("quantized/*/model.onnx")
    graph.write_bytes(graph.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        second = run(tmp_path / "b", *INT8)

    assert f"{graph.parent} in the cache is damaged, so it is made again" in caplog.text
    assert artifact(tmp_path / "b", second) == artifact(tmp_path / "a", first)
    assert "quantize" not in second["from_cache"]
    assert "quantize" in run(tmp_path / "c", *INT8)["from_cache"]


def test_a_cache_that_cannot_be_written_stops_no_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(job, "load", loaded_elsewhere(job.load, monkeypatch, tmp_path))
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path / "a", *INT8)["status"] == "finished"

    assert "is not kept in the cache" in caplog.text


def loaded_elsewhere(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., Any]:
    """Return a call that loads images with a cache that can be written: without one no image is decoded."""

    def inner(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("PQ_SWEEP_CACHE", str(folder / "images"))
            return load(*arguments)

    return inner


FILL = """
import sys
from pathlib import Path
from pq_sweep.core.cache import Cache
from pq_sweep.job.stages import Stages

folder = Path(sys.argv[1])
folder.mkdir()
made = folder / "made.bin"
stage = Stages(folder, "", Cache({}))
for number in range(20):
    def make():
        made.write_bytes(bytes([number]) * 300_000)
        print(number, flush=True)
        return number
    assert stage.keep_in_cache("kind", lambda: {"number": number}, make, made) == number
    assert made.read_bytes() == bytes([number]) * 300_000
"""


def fill(folder: Path) -> subprocess.Popen[str]:
    environment = new_user() | {"PQ_SWEEP_CACHE": str(cache_home())}
    return subprocess.Popen(
        [sys.executable, "-c", FILL, str(folder)], env=environment, stdout=subprocess.PIPE, text=True
    )


def test_eight_processes_at_once_make_each_entry_once(tmp_path: Path) -> None:
    processes = [fill(tmp_path / str(number)) for number in range(8)]
    said = [process.communicate(timeout=120)[0].split() for process in processes]

    assert [process.returncode for process in processes] == [0] * 8
    assert sorted(int(number) for numbers in said for number in numbers) == list(range(20))
    assert len(records("kind")) == 20


def test_a_process_that_is_killed_leaves_no_bad_entry(tmp_path: Path) -> None:
    source = random.Random(0)
    for attempt in range(10):
        process = fill(tmp_path / f"killed{attempt}")
        assert process.stdout
        process.stdout.readline()
        time.sleep(source.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for record in records("kind"):
            told = json.loads(record.read_text())
            assert (record.parent / "made.bin").read_bytes() == bytes([told["value"]]) * 300_000
    last = fill(tmp_path / "last")
    last.communicate(timeout=60)

    assert last.returncode == 0
    assert len(records("kind")) == 20


# --- the command ------------------------------------------------------------------------------------------------------


def kept(names: str, size: int = 1000) -> None:
    """Put an entry for each letter, the first one used longest ago."""
    source = cache_home() / "source"
    source.mkdir(parents=True, exist_ok=True)
    (source / "file").write_bytes(bytes(size))
    for age, name in enumerate(reversed(names)):
        Cache({}).put(f"kind_{name}", {"name": name}, source, {"value": 0, "seconds": {}}, ["file"])
        (record,) = records(f"kind_{name}")
        os.utime(record, (time.time() - age * 86400, time.time() - age * 86400))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    known = new_user() | {"PQ_SWEEP_CACHE": str(cache_home())} | environment
    return python(["-m", "pq_sweep.cache", *arguments], cache_home().parent, known)


def left() -> list[str]:
    return [record.parent.parent.name.removeprefix("kind_") for record in records()]


def test_ls_says_what_there_is(tmp_path: Path) -> None:
    kept("ab")
    done = command("ls")

    assert done.returncode == 0, done.stderr
    assert "kind_a" in done.stdout
    assert "kind_b" in done.stdout
    assert command("ls", PQ_SWEEP_CACHE=str(tmp_path / "none")).returncode == 0


def test_prune_removes_what_was_not_used_for_longest() -> None:
    kept("abcd")
    whole = sum(entry.size for entry in cache.entries())
    done = command("prune", "--gb", str(whole * 0.6 / 1e9))

    assert done.stdout.startswith("removed 2 entries"), done.stderr
    assert left() == ["c", "d"]
    assert command("prune", "--unused-days", "0.5").stdout.startswith("removed 1 ")
    assert left() == ["d"]
    assert command("prune", PQ_SWEEP_CACHE_GB="0").stdout.startswith("removed 1 ")


def test_the_limit_holds_while_jobs_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PQ_SWEEP_CACHE_GB", "0.000003")
    kept("abcd")

    assert len(left()) < 4
    assert "d" in left()


def test_a_limit_that_is_no_number_is_refused() -> None:
    done = command("prune", PQ_SWEEP_CACHE_GB="much")

    assert done.returncode == 1
    assert done.stderr.startswith("PQ_SWEEP_CACHE_GB=much is not valid; give how many gigabytes")


def test_what_a_killed_process_left_goes_after_a_day() -> None:
    kept("a")
    aside = cache.home() / "kind_a" / ".half.host.1"
    aside.mkdir()
    cache.shrink(10**9)
    assert aside.exists()
    os.utime(aside, (time.time() - 2 * 86400,) * 2)
    cache.shrink(10**9)

    assert not aside.exists()
    assert left() == ["a"]


@pytest.mark.slow
def test_a_second_sweep_makes_nothing_anew(tmp_path: Path) -> None:
    grid = ("-m", "pruner=none,l1_global", "pruner.amount=0.5", *INT8, *SHORT, "tracking=none")
    done = [launch_in(tmp_path, *grid, f"hydra.sweep.dir={name}") for name in ("one", "two")]
    assert [one.returncode for one in done] == [0, 0], done[1].stderr
    for number in ("0", "1"):
        one, two = (json.loads((tmp_path / name / number / "result.json").read_text()) for name in ("one", "two"))
        assert one["session"]["sha256"] == two["session"]["sha256"]
        assert {"export", "calibrate", "quantize"} <= set(two["from_cache"])
        assert one["accuracy"] == two["accuracy"]


def test_what_a_network_computes_with_tells_it_apart() -> None:
    from pq_sweep.inputs.models import digits_cnn

    one, other = digits_cnn(), digits_cnn()
    assert network_state(one) == network_state(other)
    with torch.no_grad():
        next(other.module.buffers()).add_(1)
    assert network_state(one)["weights"] != network_state(other)["weights"]
    half = digits_cnn()
    half.module.to(torch.bfloat16)
    assert network_state(one)["weights"] != network_state(half)["weights"]


class Scaled(torch.nn.Module):
    """A layer with options that its repr does not show: a number, a tensor and a buffer that is not saved."""

    def __init__(self, number: float, tensor: float, buffer: float) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.number = number
        self.tensor = torch.tensor(tensor)
        self.register_buffer("buffer", torch.tensor(buffer), persistent=False)


@pytest.mark.parametrize("options", [(2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0)], ids=str)
def test_what_a_repr_hides_tells_structures_apart(options: tuple[float, float, float]) -> None:
    """Weights, which differ in all three, do not."""
    one, same, other = (
        network_structure(Model(Scaled(*numbers), 2, Preprocess(size=1, resize=1, channels=2)))
        for numbers in ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), options)
    )
    assert one == same
    assert one != other
