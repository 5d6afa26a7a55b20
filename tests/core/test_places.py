"""Files and folders that options name: a change of any of them is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pq_sweep.core import places
from pq_sweep.core.fingerprint import files_state, look_again
from pq_sweep.core.places import state_of

NAMED: dict[str, Callable[[Path], dict[str, Any]]] = {
    "any option": lambda path: {"checkpoint": str(path)},
    "in a list": lambda path: {"checkpoints": ["nowhere.pt", str(path)]},
    "in a mapping": lambda path: {"files": {"net": {"path": str(path)}}},
    "relative": lambda path: {"checkpoint": os.path.relpath(path)},
    "in the home folder": lambda path: {"checkpoint": f"~/{path.name}"},
    "by a variable": lambda path: {"checkpoint": f"$HOME/{path.name}"},
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def seen(options: dict[str, Any], group: str = "model") -> list[Any]:
    look_again()
    return files_state({group: {"_target_": "mine.make", **options}})


@pytest.mark.parametrize("group", ["model", "dataset", "pruner"])
@pytest.mark.parametrize("how", NAMED)
def test_a_file_that_an_option_names_counts(tmp_path: Path, how: str, group: str) -> None:
    net = tmp_path / "net.pt"
    net.write_bytes(b"0" * 100)
    os.utime(net, ns=(10**18, 10**18))
    before = seen(NAMED[how](net), group)
    assert before == seen(NAMED[how](net), group) != []
    net.write_bytes(b"1" * 100)  # trained again: of the same size
    os.utime(net, ns=(10**18, 10**18 + 1))
    assert seen(NAMED[how](net), group) != before


def test_a_file_that_takes_the_place_of_another_counts(tmp_path: Path) -> None:
    """As a link that is set to the next checkpoint."""
    link = tmp_path / "latest.pt"
    for name, size in (("one.pt", 1), ("two.pt", 2)):
        (tmp_path / name).write_bytes(b"0" * size)
    link.symlink_to("one.pt")
    before = seen({"checkpoint": str(link)})
    link.unlink()
    link.symlink_to("two.pt")
    assert seen({"checkpoint": str(link)}) != before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name in ("train/cat/0.jpg", "val/cat/0.jpg", "deep/er/and/deeper/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"0")
        os.utime(root / name, (1e9, 1e9))
    return root


CHANGES: dict[str, Callable[[Path], object]] = {
    "overwritten": lambda root: (root / "val/cat/0.jpg").write_bytes(b"1"),
    "overwritten deep below": lambda root: (root / "deep/er/and/deeper/x").write_bytes(b"1"),
    "added": lambda root: (root / "deep/er/and/new").touch(),
    "taken away": lambda root: (root / "train/cat/0.jpg").unlink(),
    "an empty folder": lambda root: (root / "val/cow").mkdir(),
    "renamed": lambda root: (root / "val/cat").rename(root / "val/lynx"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_in_a_folder_counts(folder: Path, change: str) -> None:
    before = seen({"data": str(folder)})
    assert before == seen({"data": str(folder)}) != []
    CHANGES[change](folder)
    assert seen({"data": str(folder)}) != before


def test_linked_folders_count_and_loops_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "deep" / "loop").symlink_to(folder)
    before = seen({"data": str(folder)})
    (tmp_path / "elsewhere" / "new").touch()
    assert seen({"data": str(folder)}) != before


def test_what_jobs_leave_in_a_folder_does_not_count(folder: Path) -> None:
    """A user may work where the data are."""
    before = seen({"data": str(folder)})
    for name in ("multirun/2030/0/result.json", "mlartifacts/1/a", "mlflow.db", "out/sweep.json", "out/0/job.log"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    assert seen({"data": str(folder)}) == before


def test_a_large_folder_counts_by_its_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "ENTRIES", 5)
    before = seen({"data": str(folder)})
    CHANGES["overwritten"](folder)
    assert seen({"data": str(folder)}) == before
    CHANGES["renamed"](folder)
    assert seen({"data": str(folder)}) != before


def test_folders_are_looked_at_once_until_they_are_to_be_looked_at_again(folder: Path) -> None:
    before = state_of(str(folder))
    CHANGES["added"](folder)
    assert state_of(str(folder)) == before
    look_again()
    assert state_of(str(folder)) != before


@pytest.mark.parametrize("text", ["", "/", "\0", "nowhere", "~nobody_of_this_name/x", "x" * 5000, "two\nlines"])
def test_what_is_no_file_has_no_state(text: str) -> None:
    assert state_of(text) is None


def test_files_in_further_options_of_this_package_count(tmp_path: Path) -> None:
    """As a provider's configuration."""
    (tmp_path / "provider.json").touch()
    runtime = {"_target_": "pq_sweep.runtimes.OnnxRuntime", "options": {"config": str(tmp_path / "provider.json")}}
    before = files_state({"runtime": runtime})
    (tmp_path / "provider.json").write_text("{}")
    look_again()
    assert files_state({"runtime": runtime}) != before


def test_words_in_options_of_this_package_are_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quick").mkdir()
    assert files_state({"measure": {"_target_": "pq_sweep.measure.timing.Protocol", "name": "quick"}}) == []
