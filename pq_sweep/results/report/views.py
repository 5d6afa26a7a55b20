"""Which jobs belong in one drawing: those of one dataset and device, and of one model or of all models."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pq_sweep.core.files import read_json
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.groups import GROUPS
from pq_sweep.results.comparison import is_uncompressed, reference, speedup
from pq_sweep.results.decision import by_place, front, on_front
from pq_sweep.results.report.frame import short
from pq_sweep.results.rows import Row, batch_sizes
from pq_sweep.results.sweeps import Sweep

if TYPE_CHECKING:
    import altair as alt

SHOWN = 24  # jobs in a figure that has a line or bar for each
LONGEST = 70  # characters of a name
SILENT_DB = "200"  # in representations.csv
LAYERS = 1500  # histograms in all views of a page together


@dataclass(frozen=True)
class View:
    """The jobs of one dataset and device; `several` models are told apart by colour, else pruners are."""

    name: str
    sweep: Sweep
    whole: Sweep  # where the uncompressed jobs are
    objectives: list[str]
    several: bool
    histograms: int  # at most so many may be drawn

    @cached_property
    def finished(self) -> list[Row]:
        """Return the jobs that have figures."""
        return [row for row in self.sweep.rows if row["status"] == "finished"]

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options in which jobs differ."""
        return self.sweep.options

    @property
    def colour(self) -> alt.Color:
        """Return what the colours of points and lines stand for."""
        import altair as alt

        return alt.Color("model:N" if self.several else "pruner:N")

    @cached_property
    def best(self) -> dict[int, set[str]]:
        """Return the jobs on the Pareto front, by batch size."""
        return {size: on_front(self.sweep, self.objectives, size) for size in batch_sizes(self.finished)}

    @cached_property
    def unbeaten(self) -> dict[int, set[str]]:
        """Return the jobs that no other beats in accuracy and latency together, by batch size."""
        return {
            size: {
                row["job"]
                for row, chosen in zip(self.finished, front(self.finished, ["error", "latency"], size), strict=True)
                if chosen
            }
            for size in batch_sizes(self.finished)
        }

    @cached_property
    def shown(self) -> list[Row]:
        """Return the jobs for figures that cannot hold all: the uncompressed ones, then the best of the others."""
        if len(self.finished) <= SHOWN:
            return self.finished
        size = min(self.best)
        first = sorted(
            self.finished, key=lambda row: (not is_uncompressed(row), row["job"] not in self.best[size], row["job"])
        )
        kept = {row["job"] for row in first[:SHOWN]}
        return [row for row in self.finished if row["job"] in kept]

    @property
    def selection(self) -> str:
        """Say which jobs are shown, if not all."""
        if len(self.shown) == len(self.finished):
            return ""
        return f"{len(self.shown)} of {len(self.finished)} jobs: the uncompressed and those on the Pareto front first."

    @cached_property
    def dense_accuracies(self) -> list[float]:
        """Return the accuracy of each uncompressed model in %."""
        found = (row["baseline_accuracy"] for row in self.finished if "baseline_accuracy" in row)
        return sorted({round(accuracy * 100, 6) for accuracy in found})

    def label(self, row: Row) -> str:
        """Return a short name that no other job has."""
        return self._labels[row["job"]]

    @cached_property
    def _labels(self) -> dict[str, str]:
        names = {row["job"]: short_name(row, self.options, several=self.several) for row in self.finished}
        counts = list(names.values())
        return {job: name if counts.count(name) == 1 else f"{name} ({job})" for job, name in names.items()}

    def points(self, row: Row) -> list[dict[str, Any]]:
        """Return what figures show of a job, for each batch size at which it was timed."""
        return [self._point(row, size) for size in batch_sizes([row]) if "accuracy" in row]

    def _point(self, row: Row, size: int) -> dict[str, Any]:
        faster = speedup(row, reference(row, self.whole), size)
        low, high = row.get("range", {}).get("accuracy") or (row["accuracy_ci95_low"], row["accuracy_ci95_high"])
        kept = {key: row.get(key) for key in ("model", "pruner", "quantizer", "recovery", "amount")}
        figures = {
            "accuracy": row["accuracy"] * 100,
            "low": low * 100,
            "high": high * 100,
            "drop": row.get("accuracy_drop_points"),
            "latency": row[f"latency_ms/b{size}"],
            "speedup": faster and faster.value,
            "size": row.get("engine_size_mb"),
            "prep": row.get("prep_time_s"),
        }
        return (
            kept
            | {name: short(value, 6) for name, value in figures.items()}
            | {
                "id": row["job"],
                "name": self.label(row),
                "batch": size,
                "best": row["job"] in self.best[size],
                "front": row["job"] in self.unbeaten[size],
            }
        )

    def layers_of(self, row: Row) -> dict[str, Any]:
        """Return what is known about the layers of a job."""
        if row["job"] not in self._layers:
            self._layers[row["job"]] = read_json(JobFolder(Path(row["folder"])).layers) or {}
        return self._layers[row["job"]]

    @cached_property
    def _layers(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def spreads(self) -> list[tuple[Row, dict[str, Any]]]:
        """Return the jobs whose histograms are shown, as many as a page can hold, with their layers."""
        found: list[tuple[Row, dict[str, Any]]] = []
        left = self.histograms
        for row in self.shown:
            layers = self.layers_of(row)
            left -= len(layers.get("after", ()))
            if layers.get("after") and (left >= 0 or not found):
                found.append((row, layers))
        return found

    def representations_of(self, row: Row) -> list[dict[str, Any]]:
        """Return for each layer that was looked at its SNR and CKA after so many epochs; what is empty is None.

        So is an SNR where nothing differs, which has no place in a drawing.
        """
        path = JobFolder(Path(row["folder"])).representations
        found: dict[str, dict[str, Any]] = {}
        for line in csv.DictReader(path.read_text().splitlines()) if path.exists() else ():
            lists = found.setdefault(line["layer"], {"layer": line["layer"], "epoch": [], "SNR": [], "CKA": []})
            lists["epoch"].append(int(line["epoch"]))
            for name, column in (("SNR", "snr_db"), ("CKA", "cka")):
                lists[name].append(short(float(line[column])) if line[column] not in ("", SILENT_DB) else None)
        return list(found.values())

    def codes_before(self, row: Row) -> dict[str, Any]:
        """Return the integers in each layer of the job that differs from one only in pruning nothing."""
        same = [key for key in (*GROUPS, "bits", "device", "seed") if key != "pruner"]
        for other in self.finished:
            if other.get("pruner") == "none" and all(other.get(key) == row.get(key) for key in same):
                after = self.layers_of(other).get("after", {})
                return {name: layer["codes"] for name, layer in after.items() if "codes" in layer}
        return {}


def views(sweep: Sweep, objectives: list[str]) -> list[View]:
    """Return a view for each dataset and device; if there are several models, then one for each of them too."""
    parts = [
        (dataset, device, model, rows)
        for (dataset, device), found in by_place(sweep).items()
        for model, rows in _by_model(found)
    ]
    share = LAYERS // max(1, len(parts))
    return [
        View(
            " / ".join([*([model] if model else ["all models"]), dataset, device]),
            Sweep(sweep.folder, rows, sweep.options),
            sweep,
            objectives,
            model is None,
            share,
        )
        for dataset, device, model, rows in parts
    ]


def _by_model(rows: list[Row]) -> Iterator[tuple[str | None, list[Row]]]:
    """Yield all rows if they are of several models, then those of each model."""
    models = list(dict.fromkeys(str(row.get("model")) for row in rows))
    if len(models) > 1:
        yield None, rows
    for model in models:
        yield model, [row for row in rows if str(row.get("model")) == model]


def variant(row: Row, options: tuple[str, ...]) -> str:
    """Say how a job compresses, but not how much."""
    parts = [row.get(group) for group in ("model", "pruner", "recovery", "quantizer", "runtime")]
    return " ".join(str(part) for part in [*parts, *(row.get(key, "") for key in options)])


def short_name(row: Row, options: tuple[str, ...], *, several: bool) -> str:
    """Say in a few words what was done in a job."""
    parts = [row.get("model")] if several else []
    parts += [row["pruner"], row.get("amount")] if row.get("pruner", "none") != "none" else []
    parts += [row[group] for group in ("recovery", "quantizer") if row.get(group, "none") != "none"]
    parts += ["(simulated)"] if row.get("simulated") else []
    parts += ["uncompressed"] if is_uncompressed(row) else []
    parts += [f"{key.rpartition('.')[2]} {row[key]}" for key in options if row.get(key)]
    name = " ".join(str(part) for part in parts if part not in (None, ""))
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
