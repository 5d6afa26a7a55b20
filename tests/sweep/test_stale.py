"""A change of what a component imports, or of a file that it reads, shows in the next results, whatever was kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import SHORT, Done, launch_in

pytestmark = pytest.mark.slow

MODEL = """
import torch
import my_nets
from pq_sweep.types import Model, Preprocess

def make(checkpoint=None):
    torch.manual_seed(0)
    net = my_nets.Net().eval()
    if checkpoint:
        net.load_state_dict(torch.load(checkpoint))
    return Model(net, 10, Preprocess(size=8, resize=8, channels=1, mean=(0.0,), std=(1.0,)))
"""
NET = """
from torch import nn

FLIP = False

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head((x.flip(2) if FLIP else x).flatten(1))
"""
PRUNER = "from my_amount import AMOUNT\n\ndef prune(model, data):\n    model.module.head.weight.data[:AMOUNT] = 0\n"
ONNX = ("runtime=onnxruntime",)
# Folder of the second sweep, and its options: all have to show the changed network.
AFTERWARDS = {
    "again": ("first", ONNX),
    "in another folder": ("second", ONNX),
    "on another runtime": ("third", ("runtime=torch",)),
    "without the cache": ("fourth", (*ONNX, "cache=off")),
    "another job of the same folder": ("kept", ("runtime=torch", "resume=false")),
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "my_models.py").write_text(MODEL)
    (tmp_path / "my_nets.py").write_text(NET)
    for group, target in (("model", "my_models.make"), ("pruner", "my_pruners.prune")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "mine.yaml").write_text(f"# My own\n_target_: {target}\n")
    return tmp_path


def sweep(folder: Path, name: str, *overrides: str) -> Done:
    own = ("--config-dir", "conf", "model=mine", "device=cpu", "tracking=none", f"hydra.sweep.dir={name}")
    done = launch_in(folder, *own, *SHORT, *overrides)
    assert done.returncode == 0, done.stderr
    return done


def accuracies(folder: Path) -> tuple[float, float]:
    """Return the accuracy of a sweep's only job and of its reference."""
    result = json.loads((folder / "0" / "result.json").read_text())
    return result["accuracy"]["top1"], result["baseline"]["top1"]


def turn_over(folder: Path) -> None:
    net = folder / "my_nets.py"
    net.write_text(net.read_text().replace("FLIP = False", "FLIP = True"))


def test_changed_code_shows_wherever_something_is_kept(mine: Path) -> None:
    sweep(mine, "first", *ONNX)
    before = accuracies(mine / "first")
    assert before[0] == before[1]
    (mine / "unrelated.py").write_text("x = 1")
    assert "reused" in (done := sweep(mine, "first", *ONNX)).stdout + done.stderr
    shutil.copytree(mine / "first", mine / "kept")
    turn_over(mine)
    for where, (name, overrides) in AFTERWARDS.items():
        done = sweep(mine, name, *overrides)
        after = accuracies(mine / name)
        assert after[0] == after[1] != before[0], where
        assert "reused" not in done.stdout + done.stderr, where


@pytest.mark.parametrize("cache", ["on", "off"])
def test_weights_that_were_trained_again_show(mine: Path, cache: str) -> None:
    net, found = torch.nn.Sequential(), []
    net.add_module("head", torch.nn.Linear(64, 10))
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.nn.init.normal_(net.head.weight)
        torch.save(net.state_dict(), mine / "net.pt")
        sweep(mine, "first", *ONNX, "+model.checkpoint=net.pt", f"cache={cache}")
        found.append(accuracies(mine / "first"))
    assert found[0] != found[1]
    assert all(accuracy == reference for accuracy, reference in found)


COMPUTED = """
import json
from pathlib import Path

import torch
from my_models import make as plain

def make(name="net"):
    model, suffix = plain(), "json" if torch.rand(1) < 2 else "yaml"
    if json.loads(Path(f"{name}.{suffix}").read_text())["flip"]:
        model.module.register_forward_pre_hook(lambda module, inputs: inputs[0].flip(2))
    return model
"""


def test_a_file_counts_that_code_opens_by_a_computed_path(mine: Path) -> None:
    """Its content changes what the network answers and none of its weights, so nothing else could tell."""
    (mine / "my_flips.py").write_text(COMPUTED)
    (mine / "conf" / "model" / "mine.yaml").write_text("# My own\n_target_: my_flips.make\n")
    found = []
    for flip in ("false", "true"):
        (mine / "net.json").write_text(f'{{"flip": {flip}}}')
        done = sweep(mine, "first", "runtime=torch,onnxruntime", "cache=on")
        assert "reused" not in done.stdout + done.stderr
        found.append(accuracies(mine / "first"))
    assert found[0] != found[1]
    assert all(accuracy == reference for accuracy, reference in found)
    assert "reused" in (done := sweep(mine, "first", "runtime=torch,onnxruntime", "cache=on")).stdout + done.stderr
    sweep(mine, "second", *ONNX, "cache=on")
    assert accuracies(mine / "second") == found[1]


def test_a_helper_of_a_pruner_counts(mine: Path) -> None:
    found = []
    for rows in (1, 9):
        (mine / "my_pruners.py").write_text(PRUNER)
        (mine / "my_amount.py").write_text(f"AMOUNT = {rows}\n")
        sweep(mine, "first", "runtime=torch", "pruner=mine")
        found.append(accuracies(mine / "first"))
    assert found[0][1] == found[1][1]
    assert found[0][0] != found[1][0]


def test_what_cannot_be_followed_is_said_once_and_never_old(mine: Path) -> None:
    (mine / "net.log").write_text(NET)
    (mine / "my_nets.py").write_text("name = 'net' + chr(46) + 'log'\nexec(open(name).read())\n")
    done = sweep(mine, "first", "runtime=torch,onnxruntime")
    sentence = f"{mine / 'my_nets.py'}, line 2, runs code that only exists as it runs (exec)"
    assert (done.stdout + done.stderr).count(sentence) == 1
    assert all(sentence in (mine / "first" / job / "job.log").read_text() for job in ("0", "1"))
    before = accuracies(mine / "first")
    (mine / "net.log").write_text(NET.replace("FLIP = False", "FLIP = True"))
    sweep(mine, "first", "runtime=torch,onnxruntime", "cache=off")
    after = accuracies(mine / "first")
    assert after[0] == after[1] != before[0]
    sweep(mine, "second", *ONNX)
    assert accuracies(mine / "second") == after


def test_repeats_find_the_same_modules_and_allow_for_files_that_the_job_writes(mine: Path) -> None:
    """A folder that code adds to sys.path as it runs, and a file that an option names and each process rewrites."""
    (mine / "far").mkdir()
    (mine / "my_nets.py").rename(mine / "far" / "my_nets.py")
    found = "import os, sys, time\nsys.path.append(os.environ.get('NETS', 'far'))\n"
    written = "    open(checkpoint, 'w').write(str(time.time()))\n    checkpoint = None\n"
    (mine / "my_models.py").write_text(
        found + MODEL.replace("    torch.manual_seed", written + "    torch.manual_seed")
    )
    done = sweep(mine, "first", *ONNX, "+model.checkpoint=note.txt", "measure.repeats=2", "seed=0,1")
    assert "adds a computed folder to sys.path" in done.stdout + done.stderr
