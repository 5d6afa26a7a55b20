"""Draw the doctor's findings as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pq_sweep.doctor import Facts, Section

if TYPE_CHECKING:
    from rich.console import Console

MARKS = {"ok": ("✓", "green"), "problem": ("✗", "red"), "not here": ("-", "dim")}


def draw(sections: list[Section], console: Console) -> None:
    """Print a table: verdict, section, and what was found, with the remedies below."""
    from rich.table import Table
    from rich.text import Text

    marks = console.is_terminal and not console.options.ascii_only
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for section in sections:
        told = Text("\n".join(lines(section.details)))
        for remedy in section.remedies:
            told.append(f"\n-> {remedy}", style="bold")
        mark, style = MARKS[section.verdict]
        table.add_row(Text(f"{mark} {section.verdict}" if marks else section.verdict, style), section.name, told)
    with console.capture() as captured:
        console.print(table)
    print("\n".join(line.rstrip() for line in captured.get().splitlines()))
    print(summary(sections))


def summary(sections: list[Section]) -> str:
    """Name the problems in one line."""
    names = [section.name for section in sections if section.verdict == "problem"]
    return f"{len(names)} problem{'' if len(names) == 1 else 's'}" + (f": {', '.join(names)}" if names else "")


def lines(details: Facts) -> list[str]:
    """Return one line for each detail or group of details; what is unknown or empty is left out."""
    return [f"{key}: {text}" for key, value in details.items() if (text := shown(value))]


def shown(value: Any) -> str:
    """Return a value as text: yes and no, commas between the items of a list, semicolons within a group."""
    if isinstance(value, dict):
        return "; ".join(f"{key} {text}" for key, item in value.items() if (text := shown(item)))
    if isinstance(value, list):
        return ", ".join(map(shown, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "" if value is None else str(value)
