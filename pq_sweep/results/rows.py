"""One job as a flat row of figures, read from the files in its folder, whatever state the job is in."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pq_sweep.core.files import read_json
from pq_sweep.core.fingerprint import digest
from pq_sweep.core.folder import JobFolder
from pq_sweep.core.groups import GROUPS, job_name
from pq_sweep.core.result import Bits, Compared, Latency, Result, Speed
from pq_sweep.results.roofline import rates

Row = dict[str, Any]
Figures = dict[str, float | None]

# Statuses of jobs that did what they were asked to; one that was built for another machine has no accuracy or latency.
DONE = ("finished", "built")
# The job's number in SLURM, where it ran, and how it ended if SLURM ended it.
SLURM_COLUMNS = ("slurm_job", "node", "partition", "gpus_allotted", "slurm_state", "exit_code")


def batch_sizes(rows: list[Row]) -> list[int]:
    """Return all batch sizes at which latency was measured."""
    prefix = "latency_ms/b"
    return sorted({int(key.removeprefix(prefix)) for row in rows for key in row if key.startswith(prefix)})


def metrics(result: Result) -> dict[str, float]:
    """Flatten a result to its figures, by the names used in MLflow and the CSV; what was not measured is left out."""
    images, prep = result.images, result.preparation.prep_s
    flat = (_accuracies(result.accuracy) if result.accuracy else {}) | _sizes(result)
    flat |= _memories(result.speed) if result.speed else {}
    flat |= {"prep_time_s": sum(prep.values()), "baseline_accuracy": result.baseline.top1}
    flat |= {f"size_mb/{name}": size / 1e6 for name, size in result.size_bytes.formats.items()}
    flat |= {f"prep_time_s/{stage}": seconds for stage, seconds in prep.items()}
    flat |= _speeds(result, result.speed) if result.speed else {}
    flat |= {"evaluation_images": images["evaluation"], "images_left_out": len(images.get("left_out", ()))}
    flat["images_suspicious"] = len(images["suspicious"]) if "suspicious" in images else None
    flat["images_decoded"] = images.get("decoded")
    flat |= _disturbance(result.speed) if result.speed else {}
    return {name: value for name, value in flat.items() if value is not None}


def _accuracies(found: Compared) -> Figures:
    return {
        "accuracy": found.top1,
        "error_percent": (1 - found.top1) * 100,
        "accuracy_ci95_low": found.top1_ci95[0],
        "accuracy_ci95_high": found.top1_ci95[1],
        "accuracy_top5": found.top5,
        "accuracy_drop_points": found.drop_points,
        "accuracy_drop_ci95_low_points": found.drop_ci95_points[0],
        "accuracy_drop_ci95_high_points": found.drop_ci95_points[1],
        "accuracy_drop_p": found.drop_p,
        "agreement": found.agreement,
    }


def _sizes(result: Result) -> Figures:
    sizes, network = result.size_bytes, result.network
    return {
        "original_size_mb": sizes.original / 1e6,
        "engine_size_mb": sizes.compressed / 1e6,
        "engine_size_zstd_mb": sizes.compressed_zstd / 1e6,
        "sparsity": network.sparsity,
        "params": network.params,
        "params_removed": 1 - network.params / result.baseline.params,
        "macs": network.macs,
    } | (_bits(result.bits) if result.bits else {})


def _bits(bits: Bits) -> Figures:
    return {"packed_bytes": bits.packed_bytes, "rel_bops": bits.rel_bops, "weight_bits": bits.weight_bits}


def _memories(speed: Speed) -> Figures:
    return {
        "peak_memory_mb": speed.peak_memory_mb,
        "peak_memory_allocator_mb": speed.memory.allocator_mb if speed.memory else None,
        "peak_memory_nvml_mb": speed.memory.nvml_process_mb if speed.memory else None,
    }


def _speeds(result: Result, speed: Speed) -> Figures:
    """Return the figures of each batch size."""
    flat: Figures = {}
    for size, timed in speed.latency.items():
        figures = _latencies(timed) | rates(result, int(size), timed)
        flat |= {f"{name}/b{size}": value for name, value in figures.items()}
    paired = {} if result.session.details.get("simulated") else speed.paired or {}  # a simulation's time is no speed-up
    for size, pair in paired.items():
        low, high = pair.speedup_ci95 or (None, None)
        flat |= {f"speedup/b{size}": pair.speedup}
        flat |= {f"speedup_ci95_low/b{size}": low, f"speedup_ci95_high/b{size}": high}
    return flat


def _disturbance(speed: Speed) -> Figures:
    return {"load_of_others": max((timed.load_of_others for timed in speed.latency.values()), default=0.0)}


def _latencies(timed: Latency) -> Figures:
    low, high = timed.p50_ci95_ms or (None, None)
    return {
        "latency_ms": timed.p50_ms,
        "throughput": timed.throughput,
        "latency_p90_ms": timed.p90_ms,
        "latency_p99_ms": timed.p99_ms,
        "latency_mean_ms": timed.mean_ms,
        "latency_std_ms": timed.std_ms,
        "latency_ci95_low_ms": low,
        "latency_ci95_high_ms": high,
        "latency_host_ms": (timed.host_to_host or timed).p50_ms,
        "throughput_pipelined": timed.pipelined_throughput,
        "energy_per_image_j": timed.energy_per_image_j,
    }


DAMAGED = "result.json is damaged, such as cut short; start the sweep again, which runs this job anew."


def read_row(folder: JobFolder, announced: Row) -> Row:
    """Return a job as one flat row, whatever state it is in."""
    row = {
        "job": folder.name,
        "folder": str(folder.path),
        "name": announced.get("name", folder.name),
        "status": "missing",
        "stage": "",
        "error": "",
    }
    row |= announced.get("choices", {})
    if result := Result.read(folder.result):
        row |= _finished(result)
        return row | {"name": job_name(row) if "model" in row else row["name"]} | metrics(result)
    if folder.result.exists():
        return row | {"status": "failed", "stage": "end", "error": DAMAGED}
    if error := folder.read_error():
        told = {"stage": error["stage"], "error": error["message"], "stderr": error.get("stderr", [])}
        return row | {"status": "failed"} | told | _where(error.get("slurm") or {})
    if status := read_json(folder.status):
        where = _where(status.get("slurm") or {})
        return row | where | {"status": "running" if _alive(status) else "missing", "stage": status["stage"]}
    return row


def _finished(result: Result) -> Row:
    """Return the columns of a finished job that are no figures."""
    session, environment = result.session, result.environment
    return {
        "runtime": session.runtime,
        "device": session.device,
        "device_name": environment["device"],
        "status": result.status,
        "precision": session.precision,
        "protocol": result.config["measure"]["name"],
        "components": digest(
            [result.config.get("order"), *(result.config.get(group) for group in (*GROUPS, "measure"))]
        ),
        "smallest_format": result.size_bytes.smallest_format,
        "tries": len(result.tries),
        "started": result.started,
        "unstable": _unstable(result.speed) if result.speed else "",
        "hardware": result.hardware,
        **({"simulated": simulated} if (simulated := session.details.get("simulated")) else {}),
        **({} if result.notes is None else {"notes": result.notes}),
        **({"built_for": session.details["compute_capability"]} if "compute_capability" in session.details else {}),
        "gpu_uuid": (environment["gpu"] or {}).get("uuid") or "",
        "host": environment["host"],
        **_where(environment["slurm"]),
    }


def _unstable(speed: Speed) -> str:
    """Say which medians are not settled, and why: "b1 drift, b8 interval spread, paired b8 interval"."""
    found = {f"b{size}": timed.unstable for size, timed in speed.latency.items()}
    found |= {f"paired b{size}": pair.unstable for size, pair in (speed.paired or {}).items()}
    return ", ".join(f"{name} {' '.join(why)}" for name, why in found.items() if why)


def _where(slurm: dict[str, str]) -> Row:
    """Return the columns with the job's number in SLURM, where it ran, and how it ended."""
    number = slurm.get("slurm_job") or slurm.get("slurm_job_id")
    if "slurm_array_job_id" in slurm:
        number = f"{slurm['slurm_array_job_id']}_{slurm['slurm_array_task_id']}"
    node = slurm.get("slurmd_nodename") or slurm.get("node")
    names = ("slurm_job_partition", "slurm_job_gpus", "state", "exit_code")
    found = (number, node, *(slurm.get(name) for name in names))
    return {key: value for key, value in zip(SLURM_COLUMNS, found, strict=True) if value}


def _alive(status: dict[str, Any]) -> bool:
    """Say whether the process that wrote a status still runs; one on another host is assumed to.

    Results are read between jobs, so a status of this very process was left by an interrupted job. For a job of SLURM
    the queue knows whether it still runs.
    """
    if status["host"] != os.uname().nodename:
        return True
    return status["pid"] != os.getpid() and Path(f"/proc/{status['pid']}").exists()
