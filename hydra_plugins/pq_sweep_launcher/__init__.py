"""Our launchers and our sweeper where Hydra looks for them; `pq_sweep.sweep` has their code."""

from pq_sweep.sweep import launchers, sweeper


class CheckedSweeper(sweeper.CheckedSweeper):
    """Hydra's basic sweeper, for jobs that have all been composed and checked before."""


class SlurmLauncher(launchers.SlurmLauncher):
    """Jobs on the nodes of a SLURM cluster, as arrays."""


class LocalLauncher(launchers.LocalLauncher):
    """Jobs as processes of this machine, some at a time."""
