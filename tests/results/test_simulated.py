"""A job that computes in another precision than its own is compared in accuracy and size, and never in speed."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
from sweep_folders import announced, finished, write_manifest, write_result

from pq_sweep.core.result import Result
from pq_sweep.results.comparison import aggregate, payback, reference, speedup
from pq_sweep.results.decision import OBJECTIVES, Goal, decide, on_front
from pq_sweep.results.recommend import facts
from pq_sweep.results.report.frame import comparison
from pq_sweep.results.report.views import views
from pq_sweep.results.rows import Row
from pq_sweep.results.spreadsheet import write_csv
from pq_sweep.results.sweeps import Sweep, read_sweep
from pq_sweep.results.terminal import show
from pq_sweep.tracking.summary import summary

SENTENCE = "FP8 is computed in FP32: time does not hold."


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """An uncompressed job, one in INT8, and one that simulates FP8, the smallest and by chance the fastest."""
    folder = tmp_path_factory.mktemp("simulated") / "multirun" / "day" / "hour"
    names = ("none", "int8", "fp8")
    write_manifest(folder, *(announced(str(n), pruner="none", quantizer=name) for n, name in enumerate(names)))
    for number, name in enumerate(names):
        result = finished(number, 0.0, name)
        result["peak_memory_mb"] = 100.0
        if name == "fp8":
            result["session"]["simulated"] = SENTENCE
            result["size_bytes"]["compressed"] = 1000
            for size, timed in result["latency"].items():
                timed |= {"p50_ms": 0.1 * int(size), "p50_ci95_ms": [0.09 * int(size), 0.11 * int(size)]}
            pair = {"pairs": 9, "speedup": 80.0, "speedup_ci95": [79, 81], "unstable": []}
            result["paired"] = {"1": pair | {"dense_p50_ms": 8.0, "p50_ms": 0.1}}
        write_result(folder, str(number), result)
    return read_sweep(folder)


@pytest.fixture(scope="module")
def row(sweep: Sweep) -> Row:
    return sweep.rows[2]


def test_a_row_says_that_it_is_simulated(sweep: Sweep) -> None:
    assert [row.get("simulated") for row in sweep.rows] == [None, None, SENTENCE]
    cells = list(csv.DictReader(write_csv(sweep).open()))
    assert [line["simulated"] for line in cells] == ["", "", SENTENCE]
    assert float(cells[2]["latency_ms/b1"]) == 0.1  # as it was measured
    assert not cells[2].get("speedup/b1")


def test_a_simulation_is_no_speed_up(sweep: Sweep, row: Row) -> None:
    other = reference(row, sweep)
    assert other is sweep.rows[0]
    assert speedup(row, other, 1) is None
    assert payback(row, other, 1) is None
    found = speedup(sweep.rows[1], other, 1)
    assert found
    assert found.value == pytest.approx(2)


def test_a_simulation_does_not_win_by_its_speed(sweep: Sweep) -> None:
    for name in ("latency", "memory"):
        decision = decide(aggregate(sweep).rows, Goal(name, {}, 1))
        assert decision.winner
        assert decision.winner["quantizer"] != "fp8"
        assert [why for lost, why in decision.lost if lost["quantizer"] == "fp8"] == [
            f"is a simulation, whose {name} does not count"
        ]
    limited = decide(aggregate(sweep).rows, Goal("size", {"latency": 100.0}, 1))
    assert limited.winner
    assert limited.winner["quantizer"] == "int8"


def test_a_simulation_wins_by_its_size_and_says_what_it_is(sweep: Sweep) -> None:
    whole = aggregate(sweep)
    decision = decide(whole.rows, Goal("size", {"accuracy_drop": 1.0}, 1))
    assert decision.winner
    assert decision.winner["quantizer"] == "fp8"
    assert SENTENCE in decision.doubts
    told = facts(decision.winner, whole, decision.goal)
    assert (told["latency"], told["speedup"], told["payback_images"]) == (None, None, None)
    assert (told["size"], told["simulated"]) == (0.001, SENTENCE)


def test_a_simulation_is_on_no_front_of_latency(sweep: Sweep) -> None:
    assert "2" not in on_front(sweep, OBJECTIVES, 1)
    assert "2" in on_front(sweep, ["error", "size"], 1)


def test_the_table_marks_it(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    show(sweep)
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if "fp8 (simulated)" in line]
    assert [cell.strip() for cell in line.split("│")].count("-") >= 2
    assert f"simulated: {SENTENCE.rstrip('.')}: job 2" in printed


@pytest.mark.slow
def test_the_report_marks_it(sweep: Sweep) -> None:
    frame = comparison(aggregate(sweep), OBJECTIVES).set_index("job")
    assert frame.loc["2", "simulated"] == SENTENCE
    assert math.isnan(frame.loc["2", "speed-up b1"])
    assert math.isnan(frame.loc["2", "memory ratio"])
    assert frame.loc["1", "memory ratio"] == 1
    (view,) = views(aggregate(sweep), OBJECTIVES)
    (point,) = [point for point in view.points(view.finished[2]) if point["batch"] == 1]
    assert point["name"].endswith("(simulated)")
    assert (point["speedup"], point["best"], point["front"]) == (None, False, False)


@pytest.mark.slow
def test_the_best_latency_of_a_sweep_is_not_simulated(sweep: Sweep) -> None:
    assert summary(sweep).metrics["best/latency_ms/b1"] == 4
    assert summary(sweep).metrics["best/engine_size_mb"] == 0.001


def test_results_without_the_field_are_read_as_before(sweep: Sweep) -> None:
    result = Result.read(Path(sweep.folder) / "0" / "result.json")
    assert result
    assert "simulated" not in result.session.details
