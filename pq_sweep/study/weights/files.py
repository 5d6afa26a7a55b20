"""What the study leaves and shows: `weights.csv`, `advice.txt`, a page with all figures, and each of them as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import vl_convert
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from pq_sweep.core.environment import command_line, versions
from pq_sweep.core.files import write_table, write_text
from pq_sweep.results.report.files import on_paper
from pq_sweep.results.report.page import rendered
from pq_sweep.study.weights.advice import advice, summary
from pq_sweep.study.weights.charts import figures
from pq_sweep.study.weights.networks import Network, Width

NAMED = 6  # tensors better pruned that the terminal names
WIDTH = 118  # of what is not shown in a terminal


def write(networks: list[Network], failed: dict[str, str], folder: Path) -> Path:
    """Write all files into a folder and return it."""
    write_table(folder / "weights.csv", [row for network in networks for row in _rows(network)])
    write_text(folder / "advice.txt", "\n".join(_sentences(networks)) + "\n")
    drawn = list(figures(networks))
    for each in tqdm(drawn, desc="figures", disable=None, leave=False):
        write_text(folder / f"{each.name}.svg", vl_convert.vegalite_to_svg(on_paper(each.spec)))
    content = {
        "title": "Prune or quantize: weights",
        "summary": f"{len(networks)} networks" if len(networks) > 1 else networks[0].name,
        "networks": [_shown(network) for network in networks],
        "failed": failed,
        "views": [{"name": "weights", "figures": drawn}],
        "provenance": _provenance(networks),
    }
    write_text(folder / "weights.html", rendered("weights.html.j2", [drawn], "pq_sweep.study", **content))
    return folder


def _rows(network: Network) -> Iterator[dict[str, Any]]:
    """Yield the rows of `weights.csv`, as docs/studies.md describes them: one for each tensor and bit width."""
    for tensor in network.tensors:
        for width in tensor.widths:
            yield {
                "network": network.name,
                "tensor": tensor.name,
                "layer": tensor.layer,
                "shape": "x".join(map(str, tensor.shape)),
                "weights": tensor.weights,
                "zeros": tensor.zeros,
                "kurtosis": tensor.kurtosis,
                "bits": width.bits,
                "step": width.step,
                "quantization_db": width.quantization_db,
                "natural_sparsity": width.natural_sparsity,
                "pruning_db": width.pruning_db,
                "better": width.better,
            }


def _sentences(networks: list[Network]) -> Iterator[str]:
    """Yield a sentence for each network, its notes, and a sentence for each of its tensors."""
    for network in networks:
        yield summary(network)
        yield from (f"  {note}" for note in network.notes)
        yield from (f"  {tensor.name}: {advice(tensor)}" for tensor in network.tensors)


def _shown(network: Network) -> dict[str, Any]:
    """Return what the page says of a network."""
    return {
        "name": network.name,
        "summary": summary(network),
        "notes": network.notes,
        "bits": network.bits,
        "lines": lines(network),
        "tensors": [
            {
                "about": tensor,
                "kurtosis": "-" if tensor.kurtosis is None else f"{tensor.kurtosis:.1f}",
                "cells": [(_pair(width), width.better) for width in tensor.widths],
                "advice": advice(tensor),
            }
            for tensor in network.tensors
        ],
    }


def _pair(width: Width) -> str:
    return f"{_db(width.quantization_db)} / {_db(width.pruning_db)}"


def _db(value: float | None) -> str:
    """Return a ratio in dB as text: - where there is none, and infinity where nothing is lost."""
    return "-" if value is None else "∞" if value == float("inf") else f"{value:.1f}"


def lines(network: Network) -> list[tuple[str, list[str]]]:
    """Return the figures of a network over its bit widths, each line with its heading."""
    bits = network.bits
    return [
        ("quantized, median dB", [_db(network.middle("quantization_db", each)) for each in bits]),
        ("pruned, median dB", [_db(network.middle("pruning_db", each)) for each in bits]),
        ("better pruned", [f"{len(network.pruned(each))}/{len(network.tensors)}" for each in bits]),
        ("zero if quantized, mean %", [f"{network.natural_sparsity(each) * 100:.1f}" for each in bits]),
    ]


def _provenance(networks: list[Network]) -> list[tuple[str, list[str]]]:
    return [
        ("command", [command_line()]),
        ("seconds", [f"{network.name}: {network.seconds:.1f}" for network in networks]),
        ("versions", [", ".join(f"{name} {version}" for name, version in versions().items())]),
    ]


def show(networks: list[Network], failed: dict[str, str], folder: Path) -> None:
    """Show in short what was found, and where everything is."""
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
    for network in networks:
        millions = f"{network.weights() / 1e6:.3g} million weights"
        console.print(Text(f"{network.name}: {len(network.tensors)} tensors, {millions}, {network.seconds:.1f} s"))
        console.print(_drawn(network))
        for line in (summary(network), *network.notes, *_most_pruned(network)):
            console.print(Text(line))
    for name, why in failed.items():
        console.print(Text(f"{name} is left out: {why}", style="yellow"))
    console.print(Text(f"page: {folder / 'weights.html'}; weights.csv, advice.txt and the figures lie beside it"))


def _drawn(network: Network) -> Table:
    drawn = Table(header_style="bold")
    drawn.add_column("bits")
    for bits in network.bits:
        drawn.add_column(str(bits), justify="right")
    for heading, cells in lines(network):
        drawn.add_row(heading, *cells)
    return drawn


def _most_pruned(network: Network) -> list[str]:
    """Return the sentences of the tensors that are better pruned, the highest kurtosis first."""
    pruned = [tensor for tensor in network.tensors if tensor.where("prune")]
    pruned.sort(key=lambda tensor: -(tensor.kurtosis or 0))
    more = [f"  and {len(pruned) - NAMED} more in advice.txt"] if len(pruned) > NAMED else []
    return [*(f"  {tensor.name}: {advice(tensor)}" for tensor in pruned[:NAMED]), *more]
