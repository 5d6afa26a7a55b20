"""The command line of the cache that jobs share: `python -m pq_sweep.cache ls|prune`."""

from __future__ import annotations

import argparse
import sys
import time

from pq_sweep.core.cache import entries, home, limit_gb, shrink
from pq_sweep.core.environment import cache_home
from pq_sweep.types import UserError


def _show() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{home()}, at most {limit_gb():g} GB")
    for heading in ("kind", "entries", "MB", "last used"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    found = entries()
    for kind in sorted({entry.kind for entry in found}):
        part = [entry for entry in found if entry.kind == kind]
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(entry.used for entry in part)))
        table.add_row(kind, str(len(part)), f"{sum(entry.size for entry in part) / 1e6:,.1f}", used)
    table.add_section()
    table.add_row("all", str(len(found)), f"{sum(entry.size for entry in found) / 1e6:,.1f}", "")
    console = Console(highlight=False)
    console.print(table)
    for other in ("images", "datasets"):
        if (cache_home() / other).is_dir():
            size = sum(path.stat().st_size for path in (cache_home() / other).rglob("*") if path.is_file())
            console.print(f"{other}, which prune leaves: {cache_home() / other}, {size / 1e6:,.1f} MB", soft_wrap=True)


def main() -> None:
    """Show what jobs share, or remove the part of it that has been unused for longest."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.cache", description=main.__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("ls", help="what there is, by kind")
    prune = actions.add_parser("prune", help="remove entries; without options as far as the limit asks")
    prune.add_argument("--gb", type=float, help="leave at most so many gigabytes; 0 removes all")
    prune.add_argument("--unused-days", type=float, help="remove what was not used for so many days")
    arguments = parser.parse_args()
    try:
        if arguments.action == "ls":
            _show()
            return
        most = limit_gb() if arguments.gb is None else arguments.gb
        unused_s = None if arguments.unused_days is None else arguments.unused_days * 86400
        removed = shrink(int(most * 1e9), unused_s)
    except (UserError, OSError) as error:
        sys.exit(str(error))
    print(f"removed {len(removed)} entries, {sum(entry.size for entry in removed) / 1e6:,.1f} MB")


if __name__ == "__main__":
    main()
