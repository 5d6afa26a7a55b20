"""What a module's source says that it needs: modules, files, folders to import from, and what nobody can tell from it.

The source is parsed and never run.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Calls that import, by the last part of their name: the module's name is their first argument.
BY_NAME = ("import_module", "__import__", "run_module")
# Calls that find an object by its dotted name, as Hydra does.
BY_TARGET = ("get_class", "get_method", "get_object")
# Calls that run a file: the position of its path.
BY_FILE = {"run_path": 0, "spec_from_file_location": 1, "SourceFileLoader": 1, "load_source": 1}
# Calls that read a variable of the environment.
BY_VARIABLE = ("os.getenv", "os.environ.get", "os.environ.pop", "os.environ.setdefault")
ADDING = {"sys.path.insert": 1, "sys.path.append": 0, "sys.path.extend": 0, "site.addsitedir": 0}
NOWHERE = 99  # the position of an argument that is only given by its name
LONGEST = 1000  # characters of a text that may be a path


@dataclass
class Reading:
    """What a module needs: names that may be modules, paths that it spells out, files that it runs as code.

    `packages` are those of which it imports modules by computed names, `search` folders that it adds to `sys.path`,
    `variables` those of the environment that it reads, and `blind` a line's number and what that line does that cannot
    be followed.
    """

    names: list[str] = field(default_factory=list)
    packages: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    scripts: list[str] = field(default_factory=list)
    search: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
    blind: list[tuple[int, str]] = field(default_factory=list)


def read(source: bytes, file: Path, package: str) -> Reading:
    """Return what a module needs whose relative imports start at `package`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what stands in the source
            tree = ast.parse(source)
        reader = Reader(file, package, _assigned(tree))
        reader.visit(tree)
    except (SyntaxError, ValueError, RecursionError) as error:
        return Reading(blind=[(getattr(error, "lineno", None) or 1, "cannot be parsed")])
    return reader.found


def _assigned(tree: ast.Module) -> dict[str, ast.expr]:
    """Return what names stand for that are given a value once, such as HERE = Path(__file__).parent."""
    nodes = list(ast.walk(tree))
    given = [node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)]
    given += [node.arg for node in nodes if isinstance(node, ast.arg)]
    times = Counter(given)
    return {
        node.targets[0].id: node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and times[node.targets[0].id] == 1
    }


class Reader(ast.NodeVisitor):
    """Walks through a module and notes what it needs."""

    def __init__(self, file: Path, package: str, assigned: dict[str, ast.expr]) -> None:
        self.file, self.package, self.assigned = file, package, assigned
        self.known: dict[str, str] = {}  # what imported names stand for
        self.found = Reading()

    def visit_Import(self, node: ast.Import) -> None:
        """Note the modules of `import a, b.c`."""
        self.found.names += [alias.name for alias in node.names]
        self.known |= {alias.asname: alias.name for alias in node.names if alias.asname}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Note the module of `from a import b`, and b, which may be a module too."""
        base = self._absolute("." * node.level + (node.module or ""))
        if base is None:
            return
        self.found.names.append(base)
        for alias in node.names:
            if alias.name == "*":  # takes the submodules that the package names in __all__, perhaps computed
                self.found.packages.append(base)
            else:
                self.found.names.append(f"{base}.{alias.name}")
                self.known[alias.asname or alias.name] = f"{base}.{alias.name}"

    def visit_Call(self, node: ast.Call) -> None:
        """Note what a call imports or runs, and the path that it may stand for."""
        name = self._dotted(node.func)
        last = name.rpartition(".")[2]
        if name in ADDING:
            self._add_folders(node, _argument(node, ADDING[name]))
        elif name in BY_VARIABLE:
            self._note_variable(_argument(node, 0, "key", "varname"))
        elif last in BY_NAME or (last in BY_TARGET and name.startswith("hydra.")):
            self._import(node)
        elif last in BY_FILE:
            self._run(node, _argument(node, BY_FILE[last], "location", "path", "path_name", "pathname"))
        elif name == "torch.load" and _is_false(_argument(node, NOWHERE, "weights_only")):
            self.found.blind.append((node.lineno, "unpickles objects, whose code may lie anywhere (torch.load)"))
        elif name.endswith("hub.load") and name.startswith("torch"):
            self._load_from_hub(node)
        elif name in ("exec", "builtins.exec"):
            self.found.blind.append((node.lineno, "runs code that only exists as it runs (exec)"))
        self._note_path(node)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        """Note the variable of `os.environ["NAME"]`."""
        if self._dotted(node.value) == "os.environ":
            self._note_variable(node.slice)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        """Note the folders of `sys.path += [...]`."""
        self._set_path(node.target, node.value)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Note the folders of `sys.path[:0] = [...]`, and the names of submodules in `__all__`."""
        for target in node.targets:
            self._set_path(target, node.value)
            if isinstance(target, ast.Name) and target.id == "__all__" and self.package:
                words = (part.value for part in ast.walk(node.value) if isinstance(part, ast.Constant))
                self.found.names += [f"{self.package}.{word}" for word in words if isinstance(word, str)]
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        """Note the path of `folder / name`."""
        self._note_path(node)
        self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Note the path of f"{folder}/name"."""
        self._note_path(node)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Note a text that may be a path."""
        self._note_path(node)

    def _note_variable(self, node: ast.expr | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self.found.variables.append(node.value)

    def _set_path(self, target: ast.expr, value: ast.expr) -> None:
        whole = target.value if isinstance(target, ast.Subscript) else target
        if self._dotted(whole) == "sys.path":
            self._add_folders(value, value)

    def _add_folders(self, node: ast.expr, value: ast.expr | None) -> None:
        """Note folders that are added to sys.path, and those of them that are computed."""
        parts = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
        for part in parts:
            if isinstance(part, ast.Starred | ast.BinOp) and "sys.path" in ast.unparse(part):
                continue  # what was there before
            folder = self._text(part)
            if folder is None:
                self.found.blind.append((node.lineno, "adds a computed folder to sys.path"))
            else:
                self.found.search.append(folder)

    def _import(self, node: ast.Call) -> None:
        wanted = _argument(node, 0, "name", "mod_name", "path")
        name = self._text(wanted)
        package, dot, _ = (name or self._beginning(wanted)).rpartition(".")
        if name is not None and (whole := self._absolute(name)):
            self.found.names.append(whole)
        elif name is None and dot and (whole := self._absolute(package or ".")):
            self.found.packages.append(whole)
        else:
            self.found.blind.append((node.lineno, "imports a module by a computed name"))

    def _beginning(self, node: ast.expr | None) -> str:
        """Return the text that a computed one begins with, such as "nets." of f"nets.{name}"."""
        first = node.values[0] if isinstance(node, ast.JoinedStr) and node.values else None
        first = node.left if isinstance(node, ast.BinOp) else first
        return self._text(first) or ""

    def _run(self, node: ast.Call, path: ast.expr | None) -> None:
        script = self._text(path)
        if script is None:
            self.found.blind.append((node.lineno, "runs a file by a computed path"))
        else:
            self.found.scripts.append(script)

    def _load_from_hub(self, node: ast.Call) -> None:
        folder = self._text(_argument(node, 0, "repo_or_dir"))
        if folder is not None and Path(folder).expanduser().is_dir():
            self.found.search.append(folder)
            self.found.scripts.append(str(Path(folder, "hubconf.py")))
        else:
            self.found.blind.append((node.lineno, "runs code of another place (torch.hub)"))

    def _note_path(self, node: ast.expr) -> None:
        if path := self._text(node):
            self.found.paths.append(path)

    def _text(self, node: ast.expr | None) -> str | None:
        with suppress(Exception):  # whatever cannot be computed from the source alone
            value = Paths(self.file, self.assigned, self._dotted).of(node)
            text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
            return text if text and len(text) <= LONGEST and text.isprintable() else None
        return None

    def _absolute(self, name: str) -> str | None:
        """Return a name as seen from nowhere, or None if its relative form leads out of all packages."""
        with suppress(ImportError, ValueError):
            return importlib.util.resolve_name(name, self.package)
        return None

    def _dotted(self, node: ast.expr) -> str:
        """Return the name that an expression such as `il.import_module` has where it comes from."""
        if isinstance(node, ast.Attribute):
            return f"{self._dotted(node.value)}.{node.attr}"
        return self.known.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _argument(node: ast.Call, position: int, *names: str) -> ast.expr | None:
    named = (word.value for word in node.keywords if word.arg in names)
    return node.args[position] if len(node.args) > position else next(named, None)


@dataclass(frozen=True)
class Paths:
    """Computes the paths that sources spell out, such as `os.path.join(os.path.dirname(__file__), "net.pt")`.

    Raises:
        ValueError: If an expression is more than that.
    """

    file: Path
    assigned: dict[str, ast.expr]
    name_of: Callable[[ast.expr], str]
    within: frozenset[str] = frozenset()

    def of(self, node: ast.expr | None) -> Any:
        """Return a text, number or path."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self._of_name(node.id)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return Path(self.of(node.left)) / self.of(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return str(self.of(node.left)) + str(self.of(node.right))
        if isinstance(node, ast.JoinedStr):
            return "".join(str(self.of(getattr(part, "value", None) if isinstance(part, ast.FormattedValue) else part))
                           for part in node.values)  # fmt: skip
        if isinstance(node, ast.Attribute) and node.attr == "parent":
            return Path(self.of(node.value)).parent
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Attribute) and node.value.attr == "parents":
            return Path(self.of(node.value.value)).parents[self.of(node.slice)]
        if isinstance(node, ast.Call):
            return self._of_call(node)
        raise ValueError

    def _of_name(self, name: str) -> Any:
        if name == "__file__":
            return str(self.file)
        if name in self.within or name not in self.assigned:
            raise ValueError(name)
        return Paths(self.file, self.assigned, self.name_of, self.within | {name}).of(self.assigned[name])

    def _of_call(self, node: ast.Call) -> Any:
        called = self.name_of(node.func).removeprefix("pathlib.")
        if called in FUNCTIONS:
            return FUNCTIONS[called](*(self.of(argument) for argument in node.args))
        if isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            whole = Path(self.of(node.func.value))
            return getattr(whole, node.func.attr)(*(self.of(argument) for argument in node.args))
        raise ValueError(called)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "str": str,
    "Path": Path,
    "os.fspath": str,
    "os.getcwd": os.getcwd,
    "Path.cwd": Path.cwd,
    "Path.home": Path.home,
    **{
        f"os.path.{name}": getattr(os.path, name)
        for name in ("join", "dirname", "abspath", "realpath", "expanduser", "normpath")
    },
}
METHODS = ("resolve", "absolute", "expanduser", "joinpath", "as_posix", "with_name", "with_suffix")


def shown(file: Path, blind: list[tuple[int, str]]) -> Iterator[str]:
    """Say in a sentence each what of a file cannot be followed."""
    for line, what in blind:
        yield (f"{file}, line {line}, {what}: a change behind that is not noticed, so give resume=false after one.")
