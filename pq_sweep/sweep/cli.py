"""The command line around Hydra: help that explains every choice, errors of one sentence, a table at the end."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from hydra._internal.utils import get_args_parser

from pq_sweep.core.sources import fix_search_path
from pq_sweep.sweep.composing import compose_quickly
from pq_sweep.sweep.current import CURRENT
from pq_sweep.sweep.explain import explain
from pq_sweep.sweep.quoting import quoted
from pq_sweep.types import Stopped, UserError

EXAMPLES = """\
  # three amounts of global magnitude pruning, compared
  python launch.py -m pruner=l1_global pruner.amount=0.1,0.5,0.9
  # prune, quantize, and both
  python launch.py -m pruner=none,l1_global,remove quantizer=none,int8 runtime=onnxruntime
  # a trained network of your own on a folder of class folders
  python launch.py model=resnet18 model.weights=/path/resnet18.pth dataset=image_folder dataset.root=/path/val"""


def main(launch: Callable[[], None], conf: Path) -> None:
    """Run a `@hydra.main` function over the groups in `conf`; exit 0 only if every job finished."""
    if {"-h", "--help"} & set(sys.argv):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads it may have read enough
        print(help_text([*_config_dirs(sys.argv), conf]))
        return
    try:
        sys.argv[1:] = [quoted(word) for word in in_order(sys.argv[1:])]
    except UserError as error:
        sys.exit(str(error))
    codes = list[int]()
    atexit.register(leave, codes)  # what registers first is called last
    sys.path.append(str(Path.cwd()))  # where a user's own components are
    fix_search_path()
    compose_quickly()
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # lets errors through to here
    code = 0
    try:
        launch()
    except KeyboardInterrupt:
        print("interrupted; finished jobs are kept", file=sys.stderr)
        code = 130
    except Stopped as error:
        print(error, file=sys.stderr)
        code = 143
    except Exception as error:
        if wants_traceback:
            raise
        print(explain(error), file=sys.stderr)
        code = 1
    try:
        complete = CURRENT.finish()
    except OSError as error:
        print(f"the results cannot be written: {error}", file=sys.stderr)
        complete = False
    codes.append(code or (0 if complete else 1))
    sys.exit(codes[0])


def in_order(words: list[str]) -> list[str]:
    """Return a command's words with all overrides first: argparse takes them in one place only.

    Raises:
        UserError: If there is an option that is none of Hydra's, such as --device=cpu.
    """
    overrides, options, rest = list[str](), list[str](), list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        action = _option(word.partition("=")[0])
        if action is None:
            raise UserError(_no_option(*word.partition("=")[::2], rest))
        options.append(word)
        takes = action.nargs is None or (action.nargs == "?" and rest[:1] and rest[0] in (action.choices or ()))
        if takes and "=" not in word:
            options += [rest.pop(0)] if rest else []
    return [*overrides, *options]


def _option(name: str) -> argparse.Action | None:
    """Return Hydra's option of a name, or the first that begins so, as argparse takes it."""
    known = get_args_parser()._option_string_actions
    return known.get(name) or next(
        (it for option, it in known.items() if name.startswith("--") and option.startswith(name)), None
    )


def _no_option(name: str, value: str, rest: list[str]) -> str:
    """Say how to write what came like an option of other programs: --device=cpu, --model resnet18."""
    given = value or (rest[0] if rest and "=" not in rest[0] else "...")
    right = f"{name[2:]}={given}" if name.startswith("--") else "group=name or key=value"
    return f"{name} is none of Hydra's options; write {right} (--help lists more)."


def leave(codes: list[int]) -> None:
    """End the process once all other exit handlers ran: taking apart what torch and MLflow hold takes seconds."""
    if codes:
        logging.shutdown()  # its own handler was registered earlier, so it has not run yet
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(codes[0])


def help_text(folders: list[Path]) -> str:
    """Return the text of --help: examples, then every group and choice with the first line of its file.

    Hydra's own help walks all of its groups twice before it prints, which alone takes most of a second.
    """
    about = {key: text for folder in folders for key, text in _defaults_comments(folder / "config.yaml").items()}
    lines = ["pq_sweep prunes, quantizes and measures vision models, one job per combination.", "", EXAMPLES, ""]
    lines.append("Groups and their choices (choose by group=name, set a value by group.key=value):")
    for group, text in about.items():
        files = {path.stem: path for folder in reversed(folders) for path in sorted((folder / group).glob("*.yaml"))}
        width = max((len(name) for name in files), default=0)
        lines += [
            "",
            f"{group}: {text}",
            *(f"  {name:<{width}}  {_first_comment(path)}" for name, path in files.items()),
        ]
    more = "All values and their defaults: python launch.py --cfg job; Hydra's own options: --hydra-help"
    return "\n".join([*lines, "", more])


def _config_dirs(arguments: list[str]) -> list[Path]:
    """Return the folders that the user adds to the configuration by --config-dir."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-dir", "-cd", action="append", type=Path, default=[])
    return list(parser.parse_known_args(arguments)[0].config_dir)


def _defaults_comments(path: Path) -> dict[str, str]:
    """Return the comment behind each group of a defaults list."""
    text = path.read_text() if path.exists() else ""
    return dict(re.findall(r"^  - (?:optional |override )?([\w/]+): \S+ # (.+)$", text, re.MULTILINE))


def _first_comment(path: Path) -> str:
    lines = (line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in lines if not line.startswith("@package")), "")
