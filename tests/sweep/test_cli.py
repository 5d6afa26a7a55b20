"""The command line before any job runs: help, completion, typos, and that none of it waits for a framework."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import HEAVY, LAUNCH, imported, said
from conftest import ROOT, Launch, python, refused

from pq_sweep.sweep.cli import EXAMPLES, in_order

CONF = ROOT / "conf"
# Options that several choices share are no choice themselves.
CHOICES = sorted(path.relative_to(CONF) for path in CONF.glob("*/**/*.yaml") if path.parent.name != "recipe")
LIGHT_MODULES = (
    "core.environment",
    "compress.quantizers",
    "doctor",
    "job.check",
    "job.stages",
    "results.sweeps",
    "runtimes",
    "study",
    "sweep.callback",
    "sweep.cli",
    "sweep.launchers",
    "sweep.worker",
    "tracking",
    "types",
)


@pytest.fixture(scope="module")
def help_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    done = python([LAUNCH, "--help"], tmp_path_factory.mktemp("help"), {})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def my_conf(tmp_path: Path) -> str:
    """A user's own configuration folder with one pruner, relative to the working folder."""
    path = tmp_path / "mine" / "pruner" / "my_pruner.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("# A pruner of my own\n_target_: pq_sweep.compress.pruners.l1\namount: 0.25\nevery_weight: false\n")
    return "mine"


def described(text: str, group: str) -> dict[str, str]:
    """Return the choices of a group and their descriptions from the help text."""
    (section,) = re.findall(rf"^{re.escape(group)}: \S.*\n((?:  .*\n)+)", text, re.MULTILINE)
    return dict(re.findall(r"^  (\S+)  +(\S.*)$", section, re.MULTILINE))


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_help_describes_every_choice(help_text: str, choice: Path) -> None:
    description = described(help_text, str(choice.parent))[choice.stem]
    assert description in (CONF / choice).read_text()


def test_help_gives_three_commands(help_text: str) -> None:
    assert len(re.findall(r"^ +python launch\.py .*=", help_text, re.MULTILINE)) == 3


def test_every_group_of_the_defaults_is_in_help(help_text: str) -> None:
    groups = re.findall(r"^  - (?:override )?([\w/]+):", (CONF / "config.yaml").read_text(), re.MULTILINE)
    assert len(groups) >= 10
    assert all(described(help_text, group) for group in groups)


def test_import_times_are_seen(tmp_path: Path) -> None:
    """What the tests below look for would be found."""
    done = python(["-X", "importtime", "-c", "import sklearn"], tmp_path, {})
    assert {"sklearn", "numpy"} <= imported(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], "Groups and their choices"),
        (["--cfg", "job"], "_target_: pq_sweep.inputs.models.digits_cnn"),
        (["-sc", "query=bash"], "pruner=l1_global"),
        (["pruner=l1_globl"], ""),
    ],
    ids=["help", "cfg", "completion", "typo"],
)
def test_command_imports_no_framework(
    tmp_path: Path, environment: dict[str, str], arguments: list[str], expected: str
) -> None:
    completing = {"COMP_LINE": "python launch.py -m pruner=l"}
    done = python(["-X", "importtime", LAUNCH, *arguments], tmp_path, environment | completing)
    assert expected in done.stdout
    assert "hydra" in imported(done.stderr)
    assert not HEAVY & imported(done.stderr)


def test_light_modules_import_no_framework(tmp_path: Path, environment: dict[str, str]) -> None:
    code = "; ".join(f"import pq_sweep.{name}" for name in LIGHT_MODULES)
    done = python(["-X", "importtime", "-c", code], tmp_path, environment)
    assert done.returncode == 0, said(done.stderr)
    assert "pq_sweep" in imported(done.stderr)
    assert not HEAVY & imported(done.stderr)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("launch.py pruner=l", {"pruner=l1", "pruner=l1_global", "pruner=ln_structured"}),
        ("launch.py quantizer=int8 quantizer.cal", {"quantizer.calibration="}),
        ("launch.py hydra/launcher=lo", {"hydra/launcher=local_parallel"}),
        ("launch.py experiment=pru", {"experiment=prune_and_quantize"}),
    ],
)
def test_completion(launch: Launch, line: str, expected: set[str]) -> None:
    done = launch("-sc", "query=bash", env={"COMP_LINE": line})
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "wrong", "valid", "suggested"),
    [
        (["prunr=l1"], "prunr", ["model", "quantizer"], "pruner"),
        (["experimnt=prune_and_quantize"], "experimnt", ["model", "quantizer"], "experiment"),
        (["hydra/launcher=local_paralel"], "hydra/launcher=local_paralel", ["basic"], "local_parallel"),
        (["pruner=l1_globl"], "pruner=l1_globl", ["none", "remove"], "l1_global"),
        (["-m", "pruner=none,remov"], "pruner=remov", ["none", "l1"], "remove"),
        (["quantizer=int_8"], "quantizer=int_8", ["none", "fp16"], "int8"),
        (["pruner=l1", "pruner.amont=0.5"], "pruner.amont", ["every_weight"], "amount"),
        (["-m", "pruner=l1", "pruner.amont=0.1,0.5"], "pruner.amont", ["every_weight"], "amount"),
        (["measure.batchsizes=[1]"], "measure.batchsizes", ["eval_batch_size"], "batch_sizes"),
        (["hydra.swep.dir=x"], "hydra.swep", ["launcher"], "sweep"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_typo_names_what_is_valid(
    tmp_path: Path, launch: Launch, overrides: list[str], wrong: str, valid: list[str], suggested: str
) -> None:
    done = launch(*overrides)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{wrong} is not known; valid are: ")
    assert all(re.search(rf"\b{name}\b", line) for name in [*valid, suggested])
    assert line.endswith(f"Did you mean {suggested}?")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("a=1 -m b=2,3", "a=1 b=2,3 -m"),
        ("--multirun a=1 --config-dir mine b=2", "a=1 b=2 --multirun --config-dir mine"),
        ("--config-dir=mine a=1 -cd=x b=2", "a=1 b=2 --config-dir=mine -cd=x"),
        ("a=1 --cfg job --package x b=2", "a=1 b=2 --cfg job --package x"),
        ("--info a=1 --multi b=2 --info all c=3", "a=1 b=2 c=3 --info --multi --info all"),
        ("-sc query=bash", "query=bash -sc"),
        ("~a +b=1 -r", "~a +b=1 -r"),
    ],
)
def test_overrides_may_stand_before_and_after_options(words: str, expected: str) -> None:
    assert in_order(words.split()) == expected.split()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--device=cpu", "--device is none of Hydra's options; write device=cpu (--help lists more)."),
        ("a=1 --model resnet18 -m", "--model is none of Hydra's options; write model=resnet18 (--help lists more)."),
        ("--device a=1", "--device is none of Hydra's options; write device=... (--help lists more)."),
        ("-x", "-x is none of Hydra's options; write group=name or key=value (--help lists more)."),
    ],
)
def test_options_of_other_programs_are_refused_with_the_right_form(words: str, told: str) -> None:
    assert refused(lambda: in_order(words.split())) == told


def test_a_grid_may_stand_behind_an_option(launch: Launch) -> None:
    done = launch("pruner=l1", "--cfg", "job", "seed=3", "-p", "pruner")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# @package pruner")
    done = launch("seed=3", "--pruner", "l1")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "--pruner is none of Hydra's options; write pruner=l1 (--help lists more).\n"


@pytest.mark.parametrize("form", [["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]], ids=" ".join)
def test_own_config_folder_is_in_help(launch: Launch, my_conf: str, form: list[str]) -> None:
    done = launch("--help", *form)
    assert described(done.stdout, "pruner")["my_pruner"] == "A pruner of my own"
    assert described(done.stdout, "pruner")["l1_global"]


@pytest.mark.slow
def test_own_config_folder_can_be_used(launch: Launch, my_conf: str) -> None:
    done = launch("--config-dir", my_conf, "pruner=my_pruner", "--cfg", "job", "--package", "pruner")
    assert done.returncode == 0, done.stderr
    assert "amount: 0.25" in done.stdout


def test_missing_config_folder_is_refused_in_one_sentence(launch: Launch) -> None:
    done = launch("--config-dir", "nowhere", "pruner=l1")
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "nowhere" in line


def test_full_error_of_hydra_stays_available(launch: Launch) -> None:
    done = launch("pruner=l1_globl", env={"HYDRA_FULL_ERROR": "1"})
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


@pytest.mark.parametrize("command", [line for line in EXAMPLES.splitlines() if "launch.py" in line])
def test_commands_in_help_name_real_choices(command: str) -> None:
    choices = re.findall(r" (\w+)=([\w,]+)(?= |$)", command)
    files = [CONF / group / f"{name}.yaml" for group, names in choices for name in names.split(",")]
    assert files
    assert all(path.is_file() for path in files)


ENDING = """
import atexit, logging, sys, threading, time
from pathlib import Path
from pq_sweep.sweep import cli
from pq_sweep.types import UserError

class Held:
    def __del__(self):
        print("taken apart")

held = Held()

def work():
    time.sleep(0.2)
    print("waited for")

def launch():
    logging.basicConfig(handlers=[logging.FileHandler("log", delay=True)])
    logging.warning("logged")
    atexit.register(print, "told")
    threading.Thread(target=work).start()
    raise UserError("It failed.")

cli.main(launch, Path("conf"))
"""


def test_a_launch_ends_without_taking_memory_apart_once_all_are_told(tmp_path: Path) -> None:
    """Threads end, handlers of others run, output is whole and the exit code is kept."""
    (tmp_path / "own.py").write_text(ENDING)
    done = python([str(tmp_path / "own.py")], tmp_path, {"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stdout, done.stderr) == (1, "waited for\ntold\n", "It failed.\n")
    assert (tmp_path / "log").read_text() == "WARNING:root:logged\n"
