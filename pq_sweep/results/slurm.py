"""What SLURM knows about the jobs of a sweep, by its command line tools, with or without accounting."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

# A controller that is restarting answers late, or not at all.
PATIENCE_S = 20

# States after which a job of SLURM does not run again by itself, and what a user can do about them.
ENDS = {
    "BOOT_FAIL": "its node did not start",
    "CANCELLED": "it was cancelled",
    "COMPLETED": "it ended without a result",
    "DEADLINE": "it could not end before its deadline",
    "FAILED": "it failed",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "it needed more memory than it had asked for; raise hydra.launcher.mem_gb",
    "PREEMPTED": "it was preempted and not requeued",
    "TIMEOUT": "it hit its time limit; raise hydra.launcher.timeout_min or max_num_timeout",
}


@dataclass(frozen=True)
class Queued:
    """A job in the queue: state such as PENDING or RUNNING, its node, and why it waits."""

    state: str
    node: str
    reason: str


@dataclass(frozen=True)
class Ended:
    """A job that left the queue: its last state, exit code as `code:signal`, and node; what is unknown is empty."""

    state: str = ""
    exit_code: str = ""
    node: str = ""

    @property
    def final(self) -> bool:
        """Say whether SLURM has given up the job; it may report COMPLETED before the result can be seen here."""
        return self.state in ENDS and self.state != "COMPLETED"

    def explain(self, job: str) -> str:
        """Say in one sentence how the job ended."""
        why = ENDS.get(self.state, "it left the queue without a result, and SLURM keeps no record of why")
        code, _, signal = self.exit_code.partition(":")
        # A shell reports a signal by an exit code above 128.
        number = int(signal or 0) or max(int(code or 0) - 128, 0)
        if self.state == "FAILED" and number:  # the other states say it all
            why += f", killed by signal {number}" + (" (often: out of memory)" if number == 9 else "")
        elif self.state == "FAILED":
            why += f", exit code {code}"
        where = f", node {self.node}" if self.node else ""
        return f"SLURM job {job} ended: {why} (state {self.state or 'unknown'}{where})."


def queue(user: int) -> dict[str, Queued] | None:
    """Return the queued jobs of a user by id, such as "12" or "12_3"; None if SLURM does not answer."""
    printed = _ask("squeue", "--noheader", "--array", f"--user={user}", "--format=%i|%T|%N|%r")
    if printed is None:
        return None
    rows = (line.split("|", 3) for line in printed.splitlines() if line.count("|") >= 3)
    return {job.strip(): Queued(state, node, reason) for job, state, node, reason in rows}


def ended(job: str) -> Ended:
    """Return how a job ended, from accounting if the cluster has it, else from what the controller still remembers."""
    for found in (*_accounting(job), *_controller(job)):
        if found.state in ENDS:
            return found
    return Ended()


def max_array_size() -> int:
    """Return how many jobs an array may have."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "", re.MULTILINE)
    return int(found.group(1)) if found else 1001


def _accounting(job: str) -> Iterator[Ended]:
    """Ask slurmdbd; the step that Python ran in knows the signal, the job as a whole only an exit code."""
    printed = _ask("sacct", "--noheader", "--parsable2", f"--jobs={job}", "--format=JobID,State,ExitCode,NodeList")
    rows = [line.split("|") for line in (printed or "").splitlines()]
    whole = [row for row in rows if len(row) == 4 and row[0] == job]
    steps = [row[2] for row in rows if len(row) == 4 and row[0] == f"{job}.0"]
    for _, state, code, node in whole:
        exit_code = steps[-1] if steps and steps[-1] != "0:0" else code
        yield Ended(state.partition(" ")[0], exit_code, node if node != "None assigned" else "")


def _controller(job: str) -> Iterator[Ended]:
    """Ask slurmctld, which forgets a job some minutes after its end."""
    printed = _ask("scontrol", "--oneliner", "show", "job", job) or ""
    fields = dict(re.findall(r"(\w+)=(\S*)", printed))
    if "JobState" in fields:
        yield Ended(fields["JobState"], fields.get("ExitCode", ""), fields.get("NodeList", "").replace("(null)", ""))


def _ask(*command: str) -> str | None:
    """Return what a command prints, or None if the command is not installed, fails, or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
