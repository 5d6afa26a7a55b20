"""Try every model with every kind of compression and write a table: `python -m benchmarks.support docs/support.md`.

Each cell is run on the CPU at default settings. It shows whether that worked, the seconds, the size as a share of the
FP32 network's file, and how near the logits stay to those of the FP32 network (signal-to-noise ratio in dB). Weights
come from `--weights FOLDER` if it has <model>.pth, and are random otherwise; images come from `--images FOLDER`, or are
noise without it.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from tqdm import tqdm

from benchmarks.timm_models import FAMILIES, timm_model
from pq_sweep.types import UserError

ROOT = Path(__file__).resolve().parent.parent
TIMM = "timm."
TENSORRT = "TensorRT builds"
BELOW = "TensorRT builds fp8, int4"
TECHNIQUES = (
    "zero-fill",
    "remove",
    "export",
    "fp16",
    "int8",
    "remove + int8",
    TENSORRT,
    "fp8",
    "int4",
    BELOW,
    "weights",
)
# The graphs that TensorRT-RTX builds in each of these columns: their quantizers, and what they are built for.
BUILT = {
    TENSORRT: tuple(product(("none", "fp16", "int8"), ("8.0", "8.9"))),
    BELOW: tuple(product(("fp8", "int4"), ("8.9",))),
}
CALIBRATED = ("int8", "fp8")
AMOUNT = 0.5
IMAGES = 16
Cell = dict[str, Any]


def main() -> None:
    """Try each model that has no record yet, in a process of its own, and write the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("table", type=Path, help="the Markdown file to write")
    parser.add_argument("--weights", type=Path, help="folder with <model>.pth of trained weights")
    parser.add_argument("--images", type=Path, help="folder of class folders of images")
    parser.add_argument("--records", type=Path, help="keep the records here, and go on from them")
    parser.add_argument("--only", nargs="*", help="models to try instead of all")
    parser.add_argument(
        "--column", choices=TECHNIQUES, nargs="*", help="try these alone, and keep the table's other cells"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        chosen = options.column or TECHNIQUES
        print(json.dumps(try_model(options.one, options.weights, options.images, chosen)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        records = options.records or Path(scratch)
        records.mkdir(parents=True, exist_ok=True)
        for name in tqdm(options.only or model_names(), unit="model"):
            if not (records / f"{name}.json").exists():
                (records / f"{name}.json").write_text(json.dumps(in_own_process(name, options)))
        found = {path.stem: json.loads(path.read_text()) for path in sorted(records.glob("*.json"))}
    if options.column:
        found = joined(read_table(options.table), found)
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(table(found))


def read_table(path: Path) -> dict[str, Cell]:
    """Return the cells of a table that was written before, as their texts."""
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in path.open() if line.startswith("| ")]
    return {
        name: {
            "weights": weights,
            "cells": {what: {"text": cell} for what, cell in zip(TECHNIQUES, cells, strict=False)},
        }
        for name, weights, *cells in rows
        if name not in ("model", "---")
    }


def joined(before: dict[str, Cell], found: dict[str, Cell]) -> dict[str, Cell]:
    """Return the records of a table with the cells that were tried now."""
    return {
        name: {"weights": record["weights"], "cells": record["cells"] | found.get(name, {"cells": {}})["cells"]}
        for name, record in before.items()
    }


def model_names() -> list[str]:
    """Return every model of the catalogue, and one network of each family of timm."""
    named = [path.stem for path in (ROOT / "conf/model").glob("*.yaml") if "name: ???" not in path.read_text()]
    return [*sorted(named), *(TIMM + name for name in FAMILIES)]


def in_own_process(name: str, options: argparse.Namespace) -> Cell:
    """Try a model in a process of its own, so that a crash does not end the others."""
    given = [f"--{key}={value}" for key in ("weights", "images") if (value := getattr(options, key))]
    given += ["--column", *options.column] if options.column else []
    command = [sys.executable, "-m", "benchmarks.support", "unused", "--one", name, *given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    chosen = options.column or TECHNIQUES
    return {"weights": "?", "cells": {technique: {"error": reason} for technique in chosen}}


def try_model(name: str, weights: Path | None, images: Path | None, techniques: Iterable[str]) -> Cell:
    """Compress one model in several ways; the FP32 network in torch is the reference."""
    import torch
    from hydra.utils import instantiate

    from pq_sweep.core.threads import use_threads
    from pq_sweep.inputs.own_model import accepted_model

    use_threads(None)
    torch.manual_seed(0)
    trained = weights / f"{name}.pth" if weights and (weights / f"{name}.pth").exists() else None
    packaged = name == "digits_cnn"
    dataset = ["dataset=fake", f"dataset.images={IMAGES}"]
    if images and not packaged:
        dataset = ["dataset=image_folder", f"dataset.root={images}", f"dataset.evaluation={IMAGES}"]
    dataset = ["dataset=digits"] if packaged else dataset
    model = accepted_model(make_model(name, trained), name)
    if not (trained or packaged):
        randomise(model)
    data = instantiate(config(*dataset).dataset, _partial_=True)(model)
    if not (trained or packaged):
        settle(model, data)
    with tempfile.TemporaryDirectory() as folder:
        cells = {technique: attempt(technique, model, data, Path(folder)) for technique in techniques}
    return {"weights": "packaged" if packaged else "trained" if trained else "random", "cells": cells}


def make_model(name: str, trained: Path | None) -> Any:
    """Return a model of the catalogue, or one of timm from a function as a user would write it."""
    from hydra.utils import instantiate

    if name.startswith(TIMM):
        return timm_model(name=name.removeprefix(TIMM))
    weights = [] if name == "digits_cnn" else [f"model.weights={trained or 'null'}"]
    return instantiate(config(f"model={name}", *weights).model)


def config(*overrides: str) -> Any:
    """Compose a job's config."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def randomise(model: Any) -> None:
    """Draw all weights so that answers depend on the image: torchvision's ViT, for example, starts with a zero head."""
    from torch import nn

    for part in model.module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="linear" if part.bias is None else "relu")


def settle(model: Any, data: Any) -> None:
    """Give BatchNorm the statistics of its inputs, as training would have done."""
    from torch import nn

    from pq_sweep.compress.recovery import bn_reestimate

    if any(isinstance(part, nn.BatchNorm2d) for part in model.module.modules()):
        bn_reestimate(model, data, images=IMAGES, batch_size=IMAGES)


def attempt(technique: str, model: Any, data: Any, folder: Path) -> Cell:
    """Run one cell; if that fails, the cell holds the error."""
    try:
        if technique in BUILT:
            return build(technique, model, data, folder)
        return run(technique, copy.deepcopy(model), data, folder)
    except UserError as error:
        return {"refused": " ".join(str(error).split())}
    except Exception as error:
        return {"error": " ".join(str(error).split())}


def run(technique: str, model: Any, data: Any, folder: Path) -> Cell:
    """Compress the model and compare file and logits with those of the FP32 network."""
    import torch

    from pq_sweep.compress.mixed import snr_db

    images = data.evaluation.fetch(list(range(min(IMAGES, len(data.evaluation)))))
    with torch.inference_mode():
        reference = model.module(images)
    original = file_size(model)
    start = time.perf_counter()
    artifact, logits = TRY[technique](model, data, images, folder)
    seconds = time.perf_counter() - start
    if technique == "remove + int8":
        with torch.inference_mode():
            reference = model.module(images)  # the smaller network, which the graph has to reproduce
    assert logits.shape == reference.shape, f"{tuple(logits.shape)} logits instead of {tuple(reference.shape)}"
    assert logits.isfinite().all(), "the logits are not finite"
    return {"size": artifact.stat().st_size / original, "snr_db": snr_db(reference, logits), "seconds": seconds}


def build(technique: str, model: Any, data: Any, folder: Path) -> Cell:
    """Have NVIDIA's parser and builder make an engine of each graph for TensorRT, and count them.

    A network without a layer for INT4 has no such graph.
    """
    from pq_sweep.core.cache import Cache
    from pq_sweep.job.stages import Stages
    from pq_sweep.types import Workspace

    start, sizes = time.perf_counter(), {}
    for quantizer, capability in BUILT[technique]:
        place = folder / f"{quantizer} {capability}"
        place.mkdir()
        work = Workspace(place, "cpu", 1, Stages(place, "", Cache({"of": str(folder)})))
        options = ["runtime.build_only=true", f"runtime.compute_capability='{capability}'"]
        limit = [f"quantizer.images={IMAGES}"] if quantizer in CALIBRATED else []
        runtime = component("runtime", "tensorrt_rtx", *options)()
        try:
            session = runtime.open(model, component("quantizer", quantizer, *limit), data, work)
        except UserError:
            if quantizer != "int4":
                raise
            continue
        if warnings := session.details["builder_warnings"]:
            raise RuntimeError(f"{quantizer} for {capability}: {warnings[0]}")
        sizes[f"{quantizer} {capability}"] = session.artifact.stat().st_size
        shutil.rmtree(place)
    return {"engines": len(sizes), "bytes": sizes, "seconds": time.perf_counter() - start}


def try_pruning(name: str, model: Any, data: Any, images: Any, folder: Path) -> tuple[Path, Any]:
    """Prune the network and run it under torch."""
    import torch

    component("pruner", name, f"pruner.amount={AMOUNT}")(model, data)
    torch.save(model.module.state_dict(), folder / "model.pt")
    with torch.inference_mode():
        return folder / "model.pt", model.module(images)


def try_export(model: Any, data: Any, images: Any, folder: Path) -> tuple[Path, Any]:
    """Export the network, prove the graph equal, and run it under ONNX Runtime."""
    from pq_sweep.runtimes.export import check_export, export_onnx

    graph = folder / "export.onnx"
    export_onnx(model, graph)
    check_export(model, graph)
    return graph, answer(graph, images)


def try_quantizer(name: str, model: Any, data: Any, images: Any, folder: Path) -> tuple[Path, Any]:
    """Quantize the exported graph and run it under ONNX Runtime."""
    from pq_sweep.job.stages import Stages
    from pq_sweep.runtimes.export import export_onnx

    if not (folder / "export.onnx").exists():
        export_onnx(model, folder / "export.onnx")
    options = [f"quantizer.images={IMAGES}"] if name in CALIBRATED else []
    target = folder / f"{name}.onnx"
    stage = Stages(folder, name)
    component("quantizer", name, *options)(folder / "export.onnx", target, data, form="cpu", stage=stage)
    return target, answer(target, images, name)


def try_both(model: Any, data: Any, images: Any, folder: Path) -> tuple[Path, Any]:
    """Remove channels, export, quantize and run under ONNX Runtime."""
    component("pruner", "remove", f"pruner.amount={AMOUNT}")(model, data)
    folder = folder / "smaller"
    folder.mkdir()
    try_export(model, data, images, folder)
    return try_quantizer("int8", model, data, images, folder)


def answer(graph: Path, images: Any, quantizer: str = "none") -> Any:
    """Run a graph as a job does."""
    import torch

    from pq_sweep.job.stages import Stages
    from pq_sweep.types import Workspace

    work = Workspace(graph.parent, "cpu", torch.get_num_threads(), Stages(graph.parent, ""))
    session = component("runtime", "onnxruntime")().load(graph, component("quantizer", quantizer), work, {})
    try:
        return session(images)
    finally:
        session.close()


def component(group: str, name: str, *overrides: str) -> Any:
    """Return a component at its defaults, as a function."""
    from hydra.utils import instantiate

    return instantiate(config(f"{group}={name}", *overrides)[group], _partial_=True, _convert_="all")


TRY: dict[str, Callable[..., tuple[Path, Any]]] = {
    "zero-fill": partial(try_pruning, "l1_global"),
    "remove": partial(try_pruning, "remove"),
    "export": try_export,
    "fp16": partial(try_quantizer, "fp16"),
    "int8": partial(try_quantizer, "int8"),
    "remove + int8": try_both,
    "fp8": partial(try_quantizer, "fp8"),
    "int4": partial(try_quantizer, "int4"),
    "weights": partial(try_quantizer, "weights"),
}


def file_size(model: Any) -> int:
    """Return the bytes of the state_dict's file."""
    import torch

    with tempfile.NamedTemporaryFile() as file:
        torch.save(model.module.state_dict(), file.name)
        return Path(file.name).stat().st_size


def table(records: dict[str, Cell]) -> str:
    """Draw the records as Markdown."""
    ours = {name: record for name, record in records.items() if not name.startswith(TIMM)}
    theirs = {name: record for name, record in records.items() if name.startswith(TIMM)}
    head = HEADER.format(**versions(), amount=AMOUNT, images=IMAGES)
    return head + "".join(lines(ours)) + TIMM_HEADER.format(timm=version("timm")) + "".join(lines(theirs))


def lines(records: dict[str, Cell]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(['model', 'weights', *TECHNIQUES])} |\n"
    yield f"| {' | '.join(['---'] * (2 + len(TECHNIQUES)))} |\n"
    for name, record in records.items():
        cells = (text(record["cells"].get(technique, {"text": "-"})) for technique in TECHNIQUES)
        yield f"| {' | '.join([name, record['weights'], *cells])} |\n"


def text(cell: Cell) -> str:
    """Draw one cell."""
    if "text" in cell:
        return str(cell["text"])
    if "engines" in cell:
        (size,) = (cell["bytes"][name] for name in ("int8 8.9", "fp8 8.9") if name in cell["bytes"])
        return f"{cell['engines']} engine{'s' * (cell['engines'] > 1)} {cell['seconds']:.1f} s, {size / 1e6:.1f} MB"
    if "refused" in cell:
        return f"refused: {cell['refused']}".replace("|", "/")
    if "error" in cell:
        return f"**failed**: {cell['error']}".replace("|", "/")
    return f"ok {cell['seconds']:.1f} s, {cell['size']:.2f}, {cell['snr_db']:.0f} dB"


def versions() -> dict[str, str]:
    """Return the versions and the machine that ran."""
    import onnxruntime
    import torch
    import torchvision

    return {"torch": torch.__version__, "torchvision": torchvision.__version__,
            "onnxruntime": onnxruntime.__version__, "machine": platform.machine(),
            "rtx": version("tensorrt-rtx-cu13-bindings")}  # fmt: skip


HEADER = """\
# What works on which model

Written by `make support`; every cell was run: torch {torch}, torchvision {torchvision}, ONNX Runtime {onnxruntime}, CPU
({machine}). A cell says whether it worked, the seconds from the network (for `fp16` and `int8` from its export) to the
logits of {images} images, the size of its file as a share of the FP32 state_dict, and the signal-to-noise ratio of its
logits against the FP32 network's (200 dB: equal).

- `zero-fill` is `pruner=l1_global`, `remove` is `pruner=remove`, both at {amount} and without recovery: their
  signal-to-noise ratio is that of a network that nobody has repaired.
- `export`, `fp16` and `int8` run the ONNX graph under ONNX Runtime; `int8` is calibrated on {images} images. With
  `remove + int8` the ratio is against the FP32 network that was left after removal.
- `TensorRT builds`: NVIDIA's own parser and builder, those of TensorRT-RTX {rtx}, made engines of the FP32, FP16
  and INT8 graphs for compute capability 8.0 and 8.9 without a warning. The seconds are of all of them with the export,
  the size is that of the INT8 engine for 8.9. None of them ran: that needs a GPU.
- `fp8` and `int4` under ONNX Runtime: FP8 is simulated in FP32, and INT4 are the weights of linear layers alone.
  `TensorRT builds fp8, int4` are the engines of these graphs for 8.9 in the same way, with the size of the FP8 engine.
- `weights` are all weights of matrix products in 4 bits, dequantized as the model runs under ONNX Runtime.
- Weights are `trained` where they were at hand; `random` ones (BatchNorm measured on images) show that a technique
  works, not how well: for accuracy, run a sweep.

"""

TIMM_HEADER = """
## Networks of timm

One small network of each of twelve families, brought by the function of a few lines in
[benchmarks/timm_models.py](../benchmarks/timm_models.py), as you would bring your own; timm {timm}.

"""


if __name__ == "__main__":
    main()
