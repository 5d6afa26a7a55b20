"""Errors of the command line in one sentence."""

from __future__ import annotations

import difflib
import re
import sys
import traceback
from collections.abc import Iterable

from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from pq_sweep.sweep.quoting import culprit, for_shell, unclosed
from pq_sweep.types import UserError


def explain(error: BaseException) -> str:
    """Say in one sentence what is wrong with the command; for an unforeseen error, return the traceback."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        if group.startswith("experiment/"):
            right = f"override /{group.removeprefix('experiment/')}: {name}"
            return f"{group}={name} is not known; in the defaults of an experiment, write `- {right}`."
        return f"{group}={name} is not known; {_valid(name, error.options)}"
    if isinstance(error, OverrideParseException):
        return _explain_word(str(error.override))
    cause = error.__cause__
    if isinstance(cause, UserError):  # Hydra wraps the error that a component raises
        return explain(cause)
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        return _explain_key(cause)
    if isinstance(error, HydraException) and (told := _explain_hydra(str(error))):
        return told
    if isinstance(error, UserError | ConfigCompositionException):
        return "\n".join(line for line in str(error).splitlines() if line.strip())
    if isinstance(error, InterpolationKeyError | InterpolationResolutionError):
        return _explain_reference(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{mark.name} is no YAML in line {mark.line + 1} ({error.problem}); correct it there or just before."
    if isinstance(error, OmegaConfBaseException | OSError | HydraException):
        return " ".join(str(error).split("full_key:")[0].split())
    if isinstance(error, ValueError) and "can be specified" in str(error):
        return f"{error}."
    if isinstance(error, ValueError) and "Config group override" in str(error):
        empty = " ".join(word for word in sys.argv if re.fullmatch(r"[\w/]+=(null)?", word))
        return f"{empty or 'an override'} chooses nothing; write group=name, and none where it is to do nothing."
    return "".join(traceback.format_exception(error))


def _explain_hydra(text: str) -> str | None:
    """Say in our terms what Hydra says of a sweep in a single run, and of an option that cannot be deleted."""
    if swept := re.match(r"Ambiguous value for argument '(.*)'", text):
        return f"{swept[1]} is a sweep, and hydra.mode=RUN is for a single job; leave that out."
    if deleted := re.match(r"Could not delete from config\. '(.*)' does not exist", text):
        return f"~{deleted[1]} deletes nothing, as {deleted[1]} is null or not there; leave it out."
    return None


def _explain_word(word: str) -> str:
    """Say what Hydra could not read in an override: a character of its value, or all of it."""
    value = word.partition("=")[2]
    if pair := unclosed(value):
        advice = f"close {pair[0]} by {pair[1]}"
    elif sign := culprit(value):
        advice = f"quote a value that has {sign}, as in {for_shell(word)}"
    else:
        advice = "quote values with spaces or commas"
    return f"the override {word!r} cannot be read; write key=value, and {advice}."


def _explain_key(error: OmegaConfBaseException) -> str:
    parent = error.parent_node
    key, full = str(error.key), str(error.full_key or error.key)
    if "Cannot merge" in str(error):
        form = f"is a list; give {full}=[...]" if error.object_type is list else f"is a group; give +{full}.NAME=VALUE"
        return f"{full} {form}."
    if not isinstance(error, ConfigAttributeError | ConfigKeyError):
        return f"{full} is given what it cannot hold: {str(error).splitlines()[0].rstrip('.')}."
    if parent is None or not OmegaConf.is_dict(parent):
        return f"{full}: {str(error).splitlines()[0]}"
    names = [str(name) for name in parent if not str(name).startswith("_")]
    if full == key and "pruner" in names:  # of a job, in which experiment=null leaves no such key behind
        names.append("experiment")
    group = full.partition(".")[0]
    if full != key and any(re.match(rf"{group}=.*,", word) for word in sys.argv):
        # Hydra applies the override to the group's default choice, which it composes first.
        return f"{full} is not known to the default {group}; where {group} itself is swept, write ++{full}=..."
    return f"{full} is not known; {_valid(key, names)}"


def _explain_reference(error: OmegaConfBaseException) -> str:
    """Say which option refers by ${...} to what is not there."""
    why = str(error).splitlines()[0].rpartition("resolving interpolation: ")[2].strip('". ')
    return f"{error.full_key or 'a value'} refers to what is not there ({why}); correct its ${{...}}."


def _valid(wrong: str, names: Iterable[str]) -> str:
    names = [name for name in names if name != "hydra"]
    close = difflib.get_close_matches(wrong, names, n=1)
    return f"valid are: {', '.join(names) or 'none'}." + (f" Did you mean {close[0]}?" if close else "")
