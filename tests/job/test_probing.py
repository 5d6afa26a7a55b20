"""`recovery.probe=true` in a job: its files, its time, and that the job is otherwise the same, also when it goes on."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from math import log10
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT
from conftest import ROOT, refused
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from pq_sweep.compress.representations import Probe
from pq_sweep.core.fingerprint import fingerprint
from pq_sweep.core.folder import JobFolder
from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job import probing
from pq_sweep.job import run as job
from pq_sweep.job import steps as resume
from pq_sweep.job.check import problems
from pq_sweep.job.probing import with_original, without_probe
from pq_sweep.job.stages import PREP, Stages
from pq_sweep.job.steps import Origin

PRUNED = ("pruner=l1_global", "pruner.amount=0.8", "device=cpu")
TRAINED = (*PRUNED, "recovery=finetune", "recovery.epochs=1")
RENEWED = (*PRUNED, "recovery=bn_reestimate", "recovery.images=64")
PROBE = ("recovery.probe=true", "recovery.probe_images=32")
LAYERS = ["stem.0.0", "stem.1.0", "residual.conv1", "body.0", "fc1"]

OWN = """
def nothing(model, data, *, rate):
    "Change nothing, and tell something."
    return {"rate": rate}


def slowly(model, data, *, epochs, observe):
    "Make the first layer smaller in each epoch; after the first, look at half of the images' brightness."
    observe(0)
    weight = model.module.stem[0][0].weight
    for epoch in range(epochs):
        weight.data *= 0.9
        observe(epoch + 1, None if epoch else lambda images: model.module(images * 0.5))
    return {"epochs": epochs}
"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PQ_SWEEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(resume, "WORTH_KEEPING_S", 0.0)


def config(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=["tracking=none", *SHORT, *overrides])


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run a job in a sweep of its own and return its result."""
    folder = folder / "0"
    folder.mkdir(parents=True, exist_ok=True)
    job.run(config(*overrides), folder)
    return result_of(folder.parent)


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "0" / "result.json").read_text())
    return found


def rows(folder: Path) -> list[dict[str, str]]:
    with JobFolder(folder / "0").representations.open(newline="") as file:
        return list(csv.DictReader(file))


def epochs(folder: Path) -> list[str]:
    return list(dict.fromkeys(row["epoch"] for row in rows(folder)))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "0" / "model.pt", weights_only=True)
    return found


@contextmanager
def ending_in(stage: str) -> Iterator[None]:
    """End a job in this process before a stage."""
    enter = Stages.__call__

    def leaving(self: Stages, name: str, **how: Any) -> Any:
        if name == stage:
            raise KeyboardInterrupt
        return enter(self, name, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stages, "__call__", leaving)
        yield


@pytest.mark.slow
class TestJob:
    """Jobs that are looked at, and jobs that are not."""

    def test_a_job_has_a_table_a_picture_and_the_same_network(self, tmp_path: Path) -> None:
        probed = run(tmp_path / "on", *TRAINED, *PROBE, "cache=off")
        plain = run(tmp_path / "off", *TRAINED, "cache=off")
        found = rows(tmp_path / "on")
        assert [(row["epoch"], row["layer"]) for row in found] == [(e, layer) for e in "01" for layer in LAYERS]
        assert tuple(found[0]) == probing.COLUMNS
        assert all(0 < float(row["cka"]) < 1 and 0 < float(row["snr_db"]) < 60 for row in found)
        assert {row["images"] for row in found} == {"32"}
        assert JobFolder(tmp_path / "on" / "0").representations_drawn.read_text().count("<svg") == 1
        ours, theirs = weights(tmp_path / "on"), weights(tmp_path / "off")
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert probed["accuracy"] == plain["accuracy"]
        assert probed["prep_s"]["probe"] > 0
        assert "probe" not in plain["prep_s"]
        assert not JobFolder(tmp_path / "off" / "0").representations.exists()

    def test_what_comes_from_the_cache_has_its_table_and_is_told(self, tmp_path: Path) -> None:
        first = run(tmp_path / "first", *RENEWED, *PROBE)
        second = run(tmp_path / "second", *RENEWED, *PROBE)
        assert second["from_cache"][:3] == ["prune", "recover", "probe"]
        for stage in ("recover", "probe"):
            assert second["prep_s"][stage] == first["prep_s"][stage]
        for name in ("representations.csv", "representations.svg"):
            assert (tmp_path / "first" / "0" / name).read_bytes() == (tmp_path / "second" / "0" / name).read_bytes()

    def test_what_is_looked_at_otherwise_is_made_anew(self, tmp_path: Path) -> None:
        run(tmp_path / "plain", *RENEWED)
        assert run(tmp_path / "again", *RENEWED, "recovery.probe_images=16")["from_cache"] == ["prune", "recover"]
        assert run(tmp_path / "probed", *RENEWED, *PROBE)["from_cache"] == ["prune"]
        assert run(tmp_path / "named", *RENEWED, *PROBE, "recovery.probe_layers=[fc1]")["from_cache"] == ["prune"]
        assert [row["layer"] for row in rows(tmp_path / "named")] == ["fc1", "fc1"]

    def test_a_job_that_goes_on_has_all_of_it(self, tmp_path: Path) -> None:
        chosen = (*RENEWED, *PROBE, "cache=off")
        whole = run(tmp_path / "whole", *chosen)
        for stage in ("recover", "sizes"):
            with ending_in(stage), pytest.raises(KeyboardInterrupt):
                run(tmp_path / stage, *chosen)
            JobFolder(tmp_path / stage / "0").representations.unlink(missing_ok=True)
            again = run(tmp_path / stage, *chosen)
            assert rows(tmp_path / stage) == rows(tmp_path / "whole")
            assert again["prep_s"].keys() == whole["prep_s"].keys()
            assert again["prep_s"]["probe"] > 0
            assert JobFolder(tmp_path / stage / "0").representations_drawn.exists()

    @pytest.mark.parametrize(("name", "expected"), [("none", ["0"]), ("bn_reestimate", ["0", "1"])])
    def test_what_does_not_train_is_looked_at_too(self, tmp_path: Path, name: str, expected: list[str]) -> None:
        run(tmp_path / "a", *PRUNED, f"recovery={name}", "recovery.probe=true")
        assert epochs(tmp_path / "a") == expected

    def test_a_recovery_of_ones_own_is_looked_at_before_and_after(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "my_recovery.py").write_text(OWN)
        monkeypatch.syspath_prepend(str(tmp_path))
        mine = ("recovery._target_=my_recovery.nothing", "+recovery.rate=${seed}", "seed=3", "recovery.probe=true")
        run(tmp_path / "a", *PRUNED, *mine)
        assert epochs(tmp_path / "a") == ["0", "1"]
        first, last = ([row["cka"] for row in rows(tmp_path / "a") if row["epoch"] == epoch] for epoch in "01")
        assert first == last

    def test_a_pruner_that_tells_of_epochs_is_looked_at_before_the_recovery(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "my_recovery.py").write_text(OWN)
        monkeypatch.syspath_prepend(str(tmp_path))
        mine = (
            "pruner._target_=my_recovery.slowly",
            "~pruner.amount",
            "+pruner.epochs=2",
            "recovery=bn_reestimate",
            "device=cpu",
        )
        run(tmp_path / "plain", *mine)
        for name, cached in (("a", []), ("b", ["prune", "recover", "probe"])):
            result = run(tmp_path / name, *mine, *PROBE, "recovery.probe_layers=[stem.0.0]")
            found = rows(tmp_path / name)
            assert [row["epoch"] for row in found] == ["0", "1", "2", "3"]
            assert [float(row["snr_db"]) for row in found] == pytest.approx(
                [200, -20 * log10(1 - 0.45), -20 * log10(1 - 0.81), -20 * log10(1 - 0.81)], abs=1e-3
            )
            assert result["from_cache"][: len(cached)] == cached
            assert set(JobFolder(tmp_path / name / "0").pruning.read_text().split('"')) >= {"epochs"}
            assert "rows" not in JobFolder(tmp_path / name / "0").pruning.read_text()
        first, second = (result_of(tmp_path / name)["prep_s"]["probe"] for name in "ab")
        assert first == second > 0

    def test_a_layer_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        sentence = refused(lambda: run(tmp_path / "a", *RENEWED, *PROBE, "recovery.probe_layers=[fc9]"))
        assert sentence.startswith("recovery.probe_layers names fc9,")


def test_the_original_network_counts() -> None:
    """Two networks may be pruned to the same weights."""
    first, second = digits_cnn(), digits_cnn()
    second.module.fc1.weight.data[0, 0] = 0  # type: ignore[union-attr,operator]
    images = first.sample(4)
    told = [with_original(Origin({"random": 1}, list), Probe(each, images, ["fc1"])).about for each in (first, second)]
    assert told[0]["original"] != told[1]["original"]
    assert [one["probe"] for one in told] == [{"layers": {"fc1": 256}, "images": 4}] * 2
    assert with_original(Origin({"random": 1}, list), None).about == {"random": 1}


def test_only_the_own_options_of_a_recovery_are_handed_to_it() -> None:
    whole = config("recovery=finetune", "recovery.probe=true", "+recovery.x=${seed}", "seed=7")
    assert OmegaConf.to_container(without_probe(whole.recovery), resolve=True) == {
        "_target_": "pq_sweep.compress.recovery.finetune", "epochs": 2, "lr": 0.001, "batch_size": 64, "x": 7,
        "optimizer": "adamw", "weight_decay": 0.01, "augment": [],
    }  # fmt: skip
    assert whole.recovery.probe is True
    assert without_probe(OmegaConf.create({"epochs": 2})) == {"epochs": 2}  # of an earlier version


def test_options_count_for_the_fingerprint() -> None:
    probed = "recovery.probe=true"
    jobs = ([], [probed], [probed, "recovery.probe_images=16"], [probed, "recovery.probe_layers=[fc1]"])
    assert len({fingerprint(config(*each)) for each in jobs}) == 4


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["recovery.probe=maybe"], "recovery.probe=maybe is neither true nor false; give one of them."),
        (["recovery.probe_images=1"], "recovery.probe_images=1 is out of range; give a whole number from 2 to 1000."),
        (["recovery.probe_images=null"], "recovery.probe_images=null is not valid; give a whole number from 2 on."),
        (["recovery.probe_layers=[0]"], "recovery.probe_layers=[0] has 0, no text; quote layer names: "),
        (["recovery.probe_layers={a:1}"], "recovery.probe_layers={'a': 1} is not valid, as it is no list; give "),
        (["~recovery"], "recovery is not chosen; give recovery=..., none where it is to do nothing."),
        (["order=quantize_first", "runtime=onnxruntime", "recovery.probe=true"], "recovery.probe=true looks at the"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(overrides: list[str], told: str) -> None:
    (sentence,) = problems(config(*overrides))
    assert sentence.startswith(told)


@pytest.mark.parametrize("value", ["maybe", "[true]"])
def test_options_beside_a_recovery_of_ones_own_are_checked(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_recovery.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    (sentence,) = problems(config("recovery._target_=my_recovery.nothing", f"recovery.probe={value}"))
    assert sentence.endswith("is neither true nor false; give one of them.")


def test_every_column_is_documented() -> None:
    page = (ROOT / "docs" / "results.md").read_text()
    (table,) = re.findall(r"^\| column of `representations.csv` \|.*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines())) == list(probing.COLUMNS)


def test_the_epochs_of_steps_follow_each_other(tmp_path: Path) -> None:
    def seen(*figures: tuple[int, float]) -> dict[str, Any]:
        rows = [{"epoch": epoch, "layer": "a", "snr_db": snr, "cka": None} for epoch, snr in figures]
        return {"representations": {"rows": rows, "seconds": 1.5, "before_s": 0.25}, "other": 1}

    stage = Stages(tmp_path, "")
    for recovered, told in ((seen((0, 5.0), (1, 6.0)), ["0", "2", "3"]), (seen((0, 4.0), (1, 6.0)), list("0223"))):
        probing.tell(stage, {"prune": seen((0, 200.0), (2, 5.0)), "recover": recovered})
        lines = stage.files.representations.read_text().splitlines()
        assert [line.partition(",")[0] for line in lines[1:]] == told
        assert stage.seconds["probe"] == 3.25
    assert probing.untold(seen()) == {"other": 1}


def test_what_belongs_to_another_stage_is_left_out(tmp_path: Path) -> None:
    stage = Stages(tmp_path, "")
    with stage("recover"):
        with stage("inner"):
            stage.leave_out(3.0)
        stage.leave_out(4.0)
    with stage("next"):
        pass
    stage.set_seconds("probe", 7.0, cached=True)
    assert stage.seconds["recover"] == pytest.approx(-7, abs=1)
    assert stage.seconds["inner"] == pytest.approx(-3, abs=1)
    assert stage.seconds["next"] == pytest.approx(0, abs=1)
    assert stage.preparation.prep_s == {"recover": stage.seconds["recover"], "probe": 7.0}
    assert stage.from_cache == ["probe"]
    assert PREP.index("probe") == PREP.index("recover") + 1


def test_what_another_job_left_is_cleared_away(tmp_path: Path) -> None:
    files = JobFolder(tmp_path)
    for path in (files.representations, files.representations_drawn):
        path.touch()
    files.clear()
    assert list(tmp_path.iterdir()) == []
