"""All steps, the most valuable first: what no machine without a GPU can show, and what most users would meet."""

from __future__ import annotations

from pq_sweep.doctor.gpu_check import Step
from pq_sweep.doctor.gpu_check.jobs import PRECISIONS, Launch
from pq_sweep.doctor.gpu_check.packages import JOBS, RUNTIMES, TESTS
from pq_sweep.doctor.gpu_check.suite import Suite

# The trained network is there for its accuracy, the large ones with random weights for their speed.
DIGITS = ("model=digits_cnn", "dataset=digits")
ALL = tuple(PRECISIONS)
STORE = "tracking.uri=sqlite:///mlflow.db"
RESNET50_TIMES, ENGINE_TIMES = "other_cuda_events or torchs_tools or explains", "trtexec"


def of_digits(runtime: str, seconds: float) -> Launch:
    """Return jobs with the network of the digits in every precision of a runtime."""
    needs = (*JOBS, *RUNTIMES[runtime])
    name = f"digits_cnn {runtime}"
    return Launch(name=name, seconds=seconds, needs=needs, runtime=runtime, overrides=DIGITS, quantizers=ALL)


def of_images(model: str, runtime: str, seconds: float, *quantizers: str) -> Launch:
    """Return jobs with one of torchvision's networks on noise."""
    return Launch(
        name=f"{model} {runtime}",
        seconds=seconds,
        needs=(*JOBS, "torchvision", *RUNTIMES[runtime]),
        runtime=runtime,
        overrides=(f"model={model}", "model.weights=null", "dataset=fake", "dataset.images=64"),
        quantizers=quantizers,
    )


def of_torch(name: str, needs: tuple[str, ...], *overrides: str) -> Launch:
    """Return a job under torch that does more than quantize."""
    return Launch(name=name, seconds=60, needs=(*JOBS, *needs), runtime="torch", overrides=(*DIGITS, *overrides))


def of_tests(name: str, seconds: float, *selected: str, keyword: str = "", needs: tuple[str, ...] = ()) -> Suite:
    """Return tests of tests/gpu."""
    return Suite(name=name, seconds=seconds, needs=(*TESTS, *needs), selected=selected, keyword=keyword)


# Jobs first, before the process of the tests uses the GPU, which may be set to allow a single process.
ANSWERS = ("test_answers.py", "test_sessions.py")
RESNET50_ENGINE = ("torchvision", *RUNTIMES["tensorrt_native"])
STEPS: tuple[Step, ...] = (
    of_tests("torch", 60, "test_torch.py"),
    of_digits("torch", 60),
    of_tests("onnxruntime", 100, *ANSWERS, keyword="onnxruntime", needs=RUNTIMES["onnxruntime"]),
    of_tests("times of resnet50", 60, "test_speed.py", keyword=RESNET50_TIMES, needs=("torchvision",)),
    of_images("resnet50", "torch", 60, *ALL),
    of_images("vit_b_16", "torch", 60, "none", "fp16"),
    of_images("vit_b_16", "onnxruntime", 90, "none", "fp16"),
    of_tests("compiled", 120, "test_answers.py", keyword="compile", needs=("triton",)),
    of_tests("memory, clocks and energy", 60, "test_device.py", needs=("torchvision",)),
    of_tests("tensorrt_native", 120, *ANSWERS, keyword="tensorrt_native", needs=RUNTIMES["tensorrt_native"]),
    of_tests("tensorrt", 120, *ANSWERS, keyword="tensorrt and not tensorrt_native", needs=RUNTIMES["tensorrt"]),
    of_tests("times of an engine", 120, "test_speed.py", keyword=ENGINE_TIMES, needs=RESNET50_ENGINE),
    of_digits("onnxruntime", 60),
    of_digits("tensorrt_native", 90),
    of_digits("tensorrt", 90),
    of_digits("tensorrt_rtx", 90),
    of_images("resnet50", "onnxruntime", 60, "fp16"),
    of_images("resnet50", "tensorrt_native", 120, "fp16"),
    of_images("resnet50", "tensorrt", 120, "fp16"),
    of_images("resnet50", "tensorrt_rtx", 120, "fp16"),
    of_tests("options of torch", 90, "test_answers.py", keyword="torch and not compile"),
    of_torch("pruned", (), "pruner=l1_global", "recovery=bn_reestimate,finetune"),
    of_torch("removed", ("torch-pruning",), "pruner=remove", "recovery=finetune"),
    of_torch("tracked", ("mlflow",), "tracking=mlflow", STORE),
    of_tests("further times", 90, "test_speed.py", keyword=f"not ({RESNET50_TIMES} or {ENGINE_TIMES})"),
    of_tests("several GPUs", 60, "test_sessions.py", keyword="each_gpu"),
)
