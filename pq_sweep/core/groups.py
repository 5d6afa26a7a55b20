"""The config groups that a job is told by, and its name."""

from __future__ import annotations

from typing import Any

GROUPS = ("model", "dataset", "pruner", "recovery", "quantizer", "runtime")


def job_name(choices: dict[str, Any]) -> str:
    """Say in a few words what a job is: "resnet18 l1_global 0.5 int8 tensorrt"."""
    pruner = [choices["pruner"], choices.get("amount")] if choices["pruner"] != "none" else ["none"]
    recovery = [] if choices["recovery"] == "none" else [choices["recovery"]]
    parts = [choices["model"], *pruner, *recovery, choices["quantizer"], choices["runtime"], choices.get("node_type")]
    return " ".join(str(part) for part in parts if part is not None)


COMPRESSING = ("pruner", "recovery", "quantizer")
