"""Files that are taken for weights by mistake: told by how they begin, before torch is imported."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

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
SAFETENSORS = b"\0\0\0{"  # the end of the header's length, which is below a terabyte, and the header itself


def refuse_mistaken(path: Path) -> None:
    """Raise a UserError if a file plainly holds no weights, as one that is empty or a web page."""
    head = beginning(path)
    if head[5:9] != SAFETENSORS:
        for found in _mistaken(path, head):
            raise unreadable(path, *found)


def unreadable(path: Path, what: str, remedy: str = HOW_TO_SAVE) -> UserError:
    """Return the error for a file from which no weights can be read."""
    return UserError(f"model.weights={path} is no readable state_dict ({what}); {remedy}.")


def beginning(path: Path) -> bytes:
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
    yield from ((what, remedy) for start, what, remedy in BEGINNINGS if re.match(start, head))
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
