"""Studies of networks beside sweeps, each a subcommand of `python -m pq_sweep.study`: `weights`.

The door composes what a command line asks for and hands its cases to the module of the subcommand's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import DictConfig


@dataclass(frozen=True)
class Case:
    """One combination of the options of a command line: its config, the choice of each group, and its own words.

    `launcher` is where its work is done: the options of a Hydra launcher.
    """

    cfg: DictConfig
    choices: dict[str, str]
    words: tuple[str, ...]
    launcher: DictConfig
