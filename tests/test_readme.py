"""What the README tells a user to type, tried."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from commands import SHORT
from conftest import ROOT, Launch, only_sweep, results

README = (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_own_pruner(tmp_path: Path, launch: Launch) -> None:
    ((module, code),) = re.findall(r"in `(my_\w+\.py)`:\n\n```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    ((name, yaml),) = re.findall(r"^`(my_[\w/.]+)`:\n\n```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(yaml)
    (tmp_path / module).write_text(code)
    (command,) = re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    _, script, *arguments = shlex.split(command)
    assert script == "launch.py"

    done = launch(*arguments, "tracking=none", *SHORT)

    assert done.returncode == 0, done.stderr
    dense, small, pruned, both = results(only_sweep(tmp_path))
    assert pruned["network"]["sparsity"] == both["network"]["sparsity"] > 0.1 > dense["network"]["sparsity"]
    assert both["session"]["precision"] == small["session"]["precision"] == "int8"


def test_readme_names_every_choice() -> None:
    names = {
        path.stem
        for group in ("dataset", "pruner", "recovery", "quantizer", "runtime", "measure")
        for path in (ROOT / "conf" / group).glob("*.yaml")
    }
    assert {name for name in names if f"`{name}`" not in README} <= {"none"}
