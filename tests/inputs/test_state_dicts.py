"""State_dicts: what torch loads strictly is loaded whatever tools wrapped around it, and nothing else is."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import State, assert_same, load_digits, prefixed, trained
from conftest import refused
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from pq_sweep.inputs.digits_cnn import DigitsCNN
from pq_sweep.inputs.models import auxiliary_model, load_weights, torchvision_model


def converted(state: State, dtype: torch.dtype) -> State:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


def without_counts(state: State) -> State:
    """Return a state as PyTorch wrote it before version 0.4.1."""
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


def network(state: State) -> DigitsCNN:
    module = DigitsCNN()
    module.load_state_dict(state)
    return module


PLAIN = trained()
AVERAGED = trained(seed=43)

WRAPPED: dict[str, Any] = {
    "a list": [PLAIN, {"lr": 0.1}],
    "a tuple": (3, PLAIN),
    "by epoch": {10: PLAIN},
    "beside an optimizer": {
        "net": PLAIN,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{}]},
    },
    "saved in full": {"epoch": 3, "losses": [0.3, 0.2], "best": None, "state_dict": PLAIN, "lr": 0.1},
    **{key: {key: PLAIN} for key in ("model", "net", "model_state_dict", "weights", "params", "network", "state")},
    "numbers among the weights": PLAIN | {"epoch": 3, "history": [1, 2]},
    "nested": {"checkpoint": {"last": {"state_dict": PLAIN}}},
    "compiled": prefixed(PLAIN, "_orig_mod."),
    "parallel and compiled": prefixed(PLAIN, "module._orig_mod."),
    "compiled and parallel": prefixed(PLAIN, "_orig_mod.module."),
    "one layer compiled": {re.sub(r"^stem\.", "stem._orig_mod.", key): value for key, value in PLAIN.items()},
    "sharded": prefixed(PLAIN, "_fsdp_wrapped_module."),
    **{f"lightning {name}": {"state_dict": prefixed(PLAIN, name)} for name in ("model.", "net.", "backbone.")},
    "lightning compiled": {"state_dict": prefixed(PLAIN, "model._orig_mod.")},
    "a module of any name": prefixed(PLAIN, "wrapper.classifier."),
    "held twice by its module": prefixed(PLAIN, "model.") | prefixed(PLAIN, "encoder."),
    "saved twice": {"state_dict": PLAIN, "best_state_dict": dict(PLAIN)},
    "counts of PyTorch 0.3": PLAIN | {k: v.reshape(1) for k, v in PLAIN.items() if v.dim() == 0},
    "sparse": {key: value.to_sparse() for key, value in PLAIN.items()},
    "sparse rows": {key: value.to_sparse_csr() if value.dim() == 2 else value for key, value in PLAIN.items()},
    "parameters": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in PLAIN.items()},
    "ordered": OrderedDict(PLAIN),
    "a module's own": network(PLAIN).state_dict(),
    "beside its optimizer": {
        "model": PLAIN,
        "optimizer": torch.optim.Adam(network(PLAIN).parameters()).state_dict(),
    },
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "former format"])
@pytest.mark.parametrize("name", WRAPPED)
def test_what_tools_wrap_around_weights_is_taken_off(tmp_path: Path, name: str, legacy: bool) -> None:
    model = load_digits(tmp_path, WRAPPED[name], _use_new_zipfile_serialization=not legacy)
    assert_same(model.module.state_dict(), PLAIN)
    assert model.notes == ()


def test_counts_of_batches_may_be_missing(tmp_path: Path) -> None:
    found = load_digits(tmp_path, prefixed(without_counts(PLAIN))).module.state_dict()
    assert_same(without_counts(found), without_counts(PLAIN))
    assert_same(found, found | {key: torch.tensor(0) for key in PLAIN.keys() - without_counts(PLAIN).keys()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_become_float32_and_that_is_said(tmp_path: Path, dtype: torch.dtype) -> None:
    model = load_digits(tmp_path, converted(PLAIN, dtype))
    assert_same(model.module.state_dict(), converted(converted(PLAIN, dtype), torch.float32))
    assert model.notes == (f"weights.pth: weights in {str(dtype)[6:]} were converted to float32.",)


def test_pruning_masks_are_applied_and_that_is_said(tmp_path: Path) -> None:
    module = network(PLAIN)
    prune.l1_unstructured(module.fc1, "weight", 0.5)
    prune.random_unstructured(module.fc2, "bias", 0.2)
    model = load_digits(tmp_path, prefixed(module.state_dict(), "model."))
    prune.remove(module.fc1, "weight")
    prune.remove(module.fc2, "bias")
    assert_same(model.module.state_dict(), dict(module.state_dict()))
    assert model.notes == ("weights.pth: the pruning masks of 2 entries were applied.",)


@pytest.mark.parametrize(
    ("more", "first"),
    [
        ({"loss_fn.weight": torch.ones(10), "val_acc.tp": torch.zeros(3)}, "loss_fn.weight"),
        ({"class_weights": torch.ones(10)}, "class_weights"),
        ({"metrics.MulticlassAccuracy.tp": torch.zeros(10)}, "metrics.MulticlassAccuracy.tp"),
        ({"model.total_ops": torch.zeros(1), "model.fc1.total_ops": torch.zeros(1)}, "total_ops"),
    ],
)
def test_losses_metrics_and_counts_are_left_out_and_that_is_said(tmp_path: Path, more: State, first: str) -> None:
    model = load_digits(tmp_path, {"state_dict": prefixed(PLAIN, "model.") | more})
    assert_same(model.module.state_dict(), PLAIN)
    (note,) = model.notes
    assert f"beside the network, first {first}, w" in note


AVERAGES: dict[str, tuple[Any, str]] = {  # what a file holds, and the key of the averaged weights
    "timm": ({"state_dict": PLAIN, "state_dict_ema": AVERAGED}, "state_dict_ema"),
    "DeiT": ({"model": prefixed(PLAIN), "model_ema": AVERAGED}, "model_ema"),
    "torchvision": (
        {"model": PLAIN, "model_ema": {"n_averaged": torch.tensor(3), **prefixed(AVERAGED)}},
        "model_ema",
    ),
    "BasicSR": ({"params": PLAIN, "params_ema": AVERAGED}, "params_ema"),
    "ema": ({"net": PLAIN, "ema": AVERAGED}, "ema"),
    "ema_state_dict": ({"model_state_dict": PLAIN, "ema_state_dict": AVERAGED}, "ema_state_dict"),
    "camel case": ({"model": PLAIN, "modelEMA": AVERAGED}, "modelEMA"),
    "stochastic weight averaging": ({"state_dict": PLAIN, "swa_state_dict": AVERAGED}, "swa_state_dict"),
    "beside the plain ones by name": (prefixed(PLAIN, "net.") | prefixed(AVERAGED, "net_ema."), "net_ema"),
    "ema_pytorch": (
        prefixed(PLAIN, "online_model.") | prefixed(AVERAGED, "ema_model."),
        "ema_model",
    ),
    "nested": ({"state_dict": PLAIN, "callbacks": {"EMA": {"ema_weights": AVERAGED}}}, "callbacks.EMA.ema_weights"),
    "Lightning module": (
        {"state_dict": prefixed(PLAIN, "model.") | prefixed(AVERAGED, "ema_model.")},
        "state_dict.ema_model",
    ),
    "Lightning module with an AveragedModel": (
        {
            "state_dict": prefixed(PLAIN, "model.")
            | prefixed(AVERAGED, "averaged_model.module.")
            | {"averaged_model.n_averaged": torch.tensor(7)}
        },
        "state_dict.averaged_model",
    ),
    "Lightning's WeightAveraging": (  # it has the averaged ones where the plain ones usually are
        {
            "state_dict": prefixed(AVERAGED, "model."),
            "current_model_state": prefixed(PLAIN, "model."),
            "averaging_state": {"n_averaged": torch.tensor(3)},
        },
        "state_dict.model",
    ),
}


@pytest.mark.parametrize(("content", "key"), AVERAGES.values(), ids=AVERAGES)
def test_plain_weights_are_taken_and_averaged_ones_are_named(tmp_path: Path, content: Any, key: str) -> None:
    model = load_digits(tmp_path, content)
    assert_same(model.module.state_dict(), PLAIN)
    (note,) = model.notes
    assert note.startswith("weights.pth: the plain weights in ")
    assert note.endswith(f" were taken, and model.key={key} takes the averaged ones.")


@pytest.mark.parametrize(("content", "key"), AVERAGES.values(), ids=AVERAGES)
def test_key_takes_averaged_weights(tmp_path: Path, content: Any, key: str) -> None:
    model = load_digits(tmp_path, content, key=key)
    assert_same(model.module.state_dict(), AVERAGED)
    assert model.notes == (f"weights.pth: the averaged weights in {key} were taken, as model.key says.",)


def averaged_model() -> State:
    averaged = AveragedModel(network(AVERAGED))
    averaged.update_parameters(network(AVERAGED))
    return averaged.state_dict()


@pytest.mark.parametrize("content", [{"ema": AVERAGED}, {"model_ema": AVERAGED, "epoch": 1}, averaged_model()])
def test_averaged_weights_alone_are_taken_and_that_is_said(tmp_path: Path, content: Any) -> None:
    model = load_digits(tmp_path, content)
    assert_same(model.module.state_dict(), AVERAGED)
    (note,) = model.notes
    assert re.fullmatch(r"weights.pth: the averaged weights(| in \w+) were taken, as there are no plain .*", note)


def test_averaged_weights_that_no_key_can_take_are_named(tmp_path: Path) -> None:
    """Some tools leave out dots in the names of averaged weights, and average no statistics."""
    averaged = {"model_ema." + key.replace(".", ""): value for key, value in AVERAGED.items() if "running" not in key}
    model = load_digits(tmp_path, prefixed(PLAIN, "model.") | averaged | {"model_ema.decay": torch.tensor(0.9)})
    assert_same(model.module.state_dict(), PLAIN)
    (note,) = model.notes
    assert "the plain weights in model were taken, and the averaged ones, first model_ema." in note


@pytest.mark.parametrize(("plain", "borrowed"), [({"model": PLAIN}, "model"), (PLAIN, "the plain weights")])
def test_averaged_parameters_alone_take_the_statistics_of_the_plain_weights(
    tmp_path: Path, plain: Any, borrowed: str
) -> None:
    parameters = {name: AVERAGED[name] for name, _ in DigitsCNN().named_parameters()}
    content = {**plain, "ema": parameters}
    model = load_digits(tmp_path, content)
    assert_same(model.module.state_dict(), PLAIN)
    (note,) = model.notes
    assert note.endswith(" were taken, and model.key=ema takes the averaged ones.")
    model = load_digits(tmp_path, content, key="ema")
    expected = {key: parameters.get(key, value) for key, value in without_counts(PLAIN).items()}
    assert_same(without_counts(model.module.state_dict()), expected)
    (note,) = model.notes
    assert note.endswith(f"in ema were taken, as model.key says, with the statistics of {borrowed}.")


def test_averaged_parameters_without_any_statistics_are_refused(tmp_path: Path) -> None:
    parameters = {name: AVERAGED[name] for name, _ in DigitsCNN().named_parameters()}
    text = refused(lambda: load_digits(tmp_path, {"ema": parameters}))
    assert "BatchNorm's statistics are missing" in text


def test_averaged_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = load_digits(tmp_path, {"model": PLAIN, "ema": DigitsCNN(num_classes=7).state_dict()})
    assert_same(model.module.state_dict(), PLAIN)
    (note,) = model.notes
    assert "the plain weights in model were taken, and the averaged ones, first ema, left out" in note


def test_averaged_weights_without_names_are_named_by_their_place(tmp_path: Path) -> None:
    averaged = {"ema": {"decay": 0.9, "shadow_params": list(AVERAGED.values())}}
    model = load_digits(tmp_path, {"model": PLAIN, **averaged})
    assert_same(model.module.state_dict(), PLAIN)
    (note,) = model.notes
    assert "the plain weights in model were taken, and the averaged ones, first ema.shadow_params, left out" in note
    text = refused(lambda: load_digits(tmp_path, averaged))
    assert "holds no state_dict but tensors without names at ema.shadow_params; save one by" in text


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"student": PLAIN, "teacher": AVERAGED}, "teacher", AVERAGED),
        ({"best": {"model": PLAIN}, "last": {"model": AVERAGED}}, "last", AVERAGED),
        ({"best": {"model": PLAIN}, "last": {"model": AVERAGED}}, "last.model", AVERAGED),
        (PLAIN | prefixed(AVERAGED), "module", AVERAGED),
        (prefixed(PLAIN), "module", PLAIN),
        (prefixed(PLAIN, "model.") | {"projector.weight": torch.ones(3)}, "model", PLAIN),
        ({"state_dict": prefixed(PLAIN, "a.") | prefixed(AVERAGED, "b.")}, "b", AVERAGED),
    ],
)
def test_key_takes_any_set_of_weights(tmp_path: Path, content: Any, key: str, expected: State) -> None:
    assert_same(load_digits(tmp_path, content, key=key).module.state_dict(), expected)


@pytest.mark.parametrize(
    "content",
    [
        {"student": PLAIN, "teacher": AVERAGED},
        {"state_dict": prefixed(PLAIN, "student.") | prefixed(AVERAGED, "teacher.")},
    ],
)
def test_different_weights_are_not_guessed_among(tmp_path: Path, content: Any) -> None:
    text = refused(lambda: load_digits(tmp_path, content))
    assert re.search(
        r"holds several sets of weights, under \S*student, \S*teacher; choose one, such as model.key=", text
    )


def test_wrapped_and_plain_weights_of_the_same_names_are_not_mixed(tmp_path: Path) -> None:
    text = refused(lambda: load_digits(tmp_path, PLAIN | prefixed(AVERAGED)))
    assert "holds several sets of weights, under module, and others beside them" in text


@pytest.mark.parametrize(
    ("content", "listed"),
    [
        ({"state_dict": PLAIN, "state_dict_ema": AVERAGED}, "there are weights under state_dict, state_dict_ema."),
        (PLAIN, "its weights lie under none, so leave it out."),
    ],
)
def test_key_that_is_not_there_lists_those_that_are(tmp_path: Path, content: Any, listed: str) -> None:
    text = refused(lambda: load_digits(tmp_path, content, key="ema"))
    assert text.startswith("model.key=ema names no weights in model.weights=")
    assert text.endswith(listed)


def weight_normed() -> State:
    module = DigitsCNN()
    parametrizations.weight_norm(module.fc1)
    return module.state_dict()


def quantization_aware() -> State:
    return PLAIN | {"fc1.weight_fake_quant.scale": torch.ones(1), "fc1.weight_fake_quant.zero_point": torch.zeros(1)}


def wider(state: State) -> State:
    return {key: torch.cat([value, value]) if value.dim() else value for key, value in state.items()}


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "other number of classes": (
        DigitsCNN(num_classes=7).state_dict(),
        (
            "2 of another shape, first fc2.bias with shape (7,) instead of (10,)",
            "give model.num_classes=7, if it has one.",
        ),
    ),
    "backbone": (
        {key: value for key, value in PLAIN.items() if not key.startswith("fc2.")},
        ("2 of 34 entries missing, first fc2.bias with shape (10,)", "as a backbone without classifier"),
    ),
    "other network": (
        nn.Sequential(nn.Conv2d(1, 2, 3)).state_dict(),
        ("29 of 34 entries missing", "2 unexpected, first 0.bias with shape (2,)", "weights of another model"),
    ),
    "other images": (
        PLAIN | {"stem.0.0.weight": torch.ones(16, 3, 3, 3)},
        ("1 of another shape, first stem.0.0.weight with shape (16, 3, 3, 3) instead of (16, 1, 3, 3)", "other images"),
    ),
    "wider": (wider(PLAIN), ("29 of another shape", "wider or narrower variant")),
    "deeper": (PLAIN | {"body.9.weight": torch.ones(3)}, ("1 unexpected, first body.9.weight", "deeper, shallower")),
    "no statistics": (
        {key: value for key, value in PLAIN.items() if "running" not in key},
        ("missing, first body.1.running_mean", "BatchNorm's statistics are missing"),
    ),
    "all three": (
        {key: value for key, value in PLAIN.items() if key != "fc1.bias"}
        | {"extra": torch.ones(1), "fc2.bias": torch.ones(3)},
        ("1 of 34 entries missing, first fc1.bias", "1 unexpected, first extra", "1 of another shape, first fc2.bias"),
    ),
    "more than the network": (
        {"state_dict": prefixed(PLAIN, "model.") | {"projector.weight": torch.ones(3)}},
        ("1 unexpected, first projector.weight", "model.key=state_dict.model takes what lies there alone"),
    ),
    "normalisation of images": (
        prefixed(PLAIN, "model.") | {"normalize.mean": torch.ones(3)},
        ("1 unexpected, first normalize.mean with shape (3,)",),
    ),
    "attention named ema": (
        PLAIN | {"body.0.ema.weight": torch.ones(3)},
        ("1 unexpected, first body.0.ema.weight",),
    ),
    "parametrized": (weight_normed(), ("fc1.parametrizations.weight.original0 belongs to a parametrized layer",)),
    "quantization-aware": (quantization_aware(), ("the state of a quantized network, such as fc1.weight_fake_quant",)),
    "integers": ({key: value.to(torch.int8) for key, value in PLAIN.items()}, ("holds int8 in stem.0.0.weight",)),
    "quantized": (
        PLAIN | {"fc1.weight": torch.quantize_per_tensor(PLAIN["fc1.weight"], 0.1, 0, torch.qint8)},
        ("holds qint8 in fc1.weight",),
    ),
    "complex": (PLAIN | {"fc1.bias": PLAIN["fc1.bias"] + 0j}, ("holds complex64 in fc1.bias",)),
    "no values": ({key: value.to("meta") for key, value in PLAIN.items()}, ("holds shapes without values",)),
    "averaged and of other classes": (
        {"ema": DigitsCNN(num_classes=7).state_dict()},
        ("(its weights at ema) does not fit the model", "give model.num_classes=7, if it has one."),
    ),
    "NaN": (
        PLAIN | {"fc1.weight": PLAIN["fc1.weight"] * float("nan")},
        ("has values that are not finite, first fc1.weight (1 of 34 entries have such)",),
    ),
    "infinity": (
        prefixed(PLAIN | {"fc1.bias": PLAIN["fc1.bias"] / 0, "fc2.bias": -PLAIN["fc2.bias"] / 0}, "model."),
        ("has values that are not finite, first fc1.bias (2 of 34 entries have such)",),
    ),
    "too large for float32": (
        PLAIN | {"fc2.bias": torch.full((10,), 1e300, dtype=torch.float64)},
        ("has values that are not finite, first fc2.bias",),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_its_likely_cause(tmp_path: Path, name: str) -> None:
    content, parts = REFUSED[name]
    text = refused(lambda: load_digits(tmp_path, content))
    assert text.startswith(f"model.weights={tmp_path / 'weights.pth'} ")
    assert [part for part in parts if part not in text] == []


def test_values_whose_sum_overflows_are_finite(tmp_path: Path) -> None:
    state = PLAIN | {"fc1.weight": torch.full_like(PLAIN["fc1.weight"], 3e38)}
    assert_same(load_digits(tmp_path, state).module.state_dict(), state)


class Tied(nn.Module):
    """Two layers of one weight, and a mask with infinity, as language models have both."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_shared_weights_need_one_name_in_a_file(tmp_path: Path, kept: str) -> None:
    """Safetensors keeps a shared weight once."""
    state = {kept: torch.arange(9.0).reshape(3, 3), "mask": Tied().state_dict()["mask"]}
    save_file(state, tmp_path / "tied.safetensors")
    module = Tied()
    load_weights(module, tmp_path / "tied.safetensors")
    assert torch.equal(module.embed.weight, state[kept])
    assert module.head.weight is module.embed.weight


def former_densenet(state: State) -> State:
    """Return a state by the names in the files that torchvision publishes."""
    renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)\.", r"\1.\2.", key): it for key, it in state.items()}
    return without_counts(renamed)


def former_vit(state: State) -> State:
    """Return a state by the names that torchvision's vision transformers had."""
    former = {".mlp.0.": ".mlp.linear_1.", ".mlp.3.": ".mlp.linear_2."}
    return {re.sub(r"\.mlp\.[03]\.", lambda found: former[found[0]], key): value for key, value in state.items()}


def parallel_features(state: State) -> State:
    """Return a state as PyTorch's ImageNet example wrote it, with DataParallel around the convolutions alone."""
    return {key.replace("features.", "features.module."): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("resnet18", without_counts),
        ("resnet18", lambda state: prefixed(state, "_orig_mod.")),
        ("densenet121", former_densenet),
        ("densenet121", lambda state: {"state_dict": prefixed(former_densenet(state))}),
        ("squeezenet1_1", parallel_features),
        ("mnasnet0_5", lambda state: state),  # asks for the version that a state_dict has
        ("mnasnet0_5", lambda state: {"state_dict": prefixed(dict(state))}),
        pytest.param("vit_b_16", former_vit, marks=pytest.mark.slow),
    ],
)
def test_former_names_and_wrappers_of_torchvisions_networks_are_known(
    tmp_path: Path, name: str, wrap: Callable[[State], Any]
) -> None:
    model = torchvision_model(name=name, weights=None, num_classes=5)
    state = model.module.state_dict()
    torch.save(wrap(state), tmp_path / "former.pth")
    found = torchvision_model(name=name, weights=str(tmp_path / "former.pth"), num_classes=5)
    assert_same(found.module.state_dict(), state)


def test_a_single_nan_is_named(tmp_path: Path) -> None:
    state = torchvision_model(name="resnet18", weights=None).module.state_dict()
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    text = refused(lambda: torchvision_model(name="resnet18", weights=str(tmp_path / "nan.pth")))
    assert "nan.pth has values that are not finite, first conv1.weight (1 of 122 entries have such)" in text


def test_auxiliary_classifiers_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    state = auxiliary_model(name="googlenet", weights=None, num_classes=5).module.state_dict()
    torch.save(state | {"aux1.fc2.weight": torch.ones(5, 1024)}, tmp_path / "weights.pth")
    model = auxiliary_model(name="googlenet", weights=str(tmp_path / "weights.pth"), num_classes=5)
    assert_same(model.module.state_dict(), state)
    assert model.notes == ("weights.pth: 1 entry beside the network, first aux1.fc2.weight, was left out.",)


@pytest.mark.parametrize(
    ("model", "weights", "cause"),
    [
        ("resnet34", "resnet18", "deeper, shallower or changed variant"),
        ("resnet18", "resnet50", "a variant of another depth and width"),
        ("resnet18", "squeezenet1_1", "weights of another model"),
    ],
)
def test_weights_of_another_model_of_torchvision(tmp_path: Path, model: str, weights: str, cause: str) -> None:
    torch.save(torchvision_model(name=weights, weights=None).module.state_dict(), tmp_path / "weights.pth")
    make: Callable[[], Any] = partial(torchvision_model, name=model, weights=str(tmp_path / "weights.pth"))
    assert cause in refused(make)


class Positioned(nn.Module):
    """A network that knows the places of its inputs."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.pos_embedding = nn.Parameter(torch.ones(1, places, 2))


def test_weights_for_another_size_of_images(tmp_path: Path) -> None:
    torch.save(Positioned(10).state_dict(), tmp_path / "weights.pth")
    text = refused(lambda: load_weights(Positioned(5), tmp_path / "weights.pth"))
    assert "1 of another shape, first pos_embedding with shape (1, 10, 2) instead of (1, 5, 2)" in text
    assert "these weights are for another size of images" in text


class Hooked(nn.Module):
    """A network whose own hook refuses what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def _load_from_state_dict(self, *_: Any) -> None:
        raise ValueError("version 3\nis not known")


def test_a_refusal_of_the_network_itself_is_one_sentence(tmp_path: Path) -> None:
    torch.save(nn.ModuleDict({"fc": nn.Linear(2, 2)}).state_dict(), tmp_path / "weights.pth")
    text = refused(lambda: load_weights(Hooked(), tmp_path / "weights.pth"))
    assert "cannot be loaded into the model (version 3 is not known)" in text
