"""The config groups that tell jobs apart, and the name of a job."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

GROUPS = ("model", "dataset", "pruner", "recovery", "quantizer", "runtime")


ORDERS = ("prune_first", "quantize_first")


def job_name(choices: dict[str, Any]) -> str:
    """Say in a few words what a job is: "resnet18 l1_global 0.5 int8 tensorrt", or "resnet18 int8 then l1 0.3 ..."."""
    pruner = [choices["pruner"], choices.get("amount")] if choices["pruner"] != "none" else ["none"]
    recovery = [] if choices["recovery"] == "none" else [choices["recovery"]]
    quantizer = [choices["quantizer"], choices.get("bits")]
    steps = [*quantizer, "then", *pruner] if "order" in choices else [*pruner, *recovery, *quantizer]
    parts = [choices["model"], *steps, choices["runtime"], choices.get("node_type")]
    return " ".join(str(part) for part in parts if part is not None)


def options_that_tell(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what tells jobs apart beside the choices of groups; what is as usual is left out."""
    choices = {
        "amount": config["pruner"].get("amount"),
        "device": str(config.get("device")),
        "seed": config.get("seed"),
    }
    unusual = {"node_type": config.get("node"), "bits": config["quantizer"].get("bits")}
    order = config.get("order", ORDERS[0])
    unusual["order"] = None if order == ORDERS[0] else order
    return choices | {name: value for name, value in unusual.items() if value}


COMPRESSING = ("pruner", "recovery", "quantizer")
FOLDER_OPTIONS = ("hydra.sweep.dir", "hydra.run.dir")  # either names the sweep's folder


def option_of(word: str) -> str:
    """Return the option that an override sets: "pruner.amount" of "++pruner.amount=0.5"."""
    return word.lstrip("+~").partition("=")[0]


def group_of(word: str) -> str:
    """Return the group that an override belongs to: "pruner" of "pruner=l1", "pruner.amount=0.5" or "pruner@x=l1"."""
    return re.split(r"[./@]", option_of(word))[0]
