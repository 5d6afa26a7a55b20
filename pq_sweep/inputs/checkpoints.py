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

from pq_sweep.types import UserError

HOW_TO_SAVE = "save one by torch.save(model.state_dict(), path)"
AGAIN = "copy or download it again"
UNPACK = "unpack it and give the file in it"

# How files begin that are taken for weights by mistake, what they are, and what would be right.
BEGINNINGS = (
    (rb"\Z", "the file is empty", AGAIN),
    (rb"version https://git-lfs", "a pointer of git-lfs to the file", "fetch the file itself by git lfs pull"),
    (rb"(\xef\xbb\xbf)?\s*<", "a web page, as a failed download leaves it", "download it again, signed in if need be"),
    (rb"(\xef\xbb\xbf)?\s*[{\[]", "JSON text, such as an index", "give the file that holds the weights"),
    (rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", "an ONNX graph", f"{HOW_TO_SAVE} in PyTorch"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes it", f"{HOW_TO_SAVE} in PyTorch"),
    (rb"\x93NUMPY", "a NumPy array", HOW_TO_SAVE),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "a compressed file", UNPACK),
    (rb"(?s).{257}ustar", "a tar archive", UNPACK),
)
PROTOCOL = 2  # of pickle, which torch.save writes by default
SAFETENSORS = b"\0\0\0{"  # the end of the header's length, which is below a terabyte, and the header itself

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
    head = _head(path)
    if head[5:9] == SAFETENSORS:
        return _read_safetensors(path)
    for found in _mistaken(path, head):
        raise unreadable(path, *found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of protocols of pickle before it refuses them
        return _read_pickle(path)


def unreadable(path: Path, what: str, remedy: str = HOW_TO_SAVE) -> UserError:
    """Return the error for a file from which no weights can be read."""
    return UserError(f"model.weights={path} is no readable state_dict ({what}); {remedy}.")


def _head(path: Path) -> bytes:
    """Return the first bytes of a file, or refuse what is no file."""
    if path.is_dir():
        raise UserError(f"model.weights={path} is a folder; give the path of the file with the weights in it.")
    if not path.is_file():
        raise UserError(f"model.weights={path} is no file; give DEFAULT, null or the path of a state_dict.")
    try:
        with path.open("rb") as file:
            return file.read(512)
    except OSError as error:
        raise unreadable(path, str(error.strerror), "make it readable") from error


def _mistaken(path: Path, head: bytes) -> Iterator[tuple[str, str]]:
    """Yield what a file is instead of a checkpoint, and what would be right."""
    yield from ((what, remedy) for beginning, what, remedy in BEGINNINGS if re.match(beginning, head))
    if head.startswith(b"PK"):
        yield from _mistaken_zip(path)
    elif path.suffix == ".safetensors" and not head.startswith(b"\x80"):
        yield "a safetensors file that is damaged or none at all", AGAIN


def _mistaken_zip(path: Path) -> Iterator[tuple[str, str]]:
    """Yield what a zip archive is if torch.save did not write it, or not all of it is there."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        yield "it is cut short or damaged", AGAIN
        return
    if any(name.endswith(("constants.pkl", "model.json")) for name in names):
        yield "a TorchScript archive or exported program, which is code and never run", HOW_TO_SAVE
    elif not any(name.endswith("data.pkl") for name in names):
        yield "a zip archive that torch.save did not write", UNPACK


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
