"""The recommendation from the command line, on sweep folders with real results."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import new_user, python, refused
from sweep_folders import announced, real_result, write_error, write_manifest, write_result

from pq_sweep.results.recommend import _only
from pq_sweep.types import UserError

Done = subprocess.CompletedProcess[str]


def result(p50_ms: float, lost: float, size_mb: float, device: str = "V100") -> dict[str, Any]:
    """Return a real result with a latency at batch 1, a drop in points with its interval, and a size."""
    found = real_result()
    found["environment"] |= {"device": device, "gpu": {"name": device, "uuid": f"GPU of {device}"}}
    found["latency"] = {"1": found["latency"]["1"] | {"p50_ms": p50_ms, "p50_ci95_ms": [p50_ms * 0.99, p50_ms * 1.01]}}
    found["latency"]["1"]["unstable"] = []
    found["accuracy"] |= {"drop_points": lost, "drop_ci95_points": [lost - 0.5, lost + 0.5]}
    found["size_bytes"]["compressed"] = size_mb * 1e6
    found["prep_s"] = {"export": 2.0}
    return found


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four jobs that finished, the uncompressed one first, and one that failed."""
    jobs = [
        announced("0", pruner="none", amount=0.0),
        *(announced(str(number), amount=number / 10) for number in range(1, 5)),
    ]
    for number, job in enumerate(jobs):
        job["overrides"] = ["pruner=l1_global", f"pruner.amount=0.{number}"]
    folder = write_manifest(tmp_path / "sweep", *jobs)
    figures = [(8.0, 0.0, 40.0), (4.0, 0.4, 20.0), (2.0, 3.0, 10.0), (5.0, 0.2, 21.0)]
    for number, values in enumerate(figures):
        write_result(folder, str(number), result(*values))
    write_error(folder, "4")
    return folder


def recommend(folder: Path, *arguments: str) -> Done:
    return python(["-m", "pq_sweep.recommend", str(folder), *arguments], folder.parent, new_user() | {"COLUMNS": "200"})


def told(folder: Path, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(recommend(folder, "--json", *arguments).stdout)
    return answer


def test_the_fastest_within_the_limits_wins(sweep: Path) -> None:
    answer = told(sweep, "--max-accuracy-drop", "1", "--max-size-mb", "30")

    assert (answer["winner"]["job"], answer["runner_up"]["job"]) == ("1", "3")
    assert answer["winner"]["speedup"] == 2
    assert answer["winner"]["payback_images"] == pytest.approx(2.0 / 0.004)
    assert answer["winner"]["command"] == "python launch.py pruner=l1_global pruner.amount=0.1"
    assert answer["doubts"] == []
    assert answer["others"] == {
        "0": "size 40 MB is over 30 MB",
        "2": "accuracy_drop 3 points is over 1 points",
        "3": "latency 5 ms is more than 4 ms, 1.25 times as much",
        "4": "is failed",
    }


def test_it_is_drawn_for_people(sweep: Path) -> None:
    done = recommend(sweep, "--max-accuracy-drop", "0.5", "--minimize", "size")

    assert done.returncode == 0
    assert "least size at batch 1 with accuracy_drop at most 0.5 points: job 1" in done.stdout
    assert "0.40 points (-0.10 to 0.90)" in done.stdout
    assert "2.00 (1.96 to 2.04)" in done.stdout
    assert "500 images" in done.stdout
    assert "not sure: the true drop may be up to 0.90 points" in done.stdout
    assert "job 4 (announced 4) is failed" in done.stdout
    assert "to make it again: python launch.py pruner=l1_global pruner.amount=0.1" in done.stdout


@pytest.mark.parametrize(
    ("minimize", "limit", "line", "shown"),
    [
        ("packed", ["--max-packed-bytes", "900000"], "packed_bytes", "packed 250,000 bytes is more than 120,000 bytes"),
        ("bops", ["--max-bops", "0.5"], "rel_bops", "bops 0.25 of FP32 is more than 0.0625 of FP32"),
    ],
)
def test_bits_can_be_small_too(sweep: Path, minimize: str, limit: list[str], line: str, shown: str) -> None:
    bits = [(1_000_000, 1.0), (120_000, 0.0625), (250_000, 0.25)]
    for number, (packed, share) in enumerate(bits):
        found = result(4.0, 0.1, 10.0)
        found["bits"] |= {"packed_bytes": packed, "rel_bops": share}
        write_result(sweep, str(number), found)
    earlier = result(4.0, 0.1, 10.0)
    del earlier["bits"]
    write_result(sweep, "3", earlier)
    answer = told(sweep, "--minimize", minimize, *limit)

    assert (answer["winner"]["job"], answer["runner_up"]["job"]) == ("1", "2")
    assert (answer["winner"]["packed"], answer["winner"]["bops"]) == bits[1]
    assert "is over" in answer["others"]["0"]
    assert shown in answer["others"]["2"]
    assert answer["others"]["3"] == f"has no {line}"


def test_a_loss_of_accuracy_that_no_one_limited_is_pointed_out(sweep: Path) -> None:
    answer = told(sweep)

    assert answer["winner"]["job"] == "2"
    assert answer["doubts"] == ["it lost 3.00 points of accuracy, for which no limit was given: set one"]


def test_without_a_job_within_the_limits_it_says_how_far_they_would_have_to_go(sweep: Path) -> None:
    done = recommend(sweep, "--max-accuracy-drop", "1", "--max-size-mb", "15")

    assert done.returncode == 1
    assert "no job has latency at batch 1 with accuracy_drop at most 1 points, size at most 15 MB" in done.stdout
    assert "it would take size 20 MB (job 1), or accuracy_drop 3 points (job 2)" in done.stdout


@pytest.mark.slow
def test_jobs_of_several_devices_are_not_mixed(sweep: Path) -> None:
    write_result(sweep, "3", result(1.0, 0.0, 5.0, "A100"))
    done = recommend(sweep)

    assert done.returncode == 1
    assert done.stderr.strip() == "the jobs are of 2 devices; give --device as part of one of: A100, V100."
    assert told(sweep, "--device", "a100")["winner"]["job"] == "3"
    assert told(sweep, "--device", "V100", "--max-accuracy-drop", "1")["winner"]["job"] == "1"


@pytest.mark.slow
def test_jobs_of_several_datasets_are_not_mixed(sweep: Path) -> None:
    jobs = [announced(str(number), amount=number / 10, dataset="digits") for number in range(3)]
    write_manifest(sweep, *jobs, announced("3", dataset="letters"))
    done = recommend(sweep)

    assert done.returncode == 1
    assert done.stderr.strip() == "the jobs are of 2 datasets; give --dataset as part of one of: digits, letters."
    assert told(sweep, "--dataset", "letter")["winner"]["job"] == "3"
    assert told(sweep, "--dataset", "DIGITS", "--max-accuracy-drop", "1")["winner"]["job"] == "1"


def test_jobs_of_several_sweeps_are_told_apart_by_their_folders(sweep: Path) -> None:
    other = write_manifest(sweep.parent / "other", announced("1", amount=0.8))
    write_result(other, "1", result(1.0, 0.1, 5.0))
    done = python(
        ["-m", "pq_sweep.recommend", "sweep", "other", "--json", "--max-accuracy-drop", "1"], sweep.parent, new_user()
    )
    answer = json.loads(done.stdout)

    assert answer["winner"]["job"] == "other/1"
    assert answer["winner"]["folder"] == "other/1"
    assert answer["runner_up"]["job"] == "sweep/1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "8"], "--batch 8 was not measured; valid are: 1."),
        (
            ["--device", "H100"],
            "--device H100 is of no device on which a job finished; give --device as part of one of",
        ),
    ],
)
def test_what_was_not_measured_is_refused(sweep: Path, arguments: list[str], message: str) -> None:
    done = recommend(sweep, *arguments)

    assert done.returncode == 1
    assert done.stderr.startswith(message)


def test_a_sweep_without_a_finished_job_has_nothing_to_recommend(tmp_path: Path) -> None:
    folder = write_manifest(tmp_path / "sweep", announced("0"))
    write_error(folder, "0")
    done = recommend(folder)

    assert done.returncode == 1
    assert done.stderr == "no job has finished, so there is nothing to recommend; see python -m pq_sweep.results.\n"


def test_jobs_that_were_only_built_are_no_candidates() -> None:
    rows = [{"status": "built", "device_name": "CPU"}, {"status": "failed"}]
    assert "(1 of 2 were only built, for another machine)" in refused(lambda: _only(rows, "device", "H100"))


def test_components_of_ones_own_are_part_of_the_command(sweep: Path) -> None:
    from pq_sweep.results.commands import command
    from pq_sweep.results.sweeps import read_sweep

    manifest = json.loads((sweep / "sweep.json").read_text())
    manifest["arguments"] = ["/some/where/launch.py", "--config-dir", "my conf", "-m", "pruner=l1_global"]
    (sweep / "sweep.json").write_text(json.dumps(manifest))
    read = read_sweep(sweep)

    assert command(read.rows[2]) == "python launch.py --config-dir 'my conf' pruner=l1_global pruner.amount=0.2"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    from pq_sweep.results.sweeps import find_sweeps

    with pytest.raises(UserError, match="holds no sweep"):
        find_sweeps([tmp_path])
    assert recommend(tmp_path).stderr.count("\n") == 1
