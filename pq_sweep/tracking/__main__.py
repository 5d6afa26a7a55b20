"""`python -m pq_sweep.tracking sync FOLDER...` logs what MLflow does not have yet; `ui` shows what it has."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from pathlib import Path

from pq_sweep.core.sentences import reason, without_password
from pq_sweep.results.sweeps import find_sweeps
from pq_sweep.tracking.addresses import require_address
from pq_sweep.tracking.tracker import Mlflow
from pq_sweep.types import UserError


def main() -> None:
    """Log the jobs of sweep folders that MLflow does not have yet, or show the jobs that it has."""
    arguments = _arguments()
    tracker = Mlflow(arguments.uri, arguments.experiment or "pq_sweep")
    try:
        require_address(arguments.uri, "--uri")
        if arguments.action == "ui":
            _show(tracker.store, arguments)
            return
        for sweep in find_sweeps(arguments.folders):
            print(f"{sweep.folder}: {tracker.sync(sweep.folder)} of {len(sweep.rows)} jobs logged now")
    except UserError as error:
        sys.exit(str(error))
    except Exception as error:
        sys.exit(f"MLflow store {without_password(tracker.store)} cannot be used: {reason(error)}")


def _show(store: str, arguments: argparse.Namespace) -> None:
    from pq_sweep.tracking.ui import show

    with suppress(KeyboardInterrupt):  # which is how it is ended
        show(store, arguments.experiment, arguments.port)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.tracking", description=main.__doc__)
    parser.add_argument("action", choices=["sync", "ui"])
    parser.add_argument("folders", nargs="*", type=Path, help="of sync: sweep folders, or folders that contain some")
    parser.add_argument(
        "--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db in the working folder"
    )
    parser.add_argument("--experiment", help="default: pq_sweep; of ui: every experiment that has sweeps")
    parser.add_argument("--port", type=int, default=os.environ.get("MLFLOW_PORT", "5000"), help="of ui")
    arguments = parser.parse_args()
    if bool(arguments.folders) != (arguments.action == "sync"):
        parser.error("sync takes one or more folders, and ui takes none")
    return arguments


if __name__ == "__main__":
    main()
