"""MLflow as a view of the job folders, or none: what `conf/tracking` chooses from."""

from pq_sweep.tracking.tracker import Mlflow, NoTracking, Tracker, tracker_of

__all__ = ["Mlflow", "NoTracking", "Tracker", "tracker_of"]
