"""The house: a room imports what stands below it, never beside or above, and nothing stands in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "pq_sweep"
FLOORS = (
    ("types",),
    ("core",),
    ("inputs", "measure", "runtimes", "results"),
    ("compress", "tracking"),
    ("job",),
    ("sweep", "doctor"),
    ("study",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
DOOR = len(FLOORS)
BESIDE = {"__init__"}  # the package itself: its version and its former names


def modules(root: Path = ROOT) -> dict[str, Path]:
    """Return every module that stands in the house or opens it, by name."""
    paths = [*root.glob("pq_sweep/**/*.py"), *root.glob("hydra_plugins/**/*.py"), *root.glob("launch.py")]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports(source: str, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Yield each module of the house that is imported and in which line, inside functions and for types alone too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if (name := full if full in known else str(node.module)) in known:
                    yield name, node.lineno


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "pq_sweep" and len(parts) > 1 else "__init__" if parts == ["pq_sweep"] else parts[0]


def floor_of(module: str) -> int:
    """Return the floor of a module; doors, which nobody imports, are on top: command lines, launch.py and plugins."""
    room = room_of(module)
    return -1 if room in BESIDE else DOOR if module.endswith(".__main__") else FLOOR.get(room, DOOR)


def misplaced(root: Path = ROOT) -> list[str]:
    """Say of each import that goes up or aside where it stands."""
    known = modules(root)
    return [
        f"{path.relative_to(root)}:{line} imports {name}, which does not stand below it"
        for module, path in known.items()
        for name, line in imports(path.read_text(), known)
        if room_of(module) not in BESIDE
        and floor_of(name) >= floor_of(module)
        and (room_of(name) != room_of(module) or floor_of(name) > floor_of(module))
    ]


def test_imports_run_downward_only() -> None:
    assert misplaced() == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {module: {name for name, _ in imports(path.read_text(), known)} for module, path in known.items()}
    try:
        list(TopologicalSorter({module: names - {module} for module, names in graph.items()}).static_order())
    except CycleError as circle:
        pytest.fail(f"a circle: {' -> '.join(circle.args[1])}")


def test_every_room_has_a_floor_and_there_are_few_entries() -> None:
    """What is no room is a door: a command line of a few lines, which nothing imports."""
    there = {path.stem for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    doors = there - FLOOR.keys() - BESIDE
    assert FLOOR.keys() <= there
    assert len(there - doors) <= 13
    known = modules()
    imported = {name for path in known.values() for name, _ in imports(path.read_text(), known)}
    assert not {f"pq_sweep.{door}" for door in doors} & imported
    assert all("def main()" in (PACKAGE / f"{door}.py").read_text() for door in doors)


@pytest.mark.parametrize(
    ("room", "line", "told"),
    [
        ("core/files.py", "    from pq_sweep.job.run import run\n", True),
        ("measure/latency.py", "if TYPE_CHECKING:\n    from pq_sweep.results import rows\n", True),
        ("job/run.py", "import pq_sweep.sweep.grid\n", True),
        ("results/rows.py", "from pq_sweep import report\n", True),
        ("job/run.py", "from pq_sweep.core import files\n", False),
        ("results/rows.py", "from pq_sweep.results import sweeps\n", False),
    ],
)
def test_an_import_that_goes_up_or_aside_is_found(tmp_path: Path, room: str, line: str, told: bool) -> None:
    for path in modules().values():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.touch()
    (tmp_path / "pq_sweep" / room).write_text(f"def look():\n{line}" if line.startswith(" ") else line)
    assert [sentence.partition(":")[0] for sentence in misplaced(tmp_path)] == [f"pq_sweep/{room}"] * told
