"""One job as a flat row of figures, whatever state it is in: what the files in its folder say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pq_sweep.core.files import read_json
from pq_sweep.core.folder import read_error
from pq_sweep.core.groups import job_name

Row = dict[str, Any]

# Which job of SLURM it was, where it ran, and how it ended if SLURM ended it.
SLURM_COLUMNS = ("slurm_job", "node", "partition", "gpus_allotted", "slurm_state", "exit_code")


def batch_sizes(rows: list[Row]) -> list[int]:
    """Return all batch sizes at which latency was measured."""
    prefix = "latency_ms/b"
    return sorted({int(key.removeprefix(prefix)) for row in rows for key in row if key.startswith(prefix)})


def metrics(result: dict[str, Any]) -> dict[str, float]:
    """Flatten a result to its figures, by the names used in MLflow and the CSV; what was not measured is left out."""
    accuracy, network = result["accuracy"], result["network"]
    original = result["baseline"]
    flat = {
        "accuracy": accuracy["top1"],
        "error_percent": (1 - accuracy["top1"]) * 100,
        "accuracy_ci95_low": accuracy["top1_ci95"][0],
        "accuracy_ci95_high": accuracy["top1_ci95"][1],
        "accuracy_top5": accuracy["top5"],
        "accuracy_drop_points": accuracy["drop_points"],
        "accuracy_drop_ci95_low_points": accuracy["drop_ci95_points"][0],
        "accuracy_drop_ci95_high_points": accuracy["drop_ci95_points"][1],
        "accuracy_drop_p": accuracy["drop_p"],
        "agreement": accuracy["agreement"],
        "original_size_mb": result["size_bytes"]["original"] / 1e6,
        "engine_size_mb": result["size_bytes"]["compressed"] / 1e6,
        "engine_size_zstd_mb": result["size_bytes"]["compressed_zstd"] / 1e6,
        "sparsity": network["sparsity"],
        "params": network["params"],
        "params_removed": 1 - network["params"] / original["params"],
        "macs": network["macs"],
        "peak_memory_mb": result["peak_memory_mb"],
        "peak_memory_allocator_mb": result.get("memory", {}).get("allocator_mb"),
        "peak_memory_nvml_mb": result.get("memory", {}).get("nvml_process_mb"),
        "prep_time_s": sum(result["prep_s"].values()),
        "baseline_accuracy": original["top1"],
    }
    flat |= {f"size_mb/{name}": size / 1e6 for name, size in result["size_bytes"]["formats"].items()}
    flat |= {f"prep_time_s/{stage}": seconds for stage, seconds in result["prep_s"].items()}
    flat |= _timed(result)
    images = result["images"]
    flat |= {"evaluation_images": images["evaluation"], "images_left_out": len(images.get("left_out", ()))}
    flat["images_decoded"] = images.get("decoded")
    flat["load_of_others"] = max((timed["load_of_others"] for timed in result["latency"].values()), default=0.0)
    return {name: value for name, value in flat.items() if value is not None}


def _timed(result: dict[str, Any]) -> dict[str, float | None]:
    """Return the figures of each batch size."""
    flat: dict[str, float | None] = {}
    for size, timed in result["latency"].items():
        flat |= {f"latency_ms/b{size}": timed["p50_ms"], f"throughput/b{size}": timed["throughput"]}
        flat |= {f"latency_{name}_ms/b{size}": timed[f"{name}_ms"] for name in ("p90", "p99", "mean", "std")}
        low, high = timed.get("p50_ci95_ms") or (None, None)
        flat |= {f"latency_ci95_low_ms/b{size}": low, f"latency_ci95_high_ms/b{size}": high}
        flat |= {f"latency_host_ms/b{size}": timed.get("host_to_host", timed)["p50_ms"]}
        flat |= {f"throughput_pipelined/b{size}": timed.get("pipelined_throughput")}
        flat |= {f"energy_per_image_j/b{size}": timed.get("energy_per_image_j")}
    for size, pair in result.get("paired", {}).items():
        low, high = pair["speedup_ci95"] or (None, None)
        flat |= {f"speedup/b{size}": pair["speedup"]}
        flat |= {f"speedup_ci95_low/b{size}": low, f"speedup_ci95_high/b{size}": high}
    return flat


def read_row(folder: Path, announced: Row) -> Row:
    """Return a job as one flat row, whatever state it is in."""
    result = read_json(folder / "result.json")
    error = None if result else read_error(folder)
    status = None if result or error else read_json(folder / "status.json")
    row = {
        "job": folder.name,
        "folder": str(folder),
        "name": announced.get("name", folder.name),
        "status": "missing",
        "stage": "",
        "error": "",
    }
    row |= announced.get("choices", {})
    if result:
        session, environment = result["session"], result["environment"]
        ran = {"runtime": session["runtime"], "device": session["device"], "device_name": environment["device"]}
        row |= ran | {
            "status": "finished",
            "precision": session["precision"],
            "protocol": result["config"]["measure"]["name"],
            "smallest_format": result["size_bytes"]["smallest_format"],
            "tries": len(result["tries"]),
            "started": result["started"],
            "unstable": _unstable(result),
            "hardware": result.get("hardware", []),
            "gpu_uuid": (environment["gpu"] or {}).get("uuid") or "",
            "host": environment["host"],
            **_where(environment["slurm"]),
        }
        return row | {"name": job_name(row) if "model" in row else row["name"]} | metrics(result)
    if error:
        told = {"stage": error["stage"], "error": error["message"], "stderr": error.get("stderr", [])}
        return row | {"status": "failed"} | told | _where(error.get("slurm") or {})
    if status:
        where = _where(status.get("slurm") or {})
        return row | where | {"status": "running" if _alive(status) else "missing", "stage": status["stage"]}
    return row


def _unstable(result: Row) -> str:
    """Say which medians are not settled, and why: "b1 drift, b8 interval spread, paired b8 interval"."""
    found = {f"b{size}": timed.get("unstable") for size, timed in result["latency"].items()}
    found |= {f"paired b{size}": pair["unstable"] for size, pair in result.get("paired", {}).items()}
    return ", ".join(f"{name} {' '.join(why)}" for name, why in found.items() if why)


def _where(slurm: dict[str, str]) -> Row:
    """Return the columns that say which job of SLURM it was, and where and how it ran."""
    number = slurm.get("slurm_job") or slurm.get("slurm_job_id")
    if "slurm_array_job_id" in slurm:
        number = f"{slurm['slurm_array_job_id']}_{slurm['slurm_array_task_id']}"
    node = slurm.get("slurmd_nodename") or slurm.get("node")
    names = ("slurm_job_partition", "slurm_job_gpus", "state", "exit_code")
    found = (number, node, *(slurm.get(name) for name in names))
    return {key: value for key, value in zip(SLURM_COLUMNS, found, strict=True) if value}


def _alive(status: dict[str, Any]) -> bool:
    """Say whether the process that wrote a status still runs, as far as one can know of another host.

    Results are read between jobs, so a status of this very process was left by an interrupted job. Whether a job of
    SLURM still runs is known to its queue.
    """
    if status["host"] != os.uname().nodename:
        return True
    return status["pid"] != os.getpid() and Path(f"/proc/{status['pid']}").exists()
