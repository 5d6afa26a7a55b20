"""A job that ends before its time goes on where it was, and what is finished is not done again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import LAUNCH, SHORT, Done, launch_in
from conftest import ROOT, new_user
from hydra import compose, initialize_config_dir

from pq_sweep.compress.pruners import l1_global
from pq_sweep.compress.recovery import finetune
from pq_sweep.compress.removal import remove
from pq_sweep.core.fingerprint import resolved
from pq_sweep.core.folder import SweepFolder
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job import run as job
from pq_sweep.job import steps as resume
from pq_sweep.job.stages import Stages
from pq_sweep.job.steps import change_once
from pq_sweep.sweep.grid import Grid, announce
from pq_sweep.types import Model, UserError

PROGRESS = "progress.json"

# Runs launch.py and waits at the beginning of the stage PAUSE_IN for somebody to end the process.
PAUSING = """
import os, runpy, sys, time
from contextlib import contextmanager
from pq_sweep.job.stages import Stages

enter = Stages.__call__

@contextmanager
def pausing(self, name, **how):
    with enter(self, name, **how):
        if name == os.environ["PAUSE_IN"]:
            time.sleep(600)
        yield

Stages.__call__ = pausing
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

ONNX = ("pruner=l1_global", "quantizer=int8", "runtime=onnxruntime")
# Fine-tuning takes some seconds, so its network is kept.
TRAINED = ("pruner=remove", "recovery=finetune", "recovery.epochs=20")
WEIGHTS = "model.weights=weights.pt"

# Options, the stage in which the first try ends, how it ends, what a second try must not do again, and what it must.
INTERRUPTED = {
    "calibrated": (ONNX, "calibrate", signal.SIGKILL, {"export", "check_export", "sizes"}, {"calibrate", "build"}),
    "trained": (TRAINED, "accuracy", signal.SIGKILL, {"recover", "sizes"}, {"prune", "accuracy"}),
    "stopped": ((WEIGHTS,), "latency b1", signal.SIGTERM, {"sizes", "accuracy"}, {"latency b1"}),
}
each = pytest.mark.parametrize("name", INTERRUPTED)


@dataclass(frozen=True)
class Story:
    """A job that was ended and started again: what was there after its first try and what its second try said."""

    folder: Path
    code: int
    left: set[str]
    progress: dict[str, Any]
    error: dict[str, Any] | None
    again: Done
    log: list[str]

    @property
    def job(self) -> Path:
        return self.folder / "s" / "0"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def command(*overrides: str) -> tuple[str, ...]:
    return ("hydra.sweep.dir=s", "tracking=none", "cache=off", *SHORT, *overrides)


def wait_for_stage(folder: Path, stage: str, process: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait until a job's status.json names a stage."""
    status, end = folder / "status.json", time.monotonic() + seconds
    while not status.exists() or read(status)["stage"] != stage:
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            pytest.fail(f"{stage} was not reached: {process.communicate()}")
        time.sleep(0.05)


def end_in(folder: Path, stage: str, number: signal.Signals, *overrides: str) -> tuple[int, str]:
    """Start a sweep of one job, end it in a stage of that job, and return exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", PAUSING, LAUNCH, *command(*overrides)],
        cwd=folder,
        env=new_user() | {"PAUSE_IN": stage},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_stage(folder / "s" / "0", stage, process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr


def log_lines(folder: Path) -> list[str]:
    return (folder / "job.log").read_text().splitlines()


def stages_in(lines: list[str]) -> list[str]:
    """Return the stages that lines of a job.log name, in order."""
    return [found.group(1) for line in lines if (found := re.search(r" \| ([\w ]+)$", line))]


def save_weights(path: Path, **options: Any) -> None:
    torch.save(digits_cnn(**options).module.state_dict(), path)


def tell(folder: Path, name: str) -> Story:
    """Run a job, end it, start it again."""
    folder.mkdir()
    save_weights(folder / "weights.pt")
    overrides, stage, number, _, _ = INTERRUPTED[name]
    place = folder / "s" / "0"
    code, _ = end_in(folder, stage, number, *overrides)
    left, progress = {path.name for path in place.iterdir()}, read(place / PROGRESS)
    error = read(place / "error.json") if (place / "error.json").exists() else None
    before = len(log_lines(place))
    again = launch_in(folder, *command(*overrides))
    return Story(folder, code, left, progress, error, again, log_lines(place)[before:])


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    root = tmp_path_factory.mktemp("stories")
    with ThreadPoolExecutor(2) as pool:
        told = pool.map(lambda name: tell(root / name, name), INTERRUPTED)
        return dict(zip(INTERRUPTED, told, strict=True))


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a job in this process and return its result."""
    folder.mkdir(parents=True, exist_ok=True)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["tracking=none", "cache=off", *SHORT, *overrides])
    job.run(config, folder)
    return read(folder / "result.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the same job as it ends if nobody interrupts it."""
    root, done = tmp_path_factory.mktemp("whole"), dict[str, Path]()

    def ran(name: str) -> Path:
        if name not in done:
            overrides = [option for option in INTERRUPTED[name][0] if option != WEIGHTS]  # they are the packaged ones
            run(root / name / "0", *overrides)
            done[name] = root / name / "0"
        return done[name]

    return ran


class Gone(BaseException):
    """The process is gone: nothing is written any more."""


@contextmanager
def gone_in(stage: str, times: int = 1) -> Iterator[None]:
    """End the job in this process at the beginning of a stage as SIGKILL would."""
    enter, left = Stages.__call__, [times]

    @contextmanager
    def leaving(self: Stages, name: str, **how: Any) -> Iterator[None]:
        with enter(self, name, **how):
            if name == stage and left[0]:
                left[0] -= 1
                raise Gone
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "__call__", leaving)
        with pytest.raises(Gone):
            yield


@contextmanager
def stages_of() -> Iterator[list[str]]:
    """Note which stages are entered."""
    enter, names = Stages.__call__, list[str]()

    @contextmanager
    def noting(self: Stages, name: str, **how: Any) -> Iterator[None]:
        names.append(name)
        with enter(self, name, **how):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "__call__", noting)
        yield names


# --- killed and started again -----------------------------------------------------------------------------------------


@pytest.mark.slow
@each
def test_the_row_finishes(stories: dict[str, Story], name: str) -> None:
    story = stories[name]
    assert story.again.returncode == 0, story.again.stdout + story.again.stderr
    assert ": 1 done" in story.again.stdout
    assert not (story.job / "error.json").exists()
    result = read(story.job / "result.json")
    assert [set(attempt) for attempt in result["tries"]] == [{"started", "host"}] * 2
    assert result["tries"][0] == story.progress["tries"][0]
    assert result["tries"][1]["started"] == result["started"] > result["tries"][0]["started"]


@pytest.mark.slow
@each
def test_it_finds_what_an_uninterrupted_job_finds(
    stories: dict[str, Story], whole: Callable[[str], Path], name: str
) -> None:
    ours, theirs = stories[name].job, whole(name)
    result, expected = read(ours / "result.json"), read(theirs / "result.json")
    same = ("accuracy", "network", "size_bytes", "images", "baseline", "session")
    assert {key: result[key] for key in same} == {key: expected[key] for key in same}
    assert (ours / "predictions.npy").read_bytes() == (theirs / "predictions.npy").read_bytes()
    assert result["prep_s"].keys() == expected["prep_s"].keys()
    artifact = result["session"]["artifact"]
    if artifact == "model.onnx":
        assert (ours / artifact).read_bytes() == (theirs / artifact).read_bytes()
    else:
        networks = [torch.load(folder / artifact, weights_only=True) for folder in (ours, theirs)]
        assert networks[0].keys() == networks[1].keys()
        assert all(torch.equal(tensor, networks[1][key]) for key, tensor in networks[0].items())


@pytest.mark.slow
@each
def test_finished_stages_are_not_run_again(stories: dict[str, Story], name: str) -> None:
    story, (_, _, _, done, repeated) = stories[name], INTERRUPTED[name]
    again = stages_in(story.log)
    assert done.isdisjoint(again)
    assert repeated <= set(again)
    assert any("continued after: " in line for line in story.log)


@pytest.mark.slow
@each
def test_stages_count_as_long_as_they_took(stories: dict[str, Story], name: str) -> None:
    story = stories[name]
    seconds = read(story.job / "result.json")["stage_s"]
    done = INTERRUPTED[name][3]
    assert done <= story.progress["seconds"].keys()
    assert {stage: seconds[stage] for stage in done} == {stage: story.progress["seconds"][stage] for stage in done}


@pytest.mark.slow
@each
def test_nothing_is_left_that_was_needed_to_go_on(stories: dict[str, Story], name: str) -> None:
    left = {path.name for path in stories[name].job.iterdir()}
    assert PROGRESS in stories[name].left
    assert not [file for file in left if file.endswith(".kept.pt") or file in (PROGRESS, "export.onnx")]


@pytest.mark.slow
def test_a_trained_network_is_kept(stories: dict[str, Story]) -> None:
    """A job that is killed leaves no word, and one that repeats the training would find the same."""
    story = stories["trained"]
    assert story.code == -signal.SIGKILL
    assert story.error is None
    assert "recover.kept.pt" in story.left
    assert read(story.job / "result.json")["prep_s"]["recover"] > resume.WORTH_KEEPING_S


@pytest.mark.slow
def test_a_job_that_is_stopped_says_so(stories: dict[str, Story]) -> None:
    story = stories["stopped"]
    assert story.code == 143
    assert story.error is not None
    assert (story.error["type"], story.error["stage"]) == ("Stopped", "latency b1")
    assert re.fullmatch(r"the job was stopped by SIGTERM[^.]*\.", story.error["message"])


# --- finished ---------------------------------------------------------------------------------------------------------


def result_of(story: Story) -> tuple[int, str]:
    path = story.job / "result.json"
    return path.stat().st_mtime_ns, read(path)["fingerprint"]


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(stories: dict[str, Story]) -> None:
    story = stories["calibrated"]
    before, lines = result_of(story), len(log_lines(story.job))
    done = launch_in(story.folder, *command(*ONNX))
    assert done.returncode == 0, done.stdout + done.stderr
    assert ": 1 done" in done.stdout
    assert result_of(story) == before
    (line,) = log_lines(story.job)[lines:]
    assert line.endswith("job 1 of 1: digits_cnn l1_global 0.5 int8 onnxruntime | reused: finished earlier")


@pytest.mark.slow
def test_another_grid_does_not_replace_what_is_finished(stories: dict[str, Story]) -> None:
    story = stories["calibrated"]
    before, manifest = result_of(story), (story.folder / "s" / "sweep.json").read_bytes()
    done = launch_in(story.folder, *command(*ONNX, "pruner.amount=0.7"))
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert re.fullmatch(r"s/0 holds the finished job '.* 0\.5 int8 .*' of another grid; .* resume=false .*\.", sentence)
    assert result_of(story) == before
    assert (story.folder / "s" / "sweep.json").read_bytes() == manifest


def announced(*overrides: str) -> dict[str, Any]:
    """Return a job as a grid announces it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        job = compose("config", overrides=["hydra.job.num=0", *overrides], return_hydra_config=True)
        return announce(job, resolved(job))


@pytest.mark.parametrize(
    ("other", "refuses"),
    [
        (("pruner=l1",), True),
        (("seed=1",), True),
        (("+pruner.x=1",), True),
        (("tracking=none",), False),
        (("tracking.experiment=again",), False),
        (("resume=true",), False),
    ],
)
def test_a_grid_that_only_logs_elsewhere_is_no_other(tmp_path: Path, other: tuple[str, ...], refuses: bool) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "result.json").touch()
    try:
        Grid([announced(*other)]).refuse_other(SweepFolder(tmp_path), [announced()])
    except UserError:
        assert refuses
    else:
        assert not refuses


def test_a_grid_may_change_what_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    Grid([announced("seed=1")]).refuse_other(SweepFolder(tmp_path), [announced()])


@pytest.mark.slow
def test_resume_false_runs_what_is_finished_and_replaces_what_is_there(stories: dict[str, Story]) -> None:
    """First the same job once more, then one of another grid in its place."""
    story = stories["trained"]
    time_before, before = result_of(story)
    done = launch_in(story.folder, *command(*TRAINED), "resume=false")
    assert done.returncode == 0, done.stdout + done.stderr
    time_after, after = result_of(story)
    assert after == before
    assert time_after > time_before
    assert len(read(story.job / "result.json")["tries"]) == 1
    done = launch_in(story.folder, *command("pruner=l1"), "resume=false")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(story)[1] != before
    assert "history" not in read(story.job / "pruning.json")


@pytest.mark.slow
def test_other_weights_under_the_same_name_are_run(stories: dict[str, Story]) -> None:
    story = stories["stopped"]
    before = read(story.job / "result.json")
    save_weights(story.folder / "weights.pt", weights=None)
    done = launch_in(story.folder, *command(WEIGHTS))
    assert done.returncode == 0, done.stdout + done.stderr
    after = read(story.job / "result.json")
    assert after["accuracy"]["top1"] < 0.5 < before["accuracy"]["top1"]
    assert len(after["tries"]) == 1


@pytest.mark.slow
def test_a_component_that_exits_ends_its_job_only(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import sys\n\ndef leave(model, data, *, code):\n    if code:\n        sys.exit(code)\n"
    )
    (tmp_path / "conf" / "pruner").mkdir(parents=True)
    (tmp_path / "conf" / "pruner" / "mine.yaml").write_text("_target_: mine.leave\ncode: 3\n")
    done = launch_in(tmp_path, "-m", "--config-dir", "conf", *command("pruner=mine", "pruner.code=3,0"))
    assert done.returncode == 1
    assert "1 done, 1 failed" in done.stdout
    error = read(tmp_path / "s" / "0" / "error.json")
    assert (error["type"], error["stage"]) == ("SystemExit", "prune")
    assert error["message"] == "the job called sys.exit(3) instead of raising an error."
    assert error["message"] in " ".join(done.stdout.split())
    assert read(tmp_path / "s" / "1" / "result.json")["status"] == "finished"


# --- what is kept and what is not -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_truncated_files_are_made_again(tmp_path: Path, whole: Callable[[str], Path]) -> None:
    folder = tmp_path / "0"
    with gone_in("calibrate"):
        run(folder, *ONNX)
    truncate(folder / "export.onnx")
    with gone_in("accuracy"), stages_of() as names:
        run(folder, *ONNX)
    assert {"export", "check_export", "calibrate"} <= set(names)
    truncate(folder / "model.onnx")
    with stages_of() as names:
        result = run(folder, *ONNX)
    assert {"export", "calibrate", "quantize"} <= set(names)
    assert len(result["tries"]) == 3
    assert (folder / "model.onnx").read_bytes() == (whole("calibrated") / "model.onnx").read_bytes()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FAST_TRAINED = ("pruner=remove", "recovery=finetune", "recovery.epochs=1")


@pytest.fixture
def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "WORTH_KEEPING_S", 0.0)


@pytest.mark.slow
@pytest.mark.usefixtures("keep_everything")
def test_what_was_kept_is_taken(tmp_path: Path) -> None:
    with gone_in("accuracy"):
        run(tmp_path / "0", *FAST_TRAINED)
    assert {path.name for path in (tmp_path / "0").glob("*.kept.pt")} == {"prune.kept.pt", "recover.kept.pt"}
    with stages_of() as names:
        run(tmp_path / "0", *FAST_TRAINED)
    assert {"prune", "recover", "sizes"}.isdisjoint(names)
    assert (tmp_path / "0" / "pruning.json").exists()
    assert not list((tmp_path / "0").glob("*.kept.pt"))


@pytest.mark.slow
@pytest.mark.usefixtures("keep_everything")
def test_a_truncated_network_is_made_again(tmp_path: Path) -> None:
    expected = run(tmp_path / "whole" / "0", *FAST_TRAINED)
    folder = tmp_path / "cut" / "0"
    with gone_in("accuracy"):
        run(folder, *FAST_TRAINED)
    truncate(folder / "recover.kept.pt")
    with stages_of() as names:
        result = run(folder, *FAST_TRAINED)
    assert "recover" in names
    assert "prune" not in names
    assert result["accuracy"] == expected["accuracy"]
    predictions = [np.load(tmp_path / name / "0" / "predictions.npy") for name in ("cut", "whole")]
    assert (predictions[0] == predictions[1]).all()


@pytest.mark.slow
@pytest.mark.usefixtures("keep_everything")
@pytest.mark.parametrize("other", ["seed=1", "recovery.lr=0.002", "dataset.calibration=100"])
def test_another_job_starts_from_scratch(tmp_path: Path, other: str) -> None:
    folder = tmp_path / "0"
    with gone_in("latency b1"):
        run(folder, *FAST_TRAINED)
    with stages_of() as names, gone_in("recover"):
        run(folder, *FAST_TRAINED, other)
    assert names == ["load", "baseline", "prune", "recover"]
    progress = read(folder / PROGRESS)
    assert list(progress["kept"]) == ["prune"]
    assert len(progress["tries"]) == 1
    assert not [name for name in ("recover.kept.pt", "predictions.npy", "model.pt") if (folder / name).exists()]


# --- Stages -----------------------------------------------------------------------------------------------------------


def stages(folder: Path, key: str = "key") -> Stages:
    """Return the stages of a job that starts, or starts again."""
    stage = Stages(folder, "job")
    stage.resume(key)
    return stage


def counted(value: Any, *files: Path) -> tuple[Callable[[], Any], list[Any]]:
    """Return a function that writes `files` and returns `value`, and the list of its calls."""
    calls: list[Any] = []

    def make() -> Any:
        calls.append(value)
        for file in files:
            file.write_text(str(value))
        return value

    return make, calls


def test_what_is_kept_is_made_once(tmp_path: Path) -> None:
    file = tmp_path / "made.txt"
    value = {"numbers": [1, 2.5, None], "text": "ü"}
    make, calls = counted(value, file)
    first = stages(tmp_path)
    assert not first.has("part")
    assert first.keep_in_job("part", make, file) == first.keep_in_job("part", make, file) == value
    again = stages(tmp_path)
    assert again.has("part")
    assert again.keep_in_job("part", make, file) == value
    assert len(calls) == 1


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("longer than before")])
def test_a_part_whose_file_changed_is_not_kept(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    file = tmp_path / "made.txt"
    make, calls = counted("value", file)
    stages(tmp_path).keep_in_job("part", make, file)
    damage(file)
    again = stages(tmp_path)
    assert not again.has("part")
    assert again.keep_in_job("part", make, file) == "value"
    assert file.read_text() == "value"
    assert len(calls) == 2


def test_a_part_that_failed_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        stages(tmp_path).keep_in_job("part", lambda: 1 / 0)
    assert not stages(tmp_path).has("part")


def test_once_is_a_stage(tmp_path: Path) -> None:
    make, calls = counted(7)
    first = stages(tmp_path)
    assert first.time_and_keep("export", make) == 7
    again = stages(tmp_path)
    with stages_of() as names:
        assert again.time_and_keep("export", make) == 7
    assert names == []
    assert len(calls) == 1
    assert again.preparation.prep_s == {"export": first.seconds["export"]}


def test_a_stage_of_an_earlier_try_is_not_timed_again(tmp_path: Path) -> None:
    first = stages(tmp_path)
    first.time_and_keep("export", lambda: None)
    again = stages(tmp_path)
    for name in ("export", "quantize"):
        with again(name):
            time.sleep(0.01)
    assert again.seconds["export"] == first.seconds["export"] < 0.01 <= again.seconds["quantize"]


def test_a_try_of_the_same_job_is_added(tmp_path: Path) -> None:
    stages(tmp_path)
    tries = stages(tmp_path).tries
    assert len(tries) == 2
    assert tries[0]["started"] < tries[1]["started"]
    assert {attempt["host"] for attempt in tries} == {os.uname().nodename}


def test_another_key_clears_the_folder(tmp_path: Path) -> None:
    stages(tmp_path).keep_in_job("part", lambda: 1)
    for name in ("export.onnx", "model.pt", "prune.kept.pt", "predictions.npy", "pruning.json", "job.log"):
        (tmp_path / name).touch()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "x.engine").touch()
    again = stages(tmp_path, "another")
    assert not again.has("part")
    assert len(again.tries) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"job.log", PROGRESS}


def test_a_damaged_record_of_progress_counts_for_nothing(tmp_path: Path) -> None:
    stages(tmp_path).keep_in_job("part", lambda: 1)
    (tmp_path / PROGRESS).write_text('{"key": "key", "kept": {"part"')
    assert not stages(tmp_path).has("part")


# --- steps that change the network ------------------------------------------------------------------------------------

REMOVAL = {"amount": 0.5, "importance": "magnitude", "p": 2, "global_ranking": False, "round_to": None}


def prune_by_removal(model: Model) -> Any:
    from pq_sweep.inputs.datasets import digits

    return remove(model, digits(model), **REMOVAL)


def prune_by_zeros(model: Model) -> None:
    from pq_sweep.inputs.datasets import digits

    l1_global(model, digits(model), amount=0.5)


def train(model: Model) -> None:
    from pq_sweep.inputs.datasets import digits

    finetune(model, digits(model), epochs=1, lr=0.001)


@pytest.mark.usefixtures("keep_everything")
@pytest.mark.parametrize("step", [prune_by_removal, prune_by_zeros, train])
def test_a_changed_network_comes_back(tmp_path: Path, step: Callable[[Model], Any]) -> None:
    torch.manual_seed(3)
    first, again = digits_cnn(), digits_cnn()
    record = change_once(stages(tmp_path), "prune", first, lambda: step(first))
    drawn = torch.rand(4)

    torch.manual_seed(4)
    stage = stages(tmp_path)
    restored = change_once(stage, "prune", again, lambda: pytest.fail("it was done again"))

    assert restored == record
    assert torch.equal(torch.rand(4), drawn)  # random numbers go on as they would have
    ours, theirs = again.module.state_dict(), first.module.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(again.module(again.sample()), first.module(first.sample()))
    dense = sum(weight.numel() for weight in digits_cnn().module.parameters())
    removed = sum(weight.numel() for weight in again.module.parameters())
    assert (removed < dense) == (step is prune_by_removal)


@pytest.mark.usefixtures("keep_everything")
def test_what_cannot_be_put_back_is_repeated(tmp_path: Path) -> None:
    """A pruner of one's own that changes shapes without a history leaves weights that fit no fresh network."""

    def shrink(model: Model) -> None:
        last = next(part for part in reversed(list(model.module.modules())) if isinstance(part, torch.nn.Linear))
        last.bias = None

    for _ in range(2):
        model = digits_cnn()
        change_once(stages(tmp_path), "prune", model, lambda model=model: shrink(model))
        assert len(list(model.module.parameters())) < len(list(digits_cnn().module.parameters()))
    assert not list(tmp_path.glob("*.kept.pt"))


def flip(model: Model) -> None:
    forward = model.module.forward
    model.module.forward = lambda images: forward(images.flip(3))


def hook(model: Model) -> None:
    model.module.register_forward_hook(lambda part, images, logits: -logits)


@pytest.mark.usefixtures("keep_everything")
@pytest.mark.parametrize("step", [flip, hook])
def test_what_no_state_dict_holds_is_repeated(tmp_path: Path, step: Callable[[Model], None]) -> None:
    """A pruner of one's own that changes what the network computes, and none of its weights."""
    answers = []
    for _ in range(2):
        model = digits_cnn()
        change_once(stages(tmp_path), "prune", model, lambda model=model: step(model))
        answers.append(model.module(model.sample()))
    assert torch.equal(*answers)
    assert not torch.equal(answers[0], digits_cnn().module(model.sample()))


def test_what_is_quick_is_repeated(tmp_path: Path) -> None:
    model = digits_cnn()
    for _ in range(2):
        done: list[bool] = []
        assert change_once(stages(tmp_path), "prune", model, lambda done=done: done.append(True)) is None
        assert done == [True]
    assert not list(tmp_path.glob("*.kept.pt"))


@pytest.mark.usefixtures("keep_everything")
def test_a_step_that_fails_keeps_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        change_once(stages(tmp_path), "prune", digits_cnn(), lambda: 1 / 0)
    assert not list(tmp_path.glob("*.kept.pt"))
    assert not stages(tmp_path).has("prune")
