"""Networks of timm, brought by a function of a few lines: each runs, or one sentence says why not.

docs/support.md has all twelve families in every way; here are four whose graphs have little in common.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, refused
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from pq_sweep.job.run import run

pytest.importorskip("timm", reason="needs timm, which pip install -e '.[dev]' installs")
pytestmark = pytest.mark.slow

BRIEF = (
    "tracking=none", "measure.batch_sizes=[1]", "measure.threads=1", "measure.iterations=2", "measure.warmup_s=0",
    "measure.min_s=0", "measure.max_s=0", "dataset=fake", "dataset.images=4", "dataset.calibration=4",
    "quantizer=int8", "quantizer.images=4", "runtime=onnxruntime",
)  # fmt: skip


def config(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", [*BRIEF, *overrides])
    cfg.model = {"_target_": "benchmarks.timm_models.timm_model", "name": name}
    return cfg


@pytest.mark.parametrize("name", ["convnext_atto", "levit_128s", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_a_family_runs_in_int8(name: str, tmp_path: Path) -> None:
    result = run(config(name), tmp_path)
    assert result.session.precision == "int8"
    assert result.size_bytes.compressed < 0.35 * result.size_bytes.original
    assert result.notes == ["The network came in training mode and was put in eval mode."]


def test_what_cannot_be_removed_is_told_in_one_sentence(tmp_path: Path) -> None:
    sentence = refused(lambda: run(config("vit_tiny_patch16_224", "pruner=remove", "pruner.amount=0.3"), tmp_path))
    assert sentence.startswith("pruner=remove cannot follow the channels through blocks.0.attn (Attention) (")
    assert sentence.endswith("a stand-in in pq_sweep.compress.blocks.STAND_INS.")
    assert json.loads((tmp_path / "error.json").read_text())["message"] == sentence
