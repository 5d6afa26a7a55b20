"""Figures and tables for a paper."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pandas as pd
import vl_convert
from tqdm import tqdm

from pq_sweep.core.files import write_text
from pq_sweep.results.report.charts import Spec, figures
from pq_sweep.results.report.page import Report

WIDTH = 640
SCALE = 2.0  # pixels of a PNG for each pixel of the page


def write_figures(report: Report, folder: Path) -> int:
    """Write every figure of every view as SVG and PNG; return how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    views = report.views()
    drawn = [(view.name if len(views) > 1 else "", figure) for view in views for figure in figures(view)]
    taken: Counter[str] = Counter()
    for view, figure in tqdm(drawn, desc="figures", disable=None, leave=False):
        name = "_".join(filter(None, [figure.name, re.sub(r"[^\w.-]+", "_", view).strip("_")[:100]]))
        taken[name] += 1
        stem = name if taken[name] == 1 else f"{name}_{taken[name]}"
        spec = on_paper(figure.spec)
        write_text(folder / f"{stem}.svg", vl_convert.vegalite_to_svg(spec))
        (folder / f"{stem}.png").write_bytes(vl_convert.vegalite_to_png(spec, scale=SCALE))
    return len(drawn)


def on_paper(spec: Spec) -> Spec:
    """Return a figure of a fixed width on white."""
    return _fixed(spec) | {"background": "white"}


def _fixed(spec: Spec) -> Spec:
    layers = {"layer": [_fixed(layer) for layer in spec["layer"]]} if "layer" in spec else {}
    return spec | layers | ({"width": WIDTH} if "width" in spec else {})


def write_tables(report: Report, folder: Path) -> None:
    """Write the comparison as Markdown, LaTeX (booktabs) and CSV."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = report.frame()
    shown = frame.astype(object).where(frame.notna(), "")
    write_text(folder / "comparison.md", shown.to_markdown(index=False, disable_numparse=True) + "\n")
    write_text(folder / "comparison.tex", _latex(shown))
    write_text(folder / "comparison.csv", frame.to_csv(index=False))


def _latex(frame: pd.DataFrame) -> str:
    text: str = frame.to_latex(index=False, escape=True)
    return text
