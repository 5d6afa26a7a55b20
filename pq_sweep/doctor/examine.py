"""Look at everything side by side, then judge each section."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pq_sweep.core.limits import bounded
from pq_sweep.doctor import Facts, Section, accelerators, judge
from pq_sweep.doctor.accelerators import look_at_onnxruntime, look_at_tensorrt, look_at_tensorrt_rtx
from pq_sweep.doctor.children import CHILD_S, alone, first_line, in_child
from pq_sweep.doctor.machine import look_at_cpu, look_at_disk, look_at_python, look_at_slurm, look_at_tracking
from pq_sweep.doctor.precisions import judge_precisions

LOOK_S = 4 * CHILD_S  # for everything that one section looks at and waits for

LOOKS: dict[str, Callable[[], Facts]] = {
    "python": look_at_python,
    "cpu": look_at_cpu,
    "gpu": partial(in_child, accelerators.__name__, "look_at_gpus"),
    "torch": partial(alone, accelerators.__name__, "look_at_torch"),
    "onnxruntime": look_at_onnxruntime,
    "tensorrt": look_at_tensorrt,
    "tensorrt_rtx": look_at_tensorrt_rtx,
    "disk": look_at_disk,
    "slurm": look_at_slurm,
    "tracking": look_at_tracking,
}
JUDGES: dict[str, Callable[[Facts], Section]] = {
    "python": judge.judge_python,
    "cpu": judge.judge_cpu,
    "gpu": judge.judge_gpu,
    "torch": judge.judge_torch,
    "onnxruntime": judge.judge_onnxruntime,
    "tensorrt": judge.judge_tensorrt,
    "tensorrt_rtx": judge.judge_tensorrt_rtx,
    "disk": judge.judge_disk,
    "slurm": judge.judge_slurm,
    "tracking": judge.judge_tracking,
    "precisions": judge_precisions,
}
FAILED = {
    "gpu": "restart the machine after an update of the driver, or install the driver again",
    "torch": "install torch and torchvision again, from PyPI",
    "onnxruntime": "uninstall every package of it, then {how}",
    "tensorrt": "uninstall it, then {how}",
    "tensorrt_rtx": "install both packages of its extra again by pip install '.[rtx]'",
}


def examine() -> list[Section]:
    """Return what is found in each section; whatever fails or hangs is reported in its own section."""
    with ThreadPoolExecutor(len(LOOKS)) as pool:
        looked = {name: pool.submit(bounded, look, LOOK_S) for name, look in LOOKS.items()}
    machine = {name: _facts(future) for name, future in looked.items()}
    return [judged(name, machine) for name in JUDGES]


def _facts(future: Future[Facts]) -> Facts:
    error = future.exception()
    return future.result() if error is None else {"failed": first_line(error)}


def judged(name: str, machine: Facts) -> Section:
    """Judge a section, or say that it could not be looked at."""
    failed = machine.get(name, {}).get("failed")
    if failed:
        remedy = FAILED.get(name, "please report it, with this output").format(how=judge.right_versions(machine))
        return Section(name, "problem", {"error": failed}, [f"{name} fails ({failed.rstrip('.')}); {remedy}."])
    try:
        return JUDGES[name](machine)
    except Exception as error:
        told = f"the doctor cannot judge this ({first_line(error)}); see the sections with errors, or report it."
        return Section(name, "problem", {"error": first_line(error)}, [told])
