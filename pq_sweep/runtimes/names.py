"""Names of a network's tensors in its graph, where no other tensor may have, or later get, the same."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from onnxscript import ir

APART = "own."
# Names that the graph's ends have, and that the exporter and ONNX Runtime give to tensors whatever the network.
GIVEN = re.compile(r"input|logits|val_\d+|graph_(in|out)put_cast_?\d+|fixed_(zero|quantization_range)\w*")
# What ONNX Runtime puts behind the name of a tensor to name another that it makes from it.
MADE_FROM = re.compile(
    r"_(quantized|scale|zero_point|output|QuantizeLinear|DequantizeLinear|MatMul|Add|Reduce|Abs|convert|cast)[\w:]*$"
)


# What the exporter calls a parameter, a buffer or a constant while it traces is this and their name.
TRACED = re.compile(r"[pbc]_")
SCOPES = "pkg.torch.onnx.name_scopes"


class Inside(nn.Module):
    """A network within a module, where none of its tensors has a name without a dot."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images)
        return found


def inside(module: nn.Module) -> nn.Module:
    """Put a network into another module if the exporter might take one of its tensors for a second one."""
    names = [*module._parameters, *module._buffers, *vars(module)]
    return Inside(module).eval() if any(TRACED.match(name) for name in names) else module


def take_out(graph: ir.Graph) -> None:
    """Give what `inside` put into another module the names that it has in the network."""
    for name, value in list(graph.initializers.items()):
        own = name.removeprefix("network.")
        if own not in graph.initializers:
            value.name = own
    for node in graph:
        if SCOPES in node.metadata_props:
            scopes = ast.literal_eval(node.metadata_props[SCOPES])
            node.metadata_props[SCOPES] = repr([scope.removeprefix("network").removeprefix(".") for scope in scopes])


def name_first(graph: ir.Graph, shared: list[list[str]]) -> None:
    """Give each tensor that has several names in the network the first of them; the exporter may take the last."""
    for first, *others in shared:
        for name in others:
            if name in graph.initializers and first not in graph.initializers:
                graph.initializers[name].name = first


def set_apart(graph: ir.Graph) -> dict[str, str]:
    """Rename the weights of a network that have, or may get, a namesake; return their names in the network by new name.

    The exporter names the output of each step after the step, so that a buffer `mean` meets the mean of a pooling.
    """
    steps = {value.name for node in graph for value in node.outputs} | {value.name for value in graph.inputs}
    names = {name or "" for name in (*steps, *graph.initializers)}
    renamed = {}
    for name, value in list(graph.initializers.items()):
        if name in steps or GIVEN.fullmatch(name) or _made_from(name, names):
            value.name = _free(name, names)
            names.add(value.name)
            renamed[value.name] = name
    return renamed


def _made_from(name: str, names: set[str]) -> bool:
    return any(name[:end] in names and MADE_FROM.match(name, end) for end in range(1, len(name)))


def _free(name: str, names: set[str]) -> str:
    while name in names:
        name = APART + name
    return name


@contextmanager
def keywords_as_names() -> Iterator[None]:
    """Let torch trace layers called `class` or `global`, which it writes as attributes into the code that it makes.

    A torch that writes it by another function refuses such layers by itself.
    """
    from torch.fx import graph

    former = getattr(graph, "_format_target", None)
    if former is None:
        yield
        return
    graph._format_target = _attribute
    try:
        yield
    finally:
        graph._format_target = former


def _attribute(base: str, target: str) -> str:
    """Return the code that reads an attribute by its dotted name."""
    for name in target.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base
