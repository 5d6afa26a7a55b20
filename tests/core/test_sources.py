"""What code counts as a component's: its module and all that it imports, found without running any of it."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest

from pq_sweep.core import fingerprint, sources
from pq_sweep.core.fingerprint import code, files_state, look_again, unfollowed
from pq_sweep.core.sources import find_module, module_of

MINE = {"model": {"_target_": "mine.make"}}


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that is on the Python path, with a module that raises if it is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    write("mine.py", "raise SystemExit('this module was run')")
    look_again()
    return tmp_path


def write(name: str, text: str) -> None:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def counts(name: str, options: dict[str, object] = MINE, text: str = "CHANGED = True") -> bool:
    """Say whether a change of a file makes another hash of the code, and undoing it the same one again."""
    look_again()
    path = Path(name)
    before, hashed = path.read_text(), code(options)
    path.write_text(before + text)
    look_again()
    changed = code(options)
    path.write_text(before)
    look_again()
    assert code(options) == hashed
    return changed != hashed


IMPORTS = {
    "a helper": ("import helper", ["helper.py"]),
    "a helper under another name": ("import helper as h", ["helper.py"]),
    "names of a helper": ("from helper import net", ["helper.py"]),
    "within a function": ("def make():\n    from helper import net\n    return net()", ["helper.py"]),
    "for types alone": ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import helper", ["helper.py"]),
    "if it is there": ("try:\n    import helper\nexcept ImportError:\n    pass", ["helper.py"]),
    "two imports away": ("import first", ["first.py", "helper.py"]),
    "a package": ("import nets", ["nets/__init__.py"]),
    "a submodule": ("import nets.small", ["nets/__init__.py", "nets/small.py"]),
    "a submodule as a name": ("from nets import small", ["nets/__init__.py", "nets/small.py"]),
    "all submodules that a package names": ("from named import *", ["named/__init__.py", "named/one.py"]),
    "relative imports in a package": ("import nets.small", ["nets/blocks.py"]),
    "relative imports from the package around": ("import nets.deep.net", ["nets/blocks.py"]),
    "a package without __init__.py": ("import loose.part", ["loose/part.py"]),
    "a package without __init__.py in another": ("from loose.inner import part", ["loose/inner/part.py"]),
    "import_module": ("import importlib\nm = importlib.import_module('helper')", ["helper.py"]),
    "import_module by name": ("from importlib import import_module as load\nm = load('helper')", ["helper.py"]),
    "import_module of a name": ("import importlib\nNAME = 'helper'\nm = importlib.import_module(NAME)", ["helper.py"]),
    "all of a package by computed names": (
        "import importlib\ndef make(name): return importlib.import_module(f'nets.{name}')",
        ["nets/__init__.py", "nets/blocks.py", "nets/deep/net.py"],
    ),
    "all of a package by computed names beside it": ("import registry", ["registry/__init__.py", "registry/one.py"]),
    "__import__": ("m = __import__('helper')", ["helper.py"]),
    "Hydra's get_class": ("from hydra.utils import get_class\nC = get_class('helper.Net')", ["helper.py"]),
    "run_path": ("import runpy\nrunpy.run_path('scripts/net.py')", ["scripts/net.py", "helper.py"]),
    "a module from its file": (
        "from importlib.util import spec_from_file_location\nfrom pathlib import Path\n"
        "s = spec_from_file_location('x', Path(__file__).parent / 'scripts' / 'net.py')",
        ["scripts/net.py"],
    ),
    "sys.path": ("import sys\nsys.path.insert(0, 'elsewhere')\nimport far", ["elsewhere/far.py"]),
    "sys.path from the module's own place": (
        "import os, sys\nHERE = os.path.dirname(os.path.abspath(__file__))\n"
        "sys.path.append(os.path.join(HERE, 'elsewhere'))\nfrom far import x",
        ["elsewhere/far.py"],
    ),
    "sys.path +=": ("import sys\nsys.path += ['elsewhere']\nimport far", ["elsewhere/far.py"]),
    "torch.hub of a folder": (
        "import torch\nnet = torch.hub.load('hub', 'net', source='local')",
        ["hub/hubconf.py", "hub/inner.py"],
    ),
}


@pytest.fixture
def helpers(mine: Path) -> None:
    """Modules of all kinds to import."""
    write("helper.py", "def net(): ...")
    write("first.py", "import helper")
    write("nets/__init__.py", "")
    write("nets/blocks.py", "")
    write("nets/small.py", "from .blocks import *\nfrom . import blocks")
    write("nets/deep/__init__.py", "")
    write("nets/deep/net.py", "from ..blocks import block")
    write("named/__init__.py", "__all__ = ['one']")
    write("named/one.py", "")
    write("loose/part.py", "")
    write(
        "registry/__init__.py", "import importlib\nfor n in 'one':\n    importlib.import_module('.' + n, __package__)"
    )
    write("registry/one.py", "")
    write("loose/inner/part.py", "")
    write("scripts/net.py", "import helper")
    write("elsewhere/far.py", "x = 1")
    write("hub/hubconf.py", "import inner")
    write("hub/inner.py", "")


@pytest.mark.usefixtures("helpers")
@pytest.mark.parametrize("how", IMPORTS)
def test_what_a_component_imports_counts(how: str) -> None:
    text, files = IMPORTS[how]
    write("mine.py", text)
    assert [name for name in files if not counts(name)] == []
    assert unfollowed(MINE) == []


@pytest.mark.usefixtures("helpers")
def test_what_a_component_does_not_import_does_not_count() -> None:
    write("mine.py", "import helper")
    assert not counts("first.py")
    assert not counts("nets/blocks.py")


@pytest.mark.usefixtures("helpers")
@pytest.mark.parametrize(
    "options",
    [
        {"dataset": {"_target_": "helper.data"}},
        {"pruner": {"_target_": "first.prune"}},
        {"model": {"_target_": "helper.Net.make"}},
        {"model": {"_target_": "pq_sweep.inputs.models.wrap", "network": {"_target_": "helper.net"}}},
        {"model": {"_target_": "hydra.utils.get_method", "path": "helper.net"}},
        {"model": {"_target_": "pq_sweep.inputs.models.wrap", "parts": [{"_target_": "helper.net"}]}},
    ],
    ids=["dataset", "pruner", "method of a class", "component in a component", "named by an option", "in a list"],
)
def test_modules_of_all_components_count(options: dict[str, object]) -> None:
    assert counts("helper.py", options)


def test_a_module_in_an_archive_counts(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = mine / "nets.zip"
    monkeypatch.syspath_prepend(str(archive))
    hashes = []
    for text in ("", "# changed"):
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("zipped.py", f"import helper\n{text}")
        write("helper.py", "")
        sys.path_importer_cache.pop(str(archive), None)
        look_again()
        hashes.append(code({"model": {"_target_": "zipped.make"}}))
    assert hashes[0] != hashes[1]
    assert counts("helper.py", {"model": {"_target_": "zipped.make"}})


def test_installed_packages_count_by_version(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own modules are not walked through, so a launch stays fast."""
    write("mine.py", "import torchvision.models, PIL.Image, os.path, pq_sweep.types, nowhere")
    found = sources.follow(["mine"])
    assert list(found.files) == ["mine"]
    assert found.versions.keys() == {"torchvision", "PIL"}
    before = code(MINE)
    monkeypatch.setattr(sources, "version", lambda name: "99")
    look_again()
    assert code(MINE) != before


def test_an_installed_module_that_is_a_component_counts(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("site-packages/theirs.py", "import helper")
    write("helper.py", "")
    monkeypatch.syspath_prepend(str(mine / "site-packages"))
    assert counts("site-packages/theirs.py", {"model": {"_target_": "theirs.make"}})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("import importlib\n\n\ndef make(name):\n    importlib.import_module(name)", "line 5, imports a module by"),
        ("exec(open('net.txt').read())", "line 1, runs code that only exists as it runs (exec)"),
        ("import runpy\n\ndef make(path): runpy.run_path(path)", "line 3, runs a file by a computed path"),
        ("import sys, os\nsys.path.append(os.environ['NETS'])", "line 2, adds a computed folder to sys.path"),
        ("import torch\nnet = torch.hub.load('someone/nets', 'net')", "line 2, runs code of another place (torch.hub)"),
        ("def make(:", "line 1, cannot be parsed"),
        ("import torch\nnet = torch.load('net.pt', weights_only=False)", "line 2, unpickles objects, whose code may"),
    ],
)
def test_what_cannot_be_followed_is_said(mine: Path, text: str, told: str) -> None:
    write("mine.py", text)
    (sentence,) = unfollowed(MINE)
    assert sentence.startswith(f"{mine / 'mine.py'}, {told}")
    assert sentence.endswith("not noticed, so give resume=false after one.")


def test_compiled_modules_count_and_are_told(mine: Path) -> None:
    (mine / "compiled.so").write_bytes(b"1")
    write("mine.py", "import compiled")
    before = code(MINE)
    (mine / "compiled.so").write_bytes(b"2")
    look_again()
    assert code(MINE) != before
    assert unfollowed(MINE)[0].startswith(f"{mine / 'compiled.so'}, line 1, is compiled")


@pytest.mark.parametrize("text", [f"x = {'(' * 500}{')' * 500}", "x = " + "-" * 5000 + "1", "\\0", "x = 'é' + '\\d'"])
def test_odd_sources_stop_nothing(mine: Path, text: str, recwarn: pytest.WarningsRecorder) -> None:
    (mine / "mine.py").write_bytes(text.encode("latin-1"))
    assert all("mine.py, line 1, cannot be parsed" in sentence for sentence in unfollowed(MINE))
    assert list(recwarn) == []


def test_a_file_that_cannot_be_read_is_told(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This user may be root, whom no permission stops."""

    def refuse(path: Path) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert "mine.py, line 1, cannot be read" in unfollowed(MINE)[0]


def test_a_name_given_several_values_is_not_taken_for_one_of_them(mine: Path) -> None:
    write("helper.py", "")
    write("mine.py", "import importlib\nNAME = 'helper'\ndef make(NAME):\n    importlib.import_module(NAME)")
    assert len(unfollowed(MINE)) == 1


def test_modules_that_import_each_other_end(mine: Path) -> None:
    write("mine.py", "import other")
    write("other.py", "import mine")
    assert counts("other.py")


def test_code_that_runs_already_is_that_which_was_imported(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change after the import shows in the next process: this one goes on with what it has."""
    write("mine.py", "")
    before = code(MINE)
    monkeypatch.setitem(sys.modules, "mine", pytest)  # as an import would
    write("mine.py", "CHANGED = True")
    look_again()
    assert code(MINE) == before
    monkeypatch.delitem(sys.modules, "mine")
    look_again()
    assert code(MINE) != before


FILES = {
    "text": "import torch\nnet = torch.load('net.pt')",
    "joined": "import os\nnet = os.path.join(os.path.dirname(__file__), 'net.pt')",
    "divided": "from pathlib import Path\nHERE = Path(__file__).resolve().parent\nnet = HERE / 'net.pt'",
    "formatted": "import os\nHERE = os.path.dirname(__file__)\nnet = f'{HERE}/net.pt'",
    "added": "import os\nnet = os.getcwd() + '/' + 'net.pt'",
    "home": "net = '~/net.pt'",
}


@pytest.mark.parametrize("how", FILES)
def test_files_that_code_spells_out_count(mine: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setenv("HOME", str(mine))
    write("mine.py", FILES[how])
    write("net.pt", "one")
    before = files_state(MINE)
    write("net.pt", "another")
    assert before == files_state(MINE)  # until it is looked at again: a job may write files itself
    look_again()
    assert before != files_state(MINE)
    assert before


def test_folders_around_code_are_not_data(mine: Path) -> None:
    write("mine.py", "from pathlib import Path\nHERE = Path(__file__).parent\nword = 'part'\nall = '.', '/', ''")
    write("part/file", "")
    assert files_state(MINE) == []


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("json.decoder.JSONDecoder.decode", "json.decoder"),
        ("pq_sweep.models.digits_cnn", "pq_sweep.models"),
        ("os.path.join", "os"),
        ("nowhere.make", None),
        ("", None),
    ],
)
def test_the_module_of_a_name(name: str, module: str | None) -> None:
    assert module_of(name) == module


def test_finding_a_module_runs_nothing(mine: Path) -> None:
    write("package/__init__.py", "raise SystemExit('this package was run')")
    write("package/part.py", "")
    found = find_module("package.part")
    assert found
    assert found.file == mine / "package" / "part.py"
    assert "package" not in sys.modules


def test_the_hash_is_that_of_the_package_alone_without_own_components() -> None:
    ours = {"model": {"_target_": "pq_sweep.inputs.models.digits_cnn"}}
    assert code(ours) == code({})
    assert fingerprint.unfollowed(ours) == []


def test_submodules_that_a_package_lists_by_a_computation_count() -> None:
    write("zoo/__init__.py", "from glob import glob\n__all__ = [name[:-3] for name in glob('*.py')]\nfrom . import *")
    write("zoo/flip.py", "FLIP = False")
    write("mine.py", "import zoo")
    assert counts("zoo/flip.py")
