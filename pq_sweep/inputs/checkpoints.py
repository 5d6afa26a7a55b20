"""Checkpoints: what a file of weights holds, read without running any code that is in it."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pq_sweep.inputs.mistaken import AGAIN, HOW_TO_SAVE, SAFETENSORS, beginning, refuse_mistaken, unreadable

PROTOCOL = 2  # of pickle, which torch.save writes by default

# Calls by which pickle makes again what is plain data where it comes from. A stand-in takes them as well: nothing of
# these names is imported, so they are as harmless as any other, and a checkpoint with them is worth reading.
DATA = re.compile(
    r"numpy\.dtype|numpy\.(_core|core)\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer)"
    r"|pathlib\.(_local\.)?(Pure)?(Posix|Windows)?Path|datetime\.\w+|decimal\.Decimal|fractions\.Fraction"
    r"|builtins\.(frozenset|list|tuple|dict|range|slice|bytes|int|float|str|bool)|functools\.partial|torch\.dtype"
    r"|torch\.torch_version\.TorchVersion|torch\._C\.Generator|types\.SimpleNamespace|numpy\.random\.\w+\.\w+"
)
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
# Of these, it makes plain dictionaries and lists.
CONTAINERS: dict[str, Any] = {"collections.defaultdict": lambda *_: {}, "collections.deque": lambda *_: []}
# What torch itself pickles tensors and state_dicts with.
TORCHS = re.compile(
    r"collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)"
    r"|torch\.(_utils|_tensor|storage|serialization)\..*"
    r"|torch\.(cuda\.)?\w+(Storage|Tensor)|torch\.(Size|device|b?float\w*|u?int\d+|bool|nn\.parameter\.Parameter)"
)


class Called(Exception):
    """A file wants something called that may run code."""


class StandIn:
    """In place of an object in a file: it takes any state, keeps none of it and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> StandIn:
        return object.__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class DictStandIn(StandIn):
    """In place of an object of a dictionary's kind, such as a configuration: an ordered dictionary of its items."""

    def __new__(cls, *_: Any, **__: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # torch fills no other kinds
        return OrderedDict()


class Uncalled(type):
    """The type of stand-ins for all names but those of plain data: a file may hold such objects, but call nothing."""

    def __call__(cls, *_: Any, **__: Any) -> Any:
        raise Called(cls.__name__)


def read_checkpoint(path: Path) -> Any:
    """Return what a file holds (.pt, .pth, .ckpt, .bin or .safetensors): tensors and plain values, the rest stand-ins.

    Files are told apart by what is in them, not by their name.
    """
    refuse_mistaken(path)
    if beginning(path)[5:9] == SAFETENSORS:
        return _read_safetensors(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of protocols of pickle before it refuses them
        return _read_pickle(path)


def _read_safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise unreadable(
            path, f"a safetensors file that is cut short or damaged: {_first_line(error)}", AGAIN
        ) from None


def _read_pickle(path: Path) -> Any:
    """Read what torch.save wrote; of other objects than tensors, those that are data are left out, others refused."""
    try:
        return _read_around(path)
    except Called as call:
        first = next(iter(_names(path)), "")
        inside = f"holds an object of {first} and " if first != str(call) else ""
        raise unreadable(path, f"it {inside}would call {call}, and code in a file is never run") from None
    except pickle.UnpicklingError:  # its text says how to load the file without this protection
        raise unreadable(path, _unsafe(path)) from None
    except Exception as error:
        raise unreadable(path, _first_line(error), f"if it is damaged, {AGAIN}, else {HOW_TO_SAVE}") from None


def _read_around(path: Path) -> Any:
    """Read tensors and plain values; if there is more, with stand-ins for objects, and at last for dictionaries."""
    with suppress(pickle.UnpicklingError):
        return _load(path)
    with suppress(pickle.UnpicklingError), torch.serialization.safe_globals(_stand_ins(path, StandIn)):
        return _load(path)
    with torch.serialization.safe_globals(_stand_ins(path, DictStandIn)):
        return _load(path)


def _load(path: Path) -> Any:
    with path.open("rb") as file:  # of a path, torch believes the name more than the content
        return torch.load(file, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    """Return what an error says, unless it is of Python's own or advice to load a file with the code in it."""
    text = (str(error).splitlines() or [""])[0].rstrip(". ")
    told = text and "weights_only" not in text and not isinstance(error, LookupError | TypeError | AttributeError)
    return text if told else "it is damaged or of another kind"


def _stand_ins(path: Path, kind: type[StandIn]) -> list[Any]:
    """Return a stand-in for each name in a file that is not torch's, as torch's list of safe names takes them."""
    return [(CONTAINERS.get(name) or _stand_in(name, kind), name) for name in _names(path)]


def _stand_in(name: str, kind: type[StandIn]) -> type[StandIn]:
    return type(name, (StandIn,), {}) if DATA.fullmatch(name) else Uncalled(name, (kind,), {})


def _unsafe(path: Path) -> str:
    """Say what is in a file that cannot be loaded safely."""
    if names := _names(path):
        return f"it holds objects of {', '.join(names[:3])}, which are never loaded as that can run code"
    protocol = max((argument for name, argument in _operations(path) if name == "PROTO"), default=PROTOCOL)
    if protocol != PROTOCOL:
        return f"it is pickled by protocol {protocol}, of which torch reads only {PROTOCOL} safely"
    return "it is damaged or of another kind"


def _names(path: Path) -> list[str]:
    """List the classes and functions other than torch's that a file of torch.save names, in order."""
    found = dict.fromkeys(_present_name(argument) for name, argument in _operations(path) if name == "GLOBAL")
    return [name for name in found if not TORCHS.fullmatch(name)]


def _present_name(argument: str) -> str:
    """Return a name as Python 3 has it; torch pickles by a protocol that knows those of Python 2."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _operations(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the operations in the pickles of a file with their arguments, as far as it goes, without acting on them."""
    with suppress(ValueError, EOFError, OSError, zipfile.BadZipFile), path.open("rb") as file:
        for stream in _pickles(path, file):
            yield from ((operation.name, argument) for operation, argument, _ in pickletools.genops(stream))


def _pickles(path: Path, file: BinaryIO) -> Iterator[BinaryIO]:
    """Yield the pickles in a file: that of its archive, or the first four of the former format."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            yield from (BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith("data.pkl"))
    else:
        yield from [file] * 4  # magic number, protocol, machine, and then what was saved
