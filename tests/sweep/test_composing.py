"""Jobs that are composed quickly are those that Hydra composes, and mistakes are told as Hydra tells them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import hydra._internal.hydra
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from pq_sweep.sweep.composing import QuickLoader, compose_quickly
from pq_sweep.sweep.grid import compose_grid


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(hydra._internal.hydra, "ConfigLoaderImpl", ConfigLoaderImpl)  # as it was, at the end
    compose_quickly()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield


def loader() -> QuickLoader:
    found = GlobalHydra.instance().config_loader()
    assert isinstance(found, QuickLoader)
    return found


def started(*words: str) -> DictConfig:
    return compose("config", overrides=[*words], return_hydra_config=True)


def as_hydra(config: DictConfig, words: list[str]) -> DictConfig:
    plain = ConfigLoaderImpl(loader().config_search_path)
    return plain.load_sweep_config(config, words)


def all_of(job: DictConfig) -> tuple[object, list[str], bool | None, bool | None]:
    values = OmegaConf.to_container(job, resolve=False)
    return values, list(map(str, job)), OmegaConf.is_struct(job), OmegaConf.is_readonly(job.hydra)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["pruner=l1_global", "pruner.amount=0.1"],
        ["seed=3", "pruner=l1_global", "model=resnet18", "pruner.amount=0.5", "quantizer=int8"],
        ["measure=rigorous", "measure.batch_sizes=[1,8]", "+dataset.more={a: 1}", "++model.num_classes=10"],
        ["recovery=lsq", "recovery.epochs=2", "recovery.bits=4", "train_device=cpu"],
        ["experiment=paper002_table4", "pruner.amount=0.2"],
        ["experiment=pq_bench_fig2", "~pruner.amount", "tracking=none"],
        ["hydra/launcher=slurm", "hydra.launcher.partition=v100", "node=null", "pruner.amount=0.25", "pruner=l1"],
        ["+quantizer.own={_target_: mine.quantizer, bits: 3}", "quantizer.own.bits=4"],
        ["pruner.amount=${seed}", "device=cpu", "model.weights=null"],
        ["order=quantize_first", "quantizer=int8", "pruner=l1", "pruner.amount=0.3"],
    ],
    ids=" ".join,
)
def test_a_job_is_the_one_that_hydra_composes(quick: None, words: list[str]) -> None:
    config = started("tracking.experiment=mine")
    expected = as_hydra(config, words)
    for _ in range(2):
        found = loader().load_sweep_config(config, words)
        assert all_of(found) == all_of(expected)
        found.seed = 99  # what a job changes is its own
        found.hydra.job.num = 7


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune_and_quantize", "paper003_cifar_quantized", "pq_bench_fig4a", "paper002_order"])
def test_the_grid_of_an_experiment_is_hydras(quick: None, name: str) -> None:
    config = started(f"experiment={name}")
    jobs = list(compose_grid(config))
    assert len(jobs) > 4
    for job in jobs[:: max(1, len(jobs) // 8)]:
        expected = as_hydra(config, list(job.hydra.overrides.task))
        expected.hydra.job.num = job.hydra.job.num
        assert all_of(job) == all_of(expected)


@pytest.mark.parametrize(
    "words", [["pruner.nonsense=1"], ["pruner=nonsense"], ["pruner.amount=[1"], ["seed.x=1"], ["+pruner=l1", "seed=2"]]
)
def test_mistakes_are_told_as_hydra_tells_them(quick: None, words: list[str]) -> None:
    config = started()
    with pytest.raises(Exception, match=r".+") as expected:
        as_hydra(config, words)
    with pytest.raises(type(expected.value)) as found:
        loader().load_sweep_config(config, words)
    assert str(found.value) == str(expected.value)


def test_files_are_read_once_for_jobs_that_differ_in_values(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config, composed = started(), list[list[str]]()
    compose_files = ConfigLoaderImpl._load_configuration_impl

    def noted(self: ConfigLoaderImpl, config_name: str, overrides: list[str], *others: object) -> DictConfig:
        composed.append(overrides)
        return compose_files(self, config_name, overrides, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(ConfigLoaderImpl, "_load_configuration_impl", lambda self, **kw: noted(self, *kw.values()))
    for amount in (0.1, 0.2, 0.3):
        for _ in range(2):
            loader().load_sweep_config(config, ["pruner=l1", f"pruner.amount={amount}", "seed=1"])
    loader().load_sweep_config(config, ["pruner=random", "pruner.amount=0.1"])
    assert [words[-1] for words in composed] == ["pruner=l1", "pruner=random"]


def test_a_sweep_without_m_is_still_refused(quick: None) -> None:
    from hydra.types import RunMode

    loader().load_configuration("config", ["seed=1,2"], RunMode.RUN, validate_sweep_overrides=False)
    with pytest.raises(Exception, match="Ambiguous value for argument 'seed=1,2'"):
        loader().load_configuration("config", ["seed=1,2"], RunMode.RUN)


def test_what_was_composed_does_not_travel_to_nodes(quick: None, tmp_path: Path) -> None:
    config = started()
    loader().load_sweep_config(config, ["pruner=l1"])
    assert loader().made
    copied = pickle.loads(pickle.dumps(loader()))
    assert not copied.made
    assert all_of(copied.load_sweep_config(config, ["pruner=l1"])) == all_of(as_hydra(config, ["pruner=l1"]))


def test_only_so_much_is_kept(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pq_sweep.sweep.composing.MOST_KEPT", 2)
    config = started()
    for pruner in ("l1", "random", "none", "l1"):
        loader().load_sweep_config(config, [f"pruner={pruner}"])
    assert len(loader().made) == 2
