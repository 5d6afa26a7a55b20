"""`python -m pq_sweep.results FOLDER...`: show how sweeps stand, and finish what their launchers left undone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pq_sweep.core.folder import SweepFolder
from pq_sweep.results.commands import start_again
from pq_sweep.results.conclude import conclude, tell
from pq_sweep.results.standing import Watch
from pq_sweep.results.sweeps import find_folders
from pq_sweep.results.watch import watch
from pq_sweep.tracking.tracker import tracker_of
from pq_sweep.types import UserError


def show_sweep(folder: Path, *, watching: bool) -> bool:
    """Draw a sweep as it stands, or watch it to its end and conclude it as its launcher would; say if all went well."""
    if watching:
        tracker = tracker_of(folder)
        return conclude(watch(folder, log=tracker.log if tracker.begin(folder) else None), tracker.finish)
    sweep = Watch(folder, patient=False).look()
    try:
        tell(sweep)
    except OSError as error:  # a folder of somebody else: it can be read
        print(f"CSV: {SweepFolder(folder).table} cannot be written ({error.strerror or error}).")
    return True


def main() -> None:
    """Show how the sweeps in the given folders stand, rebuild their CSV, and finish what their launcher left undone."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.results", description=main.__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="sweep folders, or folders that contain some")
    parser.add_argument("--watch", action="store_true", help="show what goes on until no job is pending or running")
    parser.add_argument(
        "--resubmit-failed", action="store_true", help="start the sweep again; only what is missing runs"
    )
    arguments = parser.parse_args()
    try:
        sweeps = find_folders(arguments.folders)
        if arguments.resubmit_failed:
            done = [start_again(folder) == 0 for folder in sweeps]
        else:
            done = [show_sweep(folder, watching=arguments.watch) for folder in sweeps]
        sys.exit(0 if all(done) else 1)
    except (UserError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("no longer watched; jobs of SLURM go on")


if __name__ == "__main__":
    main()
