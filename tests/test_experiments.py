"""The experiment files: each is the grid that its header promises, and every figure we say we repeat has one."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT
from conftest import ROOT, Launch, only_sweep, results
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from pq_sweep.job.check import problems
from pq_sweep.sweep.composing import compose_quickly
from pq_sweep.sweep.grid import compose_grid

CONF = ROOT / "conf"
FILES = {path.stem: path for path in sorted((CONF / "experiment").glob("*.yaml"))}
PAPERS = tuple(name for name in FILES if name.startswith(("pq_bench", "thesis", "paper")))

# A figure has a file of its name, or one for each of its panels.
FIGURES = (
    *(f"pq_bench_fig{number}" for number in ("2", "3", "4a", "4b", "4c", "4d", "5", "6", "7")),
    "pq_bench_vit",
    "thesis_table4",
    *(f"thesis_fig{number}" for number in ("10", "14", "18", "19", "21", "22")),
    *(f"paper002_table{number}" for number in range(1, 6)),
    "paper002_order",
    *(
        f"paper003_{table}_{how}"
        for table in ("cifar", "table1a", "table1b", "table1c")
        for how in ("quantized", "pruned")
    ),
)


def header(name: str) -> dict[str, str]:
    """Return the labelled parts of a header, such as Run; a part goes on in lines that are indented further."""
    lines = [line for line in FILES[name].read_text().splitlines() if line.startswith("#")]
    text = "\n".join(lines[2:]).replace("\n#   ", " ")
    return dict(re.findall(r"^# ([A-Z]\w+): (.+)$", text, re.MULTILINE))


def maybe_slow(name: str) -> Any:
    """Mark a file whose grid takes Hydra more than a second to compose."""
    large = int(header(name).get("Jobs", 0)) > 8
    return pytest.param(name, marks=pytest.mark.slow if large else ())


every_file = pytest.mark.parametrize("name", FILES)
every_paper = pytest.mark.parametrize("name", PAPERS)
every_grid = pytest.mark.parametrize("name", [maybe_slow(name) for name in FILES])


@cache
def jobs_of(name: str) -> list[DictConfig]:
    """Return the jobs that `launch.py experiment=...` would run, without Hydra's own part."""
    compose_quickly()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[f"experiment={name}"], return_hydra_config=True)
        grid = list(compose_grid(config))
    assert grid is not None
    return grid


def chosen(name: str, group: str) -> set[str]:
    return {job.hydra.runtime.choices[group] for job in jobs_of(name)}


@pytest.mark.parametrize("figure", FIGURES)
def test_figure_has_an_experiment(figure: str) -> None:
    assert [name for name in FILES if re.fullmatch(f"{figure}[a-z]?", name)]


@every_file
def test_file_is_compact(name: str) -> None:
    lines = FILES[name].read_text().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120


@every_file
def test_header_says_what_it_is_and_costs(name: str) -> None:
    first, second = FILES[name].read_text().splitlines()[:2]
    assert first == "# @package _global_"
    assert re.match(r"# \w[^:]*: \w|# \w", second)
    assert not second.startswith(("# Run:", "# Shows:"))
    parts = header(name)
    assert parts.keys() >= {"Run", "Jobs", "Hours"}
    assert parts.keys() & {"Paper", "Expect"}
    assert re.match(r"~\d+(\.\d+)? on .*\b(estimated|measured)\b", parts["Hours"])


@every_file
def test_command_is_the_one_of_this_file(name: str) -> None:
    assert re.match(rf"python launch\.py experiment={name}( |$)", header(name)["Run"])


@every_file
def test_launchers_named_are_there(name: str) -> None:
    launchers = {path.stem for path in (CONF / "hydra" / "launcher").glob("*.yaml")}
    assert set(re.findall(r"hydra/launcher=(\w+)", FILES[name].read_text())) <= launchers


@every_file
def test_amounts_are_written_out(name: str) -> None:
    """`range(0.0,0.4,0.1)` includes 0.4, so a reader would count wrongly."""
    assert "range(" not in FILES[name].read_text()


@every_paper
def test_paper_and_the_differences_from_it_are_stated(name: str) -> None:
    assert header(name).keys() >= {"Shows", "Grid", "Paper", "Differs"}


@pytest.mark.slow
@every_grid
def test_grid_has_as_many_jobs_as_stated(name: str) -> None:
    assert len(jobs_of(name)) == int(header(name)["Jobs"])


@pytest.mark.slow
@every_grid
def test_grid_repeats_no_job(name: str) -> None:
    overrides = [tuple(sorted(job.hydra.overrides.task)) for job in jobs_of(name)]
    assert len(set(overrides)) == len(overrides)


@every_grid
def test_every_job_can_run(name: str, tmp_path: Path) -> None:
    found: set[str] = set()
    for job in jobs_of(name):
        config = OmegaConf.masked_copy(job, [str(key) for key in job if key != "hydra"])
        if OmegaConf.is_missing(config.dataset, "root"):  # data that cannot be downloaded
            config.dataset.root = str(tmp_path)
        found.update(problems(config))
    assert not found


@every_grid
def test_gpu_is_demanded_where_tensorrt_is(name: str) -> None:
    needs_gpu = "tensorrt" in chosen(name, "runtime")
    assert not needs_gpu or {job.device for job in jobs_of(name)} == {"cuda"}
    assert ("needs CUDA" in header(name)["Run"]) == all(job.device == "cuda" for job in jobs_of(name))


@pytest.mark.slow
def test_smoke_covers_the_groups() -> None:
    groups = ("pruner", "recovery", "quantizer", "runtime")
    assert {group: len(chosen("smoke", group)) for group in groups} == dict.fromkeys(groups, 2)


@pytest.mark.slow
def test_smoke_runs(tmp_path: Path, launch: Launch) -> None:
    done = launch("experiment=smoke", *SHORT, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    found = results(only_sweep(tmp_path))
    assert [result["status"] for result in found] == ["finished"] * int(header("smoke")["Jobs"])
    assert {result["session"]["runtime"] for result in found} == {"torch", "onnxruntime"}
    assert {result["session"]["precision"] for result in found} == {"fp32", "int8"}
    zeroed, removed, recovered = (found[job]["accuracy"]["top1"] for job in (0, 8, 12))
    assert zeroed > 0.95
    assert removed < recovered
