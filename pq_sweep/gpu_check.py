"""The command line of the GPU check: `python -m pq_sweep.gpu_check`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from pq_sweep.core.files import write_json
from pq_sweep.doctor.children import ChildError, first_line, in_child
from pq_sweep.doctor.gpu_check import ROOT
from pq_sweep.doctor.gpu_check.jobs import is_there, launches, run_sweep
from pq_sweep.doctor.gpu_check.report import assemble, draw, problem, slug
from pq_sweep.doctor.gpu_check.suite import run_tests

BUDGET_S = 480.0
TESTS_SHARE = 0.65  # the sweep gets the rest of the time
DEVICE = "cuda:0"
HOW = "install them, without a network by pip install --no-index --no-deps --target=FOLDER WHEELS and PYTHONPATH=FOLDER"
# The packages that both tests and jobs need, by the module that is imported.
PACKAGES = {
    "pytest": "pytest",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "antlr4": "antlr4-python3-runtime",
    "yaml": "pyyaml",
    "hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher",
    "numpy": "numpy",
    "filelock": "filelock",
    "tqdm": "tqdm",
    "rich": "rich",
    "safetensors": "safetensors",
    "zstandard": "zstandard",
    "PIL": "pillow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
}


def main() -> None:
    """Run the GPU tests and a small sweep here, draw a table and write a report; exit 0 if nothing failed."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.gpu_check", description=main.__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results", help="folder of the report")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds that all may take")
    arguments = parser.parse_args()
    sys.exit(absent() or check(DEVICE, arguments.output, arguments.budget_s) or 0)


def absent() -> str:
    """Say in a sentence what keeps this machine from being checked, or return "" if nothing does."""
    if not is_there("torch"):
        return "gpu-check needs a CUDA device and a torch that finds it, and this Python has no torch."
    import torch

    if not torch.cuda.is_available():
        return f"gpu-check needs a CUDA device and torch {torch.__version__} finds none here{_why()}."
    if missing := [package for module, package in PACKAGES.items() if not is_there(module)]:
        return f"gpu-check needs {', '.join(missing)}, which this Python lacks; {HOW}."
    return ""


def _why() -> str:
    """Return, in brackets, why torch finds no device."""
    import torch

    try:
        torch.cuda.init()
    except Exception as error:  # an AssertionError or a RuntimeError, depending on how torch was built
        return f" ({first_line(error).split('. ')[0].rstrip('.')})"
    return ""


def check(device: str, output: Path, budget_s: float) -> str:
    """Check a device and write the report into `output`; return what is wrong, or "" if nothing is."""
    start, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    try:
        about = in_child("pq_sweep.doctor.gpu_check.report", "environment", device)
    except ChildError as error:
        return f"the device {device} cannot be used: {error}"
    with tempfile.TemporaryDirectory() as scratch:
        checks = run_tests(ROOT / "tests" / "gpu", Path(scratch), TESTS_SHARE * budget_s)
        checks += run_sweep(device, list(launches(device)), Path(scratch), start + budget_s)
    output.mkdir(parents=True, exist_ok=True)
    report = output / f"{slug(about['device'])}.json"
    write_json(report, assemble(about, checks, started, time.monotonic() - start))
    draw(checks)
    print(f"report: {report}")
    return problem(checks)


if __name__ == "__main__":
    main()
