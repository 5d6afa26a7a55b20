"""What the study leaves and shows: `layers.csv`, `verdict.txt`, a page with the figure, and the figure as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vl_convert
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pq_sweep.core.environment import command_line, versions
from pq_sweep.core.files import write_table, write_text
from pq_sweep.results.report.files import on_paper
from pq_sweep.results.report.page import rendered
from pq_sweep.study.layers.charts import boxes, effects
from pq_sweep.study.layers.gather import Network
from pq_sweep.study.layers.slices import FULL_BITS, Found
from pq_sweep.study.layers.verdict import advice, better, effect, summary

WIDTH = 118  # of what is not shown in a terminal
HEADINGS = ("layer", "bits", "nearest", "heuristic", "bound", "magnitude", "OBS", "exact", "proven", "better")


def write(networks: list[Network], failed: dict[str, str], folder: Path) -> Path:
    """Write all files into a folder and return it."""
    write_table(folder / "layers.csv", [_row(network.name, found) for network in networks for found in network.found])
    write_text(folder / "verdict.txt", "\n".join(_sentences(networks)) + "\n")
    drawn = [each for each in (boxes(networks), effects(networks)) if each]
    if len(drawn) > 1:
        write_table(folder / "accuracy.csv", [row for network in networks for row in _effects(network)])
    for each in drawn:
        write_text(folder / f"{each.name}.svg", vl_convert.vegalite_to_svg(on_paper(each.spec)))
    content = {
        "title": "Prune or quantize: layers",
        "summary": f"{len(networks)} networks" if len(networks) > 1 else networks[0].name,
        "networks": [_shown(network) for network in networks],
        "headings": HEADINGS,
        "failed": failed,
        "views": [{"name": "layers", "figures": drawn}],
        "provenance": [
            ("command", [command_line()]),
            ("versions", [", ".join(f"{name} {version}" for name, version in versions().items())]),
        ],
    }
    write_text(folder / "layers.html", rendered("layers.html.j2", [drawn], "pq_sweep.study", **content))
    return folder


def _row(network: str, found: Found) -> dict[str, Any]:
    """Return a row of `layers.csv`, as docs/studies.md describes it."""
    return {
        "network": network,
        "layer": found.layer,
        "group": found.group,
        "first_input": found.first,
        "inputs": found.inputs,
        "rows": found.rows,
        "bits": found.bits,
        "nearest_db": found.db("nearest"),
        "heuristic_db": found.db("heuristic"),
        "bound_db": found.db("bound"),
        "kept": found.kept,
        "magnitude_db": found.db("magnitude"),
        "obs_db": found.db("obs"),
        "exact_db": found.db("exact"),
        "proven": found.proven,
        "better": better(found),
        "bound_s": found.bound_s,
        "heuristic_s": found.heuristic_s,
        "obs_s": found.obs_s,
        "exact_s": found.exact_s,
    }


def _effects(network: Network) -> Iterator[dict[str, Any]]:
    """Yield the rows of `accuracy.csv`, as docs/studies.md describes them."""
    for each, drop in network.drops():
        own = {"network": network.name, "layer": each.layer, "bits": each.bits, "method": each.method}
        counted = {"images": each.images, "accuracy": each.right / each.images, "drop_points": drop}
        yield own | {"noise": each.noise, "output_db": each.db} | counted


def _layers(network: Network) -> dict[str, list[Found]]:
    layers: dict[str, list[Found]] = {}
    for found in network.found:
        layers.setdefault(found.layer, []).append(found)
    return layers


def _sentences(networks: list[Network]) -> Iterator[str]:
    """Yield a sentence for each network, its notes, and a sentence for each of its layers."""
    for network in networks:
        yield f"{network.name}: {summary(network.found)}"
        yield from (f"  {note}" for note in (*effect(network), *network.notes))
        yield from (f"  {layer}: {advice(found)}" for layer, found in _layers(network).items())


def _shown(network: Network) -> dict[str, Any]:
    """Return what the page says of a network."""
    layers = [f"{layer}: {advice(found)}" for layer, found in _layers(network).items()]
    return {
        "name": network.name,
        "summary": summary(network.found),
        "effects": [*effect(network)],
        "notes": network.notes,
        "layers": layers,
        "rows": [_cells(found) for found in network.found],
    }


def _cells(found: Found) -> list[str]:
    """Return a slice as a table shows it."""
    ratios = [_db(found.db(name)) for name in ("nearest", "heuristic", "bound", "magnitude", "obs", "exact")]
    place = f" [{found.group}:{found.first}]" if found.group or found.first else ""
    return [found.layer + place, str(found.bits), *ratios, f"{found.proven}/{found.rows}", better(found)]


def _db(value: float | None) -> str:
    """Return a ratio in dB as text: - where there is none, and infinity where nothing is lost."""
    return "-" if value is None else "∞" if math.isinf(value) else f"{value:.2f}"


def show(networks: list[Network], failed: dict[str, str], folder: Path) -> None:
    """Show in short what was found, and where everything is."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    for network in networks:
        console.print(Text(f"{network.name}: signal to noise of layers' outputs, dB; pruning keeps bits/{FULL_BITS}"))
        drawn = Table(header_style="bold")
        for heading in HEADINGS:
            drawn.add_column(heading, justify="left" if heading in ("layer", "better") else "right")
        for found in network.found:
            drawn.add_row(*map(Text, _cells(found)))
        console.print(drawn)
        for line in (summary(network.found), *effect(network), *network.notes):
            console.print(Text(line))
    for name, why in failed.items():
        console.print(Text(f"{name} is left out: {why}", style="yellow"))
    console.print(Text(f"page: {folder / 'layers.html'}; layers.csv, verdict.txt and figures lie beside it"))
