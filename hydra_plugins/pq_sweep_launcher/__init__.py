"""Our launchers and our sweeper where Hydra looks for them; what they do is in `pq_sweep.sweep`."""

from pq_sweep.sweep import launchers, sweeper


class CheckedSweeper(sweeper.CheckedSweeper):
    """Hydra's basic sweeper for jobs that were all composed and checked before."""


class SlurmLauncher(launchers.SlurmLauncher):
    """Jobs on the nodes of a SLURM cluster, as arrays."""


class LocalLauncher(launchers.LocalLauncher):
    """Some jobs at a time as processes of this machine."""
