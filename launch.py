"""Compose, compress, measure and compare: `python launch.py -m pruner=l1_global pruner.amount=0.1,0.5,0.9`."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from pq_sweep.sweep import cli
from pq_sweep.sweep.worker import run_job


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def launch(cfg: DictConfig) -> None:
    """Run one job; heavy packages are imported here and no earlier."""
    run_job(cfg)


if __name__ == "__main__":
    cli.main(launch, Path(__file__).parent / "conf")
