"""Values of options that Hydra's grammar refuses, such as the path /x/epoch=3.ckpt: quoted, if that is plain."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

# What begins with one of these is a list, a group of values, a quoted text or a reference that is not written to its
# end; and `range(1` or `a(b)` may be meant as one of Hydra's functions.
BEGUN = re.compile(r"""["'\[{]|\w+\([^)]*\)?$|.*\$\{""", re.DOTALL)
LIST = re.compile(r"\[(.*)\]", re.DOTALL)


def quoted(word: str) -> str:
    """Return an override so that Hydra reads it: values that it refuses are quoted, unless they may mean another thing.

    A comma separates the values of a sweep, or the entries of a list, unless the whole is the path of a file.
    """
    key, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    if "," in value and _exists(value):
        return f"{key}={in_quotes(value)}"
    if is_read(word) or not is_read(f"{key}=x"):
        return word
    listed = LIST.fullmatch(value)
    parts = [_part(part) for part in (listed[1] if listed else value).split(",")]
    whole = ",".join(parts)
    mended = f"{key}=[{whole}]" if listed else f"{key}={whole}"
    return mended if is_read(mended) else word


def _part(text: str) -> str:
    """Return one of several values as Hydra reads it, if there is no doubt about it."""
    begun = BEGUN.match(text) and not _exists(text)
    return text if begun or not text or is_read(f"x={text}") else in_quotes(text)


def culprit(value: str) -> str:
    """Return the first character that keeps Hydra from reading a value without quotes; "" if it is none by itself."""
    found = [sign for sign in value if not is_read(f"x=a{sign}b")]
    return next((sign for sign in found if sign not in "[]{}()'\""), found[0] if found else "")


def unclosed(value: str) -> tuple[str, str] | None:
    """Return what begins in a value and what would end it, if it does not end: a list, a reference, quotes, ..."""
    for begin, end in (("${", "}"), ("[", "]"), ("{", "}"), ("'", "'"), ('"', '"')):
        at = value.find(begin) if begin == "${" else 0 if value.startswith(begin) else -1
        if at >= 0 and end not in value[at + len(begin) :]:
            return begin, end
    return ("(", ")") if re.fullmatch(r"\w+\([^)]*", value) else None


def for_shell(word: str) -> str:
    """Return an override with its value as a text in quotes, as a shell takes it: 'key="value"'."""
    key, _, value = word.partition("=")
    return shlex.quote(f"{key}={QuotedString(text=value, quote=Quote.double).with_quotes()}")


@cache
def is_read(word: str) -> bool:
    """Say whether Hydra can read an override."""
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def in_quotes(text: str) -> str:
    """Return a text so that Hydra reads just it."""
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return False
