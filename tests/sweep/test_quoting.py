"""Values that Hydra's grammar refuses: taken where they can mean only one thing, and explained where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, launch_in
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException

from pq_sweep.inputs.models import digits_cnn
from pq_sweep.job.check import problems
from pq_sweep.sweep.explain import explain
from pq_sweep.sweep.quoting import is_read, quoted

PATHS = (
    "/x/epoch=3-step=10.ckpt",
    "/x/epoch=3-val_loss=0.12.ckpt",
    "~/net.pth",
    "/x/my net=1.pth",
    "/x/it's.pth",
    '/x/"best".pth',
    "/x/net(1).pth",
    "/x/net (1).pth",
    "net(1).pth",
    "/x/[old]/net.pth",
    "/x/{a}/net.pth",
    "/x/größe.pth",
    "/x/a#b&c;d!.pth",
    "C:\\x=y\\",
    "/x/a=b\\",
    "s3://x?a=b&c=d",
)


def read(word: str) -> Any:
    """Return what Hydra makes of a value, or all values of a sweep."""
    override = OverridesParser.create().parse_override(quoted(word))
    if not override.is_sweep_override():
        return override.value()
    return [getattr(value, "text", value) for value in override.value().list]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["model.weights", "hydra.sweep.dir", "++model.path"])
def test_a_path_is_taken_as_it_is(key: str, path: str) -> None:
    assert read(f"{key}={path}") == path


@pytest.mark.parametrize("path", PATHS)
def test_paths_in_lists_and_sweeps_are_taken_as_they_are(path: str) -> None:
    assert read(f"a={path},1,/y=z") == [path, 1, "/y=z"]
    assert read(f"a=[{path},1,/y=z]") == [path, 1, "/y=z"]


def test_a_file_whose_name_has_a_comma_is_one_value(tmp_path: Path) -> None:
    (tmp_path / "a,b=1.pth").touch()
    assert read(f"a={tmp_path}/a,b=1.pth") == f"{tmp_path}/a,b=1.pth"
    assert read(f"a={tmp_path}/c,d=1.pth") == [f"{tmp_path}/c", "d=1.pth"]


@pytest.mark.parametrize(
    "word",
    [
        "a=1",
        "a=[1,2]",
        "a={b:1}",
        "a='x=y'",
        'a="x=y",2',
        "a=range(1,4)",
        "a=choice(1,2)",
        "a=${b.c}",
        "a=/x/${b}",
        "a=null",
        "a=",
        "~a",
        "~a=1",
        "+a.b@c=d",
        "--config-dir=x=y",
        "-m",
        r"a=x\=y",
        "a=x y",
        "a=1,2,3",
    ],
)
def test_what_hydra_reads_stays_as_it_is(word: str) -> None:
    assert quoted(word) == word


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("a=[0.1", "close [ by ]"),
        ("a={b:1", "close { by }"),
        ('a="/x/y', 'close " by "'),
        ("a='/x/y", "close ' by '"),
        ("a=/x/${y", "close ${ by }"),
        ("a=range(1", "close ( by )"),
        ("a={b=c}", "quote a value that has =, as in 'a=\"{b=c}\"'"),
        ("a=[[b=1],[c]]", "quote a value that has =, as in 'a=\"[[b=1],[c]]\"'"),
        ("a=b,c=1,'d,e'", """quote a value that has =, as in 'a="b,c=1,'"'"'d,e'"'"'"'"""),
        ("a b=c", "quote values with spaces or commas"),
        ("pruner l1", "quote values with spaces or commas"),
    ],
)
def test_what_may_mean_several_things_is_explained(word: str, advice: str) -> None:
    assert quoted(word) == word
    assert not is_read(word)
    assert (
        explain(OverrideParseException(override=word, message=""))
        == f"the override {word!r} cannot be read; write key=value, and {advice}."
    )


WRONG = {
    "words for a list": ("quantizer.exclude=first last", "no list; give quantizer.exclude=[first,last]."),
    "nothing for a list": ("quantizer.exclude=", "no list; give quantizer.exclude=[]."),
    "an entry missing": ("quantizer.exclude='first,'", "no list; give quantizer.exclude=[first]."),
    "a tuple for a list": ("measure.batch_sizes='(1,8)'", "no list; give measure.batch_sizes=[1,8]."),
    "a word for a list": ("measure.batch_sizes=all", "no list; give measure.batch_sizes=[1,8]."),
    "a number for a name": ("quantizer.exclude=[1]", "quote layer names: 'quantizer.exclude=[\"1\"]'."),
    "a word for a switch": ("measure.paired=no", "measure.paired=no is neither true nor false; give one of them."),
    "a number for a switch": ("pruner.every_weight=1", "pruner.every_weight=1 is neither true nor false"),
    "null for a switch": ("runtime.tf32=null", "runtime.tf32=None is neither true nor false"),
    "a word for a switch in a choice of runtimes": ("runtime.torch.tf32=off", "runtime.torch.tf32=off is neither"),
    "a word for resume": ("resume=no", "resume=no is neither true nor false"),
    "a list for a number": (
        "pruner.amount=[0.1,0.2]",
        "takes one value; give pruner.amount=0.1,0.2, with a job for each.",
    ),
    "a list for images": (
        "quantizer.images=[8,16]",
        "takes one value; give quantizer.images=8,16, with a job for each.",
    ),
    "a text for a number": ("quantizer.images=many", "quantizer.images=many is out of range; give a whole number"),
    "an empty text for a number": ("quantizer.images=", "quantizer.images= is out of range; give a whole number"),
    "a number for a file": ("model.weights=5", "model.weights=5 is no text; give one path, and quote a number"),
    "a list for a file": ("model.weights=[a.pth,b.pth]", "model.weights=['a.pth', 'b.pth'] is no text; give one path"),
    "nothing for a file": ("model.weights=", "model.weights= is no file"),
    "an address for a file": ("model.weights=https://x.org/w.pth", "is an address and no path; download the file and"),
    "an address of a file": (
        "model.weights=file:///x/w.pth",
        "is an address and no path; give model.weights=/x/w.pth.",
    ),
    "a word for repeat": ("repeat=x", "repeat=x is out of range; give whole numbers from 0 on, such as repeat=1,2,3."),
    "a number for a folder": ("dataset.root=5", "dataset.root=5 is no text; give one path"),
    "nothing for a folder": ("dataset.root=", "dataset.root= is not a folder"),
    "a number for a text": ("tracking.experiment=5", "is no text; quote a number: 'tracking.experiment=\"1\"'."),
    "a number for a group of values": ("runtime.options=5", "give +runtime.options.NAME=VALUE."),
    "a word for cache": ("cache=never", "cache=never is not known; valid are: on, off."),
    "a list for the seed": (
        "seed=[1,2]",
        "seed=[1, 2] is a list, and a job takes one value; give seed=1,2, with a job",
    ),
    "a list for the device": (
        "device=[cpu]",
        "is a list, and a job takes one value; give device=cpu, with a job for each.",
    ),
}
GROUPS = {
    "dataset.root": ["dataset=image_folder"],
    "runtime.torch.tf32": ["runtime=auto"],
    "model.weights": ["model=resnet18"],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_another_kind_of_value_is_refused_in_one_sentence(wrong: str) -> None:
    override, sentence = WRONG[wrong]
    base = ["pruner=l1", "quantizer=int8", "runtime=onnxruntime", *GROUPS.get(override.partition("=")[0], [])]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        (found,) = problems(compose("config", overrides=[*base, override]))
    assert found.startswith(override.partition("=")[0])
    assert sentence in found


def explained(folder: Path, *words: str, **files: str) -> str:
    """Return what is said of a command with own YAML files, `group__name`, which Hydra refuses."""
    for name, text in files.items():
        path = folder / "mine" / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    search = f"hydra.searchpath=[{folder / 'mine'}]"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"), pytest.raises(Exception) as caught:
        compose("config", overrides=[search, *words])
    return explain(caught.value)


def test_mistakes_in_files_are_explained_too(tmp_path: Path) -> None:
    text = explained(tmp_path, "model=bad", model__bad="_target_: x\n  y: [1\n")
    assert text.startswith(
        f"{tmp_path}/mine/model/bad.yaml is no YAML in line 2 (mapping values are not allowed here); c"
    )
    text = explained(tmp_path, "experiment=e", experiment__e="# @package _global_\ndefaults:\n  - pruner: l1\n")
    assert text.startswith(
        "experiment/pruner=l1 is not known; in the defaults of an experiment, write `- override /pru"
    )


@pytest.mark.slow
def test_checkpoints_and_folders_of_any_name_run(tmp_path: Path) -> None:
    """Names as Lightning and browsers give them, in a sweep whose folder is in the user's home folder."""
    names = ("epoch=3-step=10.pth", "net (1).pth", "it's.pth", "größe #2.pth")
    for name in names:
        torch.save(digits_cnn().module.state_dict(), tmp_path / name)
    weights = ",".join(f"~/{name}" for name in names)
    own = (f"model.weights={weights}", "hydra.sweep.dir=~/a=b (1)", "tracking=none", "device=cpu", "runtime=torch")
    done = launch_in(tmp_path, *own, *SHORT, home=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "a=b (1)"
    given = [json.loads((folder / str(n) / "result.json").read_text())["config"]["model"]["weights"] for n in range(4)]
    assert given == [f"~/{name}" for name in names]
    again = launch_in(tmp_path, *own, *SHORT, home=tmp_path)
    assert again.stdout.count("reused") >= len(names)


@pytest.mark.slow
def test_a_grid_in_a_file_takes_such_names_too(tmp_path: Path) -> None:
    for name in ("epoch=1.pth", "epoch=2.pth"):
        torch.save(digits_cnn().module.state_dict(), tmp_path / name)
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "two.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      model.weights: epoch=1.pth,epoch=2.pth\n"
    )
    own = ("--config-dir", "mine", "experiment=two", "hydra.run.dir=c=d", "tracking=none", "device=cpu")
    done = launch_in(tmp_path, *own, *SHORT)
    assert done.returncode == 0, done.stderr
    assert sorted(path.parent.name for path in (tmp_path / "c=d").glob("*/result.json")) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("hydra.sweep.dir=",), "hydra.sweep.dir is empty; give the folder that the sweep is to write."),
        (("measure.batch_sizes={a:1}",), "measure.batch_sizes is a list; give measure.batch_sizes=[...]."),
        (
            ("runtime=onnxruntime", "runtime.options=[1]"),
            "runtime.options is a group; give +",
        ),
        (("pruner=l1", "pruner.amount=${no.thing}"), "pruner.amount refers to what is not there (Interpolation key"),
        (("hydra.mode=RUN", "pruner=none,l1"), "pruner=none,l1 is a sweep, and hydra.mode=RUN is for a single job"),
        (("~model.key",), "~model.key deletes nothing, as model.key is null or not there; leave it out."),
        (
            ("pruner=l1", "search=constraint", "search.max_drop=-1"),
            "search.max_drop=-1 is out of range; give the points",
        ),
        (("hydra.sweep.dir=[a]",), "hydra.sweep.dir is given what it cannot hold: "),
        (("pruner=l1", "search=constraint", "search.low=abc"), "search.low=abc is no number; give one such as 0.5."),
    ],
)
def test_options_of_the_sweep_are_checked_too(tmp_path: Path, overrides: tuple[str, ...], sentence: str) -> None:
    done = launch_in(tmp_path, *overrides)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(sentence)
    assert list(tmp_path.iterdir()) == []
