"""What devices lack is said, and the documented tables are those of the code and of the version sets."""

from __future__ import annotations

import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, new_user, python
from test_environments import environment_of

from pq_sweep.core.hardware import (
    CPU,
    CPUINFO,
    GPU,
    PEAKS,
    Cpu,
    Gpu,
    capability,
    cpu_flags,
    lacks,
    missing,
    peaks,
)
from pq_sweep.doctor.judge import has_kernels
from pq_sweep.runtimes import OnnxRuntime, TensorRT, TensorRTNative, TensorRTRTX, Torch

V100 = Gpu("V100", (7, 0))
T4 = Gpu("T4", (7, 5))
A100 = Gpu("A100", (8, 0))
H200 = Gpu("H200", (9, 0))
EPYC = Cpu("EPYC 7763", frozenset({"avx2"}), "x86_64")
XEON = Cpu("Xeon 8480", frozenset({"avx2", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8"}), "x86_64")
GRAVITON = Cpu("Neoverse-V1", frozenset({"asimd", "asimdhp", "asimddp", "i8mm", "bf16"}), "aarch64")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int8_dynamic", "mixed")
PAGE = (ROOT / "docs" / "hardware.md").read_text()
COLUMNS = {"FP16": "fp16", "INT8": "int8", "BF16": "bf16", "TF32": "tf32", "2:4": "sparse", "FP8": "fp8"}
RUNTIMES = {runtime.name: runtime for runtime in (TensorRT, TensorRTNative, TensorRTRTX)}
RUNTIMES |= {"torch": Torch, "onnxruntime": OnnxRuntime}
SETS = ("environment.yml", "environment-cu13.yml")

Table = dict[str, dict[str, str]]


def table(first: str) -> Table:
    """Return the documented table whose first column has this name: its rows by their first cell, then by column."""
    (text,) = re.findall(rf"^\| {first} \|.*\n(?:\|.*\n)+", PAGE, re.MULTILINE)
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_int8_on_a_v100_is_said_to_have_no_tensor_cores() -> None:
    expected = (
        "V100 (compute capability 7.0) has no INT8 tensor cores: INT8 runs on CUDA cores and may be slower than FP16."
    )
    assert [lacks(name, V100) for name in ("int8", "int8_dynamic", "mixed")] == [[expected]] * 3


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (V100, {"bf16", "int8", "int8_dynamic", "mixed"}),
        (T4, {"bf16"}),
        (A100, set()),
        (H200, set()),
        (Gpu("P100", (6, 0)), set(PRECISIONS) - {"fp32"}),
        (Gpu("Jetson Xavier", (7, 2)), {"bf16"}),
        (EPYC, set(PRECISIONS) - {"fp32"}),
        (XEON, set()),
        (GRAVITON, set()),
        (Cpu("Cortex-A72", frozenset({"asimd"}), "aarch64"), set(PRECISIONS) - {"fp32"}),
        (Cpu("POWER9", frozenset(), "ppc64le"), set()),  # of which nothing is known
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_what_is_not_accelerated_where(device: Gpu | Cpu, expected: set[str]) -> None:
    assert {name for name in PRECISIONS if lacks(name, device)} == expected


def test_options_beside_the_precision_are_judged() -> None:
    def named(device: Gpu | Cpu, precision: str, **options: bool) -> list[str]:
        return [feature.name for feature in missing(precision, device, **options)]

    assert named(V100, "fp32", tf32=True) == ["TF32 tensor cores"]
    assert named(V100, "int8", sparse=True) == ["INT8 tensor cores", "2:4 sparse tensor cores"]
    assert named(A100, "fp32", tf32=True) == named(A100, "int8", sparse=True) == []
    assert named(A100, "fp32", tf32=True, sparse=True) == []
    assert named(H200, "fp32", sparse=True) == ["sparse tensor cores for FP32 without TF32"]
    assert named(XEON, "fp32", sparse=True) == named(GRAVITON, "int8", sparse=True) == ["2:4 sparse matrix units"]


@pytest.mark.parametrize("device", [V100, T4, A100, EPYC, GRAVITON], ids=str)
def test_all_that_is_said_is_one_short_sentence_about_the_device(device: Gpu | Cpu) -> None:
    told = [sentence for name in PRECISIONS for sentence in lacks(name, device, sparse=True)]
    assert told
    for sentence in told:
        assert sentence.startswith(f"{device} has no ")
        assert sentence.endswith(".")
        assert not sentence.endswith("..")
        assert len(sentence) <= 120


def test_every_feature_names_its_source() -> None:
    features = [*GPU.values(), *(feature for found in CPU.values() for feature in found.values())]
    assert all(feature.source.startswith(("NVIDIA, ", "ONNX Runtime, ", "oneDNN, ", "Linux, ")) for feature in features)


def test_capabilities_of_two_digits_are_read() -> None:
    assert [capability(text) for text in ("7.0", "10.0", "12.1")] == [(7, 0), (10, 0), (12, 1)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor\t: 0\nmodel name\t: EPYC\nflags\t\t: fpu avx2 avx_vnni\n\nprocessor\t: 1\nflags\t\t: fpu\n",
         {"fpu", "avx2", "avx_vnni"}),
        ("processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd asimddp\n", {"fp", "asimd", "asimddp"}),
        ("processor\t: 0\ncpu\t\t: POWER9\n", set()),
    ],
)  # fmt: skip
def test_flags_are_read_of_the_first_processor(tmp_path: Path, text: str, expected: set[str]) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    assert cpu_flags(tmp_path / "cpuinfo") == expected


@pytest.mark.skipif(platform.machine() not in CPU or not CPUINFO.exists(), reason="needs Linux on x86-64 or ARM")
def test_this_cpu_has_flags() -> None:
    assert cpu_flags() & {"fpu", "fp"}
    assert Cpu("this", cpu_flags()).architecture == platform.machine()


def test_no_framework_is_imported(tmp_path: Path) -> None:
    code = "import sys; import pq_sweep.core.hardware; print(*sys.modules)"
    done = python(["-c", code], tmp_path, new_user())
    assert done.returncode == 0, done.stderr
    assert "torch" in sys.modules
    assert not {"torch", "onnxruntime", "mlflow"} & set(done.stdout.split())


# What a GPU reaches at most


@pytest.mark.parametrize(
    ("name", "fp32", "gb_per_s"),
    [
        ("Tesla V100-SXM2-16GB", 15.7, 900),
        ("Tesla V100-PCIE-32GB", 14, 900),
        ("Tesla T4", 8.1, 320),
        ("A100-SXM4-40GB", 19.5, 1555),  # as older drivers name it
        ("NVIDIA A100-SXM4-80GB", 19.5, 2039),
        ("NVIDIA A100-PCIE-40GB", 19.5, 1555),
        ("NVIDIA A100 80GB PCIe", 19.5, 1935),
        ("NVIDIA H100 80GB HBM3", 67, 3350),
        ("NVIDIA H100 PCIe", 51, 2000),
        ("NVIDIA H100 NVL", 60, 3900),
        ("NVIDIA H200", 67, 4800),
        ("NVIDIA L4", 30.3, 300),
        ("NVIDIA L40S", 91.6, 864),
        ("NVIDIA GeForce RTX 4090", 82.6, 1008),
        ("NVIDIA RTX 6000 Ada Generation", 91.1, 960),
    ],
)
def test_a_product_is_known_by_its_whole_name(name: str, fp32: float, gb_per_s: float) -> None:
    found = peaks(name)
    assert found
    assert (found.of("fp32"), found.gb_per_s) == (fp32, gb_per_s)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "GRID A100-40C",
        "NVIDIA A10G",
        "NVIDIA A100-SXM-64GB",
        "Tesla V100-SXM3-32GB",
        "NVIDIA GH200 480GB",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "A100",
        "AMD EPYC 7763",
        "",
    ],
)
def test_of_a_part_of_a_gpu_or_another_product_nothing_is_known(name: str) -> None:
    assert peaks(name) is None


def test_tf32_without_its_units_is_fp32() -> None:
    v100, a100 = PEAKS["V100-SXM2-16GB"], PEAKS["A100-SXM4-40GB"]
    assert (v100.of("tf32"), v100.of("fp16"), v100.of("int8"), v100.of("bf16")) == (15.7, 125, None, None)
    assert (a100.of("tf32"), a100.of("fp16"), a100.of("int8"), a100.of("mixed")) == (156, 312, 624, None)


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_have_the_ratios_of_tensor_cores_without_sparsity(name: str) -> None:
    tera = PEAKS[name].tera
    if "int8" in tera:
        assert tera["int8"] == pytest.approx(2 * tera["fp16"], rel=0.03)
    if "bf16" in tera:  # on GeForce sums in FP32, of which BF16 has no others, take twice as long
        slower = 2 if name.startswith("GeForce") else 1
        assert tera["fp16"] == pytest.approx(slower * tera["bf16"], rel=0.01)
        assert tera["bf16"] == pytest.approx(2 * tera["tf32"], rel=0.02)
    assert ("bf16" in tera) is ("tf32" in tera)
    assert tera["fp32"] < tera["fp16"]
    assert PEAKS[name].source.startswith("NVIDIA, ")


# The page


@pytest.mark.parametrize("name", table("GPU"))
def test_the_page_says_of_each_gpu_what_the_code_says(name: str) -> None:
    row = table("GPU")[name]
    gpu = Gpu(name, capability(row["compute capability"]))
    cells = {key: row[column] for column, key in COLUMNS.items()}
    assert {key for key, cell in cells.items() if cell == "fast"} == {key for key in cells if gpu.has(GPU[key])}
    assert set(cells.values()) <= {"fast", "slow", "-"}


def test_the_page_shows_every_feature_of_the_code() -> None:
    assert set(COLUMNS.values()) == {key for key, feature in GPU.items() if feature.since}
    assert {"V100", "T4", "A100", "A10", "L4", "L40", "H100", "H200", "B200"} == set(
        ", ".join(table("GPU")).split(", ")
    )


def test_the_page_has_the_peaks_of_the_code() -> None:
    shown = {name: row for names, row in table("product").items() for name in names.split(", ")}
    assert list(shown) == list(PEAKS)
    columns = ("FP32", "TF32", "FP16", "BF16", "INT8")
    for name, row in shown.items():
        stated = {column.lower(): float(row[column]) for column in columns if row[column] != "-"}
        assert (stated, float(row["GB/s"]), row["source"]) == (
            PEAKS[name].tera,
            PEAKS[name].gb_per_s,
            PEAKS[name].source,
        )


def test_the_page_has_the_flags_of_the_code() -> None:
    assert table("CPU").keys() == CPU.keys()
    for name, row in table("CPU").items():
        flags = {key: set(re.findall(r"`(\w+)`", row[column])) for column, key in COLUMNS.items() if column in row}
        assert flags == {key: feature.flags for key, feature in CPU[name].items() if feature.flags}


def test_the_page_lists_what_each_runtime_runs() -> None:
    found = {name: [row["CPU"], row["GPU"]] for name, row in table("runtime").items()}
    listed = {name: [", ".join(runtime.precisions[kind]) or "-" for kind in ("cpu", "cuda")]
              for name, runtime in RUNTIMES.items()}  # fmt: skip
    assert found == listed


@pytest.mark.parametrize("name", SETS)
def test_the_page_has_the_versions_of_the_environments(name: str) -> None:
    pins, row = environment_of(name).pins, table("environment")[name]
    versions = {column: row[column].partition(":")[0] for column in ("torch", "onnxruntime-gpu (CUDA)", "TensorRT")}
    assert list(versions.values()) == [
        str(pins["torch"]), str(pins["onnxruntime-gpu"]), str(pins[environment_of(name).tensorrt])
    ]  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_a_set_serves_the_gpus_that_its_packages_have_code_for(name: str) -> None:
    about = table("environment")[name]
    torch_code, ort_code = (
        re.findall(r"(?:sm|compute)_\d+", about[key]) for key in ("torch", "onnxruntime-gpu (CUDA)")
    )
    first, last = map(capability, re.findall(r"\d+\.\d", about["TensorRT"].partition(":")[2]))
    for row in table("GPU").values():
        found = capability(row["compute capability"])
        code = {"torch": has_kernels(found, torch_code), "onnxruntime": has_kernels(found, ort_code)}
        code["tensorrt"] = first <= found <= last
        assert row[name] == (", ".join(runtime for runtime, there in code.items() if there) or "-")


def test_the_page_has_the_architectures_of_the_torch_that_is_here() -> None:
    rows = [row["torch"] for row in table("environment").values()]
    here = [row for row in rows if row.startswith(f"{torch.__version__.partition('+')[0]}:")]
    if not here or torch.version.cuda is None:
        pytest.skip(f"torch {torch.__version__} is of no environment")
    assert here[0].partition(": ")[2] == torch._C._cuda_getArchFlags()
