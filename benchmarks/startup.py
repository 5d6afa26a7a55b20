"""How long until something happens? `python -m benchmarks.startup` prints the seconds of each start as Markdown.

The starts are `--help`, `--cfg job` and a completion query; `import torch, mlflow` alone; `python launch.py` with its
defaults, in an empty folder, from its start until `status.json` names the stage of its first measurement; and the same
with `tracking=none`, which needs no MLflow. They run one after the other, round by round. Seconds of the CPU are those
of the process and its children. The user's cache (images of the default data set, figures of the uncompressed network)
is kept between the runs; a first start, which is not counted, fills it.

The cost of imports is what `-X importtime` reports for one run up to its first measurement: the seconds of a package
and all its modules, without the packages that these import in turn. Imports take longer under that option, so read them
as shares.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = str(ROOT / "launch.py")
FIRST_MEASUREMENT = "latency b1"
IMPORTS = "`import torch, mlflow`"
JOB = "to the first measurement"
JOBS = {JOB: [], f"{JOB}, `tracking=none`": ["tracking=none"]}
COMMANDS = {
    "`--help`": [LAUNCH, "--help"],
    "`--cfg job`": [LAUNCH, "--cfg", "job"],
    "completion": [LAUNCH, "-sc", "query=bash"],
    IMPORTS: ["-c", "import torch, mlflow"],
}
LIMITS = {"`--help`": 1.0, "`--cfg job`": 1.0, "completion": 1.0}
ABOVE_IMPORTS = 1.5
IMPORT_LINE = re.compile(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", re.MULTILINE)
TOP = 8


@dataclass(frozen=True)
class Start:
    """Seconds by the clock and of the CPU and, for a job, the seconds of its parts in their order."""

    wall: float
    cpu: float
    parts: dict[str, float]


def main() -> None:
    """Run every start some times and print what they took."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    starts: dict[str, list[Start]] = {name: [] for name in [*COMMANDS, *JOBS]}
    with tempfile.TemporaryDirectory() as kept:
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW", "HYDRA"))}
        environment |= {"PQ_SWEEP_CACHE": kept, "COMP_LINE": "python launch.py -m pruner=l"}
        run_job([], environment)
        for _ in tqdm(range(options.rounds), unit="round", disable=None, leave=False):
            for name, arguments in COMMANDS.items():
                starts[name].append(run(arguments, environment))
            for name, overrides in JOBS.items():
                starts[name].append(run_job(overrides, environment))
        imports = import_seconds(environment)
    print(f"{options.rounds} rounds, {len(os.sched_getaffinity(0))} cores.\n")
    print("\n\n".join([table(starts), parts_table([starts[name] for name in JOBS]), imports_table(imports)]))


def run(arguments: list[str], environment: dict[str, str]) -> Start:
    """Run one command to its end in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed; run it to see why.")
    return Start(wall, usage.ru_utime + usage.ru_stime, {})


def run_job(overrides: list[str], environment: dict[str, str]) -> Start:
    """Run a job to its end in an empty folder; only the time before its first measurement counts."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as said:
        began = time.time()
        command = [sys.executable, LAUNCH, *overrides]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        since, cpu = await_measurement(process, Path(folder))
        if process.wait():
            raise failure(Path(folder))
        (sweep,) = Path(folder).glob("multirun/*/*")
        created = json.loads((sweep / "sweep.json").read_text())["created"]
        result = json.loads((sweep / "0" / "result.json").read_text())
        return Start(since - began, cpu, parts(result, began, created, since))


def await_measurement(process: subprocess.Popen[bytes], folder: Path) -> tuple[float, float]:
    """Return when the first measurement began and how many seconds of the CPU the process had then."""
    while process.poll() is None:
        for path in folder.glob("multirun/*/*/*/status.json"):
            status = json.loads(path.read_text())
            if status["stage"] == FIRST_MEASUREMENT:
                return status["since"], cpu_seconds(process.pid)
        time.sleep(0.01)
    raise failure(folder)


def failure(folder: Path) -> SystemExit:
    """Return an exit that shows the output of a failed job."""
    lines = (line for line in (folder / "said").read_text().splitlines() if not line.startswith("import time:"))
    return SystemExit("\n".join(["the job failed:", *lines]))


def cpu_seconds(pid: int) -> float:
    """Return the seconds of the CPU that a process and its finished children have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def parts(result: dict[str, Any], began: float, created: float, since: float) -> dict[str, float]:
    """Divide the time before the first measurement into what comes before the job, and the job's stages."""
    stages = list(result["stage_s"])
    before = {name: result["stage_s"][name] for name in stages[: stages.index(FIRST_MEASUREMENT)]}
    started = result["started"]
    return {
        "Python, Hydra, check of the grid": created - began,
        "MLflow and its store if any, then torch": started - created,
        **before,
        "between these stages": since - started - sum(before.values()),
    }


def import_seconds(environment: dict[str, str]) -> Counter[str]:
    """Return the seconds that each package took to import until the first measurement of a job."""
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "said").open("w") as said:
        command = [sys.executable, "-X", "importtime", LAUNCH]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=said)
        await_measurement(process, Path(folder))
        process.send_signal(signal.SIGKILL)
        process.wait()
        text = Path(said.name).read_text()
    seconds: Counter[str] = Counter()
    for microseconds, module in IMPORT_LINE.findall(text):
        seconds[module.partition(".")[0]] += int(microseconds) / 1e6
    return seconds


def table(starts: dict[str, list[Start]]) -> str:
    """Draw the median seconds of each start, and whether it is within its limit."""
    walls = {name: statistics.median(start.wall for start in found) for name, found in starts.items()}
    limits = LIMITS | {JOB: walls[IMPORTS] + ABOVE_IMPORTS}  # the other starts have no limit
    lines = [
        "| start | seconds | smallest | largest | of the CPU | limit | within |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, found in starts.items():
        every = [start.wall for start in found]
        seconds = [walls[name], min(every), max(every), statistics.median(start.cpu for start in found)]
        limit = limits.get(name)
        verdict = ["", ""] if limit is None else [f"{limit:.2f}", "yes" if walls[name] <= limit else "**no**"]
        lines.append(f"| {' | '.join([name, *(f'{one:.2f}' for one in seconds), *verdict])} |")
    return "\n".join(lines)


def parts_table(jobs: list[list[Start]]) -> str:
    """Draw the median seconds of each part of the way to the first measurement."""
    lines = [f"| part | {' | '.join(JOBS)} |", f"|---|{'---:|' * len(JOBS)}"]
    for name in jobs[0][0].parts:
        medians = [statistics.median(start.parts[name] for start in found) for found in jobs]
        lines.append(f"| {name} | {' | '.join(f'{median:.2f}' for median in medians)} |")
    return "\n".join(lines)


def imports_table(seconds: Counter[str]) -> str:
    """Draw the packages that take longest to import."""
    lines = ["| imports of a job, with `-X importtime` | seconds |", "|---|---:|"]
    lines += [f"| {name} | {took:.2f} |" for name, took in seconds.most_common(TOP)]
    return "\n".join([*lines, f"| all {len(seconds)} | {sum(seconds.values()):.2f} |"])


if __name__ == "__main__":
    main()
