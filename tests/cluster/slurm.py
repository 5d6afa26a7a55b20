"""A real SLURM of three nodes on this machine, for tests: `with cluster(folder) as slurm: slurm.run("sinfo")`.

How long until a job runs again, the same on idle and on busy cores:
5.3 to 6.5 s after `scontrol requeue` or once the controller knows of a node's death (cred_expire + 1, 5 is the least);
16 to 18 s after a node's death that the controller has to find out, 33 to 36 s without the timeouts for it below.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

GPUS = {"v1": "v100", "v2": "v100", "a1": "a100"}
# Daemons lie in the `sbin` beside a `bin`, which is not on everyone's PATH.
PROGRAMS = os.pathsep.join(f"{Path(folder).with_name('sbin')}{os.pathsep}{folder}" for folder in os.get_exec_path())
KEEP = "PQ_SWEEP_KEEP_CLUSTER"

CONFIGS = {
    "slurm.conf": """\
ClusterName=tests
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$slurmctld
SlurmUser=$slurm
SlurmdUser=$root
AuthInfo=socket=$folder/munge/sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/%n.log
DebugFlags=NO_CONF_HASH
ProctrackType=proctrack/linuxproc
AccountingStorageType=accounting_storage/$storage
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$slurmdbd
AccountingStoragePass=$folder/munge/sock
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
MaxArraySize=$max_array_size
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs=8 RealMemory=64000
NodeName=v1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$v1 Gres=gpu:v100:1
NodeName=v2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$v2 Gres=gpu:v100:1
NodeName=a1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$a1 Gres=gpu:a100:2
PartitionName=DEFAULT MaxTime=INFINITE DefaultTime=60
PartitionName=v100 Nodes=v1,v2 Default=YES
PartitionName=a100 Nodes=a1
""",
    # The controller tries to reach a dead node for MessageTimeout, several times; nobody else should be so impatient.
    "controller.conf": "Include $folder/slurm.conf\nMessageTimeout=3\nSlurmdTimeout=5\n",
    # Any character devices will do as GPUs: nobody opens them.
    "gres.conf": """\
NodeName=v1,v2 Name=gpu Type=v100 File=/dev/null
NodeName=a1 Name=gpu Type=a100 File=/dev/null,/dev/zero
""",
    "slurmdbd.conf": """\
AuthInfo=socket=$folder/munge/sock
CommunicationParameters=NoInAddrAny
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$slurmdbd
SlurmUser=$slurm
PidFile=$folder/run/slurmdbd.pid
LogFile=$folder/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageUser=slurm
""",
}
MUNGED = """munged --foreground --num-threads=2 --socket=$folder/munge/sock --key-file=$folder/munge/key
 --pid-file=$folder/munge/pid --seed-file=$folder/munge/seed --log-file=$folder/munge/log"""
# Without grant tables there is nothing to install first; only root and SLURM's user can reach its folder.
MARIADBD = """mariadbd --no-defaults --skip-networking --skip-grant-tables --datadir=$folder/database
 --socket=$folder/database/sock --pid-file=$folder/database/pid --innodb-log-file-size=4M
 --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900"""
# In the order of starting: user, command and what it answers at, a socket or a port.
ACCOUNTING = {
    "mariadbd": ("slurm", MARIADBD, "$folder/database/sock"),
    "slurmdbd": ("slurm", "slurmdbd -D", "$slurmdbd"),
}
DAEMONS = {
    "munged": ("munge", MUNGED, "$folder/munge/sock"),
    **ACCOUNTING,
    "slurmctld": ("slurm", "slurmctld -D -f $folder/controller.conf", "$slurmctld"),
    **{node: ("root", f"slurmd -D -N {node}", f"${node}") for node in GPUS},
}
FOLDERS = {"munge": "munge", "database": "slurm", "state": "slurm", "run": "slurm", "log": "slurm", "spool": "root"}


class Unavailable(RuntimeError):
    """What a test needs cannot run here: what is missing and how to install it."""


@dataclass
class Cluster:
    """A running SLURM: everything lies in `folder`, clients need `env`."""

    folder: Path
    env: dict[str, str]
    values: dict[str, str] = field(repr=False)
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    def run(self, *command: str, timeout: float = 30) -> str:
        """Run a client of SLURM and return what it printed."""
        others = ("SLURM", "SBATCH", "SRUN", "SALLOC", "SQUEUE", "SINFO", "SACCT", "SCANCEL", "SCONTROL")
        env = {key: value for key, value in os.environ.items() if not key.startswith(others)} | self.env
        try:
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{command} takes over {timeout} s:\n{self.tail('slurmctld')}") from None
        if done.returncode:
            raise RuntimeError(f"{command} failed with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def kill_node(self, name: str, *, report: bool = False) -> None:
        """Let a node die with all that runs there; without `report` the controller has to find out by itself."""
        self.daemons[name].kill()
        self.daemons[name].wait()
        kill(f"SLURM_CONF={self.folder}/", f"SLURMD_NODENAME={name}\0")
        if report:
            self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died")

    def start_node(self, name: str, timeout: float = 30) -> None:
        """Bring a dead node back and wait until jobs can run there."""
        # A computer is not back before its death was noticed; SLURM takes 30 s to understand one that is.
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=died")
        self._start(name)
        self._wait(f"working node {name}", name, lambda: self._work(name), timeout)

    def stop_controller(self) -> None:
        """Stop slurmctld; jobs run on."""
        stop(self.daemons["slurmctld"])

    def start_controller(self, timeout: float = 30) -> None:
        """Start slurmctld again and wait until it uses its nodes, about 5 s."""
        self._start("slurmctld")
        alive = [node for node in GPUS if self.daemons[node].poll() is None]
        self._wait("working nodes", "slurmctld", lambda: self._work(*alive), timeout)

    def wait_for_idle(self, timeout: float = 60) -> None:
        """Wait until no job is left in the queue."""
        self._wait("empty queue", "slurmctld", lambda: not self.run("squeue", "--noheader"), timeout)

    def tail(self, daemon: str) -> str:
        """Return the last lines that a daemon wrote."""
        return "\n".join((self.folder / "log" / f"{daemon}.err").read_text(errors="replace").splitlines()[-20:])

    def _start(self, name: str) -> None:
        """Start a daemon and wait until it answers."""
        user, command, address = (Template(part).substitute(self.values) for part in DAEMONS[name])
        env = {"PATH": PROGRAMS, "HOME": str(Path.home()), "MYSQL_UNIX_PORT": f"{self.folder}/database/sock"} | self.env
        if name in GPUS:
            # slurmstepd inherits it and sets it for jobs: this is how to find all that runs on a node.
            env["SLURMD_NODENAME"] = name
        with (self.folder / "log" / f"{name}.err").open("ab") as log:
            how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log} | _identity(user)
            self.daemons[name] = subprocess.Popen(command.split(), env=env, cwd="/", start_new_session=True, **how)
        self._wait(f"answer of {name}", name, lambda: _answers(address), 30)

    def _wait(self, what: str, daemon: str, done: Callable[[], bool], timeout: float) -> None:
        """Wait for something that needs a daemon, while that lives."""
        end = time.monotonic() + timeout
        while not done():
            code = self.daemons[daemon].poll()
            if code is not None:
                raise RuntimeError(f"{daemon} ended with {code}:\n{self.tail(daemon)}")
            if time.monotonic() > end:
                raise TimeoutError(f"no {what} in {timeout} s:\n{self.tail(daemon)}")
            time.sleep(0.05)

    def _work(self, *nodes: str) -> bool:
        """Say whether jobs can start or run on all the nodes."""
        states = self.run("sinfo", "--noheader", "--Node", "--nodes", ",".join(nodes), "--format", "%T").split()
        return len(states) == len(nodes) and set(states) <= {"idle", "mixed", "allocated", "completing"}


@contextmanager
def cluster(folder: Path, *, accounting: bool = True, max_array_size: int = 1001) -> Iterator[Cluster]:
    """Run a SLURM in an empty folder with a short path, and end it with everything that it started."""
    _check(folder, accounting)
    values = _values(folder, accounting, max_array_size)
    running = Cluster(folder, {"SLURM_CONF": f"{folder}/slurm.conf"}, values)
    with _guard(folder):
        try:
            _write(folder, values)
            for name in DAEMONS:
                if accounting or name not in ACCOUNTING:
                    running._start(name)
            running._wait("working nodes", "slurmctld", lambda: running._work(*GPUS), 30)
            yield running
        finally:
            _stop(running)


@contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder that the users of all daemons reach and whose path is short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="pqslurm", dir="/tmp"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        _remove(folder)


def processes(*marks: str) -> list[int]:
    """Return the processes with all marks in command line and environment, and their descendants, oldest first."""
    parents, found = {}, set()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            pid, text = int(entry.name), (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            parents[pid] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if all(mark.encode() in text for mark in marks):
                found.add(pid)

    def line(pid: int) -> set[int]:
        return {pid} | line(parents[pid]) if pid in parents else set()

    mine = line(os.getpid())
    return sorted(pid for pid in parents if pid not in mine and line(pid) & (found - mine))


def kill(*marks: str) -> None:
    """Kill the marked processes and their descendants until none is left."""
    end = time.monotonic() + 5
    while found := processes(*marks):
        if time.monotonic() > end:
            raise TimeoutError(f"processes {found} do not die")
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def stop(process: subprocess.Popen[bytes], grace: float = 5) -> None:
    """End a process, by force after some seconds."""
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _stop(running: Cluster) -> None:
    """Cancel all jobs, end the daemons in reverse order and then whatever is left."""
    controller = running.daemons.get("slurmctld")
    try:
        if controller and controller.poll() is None:
            with suppress(RuntimeError, TimeoutError):
                for partition in set(GPUS.values()):
                    running.run("scancel", "--partition", partition, timeout=5)
                running.wait_for_idle(1)
        for process in reversed(running.daemons.values()):
            stop(process, grace=1)  # nobody needs what it would still write
    finally:
        kill(f"{running.folder}/")


@contextmanager
def _guard(folder: Path) -> Iterator[None]:
    """Have another process clean up if this one is killed."""
    with subprocess.Popen([sys.executable, __file__, folder], stdin=subprocess.PIPE, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()


def _check(folder: Path, accounting: bool) -> None:
    """Refuse a machine without SLURM and a folder that daemons cannot use."""
    needed = "munged slurmctld slurmd sbatch srun sinfo scontrol squeue scancel"
    install = "slurm-wlm munge"
    if accounting:
        needed += " slurmdbd mariadbd sacct"
        install += " slurmdbd mariadb-server slurm-wlm-mysql-plugin"
    missing = [name for name in needed.split() if not shutil.which(name, path=PROGRAMS)]
    if missing:
        raise Unavailable(f"no {', '.join(missing)}: apt-get install --no-install-recommends {install}")
    if len(str(folder)) > 60 or any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty, or its path is too long for sockets")
    if not all(parent.stat().st_mode & 0o001 for parent in folder.parents):
        raise ValueError(f"munge and slurm, who run the daemons, cannot reach {folder}")


def _identity(user: str) -> dict[str, Any]:
    """Return how to start a process as a user; only root can choose."""
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if os.getuid() == 0 else {}


def _values(folder: Path, accounting: bool, max_array_size: int) -> dict[str, str]:
    """Return what the templates leave open: users, ports and the rest."""
    try:
        me = pwd.getpwuid(os.getuid()).pw_name
        users = {name: pwd.getpwnam(name).pw_name if me == "root" else me for name in ("root", "slurm", "munge")}
    except KeyError as error:
        raise Unavailable(f"{error}: SLURM's packages make their users") from None
    with ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in ("slurmctld", "slurmdbd", *GPUS)}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        ports = {name: str(one.getsockname()[1]) for name, one in sockets.items()}
    host, storage = socket.gethostname().partition(".")[0], "slurmdbd" if accounting else "none"
    rest = {"folder": str(folder), "host": host, "storage": storage, "max_array_size": str(max_array_size)}
    return users | ports | rest


def _write(folder: Path, values: dict[str, str]) -> None:
    """Write folders and configuration, each for the user who needs it."""
    for name, user in FOLDERS.items():
        (folder / name).mkdir()
        _give(folder / name, values[user], 0o700 if name == "database" else 0o755)
    for name, text in CONFIGS.items():
        (folder / name).write_text(Template(text).substitute(values))
        _give(folder / name, values["slurm"], 0o600 if name == "slurmdbd.conf" else 0o644)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    _give(key, values["munge"], 0o600)


def _give(path: Path, user: str, mode: int) -> None:
    """Let a user own a path and others do what the mode says."""
    path.chmod(mode)
    shutil.chown(path, user)


def _answers(address: str) -> bool:
    """Say whether somebody listens at a socket or at a port of this machine."""
    unix = address.startswith("/")
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as client:
        return client.connect_ex(address if unix else ("127.0.0.1", int(address))) == 0


def _remove(folder: Path) -> None:
    """Remove a cluster's folder, unless somebody wants to look at it."""
    if not os.environ.get(KEEP):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":  # the guard: its input ends with the process that started it
    sys.stdin.read()
    kill(f"{sys.argv[1]}/")
    _remove(Path(sys.argv[1]))
