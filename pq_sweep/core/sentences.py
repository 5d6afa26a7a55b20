"""Texts of errors and commands, made fit to be shown: on one line and without passwords."""

from __future__ import annotations

import re
import sysconfig
import traceback
from pathlib import Path

# Names that a sentence gives before it says how many more there are.
NAMED = 3
PACKAGE = Path(__file__).parents[1]
# Code below these folders, or with a name such as <string>, is not the user's own.
INSTALLED = (*(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")), str(PACKAGE), "<")


def without_password(text: str) -> str:
    """Blot out the passwords in addresses such as postgresql://user:password@host/name."""
    text = re.sub(r"(://[^:/@\s]*):[^@\s]+@", r"\1:***@", text)
    return re.sub(r"\b((?:\w*passw(?:or)?d|\w*token|\w*secret)=)[^&\s]+", r"\1***", text, flags=re.IGNORECASE)


def reason(error: BaseException) -> str:
    """Return the first words of an error, on one line and without a password or the statement that a database took."""
    words = " ".join(re.sub(r"\[SQL: .*", "", str(error), flags=re.DOTALL).split())
    return without_password(re.sub(r"\(\w+\.\w+Error\) ", "", words) or type(error).__name__)[:200]


def listed(names: list[str], most: int = NAMED) -> str:
    """Return names as a sentence lists them: the first few, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def own_line(error: BaseException) -> str:
    """Return the innermost line of the user's own code that an error came through: "my_nets.py, line 12"."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(INSTALLED)]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else ""
