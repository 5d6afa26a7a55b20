"""Files that components open by paths that nobody spells out are noted, and a change of one is seen."""

from __future__ import annotations

import glob
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from pq_sweep.core import opened as module
from pq_sweep.core.files import read_json, write_json
from pq_sweep.core.opened import MOST, Opened, look_again, merged, noting, opened, unchanged

OURS = OmegaConf.create({"_target_": "pq_sweep.inputs.models.digits_cnn"})
NONE: Opened = {"files": {}, "listed": {}, "matching": {}, "trees": {}}


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Iterator[DictConfig]:
    """A component of the user's, of which nothing is known yet."""
    monkeypatch.setattr(module, "WRITTEN", set())
    module.FOUND.pop("my_nets", None)
    yield OmegaConf.create({"_target_": "my_nets.make"})
    module.FOUND.pop("my_nets", None)


def noted(component: DictConfig, call: Callable[[], object], folder: Path) -> Opened:
    with noting(component):
        call()
    found = opened([component], folder / "sweep")
    assert unchanged(found)
    return found


def is_unchanged(found: Opened) -> bool:
    look_again()
    return unchanged(found)


def write_image(path: Path, value: int) -> None:
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path.with_suffix(".png"))
    path.with_suffix(".png").replace(path)


# How a file is written with a value, and read.
READ: dict[str, tuple[Callable[[Path, int], object], Callable[[Path], object]]] = {
    "text": (lambda path, value: path.write_text(str(value)), Path.read_text),
    "os.open": (lambda path, value: path.write_text(str(value)), lambda path: os.close(os.open(path, os.O_RDONLY))),
    "torch": (lambda path, value: torch.save(torch.tensor(value), path), torch.load),
    "safetensors": (lambda path, value: save_file({"x": torch.tensor(value)}, path), load_file),
    "numpy": (lambda path, value: path.write_bytes(bytes([value] * 8)), np.fromfile),
    "PIL": (write_image, lambda path: Image.open(path).load()),
}


@pytest.mark.parametrize("how", READ)
def test_a_file_counts_however_it_is_read(mine: DictConfig, tmp_path: Path, how: str) -> None:
    write, read = READ[how]
    path = tmp_path / "net.file"
    write(path, 1)
    found = noted(mine, lambda: read(path), tmp_path)
    assert list(found["files"]) == [str(path)]
    write_json(tmp_path / "kept.json", found)
    write(path, 1)  # the same again
    assert is_unchanged(read_json(tmp_path / "kept.json"))
    write(path, 2)
    assert not is_unchanged(read_json(tmp_path / "kept.json"))
    path.unlink()
    assert not is_unchanged(found)


def test_a_large_file_counts_by_size_and_time(mine: DictConfig, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    path.write_bytes(b"0" * 200_000)
    found = noted(mine, path.read_bytes, tmp_path)
    os.utime(path, (1, 1))
    assert not is_unchanged(found)


def test_what_is_not_there_and_comes_counts(mine: DictConfig, tmp_path: Path) -> None:
    def read() -> None:
        with pytest.raises(FileNotFoundError):
            (tmp_path / "better.pt").open()

    found = noted(mine, read, tmp_path)
    (tmp_path / "better.pt").touch()
    assert not is_unchanged(found)


# How the name of a checkpoint is found.
SEARCHED: dict[str, Callable[[Path], object]] = {
    "os.listdir": os.listdir,
    "os.scandir": lambda folder: list(os.scandir(folder)),
    "iterdir": lambda folder: list(folder.iterdir()),
    "glob": lambda folder: glob.glob(f"{folder}/*.pt"),  # noqa: PTH207
    "Path.glob": lambda folder: list(folder.glob("*.pt")),
    "Path.rglob": lambda folder: list(folder.rglob("*.pt")),
    "os.walk": lambda folder: list(os.walk(folder)),
}


@pytest.mark.parametrize("how", SEARCHED)
def test_a_new_file_counts_where_names_are_looked_for(mine: DictConfig, tmp_path: Path, how: str) -> None:
    found = noted(mine, lambda: SEARCHED[how](tmp_path), tmp_path)
    for name in ("multirun", "mlflow.db", "sweeps"):
        (tmp_path / name).mkdir()
    (tmp_path / "sweeps" / "sweep.json").touch()
    assert is_unchanged(found)
    if "glob" in how:
        (tmp_path / "notes.txt").touch()
        assert is_unchanged(found), "it does not match the pattern"
    (tmp_path / "newest.pt").touch()
    assert not is_unchanged(found)


def test_a_module_that_is_imported_as_it_runs_counts(
    mine: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "imported_late.py"
    source.write_text("x = 1")
    for _ in range(2):  # the second time, from __pycache__
        sys.modules.pop("imported_late", None)
        found = noted(mine, lambda: __import__("imported_late"), tmp_path)
        assert list(found["files"]) == [str(source)]
        assert not found["listed"], "the search for a module is no matter of the user's"
        module.FOUND.pop("my_nets")
    source.write_text("x = 2")
    assert not is_unchanged(found)


def test_what_a_job_writes_itself_and_what_is_foreign_does_not_count(
    mine: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))
    for name in ("sweep/0", "cache"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.onnx").touch()
    (tmp_path / "counter").touch()

    def run() -> None:
        for read in ("counter", "sweep/0/model.onnx", "cache/model.onnx"):
            (tmp_path / read).read_text()
        (tmp_path / "counter").write_text(str(time.time_ns()))
        (tmp_path / "temporary").write_text("x")
        (tmp_path / "temporary").read_text()
        (tmp_path / "temporary").unlink()
        sqlite3.connect(":memory:").close()
        Path("/proc/self/status").read_text()
        Path(os.__file__).read_text()
        Path(torch.__file__).read_text()
        Path(module.__file__).read_text()

    assert noted(mine, run, tmp_path) == NONE


def test_a_file_that_changes_meanwhile_does_not_count(mine: DictConfig, tmp_path: Path) -> None:
    """As the log of another program, which would let every job run again."""
    path = tmp_path / "log"
    path.touch()
    with noting(mine):
        path.read_text()
    os.utime(path, (1, 1))
    assert opened([mine], tmp_path / "sweep") == NONE


def test_only_components_from_elsewhere_are_watched(mine: DictConfig, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    assert noted(OURS, (tmp_path / "x").read_text, tmp_path) == NONE
    (tmp_path / "x").read_text()
    assert opened([mine, OURS], tmp_path / "sweep") == NONE


def test_what_was_read_once_counts_for_later_jobs_of_the_process(mine: DictConfig, tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    first = noted(mine, (tmp_path / "x").read_text, tmp_path)
    assert noted(mine, lambda: None, tmp_path) == first


def test_of_many_files_the_folders_are_told(mine: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path / "images" / str(number % 7) / f"{number}.raw" for number in range(MOST + 1)]
    for path in [*paths, tmp_path / "net.json"]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = noted(mine, lambda: [path.read_bytes() for path in [*paths, tmp_path / "net.json"]], tmp_path)
    assert [Path(folder).name for folder in found["trees"]] == [*"0123456"]
    assert [Path(file).name for file in found["files"]] == ["net.json"]
    os.utime(paths[5], (1, 1))
    assert not is_unchanged(found)


def test_folders_that_are_too_many_are_told_by_those_around_them(
    mine: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 3)
    paths = [tmp_path / "images" / str(number) / "0.raw" for number in range(5)]
    for path in paths:
        path.parent.mkdir(parents=True)
        path.touch()
    found = noted(mine, lambda: [path.read_bytes() for path in paths], tmp_path)
    assert list(found["trees"]) == [str(tmp_path / "images")]
    assert not found["files"]


def test_results_of_earlier_versions_have_no_such_file(tmp_path: Path) -> None:
    assert unchanged(read_json(tmp_path / "opened.json"))
    assert merged({}, {"files": {"a": None}}) == NONE | {"files": {"a": None}}
