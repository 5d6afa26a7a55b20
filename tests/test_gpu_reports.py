"""What README and docs/gpu.md say of GPUs is what the reports in docs/results say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from test_docs import MOST_WORDS

from benchmarks import gpu_reports
from benchmarks.gpu_reports import PAGE, README, RUNTIMES, in_page, in_readme, ran, read, sentence
from pq_sweep.doctor.gpu_check import Check
from pq_sweep.doctor.gpu_check.machine import Machine
from pq_sweep.doctor.gpu_check.report import Report

VERSIONS = {"torch": "2.11.0+cu130", "torchvision": "0.26.0", "onnxruntime-gpu": "1.31.1", "numpy": "2.4.0"}


def test_readme_and_page_say_what_the_reports_say() -> None:
    reports = read(gpu_reports.RESULTS)

    assert in_readme(README.read_text(), reports) == README.read_text()
    assert in_page(PAGE.read_text(), reports) == PAGE.read_text()


def test_the_runtimes_are_those_of_the_configs() -> None:
    assert set(RUNTIMES) == {path.stem for path in (README.parent / "conf" / "runtime").glob("*.yaml")} - {"auto"}


def reported(folder: Path, device: str | None, day: int, *runtimes: str, **changes: Any) -> None:
    """Write a report with a job for each runtime, as the check of a GPU does."""
    checks = [Check("sweep", name, "passed", figures={"runtime": name}) for name in runtimes]
    checks.append(Check("sweep", "resnet50 none none tensorrt_rtx", "not tried", "needs tensorrt"))
    machine = Machine({"device": device, "versions": VERSIONS} | changes)
    Report(folder, machine, (), 480, 0, checks, started=f"2026-11-{day}T10:00:00+00:00").write()


def test_a_report_is_told_with_gpu_date_and_versions(tmp_path: Path) -> None:
    reported(tmp_path, None, 27)
    assert read(tmp_path) == []
    assert sentence([]).endswith("but **they have not run on a GPU yet**.")
    reported(tmp_path, "NVIDIA H100 80GB HBM3", 28, "torch", "onnxruntime")
    reported(tmp_path, "Tesla V100-SXM2-32GB", 29, "torch", versions={"torch": "2.10.0"})
    reports = read(tmp_path)

    assert [ran(report) for report in reports] == [["torch"], ["torch", "onnxruntime"]]
    told = sentence(reports)
    assert told.endswith(
        ". `torch` has run on Tesla V100-SXM2-32GB (2026-11-29: torch 2.10.0); `onnxruntime` has run on NVIDIA H100"
        " 80GB HBM3 (2026-11-28: torch 2.11.0+cu130, onnxruntime-gpu 1.31.1); **not on a GPU yet: `tensorrt`,"
        " `tensorrt_native` and `tensorrt_rtx`**."
    )
    readme = in_readme(README.read_text(), reports)
    assert told in " ".join(readme.split())
    assert "they have not run" not in readme
    assert len(readme.split()) <= MOST_WORDS
    assert in_readme(readme, []) == in_readme(README.read_text(), [])
    page = in_page(PAGE.read_text(), reports)
    assert (
        "| [NVIDIA H100 80GB HBM3](results/nvidia-h100-80gb-hbm3.json) | 2026-11-28 | torch 2.11.0+cu130,"
        " onnxruntime-gpu 1.31.1 | `torch` `onnxruntime` | 2 | 0 | 1 |"
    ) in page.splitlines()
    assert in_page(page, []) == in_page(PAGE.read_text(), [])
    assert json.loads((tmp_path / "no-gpu.json").read_text())["device"] is None


def test_a_runtime_that_failed_has_not_run(tmp_path: Path) -> None:
    failed = Check("sweep", "digits_cnn none none torch", "failed", figures={"runtime": "torch"})
    Report(tmp_path, Machine({"device": "NVIDIA L4", "versions": VERSIONS}), (), 480, 0, [failed]).write()
    (report,) = read(tmp_path)

    assert ran(report) == []
    assert sentence([report]).endswith("but **they have not run on a GPU yet**.")
