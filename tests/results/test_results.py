"""Job folders in every state as rows, as a CSV and as tables that cut nothing off."""

from __future__ import annotations

import csv
import os
import re
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from conftest import python
from rich.cells import cell_len
from rich.console import Console
from sweep_folders import (
    announced,
    dead_pid,
    real_result,
    write_error,
    write_manifest,
    write_result,
    write_status,
)

from pq_sweep.core.groups import job_name
from pq_sweep.core.result import Result
from pq_sweep.results import terminal as drawing
from pq_sweep.results.comparison import comparable, reference
from pq_sweep.results.report.frame import comparison
from pq_sweep.results.rows import metrics
from pq_sweep.results.spreadsheet import PQ_BENCH, write_csv
from pq_sweep.results.sweeps import find_sweeps, read_sweep
from pq_sweep.results.terminal import speedups, tables
from pq_sweep.types import UserError


@pytest.fixture
def half_finished(tmp_path: Path) -> Path:
    """A sweep with a job in every state."""
    sweep = write_manifest(tmp_path / "sweep", *(announced(str(number)) for number in range(5)))
    write_result(sweep, "0")
    write_error(sweep, "1", "no channel is left.")
    (sweep / "1" / "job.log").touch()
    write_status(sweep, "2", os.getppid())
    write_status(sweep, "3", dead_pid())
    return sweep


def with_latency(**sizes: float | None) -> dict[str, Any]:
    """Return a result with p99 (ms) at batch sizes: b1=0.5, b8=None."""
    result = real_result()
    timed = result["latency"]["1"]
    result["latency"] = {size[1:]: timed | {"p99_ms": p99} for size, p99 in sizes.items()}
    return result


def swept(folder: Path, *overrides: list[str]) -> Path:
    """Return a sweep of jobs that differ in their overrides."""
    jobs = [announced(str(number)) | {"overrides": given} for number, given in enumerate(overrides)]
    return write_manifest(folder / "sweep", *jobs)


def csv_rows(sweep: Path) -> list[dict[str, str]]:
    with write_csv(read_sweep(sweep)).open(newline="") as file:
        return list(csv.DictReader(file))


def drawn(sweep: Path, width: int) -> list[str]:
    """Return the lines of the tables in a terminal of `width` characters."""
    output = StringIO()
    console = Console(width=width, file=output)
    for table in tables(read_sweep(sweep), width):
        console.print(table)
    return output.getvalue().splitlines()


def cells(lines: list[str]) -> str:
    """Return what stands in a table's lines, without borders and line breaks."""
    return re.sub(r"[\s│┃]", "", "".join(lines))


def show(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = python(["-m", "pq_sweep.results", *arguments], folder, dict(os.environ))
    return done.returncode, done.stdout, done.stderr


def test_states(half_finished: Path) -> None:
    sweep = read_sweep(half_finished)
    assert [row["status"] for row in sweep.rows] == ["finished", "failed", "running", "missing", "missing"]
    assert sweep.summary == "1 done, 1 failed, 1 running, 2 missing"
    failed, running, killed, unstarted = sweep.rows[1:]
    assert (failed["stage"], failed["error"]) == ("prune", "no channel is left.")
    assert (running["stage"], killed["stage"], unstarted["stage"]) == ("accuracy", "accuracy", "")


def test_status_of_this_process_is_no_running_job(tmp_path: Path) -> None:
    """Results are shown between jobs: what this process was running then has been interrupted."""
    sweep = write_manifest(tmp_path, announced("0"))
    write_status(sweep, "0", os.getpid())
    assert read_sweep(sweep).count("missing") == 1


def test_a_result_wins_over_an_old_status(half_finished: Path) -> None:
    write_status(half_finished, "0", os.getppid())
    assert read_sweep(half_finished).rows[0]["status"] == "finished"


def test_module_shows_a_half_finished_sweep(half_finished: Path) -> None:
    code, out, err = show(half_finished.parent, "sweep")
    assert (code, err) == (0, "")
    assert "sweep: 1 done, 1 failed, 1 running, 2 missing" in out
    assert "job 1 (announced 1) failed at prune: no channel is left. Traceback: sweep/1/job.log" in out
    assert "job 2 (announced 2) is running, stage accuracy" in out
    assert "job 3 (announced 3) is missing, stage accuracy" in out
    assert "job 4 (announced 4) is missing" in out
    assert "CSV: sweep/results.csv" in out
    assert (half_finished / "results.csv").is_file()


def test_natural_order_without_manifest(tmp_path: Path) -> None:
    for number in (10, 9, 0, 11, 2, 1):
        write_result(tmp_path, str(number))
    write_error(tmp_path, "named")
    assert [row["job"] for row in read_sweep(tmp_path).rows] == ["0", "1", "2", "9", "10", "11", "named"]


def test_announced_order_stays_and_other_jobs_follow(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, announced("b"), announced("a"))
    write_result(sweep, "7")
    write_result(sweep, "a")
    assert [(row["job"], row["status"]) for row in read_sweep(sweep).rows] == [
        ("b", "missing"),
        ("a", "finished"),
        ("7", "finished"),
    ]


def test_finished_job_tells_what_really_ran(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, announced("0", runtime="auto", amount=0.5))
    result = write_result(sweep, "0")
    (row,) = read_sweep(sweep).rows
    assert (row["runtime"], row["device"], row["protocol"], row["precision"]) == ("torch", "cpu", "quick", "fp32")
    assert row["name"] == "digits_cnn l1_global 0.5 none torch"
    assert row["accuracy"] == result["accuracy"]["top1"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "digits_cnn l1_global 0.5 none auto"),
        ({"pruner": "none", "amount": 0.0}, "digits_cnn none none auto"),
        ({"recovery": "finetune", "quantizer": "int8"}, "digits_cnn l1_global 0.5 finetune int8 auto"),
        ({"amount": None}, "digits_cnn l1_global none auto"),
    ],
)
def test_job_name(changes: dict[str, Any], name: str) -> None:
    assert job_name(announced("0", **changes)["choices"]) == name


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["multirun"], ["a", "b"]),
        (["multirun/a"], ["a"]),
        (["multirun/a/0"], ["a"]),
        (["multirun/b/1"], ["b"]),
        (["multirun/b", "multirun", "multirun/b/1"], ["b", "a"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_sweeps_are_found_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], found: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        sweep = write_manifest(Path("multirun") / name, announced("0"), announced("1"))
        write_result(sweep, "0")
        write_error(sweep, "1")
    assert [sweep.folder.name for sweep in find_sweeps([Path(path) for path in given])] == found


def test_sweeps_without_manifest_are_found(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_result(tmp_path / name, "0")
    assert [sweep.folder.name for sweep in find_sweeps([tmp_path])] == ["a", "b"]
    assert [sweep.folder.name for sweep in find_sweeps([tmp_path / "b" / "0"])] == ["b"]


def test_sweep_with_and_sweep_without_manifest_are_both_found(tmp_path: Path) -> None:
    write_result(write_manifest(tmp_path / "a", announced("0")), "0")
    write_result(tmp_path / "b", "0")
    assert sorted(sweep.folder.name for sweep in find_sweeps([tmp_path])) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nowhere", "nowhere is not a folder; give"), ("empty", "empty holds no sweep and no result")],
)
def test_folder_without_results_is_refused(tmp_path: Path, name: str, sentence: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        find_sweeps([tmp_path / name])
    code, out, err = show(tmp_path, name)
    assert (code, out) == (1, "")
    (line,) = err.strip().splitlines()
    assert sentence in line


def test_csv_starts_with_the_columns_of_pq_bench(half_finished: Path) -> None:
    write_csv(read_sweep(half_finished))
    header = (half_finished / "results.csv").read_text().splitlines()[0].split(",")
    assert tuple(header[: len(PQ_BENCH)]) == PQ_BENCH
    assert len(header) == len(set(header))


def test_csv_values(tmp_path: Path) -> None:
    pruned, plain = announced("0", amount=0.9, quantizer="int8"), announced("1", pruner="none", amount=0.0)
    sweep = write_manifest(tmp_path, pruned, plain)
    result = write_result(sweep, "0")
    write_result(sweep, "1")
    first, second = csv_rows(sweep)
    texts = ("Model", "Pruner", "Quantizer", "Dataset", "Amount", "Batch Size")
    assert [first[name] for name in texts] == ["digits_cnn", "l1_global", "int8", "digits", "0.9", "1"]
    assert [second[name] for name in texts] == ["digits_cnn", "-", "-", "digits", "-", "1"]
    assert float(first["Accuracy"]) == pytest.approx(100 * result["accuracy"]["top1"])
    assert float(first["Inf. Time (ms)"]) == result["latency"]["1"]["p50_ms"]
    assert float(first["Original Size"]) == pytest.approx(result["size_bytes"]["original"] / 1e6)
    assert float(first["Compressed Size"]) == pytest.approx(result["size_bytes"]["compressed"] / 1e6)
    assert float(first["Prep Time (s)"]) == pytest.approx(sum(result["prep_s"].values()))
    assert {key: float(first[key]) for key in metrics(Result.of(result))} == metrics(Result.of(result))


def test_csv_of_unfinished_jobs_has_their_state_and_empty_cells(half_finished: Path) -> None:
    rows = csv_rows(half_finished)
    assert [row["status"] for row in rows] == ["finished", "failed", "running", "missing", "missing"]
    assert rows[1]["error"] == "no channel is left."
    assert all(row["Model"] == "digits_cnn" for row in rows)
    assert {row[name] for row in rows[1:] for name in ("Accuracy", "Inf. Time (ms)", "accuracy")} == {""}


def test_percentile_that_was_not_stated_is_an_empty_cell(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, announced("0"), announced("1"))
    write_result(sweep, "0", with_latency(b1=0.75))
    write_result(sweep, "1", with_latency(b1=None))
    assert [row["latency_p99_ms/b1"] for row in csv_rows(sweep)] == ["0.75", ""]
    assert "latency_p99_ms/b1" not in metrics(Result.of(with_latency(b1=None)))
    table = "".join(drawn(sweep, 250))
    assert "/0.750" in table
    assert re.search(r"\d/- ", table)


def test_top5_of_few_classes_is_left_out(tmp_path: Path) -> None:
    result = real_result()
    result["accuracy"]["top5"] = None
    assert "accuracy_top5" not in metrics(Result.of(result))
    write_result(tmp_path, "0", result)
    assert csv_rows(tmp_path)[0]["status"] == "finished"


def test_batch_sizes_that_differ_between_jobs(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, announced("0"), announced("1"))
    write_result(sweep, "0", with_latency(b1=0.25, b16=0.5))
    write_result(sweep, "1", with_latency(b4=0.75))
    first, second = csv_rows(sweep)
    assert [first[f"latency_p99_ms/b{size}"] for size in (1, 4, 16)] == ["0.25", "", "0.5"]
    assert [second[f"latency_p99_ms/b{size}"] for size in (1, 4, 16)] == ["", "0.75", ""]
    assert (first["Batch Size"], second["Batch Size"]) == ("1", "4")
    lines = drawn(sweep, 250)
    header = next(line for line in lines if "ms b1" in line)
    assert re.findall(r"ms b\d+", header) == ["ms b1", "ms b4", "ms b16"]
    assert next(line for line in lines if line.startswith("│ 1 ")).count("-/-") == 2


@pytest.mark.parametrize("width", [1000, 250, 120, 80, 40])
@pytest.mark.parametrize(
    "name", ["x" * 200, "größe_λ_сеть", "数字" * 20, "[bold]not markup[/bold]", "a,b;\"c'"], ids=lambda name: name[:12]
)
def test_no_name_and_no_figure_is_cut_off(tmp_path: Path, name: str, width: int) -> None:
    sweep = write_manifest(tmp_path, announced("0", model=name), announced("1", model="short"))
    result = write_result(sweep, "0")
    write_result(sweep, "1")
    lines = drawn(sweep, width)
    text = cells(lines)
    assert "…" not in text
    assert all(cell_len(line) <= width for line in lines)
    assert f"{result['latency']['1']['p50_ms']:.3f}/" in text
    assert f"{result['size_bytes']['compressed'] / 1e6:.3f}" in text
    letters = re.sub(r"\s", "", name)
    assert all(text.count(letter) >= letters.count(letter) for letter in set(letters))


def test_csv_keeps_any_name(tmp_path: Path) -> None:
    names = ["größe_λ_сеть", 'a,b;"c', "x" * 200, "two\nlines"]
    sweep = write_manifest(tmp_path, *(announced(str(i), model=name) for i, name in enumerate(names)))
    for number in range(len(names)):
        write_result(sweep, str(number))
    assert [row["Model"] for row in csv_rows(sweep)] == names


def test_narrow_table_moves_what_is_the_same_into_the_title(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, announced("0", amount=0.1), announced("1", amount=0.9))
    write_result(sweep, "0")
    write_result(sweep, "1")
    wide, narrow = drawn(sweep, 250), drawn(sweep, 120)
    assert " model " in wide[2] + wide[3] + wide[4]
    title = cells(narrow[: next(i for i, line in enumerate(narrow) if line.startswith("┏"))])
    assert "modeldigits_cnn" in title
    assert "prunerl1_global" in title
    assert not any(" model " in line for line in narrow if line.startswith("┃"))
    assert {"0.1", "0.9"} <= set(re.findall(r"0\.\d\b", " ".join(narrow)))


def test_each_part_of_a_split_table_names_its_jobs(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path, announced("0", pruner="l1"), announced("1", pruner="random"))
    write_result(sweep, "0", with_latency(b1=None, b8=None, b32=None, b64=None))
    write_result(sweep, "1", with_latency(b1=None, b8=None, b32=None, b64=None))
    lines = drawn(sweep, 60)
    parts = sum(line.startswith("┏") for line in lines)
    assert parts > 1
    assert sum(bool(re.match(r"│ 1 +│ random ", line)) for line in lines) == parts


def test_printed_table_is_whole_without_a_terminal(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "s", announced("0", model="x" * 200), announced("1"))
    write_result(sweep, "0", with_latency(b1=0.5, b8=0.5, b32=0.5))
    write_result(sweep, "1")
    code, out, err = show(tmp_path, "s")
    assert (code, err) == (0, "")
    assert "x" * 200 in out
    assert out.count("┏") == 1


def test_swept_options_have_columns(tmp_path: Path) -> None:
    same = "measure.threads=1"
    sweep = swept(tmp_path, [same, "pruner.n=1", "+pruner.dim=0"], [same, "pruner.n=2", "++pruner.dim=0"], [same])

    assert [(row["pruner.n"], row["pruner.dim"]) for row in csv_rows(sweep)] == [("1", "0"), ("2", "0"), ("", "")]
    assert read_sweep(sweep).options == ("pruner.n", "pruner.dim")
    assert "measure.threads" not in csv_rows(sweep)[0]
    header = " ".join(drawn(sweep, 400)[:5])
    assert "pruner" in header
    assert " dim " in header


def test_swept_amounts_have_one_column(tmp_path: Path) -> None:
    sweep = swept(tmp_path, ["pruner.amount=0.1"], ["pruner.amount=0.9"])

    assert read_sweep(sweep).options == ()


def test_suspicious_images_are_counted(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    write_result(sweep, "0")
    result = real_result()
    result["images"] |= {"suspicious": {"a.png": "all of its pixels have the same value"}}
    write_result(sweep, "1", result)

    assert [row.get("images_suspicious") for row in read_sweep(sweep).rows] == [None, 1]


def test_unusable_images_are_counted_under_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    write_result(sweep, "0")
    drawing.show(read_sweep(sweep))
    assert "left out" not in capsys.readouterr().out
    result = real_result()
    result["images"] |= {"left_out": {"a.png": "the file is empty", "b.png": "the file is empty"}}
    write_result(sweep, "1", result)

    drawing.show(read_sweep(sweep))

    assert "2 images of digits were left out as unusable" in capsys.readouterr().out
    assert [row.get("images_left_out") for row in read_sweep(sweep).rows] == [0, 2]


# Devices


def on_gpu(uuid: str, p50_ms: float, name: str = "V100") -> dict[str, Any]:
    """Return a result of a GPU with a latency."""
    result = real_result()
    result["environment"] |= {"device": name, "gpu": {"name": name, "uuid": uuid}}
    result["latency"]["1"]["p50_ms"] = p50_ms
    return result


def compared(folder: Path, *results: dict[str, Any], **changes: Any) -> Path:
    """Return a sweep of an uncompressed job and of pruned ones, with these results."""
    jobs = [announced("0", pruner="none", amount=0.0)]
    jobs += [announced(str(number), **changes) for number in range(1, len(results))]
    sweep = write_manifest(folder / "sweep", *jobs)
    for number, result in enumerate(results):
        write_result(sweep, str(number), result)
    return sweep


@pytest.mark.parametrize(
    ("one", "other", "why"),
    [
        (("GPU-1", "V100", "a"), ("GPU-1", "V100", "a"), None),
        (("GPU-1", "V100", "a"), ("GPU-2", "V100", "a"), "V100 GPU-1 is not V100 GPU-2"),
        (("GPU-1", "V100", "a"), ("GPU-3", "A100", "b"), "V100 GPU-1 is not A100 GPU-3"),
        (("", "Xeon", "a"), ("", "Xeon", "a"), None),
        (("", "Xeon", "a"), ("", "Xeon", "b"), "Xeon of a is not Xeon of b"),
        (("", "Xeon", "a"), ("", "Epyc", "a"), "Xeon of a is not Epyc of a"),
        (("GPU-1", "V100", "a"), ("", "Xeon", "a"), "V100 GPU-1 is not Xeon of a"),
    ],
)
def test_only_what_one_device_ran_is_compared(
    one: tuple[str, str, str], other: tuple[str, str, str], why: str | None
) -> None:
    rows = [dict(zip(("gpu_uuid", "device_name", "host"), values, strict=True)) for values in (one, other)]

    assert comparable(*rows) == why


def test_speed_ups_are_those_over_the_uncompressed_job_of_the_same_device(tmp_path: Path) -> None:
    results = [on_gpu("GPU-1", 6.0), on_gpu("GPU-1", 4.0), on_gpu("GPU-2", 1.0), on_gpu("GPU-3", 1.0, "A100")]
    sweep = compared(tmp_path, *results, on_gpu("GPU-2", 1.0))

    assert speedups(read_sweep(sweep)) == {"1": "1.50"}
    lines = drawn(sweep, 1000)
    assert any("speed-up" in line for line in lines)
    assert "│ 1.50 " in next(line.replace("  ", "") for line in lines if line.startswith("│ 1 "))


def test_the_table_marks_the_front_of_each_device(tmp_path: Path) -> None:
    sweep = compared(tmp_path, on_gpu("GPU-1", 6.0), on_gpu("GPU-1", 4.0), on_gpu("GPU-2", 9.0, "A100"))
    lines = [line.replace("┃", "│").split("│") for line in drawn(sweep, 1000)]
    (place,) = (number for line in lines for number, cell in enumerate(line) if "Pareto" in cell)
    marked = {line[1].strip(): line[place].strip() for line in lines if len(line) > place and line[1].strip().isdigit()}

    assert marked == {"0": "", "1": "yes", "2": "yes"}


def test_where_devices_differ_a_line_says_so_and_there_is_no_speed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [on_gpu("GPU-1", 6.0), on_gpu("GPU-2", 4.0), on_gpu("GPU-3", 1.0, "A100"), on_gpu("GPU-2", 4.0)]
    sweep = compared(tmp_path, *results)
    drawing.show(read_sweep(sweep))
    out = capsys.readouterr().out

    assert "speed-up\n" not in out
    assert not speedups(read_sweep(sweep))
    reason = "no speed-up where the uncompressed model ran on another device, as V100 GPU-2 is not V100 GPU-1: job 1, 3"
    assert out.count(reason) == 1
    assert "A100 GPU-3 is not V100 GPU-1: job 2" in out


@pytest.mark.parametrize("changes", [{"model": "other"}, {"dataset": "other"}])
def test_another_model_is_no_reference(tmp_path: Path, changes: dict[str, str]) -> None:
    sweep = read_sweep(compared(tmp_path, on_gpu("GPU-1", 6.0), on_gpu("GPU-1", 4.0), **changes))

    assert reference(sweep.rows[1], sweep) is None


def test_another_runtime_is_no_reference(tmp_path: Path) -> None:
    faster = on_gpu("GPU-1", 4.0)
    faster["session"]["runtime"] = "tensorrt"
    sweep = read_sweep(compared(tmp_path, on_gpu("GPU-1", 6.0), faster))

    assert reference(sweep.rows[1], sweep) is None
    assert not speedups(sweep)


def test_the_reference_has_the_same_options_of_runtime_and_protocol(tmp_path: Path) -> None:
    overrides = [[f"measure.threads={threads}", f"pruner.n={n}"] for threads in (1, 2) for n in (1, 2)]
    jobs = [announced(str(number)) | {"overrides": given} for number, given in enumerate(overrides)]
    for number in (0, 2):
        jobs[number]["choices"] |= {"pruner": "none"}
    sweep = write_manifest(tmp_path / "sweep", *jobs)
    for number, p50_ms in enumerate((8.0, 4.0, 6.0, 2.0)):
        write_result(sweep, str(number), on_gpu("GPU-1", p50_ms))

    assert speedups(read_sweep(sweep)) == {"1": "2.00", "3": "3.00"}


def test_a_ratio_of_pairs_comes_before_that_of_medians(tmp_path: Path) -> None:
    faster = on_gpu("GPU-1", 4.0)
    faster["paired"] = {"1": {"speedup": 1.75, "speedup_ci95": None, "unstable": []}}

    assert speedups(read_sweep(compared(tmp_path, on_gpu("GPU-1", 6.0), faster))) == {"1": "1.75"}


def test_an_unfinished_reference_gives_no_speed_up(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0", pruner="none", amount=0.0), announced("1"))
    write_error(sweep, "0")
    write_result(sweep, "1")

    assert not speedups(read_sweep(sweep))


def test_what_hardware_lacks_is_said_once_with_its_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = [
        "V100 has no INT8 tensor cores: it may be slower; so measure.",
        "V100 has no TF32 tensor cores: no gain.",
    ]
    results = [real_result() | {"hardware": given} for given in ([], sentences[:1], sentences)]
    sweep = compared(tmp_path, *results)
    drawing.show(read_sweep(sweep))
    out = capsys.readouterr().out

    assert out.count("V100 has no INT8 tensor cores: it may be slower; so measure: job 1, 2\n") == 1
    assert out.count("V100 has no TF32 tensor cores: no gain: job 2\n") == 1
    assert [row["hardware"] for row in csv_rows(sweep)] == ["", sentences[0], "; ".join(sentences)]


def test_notes_are_said_once_with_their_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentences = ["The weights were converted from float16 to float32.", "pruner.amount=0.01 took out no channel."]
    results = [real_result() | {"notes": given} for given in ([], sentences[:1], sentences)]
    sweep = compared(tmp_path, *results)
    drawing.show(read_sweep(sweep))
    out = capsys.readouterr().out

    assert out.count("The weights were converted from float16 to float32: job 1, 2\n") == 1
    assert out.count("pruner.amount=0.01 took out no channel: job 2\n") == 1
    assert [row["notes"] for row in csv_rows(sweep)] == ["", sentences[0], "; ".join(sentences)]


def test_bits_are_figures_and_those_of_earlier_versions_are_empty(tmp_path: Path) -> None:
    sweep = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    result = write_result(sweep, "0")
    write_result(sweep, "1", {key: value for key, value in result.items() if key != "bits"})
    first, second = csv.DictReader(write_csv(read_sweep(sweep)).open())
    names = ("packed_bytes", "rel_bops", "weight_bits")

    assert [float(first[name]) for name in names] == [result["bits"][name] for name in names]
    assert [second[name] for name in names] == ["", "", ""]
    frame = comparison(read_sweep(sweep), ["error"])
    assert frame["packed MB"][0] == pytest.approx(result["bits"]["packed_bytes"] / 1e6)
    assert frame["BOPs %"][0] == 100 * result["bits"]["rel_bops"]
    assert frame["bits/weight"][0] == result["bits"]["weight_bits"]
    assert frame[["packed MB", "BOPs %", "bits/weight"]].isna().all(axis=1).tolist() == [False, True]


def test_memory_of_a_gpu_has_its_own_columns() -> None:
    result = real_result()
    assert not {"peak_memory_allocator_mb", "peak_memory_nvml_mb"} & metrics(Result.of(result)).keys()
    result["memory"] = {"allocator_mb": 400.0, "allocator_reserved_mb": 500.0, "nvml_process_mb": None}

    assert metrics(Result.of(result))["peak_memory_allocator_mb"] == 400.0
    assert "peak_memory_nvml_mb" not in metrics(Result.of(result))
