"""What the README tells a user to type, tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from conftest import ROOT, Launch, only_sweep, results

README = (ROOT / "README.md").read_text()


def test_own_model_dataset_pruner_and_quantizer(tmp_path: Path, launch: Launch) -> None:
    for name, content in re.findall(r"^`(my_[\w/.]+)`:\n\n```\w+\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (command,) = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    _, script, *arguments = shlex.split(command.replace("\\\n", " "))
    assert script == "launch.py"

    done = launch(*arguments, "tracking=none")

    assert done.returncode == 0, done.stderr
    dense, small, pruned, both = results(only_sweep(tmp_path))
    assert dense["accuracy"]["top1"] > 0.9
    assert pruned["network"]["sparsity"] > 0.4 > dense["network"]["sparsity"]
    assert small["size_bytes"]["compressed"] < 0.6 * small["session"]["exported_bytes"]
    assert both["session"]["runtime"] == "onnxruntime"
    assert both["session"]["precision"] == "int8"


def test_readme_names_every_choice() -> None:
    names = {
        path.stem
        for group in ("pruner", "recovery", "quantizer", "runtime", "measure")
        for path in (ROOT / "conf" / group).glob("*.yaml")
    }
    assert {name for name in names if f"`{name}`" not in README} <= {"none"}
