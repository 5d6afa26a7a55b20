"""Which stage a job is in, shown as a log line, kept in `status.json`, and timed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# A list of numbers, which is written on one line.
NUMBERS = re.compile(r"\[\n[-+.,eE\d\s]*\]")

LEFT_BY_JOBS = (
    "error.json",
    "result.json",
    "removal.json",
    "predictions.npy",
    "precisions.svg",
    "export.onnx",
    "model.pt",
    "model.onnx",
)
PREP = ("prune", "recover", "export", "calibrate", "sensitivity", "quantize", "build")


class Stages:
    """Times stages by name: `with stages("export"): ...`."""

    def __init__(self, folder: Path, label: str) -> None:
        self.folder = folder
        self.label = label
        self.started = time.time()
        self.seconds: dict[str, float] = {}
        self.current = "start"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        log.info("%s | %s", self.label, name)
        self.current = name
        write_json(
            self.folder / "status.json",
            {"stage": name, "since": time.time(), "pid": os.getpid(), "host": os.uname().nodename},
        )
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Write `error.json` if what is inside fails, and let the error go on."""
        for name in LEFT_BY_JOBS:  # of an earlier run in the same folder
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "engine", ignore_errors=True)
        try:
            yield
        except Exception as error:
            message = " ".join(str(error).split()) or type(error).__name__
            record = {"type": type(error).__name__, "message": message, "stage": self.current}
            write_json(
                self.folder / "error.json", record | {"started": self.started, "traceback": traceback.format_exc()}
            )
            raise

    @property
    def prep(self) -> dict[str, float]:
        """Return the seconds of the stages that make the compressed model."""
        return {name: self.seconds[name] for name in PREP if name in self.seconds}


def write_json(path: Path, content: Any) -> None:
    """Write aside, then rename: a reader sees the whole file or none."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps(content, indent=1, allow_nan=False)
    with aside.open("w") as file:
        file.write(NUMBERS.sub(lambda match: " ".join(match.group().split()), text) + "\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)
