"""Looking at each operation of a pass does not bring torch's compiler with it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

CHILD = """
import sys
import torch
from torch import nn
from pq_sweep.inputs.random_numbers import Draws
from pq_sweep.measure.arithmetic import arithmetic, arithmetic_by_weight
from pq_sweep.types import Model, Preprocess

model = Model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval(), 3, Preprocess(size=8, channels=1))
with torch.no_grad(), Draws() as draws:
    model.module(model.sample(2))
    torch.rand(2)
print(draws.names(), arithmetic(model), arithmetic_by_weight(model), "torch._dynamo" in sys.modules)
if sys.argv[1:]:
    import torch._dynamo
    with torch.no_grad(), Draws() as draws:
        model.module(model.sample(2))
        torch.rand(2)
    print(draws.names(), arithmetic(model), arithmetic_by_weight(model))
"""
FOUND = "['randn', 'rand'] (192, []) {'1.weight': 192}"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [[], ["too"]])
def test_passes_are_looked_at_with_and_without_the_compiler(compiler: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *compiler], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    first, *second = done.stdout.splitlines() or [done.stderr]
    assert first == f"{FOUND} False"
    assert second == [FOUND] * len(compiler)
