"""The config groups that tell jobs apart, and the name of a job."""

from __future__ import annotations

import re
from typing import Any

GROUPS = ("model", "dataset", "pruner", "recovery", "quantizer", "runtime")


def job_name(choices: dict[str, Any]) -> str:
    """Say in a few words what a job is: "resnet18 l1_global 0.5 int8 tensorrt"."""
    pruner = [choices["pruner"], choices.get("amount")] if choices["pruner"] != "none" else ["none"]
    recovery = [] if choices["recovery"] == "none" else [choices["recovery"]]
    parts = [choices["model"], *pruner, *recovery, choices["quantizer"], choices["runtime"], choices.get("node_type")]
    return " ".join(str(part) for part in parts if part is not None)


COMPRESSING = ("pruner", "recovery", "quantizer")
FOLDER_OPTIONS = ("hydra.sweep.dir", "hydra.run.dir")  # either names the sweep's folder


def option_of(word: str) -> str:
    """Return the option that an override sets: "pruner.amount" of "++pruner.amount=0.5"."""
    return word.lstrip("+~").partition("=")[0]


def group_of(word: str) -> str:
    """Return the group that an override belongs to: "pruner" of "pruner=l1", "pruner.amount=0.5" or "pruner@x=l1"."""
    return re.split(r"[./@]", option_of(word))[0]
