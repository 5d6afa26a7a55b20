"""The report: what it says of sweeps with everything that can be odd about them, and how it looks in a browser."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Chromium, Seen, started
from conftest import new_user, python
from sweep_folders import announced, finished, real_result, write_error, write_manifest, write_result

from pq_sweep.results.commands import baselines
from pq_sweep.results.comparison import aggregate
from pq_sweep.results.decision import OBJECTIVES
from pq_sweep.results.report.charts import COLOURS, figures
from pq_sweep.results.report.frame import comparison
from pq_sweep.results.report.page import report
from pq_sweep.results.report.views import views
from pq_sweep.results.sweeps import Sweep, merge, read_sweep

Done = subprocess.CompletedProcess[str]
ODD = "<b>größer & 漢字</b> " + "very long " * 20
QUANTIZERS = ("none", "int8")
LAYER = {"weights": 100, "nonzero": 100, "limit": 1.0, "counts": [2] * 50}


def write_sweep(folder: Path, jobs: int, pruners: tuple[str, ...] = ("l1_global", "remove")) -> Sweep:
    """Write a sweep of an uncompressed job and others of all amounts; the last failed."""
    entries = []
    for number in range(jobs):
        amount, quantizer = round(0.9 * number / jobs, 3), QUANTIZERS[number % 2] if number else "none"
        pruner = pruners[number // 2 % len(pruners)] if number else "none"
        entries.append(announced(str(number), pruner=pruner, amount=amount if number else None, quantizer=quantizer))
        write_manifest(folder, *entries)
        if number < jobs - 1:
            write_result(folder, str(number), finished(number, amount, quantizer))
            after = LAYER | {"nonzero": 100 - int(100 * amount)}
            layers = {"before": {"a.weight": LAYER, "b.weight": LAYER}, "after": {"a.weight": after}}
            (folder / str(number) / "layers.json").write_text(json.dumps(layers))
    write_error(folder, str(jobs - 1), ODD)
    return read_sweep(folder)


@pytest.fixture(scope="module")
def dozen(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return write_sweep(tmp_path_factory.mktemp("report") / "dozen", 12)


def told(folder: Path, *arguments: str, **environ: str) -> Done:
    return python(["-m", "pq_sweep.report", *arguments], folder, new_user() | environ)


# Comparison


def test_every_job_stands_beside_the_uncompressed_one(dozen: Sweep) -> None:
    frame = comparison(dozen, OBJECTIVES).set_index("job")

    assert len(frame) == 12
    assert frame.loc["1", "speed-up b1"] == pytest.approx(8 / (8.0 * (1 - 0.075 / 2) * 0.5), rel=1e-3)
    assert frame.loc["1", "size ratio"] == pytest.approx(1 / (0.925 * 0.25), rel=1e-3)
    assert frame.loc["1", "compared with"] == "0"
    assert frame.loc["11", "status"] == "failed"
    assert baselines(dozen) == []


@pytest.mark.slow
def test_without_an_uncompressed_job_the_command_that_runs_it_is_told(tmp_path: Path) -> None:
    job = announced("0") | {"overrides": ["pruner=l1_global", "pruner.amount=0.5", "measure.batch_sizes=[1,8]"]}
    folder = write_manifest(tmp_path / "sweep", job, job | {"folder": "1"})
    write_result(folder, "0")
    write_result(folder, "1")

    assert baselines(read_sweep(folder)) == [
        "python launch.py 'measure.batch_sizes=[1,8]' pruner=none recovery=none quantizer=none"
    ]
    assert "There is no uncompressed job to compare with" in page_of(aggregate(read_sweep(folder)))


def repeated(folder: Path, option: str) -> Sweep:
    """Write four runs of one job and one of another."""
    jobs = [announced(str(n)) | {"overrides": [f"{option}={n}", "pruner.amount=0.5"]} for n in range(4)]
    write_manifest(folder, *jobs, announced("4", pruner="none", amount=None))
    for number, lost in enumerate((1.0, 5.0, 2.0, 3.0)):
        result = finished(number, 0.5, "none")
        result["accuracy"] |= {"drop_points": lost, "drop_ci95_points": [lost - 1, lost + 1], "drop_p": lost / 10}
        write_result(folder, str(number), result)
    write_result(folder, "4", finished(0, 0.0, "none"))
    return read_sweep(folder)


@pytest.mark.parametrize("option", ["seed", "repeat"])
def test_runs_that_differ_in_seed_or_repeat_are_one_job(tmp_path: Path, option: str) -> None:
    one, other = aggregate(repeated(tmp_path / "sweep", option)).rows

    assert one["accuracy_drop_points"] == 2.5
    assert one["range"]["accuracy_drop_points"] == (1.0, 5.0)
    assert (one["accuracy_drop_ci95_low_points"], one["accuracy_drop_ci95_high_points"]) == (0.0, 6.0)
    assert one["accuracy_drop_p"] == 0.5
    assert [Path(run).name for run in one["runs"]] == ["0", "1", "2", "3"]
    assert len(other["runs"]) == 1


def test_runs_with_other_options_stay_apart(tmp_path: Path) -> None:
    assert len(aggregate(repeated(tmp_path / "sweep", "pruner.importance")).rows) == 5


@pytest.mark.parametrize(
    "change",
    [{"order": "quantize_first"}, {"quantizer": {"exclude": ["last"]}}, {"pruner": {"amount_last": 0.1}}],
    ids=str,
)
def test_jobs_that_only_their_files_tell_apart_stay_apart(tmp_path: Path, change: dict[str, Any]) -> None:
    """Experiments set options in files of their own, which no word of a command line shows."""
    for name in ("a", "b"):
        write_manifest(tmp_path / name, announced("0"))
        result = finished(0, 0.5, "none")
        if name == "b":
            result["config"] |= change
        write_result(tmp_path / name, "0", result)

    assert len(aggregate(merge([read_sweep(tmp_path / name) for name in "ab"])).rows) == 2


def test_both_orders_are_jobs_of_their_own(tmp_path: Path) -> None:
    orders = ("prune_first", "quantize_first")
    jobs = [announced(str(n)) | {"overrides": [f"order={order}"]} for n, order in enumerate(orders)]
    folder = write_manifest(tmp_path / "sweep", *jobs)
    for number in range(2):
        write_result(folder, str(number))
    sweep = read_sweep(folder)

    assert sweep.options == ("order",)
    assert [row["order"] for row in sweep.rows] == list(orders)
    assert len(aggregate(sweep).rows) == 2


def test_the_same_job_of_two_sweeps_is_one_and_the_uncompressed_is_found_in_the_other(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_manifest(tmp_path / name, announced("0"))
        write_result(tmp_path / name, "0", finished(0, 0.5, "none"))
    write_manifest(tmp_path / "c", announced("0", pruner="none", amount=None))
    write_result(tmp_path / "c", "0", finished(0, 0.0, "none"))
    joined = aggregate(merge([read_sweep(tmp_path / name) for name in "abc"]))
    frame = comparison(joined, OBJECTIVES)

    assert list(frame["runs"].dropna()) == [2]
    assert frame["speed-up b1"].max() == pytest.approx(1 / 0.75)


def test_jobs_of_another_protocol_are_no_reference(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "sweep", announced("0"), announced("1", pruner="none", amount=None))
    write_result(folder, "0")
    other = real_result()
    other["config"]["measure"]["name"] = "rigorous"
    write_result(folder, "1", other)

    assert len(baselines(read_sweep(folder))) == 1


# The page


def page_of(sweep: Sweep) -> str:
    return report(sweep, "latency", {}, None, OBJECTIVES).html()


def test_the_page_is_whole_small_and_asks_for_nothing(dozen: Sweep) -> None:
    page = page_of(aggregate(dozen))

    assert len(page.encode()) < 5e6
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?(?:https?:)?//", page)
    assert "<b>größer" not in page
    assert "&lt;b&gt;größer &amp; 漢字" in page
    assert "least latency at batch 1 with accuracy_drop at most 1 points" in page


def test_missing_figures_mixed_devices_and_models_are_no_trouble(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    jobs = [announced(str(n), model=f"{ODD} {n % 3}", pruner="none" if n < 2 else "remove") for n in range(7)]
    write_manifest(folder, *jobs)
    for number in range(6):
        result = finished(number, 0.1 * number, "none", device=f"V100 {number % 2}")
        if number == 3:
            result["latency"] = {}
        if number == 4:
            result["latency"]["1"] |= {"p90_ms": None, "p99_ms": None, "p50_ci95_ms": None}
            result["accuracy"]["top5"] = None
        write_result(folder, str(number), result)
    sweep = aggregate(read_sweep(folder))
    page = page_of(sweep)

    assert {f"V100 {n}" for n in (0, 1)} <= set(comparison(sweep, OBJECTIVES)["device"])
    assert page.count('<section class="card">') == 2
    assert [len(view.name) for view in views(sweep, OBJECTIVES)]
    assert "missing" in page


def test_a_sweep_in_which_nothing_finished_has_a_page(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "sweep", announced("0"), announced("1"))
    write_error(folder, "0", ODD)

    assert "No job has finished." in page_of(read_sweep(folder))


def test_figures_have_the_colours_that_everyone_can_tell_apart(dozen: Sweep) -> None:
    (view,) = views(aggregate(dozen), OBJECTIVES)
    drawn = {figure.name: figure for figure in figures(view)}

    assert list(drawn) == [
        "pareto", "accuracy_by_amount", "latency_by_batch", "preparation", "storage", "layer_sparsity", "histograms",
    ]  # fmt: skip
    assert all(figure.spec["config"]["range"]["category"] == COLOURS for figure in drawn.values())
    (values,) = drawn["layer_sparsity"].spec["datasets"].values()
    assert {value["layer"] for value in values} == {"a"}
    assert max(value["gone"] for value in values) == 75


def test_representations_are_drawn_of_the_jobs_that_have_them(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", 4)
    (tmp_path / "sweep" / "1" / "representations.csv").write_text(
        "epoch,layer,snr_db,cka,note\n0,a,200,1,\n0,b,,0.25,no SNR\n1,a,14,0.75,\n1,b,,,no CKA\n"
    )
    (view,) = views(aggregate(sweep), OBJECTIVES)
    (drawn,) = (figure for figure in figures(view) if figure.name == "representations")
    (values,) = drawn.spec["datasets"].values() if "datasets" in drawn.spec else [drawn.spec["data"]["values"]]

    name = view.label(next(row for row in view.finished if row["job"] == "1"))
    assert values == [
        {"name": name, "layer": "a", "epoch": [0, 1], "SNR": [None, 14.0], "CKA": [1.0, 0.75]},
        {"name": name, "layer": "b", "epoch": [0, 1], "SNR": [None, None], "CKA": [0.25, None]},
    ]
    assert {param["value"] for param in drawn.spec["params"]} == {"b", "CKA"}


def test_the_front_is_marked_as_the_figures_say(dozen: Sweep) -> None:
    frame = comparison(dozen, ["error", "size"])
    done = frame[frame["status"] == "finished"]
    points = list(zip(done["Pareto"] == "yes", 100 - done["top-1 %"], done["size MB"], strict=True))

    for best, error, size in points:
        beaten = any(e <= error and s <= size and (e, s) != (error, size) for _, e, s in points)
        assert best != beaten


# The command line


@pytest.mark.slow
def test_page_figures_and_tables_are_written(dozen: Sweep, tmp_path: Path) -> None:
    done = told(
        tmp_path, str(dozen.folder), "--output", "out/page.html", "--figures", "figures", "--tables", "tables",
        "--max-size-mb", "0.2",
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["report: out/page.html", "figures: 7 in figures", "tables: tables"]
    assert "size at most 0.2 MB" in (tmp_path / "out" / "page.html").read_text()
    assert len(list((tmp_path / "figures").glob("*.svg"))) == len(list((tmp_path / "figures").glob("*.png"))) == 7
    assert (tmp_path / "figures" / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tables" / "comparison.md").read_text().count("\n") == 14
    assert "\\toprule" in (tmp_path / "tables" / "comparison.tex").read_text()
    assert "l1\\_global" in (tmp_path / "tables" / "comparison.tex").read_text()


@pytest.mark.slow
def test_by_default_the_page_lies_in_the_sweeps_folder(dozen: Sweep, tmp_path: Path) -> None:
    assert told(tmp_path, str(dozen.folder)).stdout == f"report: {dozen.folder}/report.html\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' is no folder, and the MLflow store sqlite:"),
        (["{sweep}", "--objectives", "beauty"], "--objectives beauty is not known; valid are: accuracy_drop, error, "),
        (["{sweep}", "--device", "H100"], "--device H100 is of no device on which a job finished"),
        (["http://127.0.0.1:9"], "MLflow store"),
    ],
)
def test_what_cannot_be_read_is_told_in_a_sentence(
    dozen: Sweep, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = told(tmp_path, *(word.replace("{sweep}", str(dozen.folder)) for word in arguments))

    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


# In a browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with started() as browser:
        yield browser


@pytest.fixture
def file(dozen: Sweep, tmp_path: Path) -> Path:
    page = tmp_path / "dozen.html"
    page.write_text(page_of(aggregate(dozen)))
    return page


@pytest.fixture
def seen(file: Path, chromium: Chromium) -> Seen:
    return chromium.open(file.as_uri())


@pytest.mark.slow
@pytest.mark.chromium
def test_a_browser_draws_everything_without_a_complaint(seen: Seen) -> None:
    page = seen.page
    page.wait_for_selector("table.dataTable tbody tr")
    for chart in page.locator(".chart").all():
        chart.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelectorAll('.chart[data-drawn=yes]').length == 7")
    seen.shoot("report")

    assert page.locator(".chart svg").count() >= 7
    assert page.locator("[data-figure=pareto] path[aria-roledescription=point]").count() == 11
    assert seen.complaints == []
    assert seen.requests == []


@pytest.mark.slow
@pytest.mark.chromium
def test_the_table_sorts_and_filters(seen: Seen) -> None:
    page = seen.page
    cells = "table#jobs tbody tr td:first-child"
    page.wait_for_selector(cells)
    page.get_by_role("searchbox").first.fill("remove")
    page.wait_for_function(f"document.querySelectorAll('{cells}').length < 12")
    kept = page.locator(cells).all_inner_texts()
    page.get_by_role("searchbox").first.fill("")
    page.wait_for_function(f"document.querySelectorAll('{cells}').length == 12")
    heading = page.locator("th", has_text=re.compile(r"^size MB")).first
    place = heading.evaluate("one => one.cellIndex")
    heading.get_by_role("button", name="Toggle ordering").press("Enter")
    values = [
        float(text)
        for text in page.locator(f"table#jobs tbody tr td:nth-child({place + 1})").all_inner_texts()
        if text.strip()
    ]

    assert kept == ["2", "3", "6", "7", "10", "11"]
    assert len(values) == 11
    assert values == sorted(values)


@pytest.mark.slow
@pytest.mark.chromium
def test_a_point_tells_what_it_is_and_keys_reach_what_can_be_chosen(seen: Seen) -> None:
    page = seen.page
    page.locator("[data-figure=pareto]").scroll_into_view_if_needed()
    page.locator("[data-figure=pareto] path[aria-roledescription=point]").first.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    tip = page.locator("#vg-tooltip-element").inner_text()
    page.locator("[data-figure=pareto] select").focus()
    page.keyboard.press("ArrowDown")
    page.wait_for_timeout(300)

    assert "top-1 %" in tip
    assert "speed-up" in tip
    assert page.locator("[data-figure=pareto] select").input_value() in ("1", "8")
    assert seen.complaints == []


@pytest.mark.slow
@pytest.mark.chromium
@pytest.mark.parametrize(("scheme", "width"), [("dark", 1400), ("light", 390)])
def test_dark_screens_and_phones_are_served(file: Path, chromium: Chromium, scheme: str, width: int) -> None:
    found = chromium.open(file.as_uri(), color_scheme=scheme, viewport={"width": width, "height": 844})
    found.page.locator(".chart").first.scroll_into_view_if_needed()
    found.page.wait_for_selector(".chart[data-drawn=yes]")
    found.shoot(f"report-{scheme}-{width}")
    back = found.page.evaluate("getComputedStyle(document.body).backgroundColor")

    assert (back == "rgb(22, 24, 28)") == (scheme == "dark")
    assert found.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found.page.get_by_role("button", name="light / dark").click()
    assert found.page.evaluate("getComputedStyle(document.body).backgroundColor") != back
    assert found.complaints == []


@pytest.mark.slow
@pytest.mark.chromium
def test_five_hundred_jobs_are_drawn(chromium: Chromium, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", 500, ("l1", "l1_global", "random", "remove"))
    file = tmp_path / "page.html"
    file.write_text(page_of(aggregate(sweep)))
    found = chromium.open(file.as_uri())
    found.page.locator(".chart").first.scroll_into_view_if_needed()
    found.page.wait_for_selector(".chart[data-drawn=yes]")
    found.shoot("report-500")

    assert "500" in found.page.locator(".dt-info").inner_text()
    assert found.page.locator("[data-figure=pareto] path[aria-roledescription=point]").count() == 499
    assert found.complaints == []
    assert file.stat().st_size < 5e6
