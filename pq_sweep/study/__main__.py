"""The command line of the studies: `python -m pq_sweep.study weights model=resnet18`."""

from __future__ import annotations

import argparse
import atexit
import os
import re
import sys
from importlib import import_module
from pathlib import Path

from pq_sweep.study import Case
from pq_sweep.types import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
EXAMPLE = "python -m pq_sweep.study weights model=resnet18,mobilenet_v2 bits=[2,4,8]"
STUDIES = tuple(sorted(path.stem.removeprefix("study_") for path in CONF.glob("study_*.yaml")))


def main() -> None:
    """Run a study: its name, then options as for a sweep, key=value, several values by commas."""
    name, words = ("", sys.argv[1:]) if sys.argv[1:2] in ([], ["-h"], ["--help"]) else (sys.argv[1], sys.argv[2:])
    if name and name not in STUDIES:
        sys.exit(f"the study {name} is not known; valid are: {', '.join(STUDIES) or f'none, as {CONF} is missing'}.")
    if not name or {"-h", "--help"} & {*words}:
        print(help_text(name))
        return
    from pq_sweep.sweep.cli import leave

    codes = list[int]()
    atexit.register(leave, codes)
    codes.append(started(name, words))
    sys.exit(codes[0])


def help_text(name: str) -> str:
    """Return what a study asks and its options, or what studies there are."""
    if name:
        return f"python -m pq_sweep.study {name} [OPTION=VALUE...] [--config-dir DIR]\n\n{_file(name).read_text()}"
    lines = [f"  {name:<10} {_file(name).read_text().splitlines()[0].lstrip('# ')}" for name in STUDIES]
    more = "python -m pq_sweep.study NAME --help shows the options of a study; models are those of launch.py --help."
    return "\n".join([str(main.__doc__), "", *lines, "", f"  {EXAMPLE}", "", more])


def _file(name: str) -> Path:
    return CONF / f"study_{name}.yaml"


def started(name: str, words: list[str]) -> int:
    """Run a study of all cases that the words ask for, and return the exit code; an error is told in a sentence."""
    from pq_sweep.core.sources import fix_search_path
    from pq_sweep.sweep.explain import explain

    sys.path.append(str(Path.cwd()))  # where a user's own components are
    fix_search_path()
    try:
        complete: bool = import_module(f"pq_sweep.study.{name}").run(cases(name, words))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "HYDRA_FULL_ERROR" in os.environ:
            raise
        print(explain(error), file=sys.stderr)
        return 1
    return 0 if complete else 1


def cases(name: str, words: list[str]) -> list[Case]:
    """Compose every combination that the words of a command line ask for, as in a sweep.

    Raises:
        UserError: If there is an option that is neither key=value nor --config-dir.
    """
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from pq_sweep.sweep.quoting import quoted

    overrides, folders = split(words)
    searched = [f"hydra.searchpath=[{','.join(f'file://{folder.resolve()}' for folder in folders)}]"] if folders else []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        parsed = parser.parse_overrides([quoted(word) for word in overrides])
        keys = [override.key_or_group for override in parsed]
        refuse_foreign(name, keys)
        refuse_repeated(keys, overrides)
        (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
        return [_case(compose(f"study_{name}", [*job, *searched], return_hydra_config=True), job) for job in jobs]


def refuse_foreign(name: str, keys: list[str]) -> None:
    """Raise a UserError for a group of options that jobs have and this study has not."""
    own = re.findall(r"^  - (?:override )?/?(\w+)", _file(name).read_text(), re.MULTILINE)
    others = {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {*own, "hydra"}
    if wrong := next((key for key in keys if re.split(r"[./@]", key)[0] in others), None):
        own.remove("_self_")
        raise UserError(f"{wrong} is no option of the study {name}, whose groups of options are: {', '.join(own)}.")
    if wrong := next((key for key in keys if re.match(r"hydra\b(?!\.(launcher|searchpath)\b|/launcher)", key)), None):
        raise UserError(f"{wrong} is an option of sweeps; a study writes into output=FOLDER.")


def refuse_repeated(keys: list[str], words: list[str]) -> None:
    """Raise a UserError if an option is given twice, of which Hydra takes the last one alone."""
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        given = [word for key, word in zip(keys, words, strict=True) if key == twice]
        values = ",".join(word.partition("=")[2] for word in given)
        raise UserError(
            f"{' '.join(given)} gives {twice} twice; give it once, several values by commas: {twice}={values}."
        )


def split(words: list[str]) -> tuple[list[str], list[Path]]:
    """Return overrides, and the folders that a user adds to the configuration."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("--config-dir", "-cd", action="append", type=Path, default=[])
    known, rest = parser.parse_known_args(words)
    if wrong := next((word for word in rest if not re.match(r"[+~]*\w.*", word)), None):
        raise UserError(f"{wrong} is no option of a study; write key=value, or --config-dir DIR.")
    if missing := next((folder for folder in known.config_dir if not folder.is_dir()), None):
        raise UserError(f"--config-dir {missing} is no folder; give one with a folder for each group, as in conf.")
    return rest, known.config_dir


def _case(composed: object, words: list[str]) -> Case:
    """Take Hydra's own part off a composed config."""
    from omegaconf import DictConfig, OmegaConf

    assert isinstance(composed, DictConfig)
    choices = {str(group): str(choice) for group, choice in composed.hydra.runtime.choices.items()}
    own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    return Case(own, choices, tuple(words), composed.hydra.launcher)


if __name__ == "__main__":
    main()
