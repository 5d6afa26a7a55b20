"""The doctor's command: what can hang, crash or be missing is told in its section, on a screen and as JSON."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from commands import HEAVY, Done, imported
from conftest import new_user, python
from machines import machine
from rich.console import Console

from pq_sweep.doctor import Facts, Section, children
from pq_sweep.doctor import examine as examining
from pq_sweep.doctor.children import ChildError, in_child
from pq_sweep.doctor.draw import draw, shown
from pq_sweep.doctor.examine import JUDGES, examine, judged
from pq_sweep.runtimes import OnnxRuntime, Torch
from pq_sweep.runtimes.ort import CPU

DEAD_STORE = "postgresql+psycopg2://user:s3cret@127.0.0.1:9/pq"


@pytest.fixture(scope="module")
def quiet_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH without SLURM's tools."""
    folder = tmp_path_factory.mktemp("bin")
    git = shutil.which("git")
    assert git
    (folder / "git").symlink_to(git)
    return str(folder)


def consult(folder: Path, path: str, *arguments: str, **env: str) -> Done:
    return python(["-m", "pq_sweep.doctor", *arguments], folder, new_user() | {"PATH": path} | env)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, quiet_path: str) -> Done:
    """The report on this machine with a store that is down, as text."""
    return consult(tmp_path_factory.mktemp("told"), quiet_path, MLFLOW_TRACKING_URI=DEAD_STORE)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, quiet_path: str) -> list[Section]:
    """The report on this machine, as JSON; there is no problem."""
    done = consult(tmp_path_factory.mktemp("report"), quiet_path, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return [Section(**section) for section in json.loads(done.stdout)["sections"]]


def leaves(value: Any) -> list[str]:
    """Return all texts and numbers of nested values, as they are shown."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return [shown(value)] if inner is None else [leaf for item in inner for leaf in leaves(item)]


def squeezed(text: str) -> str:
    return "".join(text.split())


# The command


@pytest.mark.slow
def test_a_problem_is_told_by_the_exit_code_and_no_password_is(told: Done) -> None:
    assert told.returncode == 1
    assert told.stdout.splitlines()[-1] == "1 problem: tracking"
    assert "postgresql+psycopg2://user:***@127.0.0.1:9/pq" in told.stdout
    assert "s3cret" not in told.stdout
    assert told.stderr == ""


@pytest.mark.slow
def test_the_text_pastes_into_a_bug_report(told: Done) -> None:
    lines = told.stdout.splitlines()
    assert max(map(len, lines)) <= 118
    assert not any(line != line.rstrip() for line in lines)
    assert "\x1b" not in told.stdout
    assert told.stdout.isascii()


@pytest.mark.slow
def test_text_and_json_have_the_same_sections(told: Done, report: list[Section]) -> None:
    assert [section.name for section in report] == list(JUDGES)
    words = [line.split() for line in told.stdout.splitlines() if not line.startswith(" ")][:-1]
    heads = [" ".join(line[: 1 + len(section.verdict.split())]) for line, section in zip(words, report, strict=True)]
    verdicts = {section.name: section.verdict for section in report} | {"tracking": "problem"}
    assert heads == [f"{verdict} {name}" for name, verdict in verdicts.items()]


@pytest.mark.slow
def test_the_text_says_all_that_json_says(report: list[Section], capsys: pytest.CaptureFixture[str]) -> None:
    draw(report, Console(width=118))
    printed = squeezed(capsys.readouterr().out)
    for section in report:
        for value in [*leaves(section.details), *section.details, *section.remedies]:
            known = section.details.get(value, value) not in (None, "", {})
            assert not known or squeezed(value) in printed


def test_every_problem_has_its_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    sections = [judged(name, {}) for name in JUDGES]
    draw(sections, Console(width=60))
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"{len(JUDGES)} problems: {', '.join(JUDGES)}"
    assert all(squeezed(f"-> {section.remedies[0]}") in squeezed(printed) for section in sections)


def test_a_terminal_gets_ticks(capsys: pytest.CaptureFixture[str]) -> None:
    draw([judged("cpu", machine()), judged("slurm", machine())], Console(force_terminal=True, width=118))
    assert [line.count("✓") for line in capsys.readouterr().out.splitlines() if "ok" in line] == [1]


@pytest.mark.slow
def test_what_runs_here_is_what_the_runtimes_promise(report: list[Section]) -> None:
    sections = {section.name: section for section in report}
    assert sections["onnxruntime"].details[CPU] == "runs"
    (runs,) = [details for name, details in sections["precisions"].details.items() if name.startswith("cpu (")]
    for runtime, name in ((Torch, "torch"), (OnnxRuntime, "onnxruntime")):
        named = [text.partition(" (")[0] for text in runs[name]]  # several have what they lack told together
        assert sorted(", ".join(named).split(", ")) == sorted(runtime.precisions["cpu"])
    assert sections["cpu"].details["cores_usable"] == len(os.sched_getaffinity(0))


def test_the_command_itself_imports_no_framework(tmp_path: Path) -> None:
    done = python(["-X", "importtime", "-m", "pq_sweep.doctor", "--help"], tmp_path, new_user())
    assert done.returncode == 0
    assert not imported(done.stderr) & HEAVY


@pytest.mark.gpu
def test_the_gpu_here_runs(report: list[Section]) -> None:
    sections = {section.name: section for section in report}
    index = torch.cuda.current_device()
    device = sections["torch"].details[f"cuda:{index}"]
    assert (device["name"], device["error"]) == (torch.cuda.get_device_name(index), "")
    (runs,) = [
        details
        for name, details in sections["precisions"].details.items()
        if name.startswith("cuda:") and device["name"] in name
    ]
    assert [text.partition(" ")[0] for text in runs["torch"]] == list(Torch.precisions["cuda"])


# Processes of their own


def test_a_child_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "CHILD_S", 1.0)
    start = time.monotonic()
    with pytest.raises(ChildError, match=r"^no answer within 1 s$"):
        in_child("signal", "pause")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("os", "abort"), r"^crashed, killed by SIGABRT"),
        (("sys", "exit", "it went wrong"), r"^crashed, exit code 1: it went wrong$"),
        (("sys", "exit"), r"^ended without an answer$"),
        (("importlib", "import_module", "no_such_module"), r"^No module named 'no_such_module'$"),
    ],
)
def test_a_child_that_fails_says_how(call: tuple[str, ...], message: str) -> None:
    with pytest.raises(ChildError, match=message):
        in_child(*call)


def test_a_child_may_chatter_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chatter.py").write_text(
        "def answer():\n    print('loading')\n    return {'a': [1, None], 'b': 'b' * 999}\n"
    )
    assert in_child("chatter", "answer") == {"a": [1, None], "b": "b" * 999}


def test_a_section_that_fails_or_hangs_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Facts:
        raise OSError("postgresql://me:s3cret@host is\nbroken")

    def hang() -> Facts:
        Event().wait()
        return {}

    looks: dict[str, Callable[[], Facts]] = {name: facts.copy for name, facts in machine().items()}
    monkeypatch.setattr(examining, "LOOKS", looks | {"disk": fail, "tracking": hang})
    monkeypatch.setattr(examining, "LOOK_S", 0.5)
    sections = {section.name: section for section in examine()}
    assert [name for name, section in sections.items() if section.verdict == "problem"] == ["disk", "tracking"]
    assert sections["disk"].details == {"error": "postgresql://me:***@host is"}
    assert "no answer within" in sections["tracking"].remedies[0]
