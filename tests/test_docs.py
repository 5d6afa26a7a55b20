"""Pages lead where they say, are listed, fit on a screen, and name what there is."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from test_architecture import FLOOR, imports, modules, room_of

README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
MOST_WORDS = 1500
WIDTH = 120

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(path: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def links(path: Path) -> list[str]:
    """Return where a page leads within this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """Return what `#...` may follow the address of a page: its headings as GitHub writes them there."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leads_nowhere(path: Path) -> list[str]:
    """Return the links of a page whose file or heading is not there."""
    missing = []
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    return missing


@page
def test_links_lead_somewhere(page: Path) -> None:
    assert leads_nowhere(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(
        "# On a page\n[a](page.md) [b](#on-a-page) [c](#on) [d](other.md) [e](page.md#of) [f](https://g.h)\n"
    )
    assert leads_nowhere(path) == ["#on", "other.md", "page.md#of"]


def test_every_page_is_in_the_index_with_a_line() -> None:
    lines = dict(re.findall(r"^- \[[\w.-]+\]\(([^)]+)\): (.+)$", INDEX.read_text(), re.MULTILINE))
    assert {path.name for path in DOCS} - {INDEX.name} <= lines.keys()
    assert {
        line.split("](")[1].split(")")[0] for line in INDEX.read_text().splitlines() if "](" in line
    } == lines.keys()


def test_the_readme_leads_to_every_page_or_to_the_index() -> None:
    found = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert {INDEX, ROOT / "docs" / "performance.md", ROOT / "docs" / "results.md", ROOT / "CHANGELOG.md"} <= found


def test_the_readme_is_short_and_starts_with_the_two_commands() -> None:
    text = README.read_text()
    assert len(text.split()) <= MOST_WORDS
    first = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make sweep", "make test"]
    assert text.index("make sweep") < text.index("\n## ")


@page
def test_lines_are_not_wide(page: Path) -> None:
    """Tables are as wide as they have to be, and so is what a command printed."""
    wide = [line for line in prose(page).splitlines() if len(line) > WIDTH and not line.lstrip().startswith("|")]
    assert wide == []


# The changelog names what was there before.
@pytest.mark.parametrize("page", [path for path in PAGES if path.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_what_a_page_names_of_the_code_is_there(page: Path) -> None:
    text = page.read_text()
    files = set(
        re.findall(r"\b(?:pq_sweep|tests|benchmarks|conf|examples|docs)/[\w./-]+\.(?:py|yaml|md|safetensors)", text)
    )
    assert [name for name in sorted(files) if not (ROOT / name).exists() and not (page.parent / name).exists()] == []
    named = set(re.findall(r"\bpq_sweep(?:\.\w+)+\b(?!\.\*)", text))  # not tags of MLflow: pq_sweep.gpu.*
    assert [name for name in sorted(named) if not is_there(name)] == []


def is_there(name: str) -> bool:
    """Say whether a dotted name is that of a module, or of something that a module defines."""
    module, value = name, ""
    while module != "pq_sweep" and not is_module(module):
        module, _, value = module.rpartition(".")
    if not value or module == "pq_sweep":
        return not value
    spec = find_spec(module)
    assert spec
    assert spec.origin
    return bool(re.search(rf"^(?:def |class )?{value}\b", Path(spec.origin).read_text(), re.MULTILINE))


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_a_name_that_nothing_has_is_found() -> None:
    assert is_there("pq_sweep.compress.removal.replay")
    assert is_there("pq_sweep.results")
    assert not is_there("pq_sweep.compress.removal.remover")
    assert not is_there("pq_sweep.nothing")


def test_the_floors_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| (\d) \| `(\w+)` \|[^|]+\|([^|]*)\|$", (ROOT / "docs" / "architecture.md").read_text(), re.M)
    known = modules()
    actual: dict[str, set[str]] = {room: set() for room in FLOOR}
    for module, path in known.items():
        room = room_of(module)
        if room in FLOOR and not module.endswith(".__main__"):
            actual[room] |= {room_of(name) for name, _ in imports(path.read_text(), known)} & FLOOR.keys() - {room}
    assert {room: int(floor) for floor, room, _ in rows} == {room: floor + 1 for room, floor in FLOOR.items()}
    assert {room: set(re.findall(r"\w+", cell)) for _, room, cell in rows} == actual
