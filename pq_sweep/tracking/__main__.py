"""`python -m pq_sweep.tracking sync FOLDER...`: log what MLflow does not have yet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pq_sweep.core.sentences import reason, without_password
from pq_sweep.results.sweeps import find_sweeps
from pq_sweep.tracking.tracker import Mlflow
from pq_sweep.types import UserError


def main() -> None:
    """Log the jobs of sweep folders that MLflow does not have yet."""
    parser = argparse.ArgumentParser(prog="python -m pq_sweep.tracking", description=main.__doc__)
    parser.add_argument("action", choices=["sync"])
    parser.add_argument("folders", nargs="+", type=Path, help="sweep folders, or folders that contain some")
    parser.add_argument(
        "--uri", help="MLflow store; default: MLFLOW_TRACKING_URI, else mlflow.db in the working folder"
    )
    parser.add_argument("--experiment", default="pq_sweep")
    arguments = parser.parse_args()
    tracker = Mlflow(arguments.uri, arguments.experiment)
    try:
        for sweep in find_sweeps(arguments.folders):
            print(f"{sweep.folder}: {tracker.sync(sweep.folder)} of {len(sweep.rows)} jobs logged now")
    except UserError as error:
        sys.exit(str(error))
    except Exception as error:
        sys.exit(f"MLflow store {without_password(tracker.store)} cannot be used: {reason(error)}")


if __name__ == "__main__":
    main()
