"""Downloads: fetch a file once, resumably and checked, and unpack an archive; importing this imports no framework."""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import re
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from filelock import FileLock, Timeout
from tqdm import tqdm

from pq_sweep.types import UserError

if TYPE_CHECKING:
    from requests import Response, Session
    from urllib3 import Retry

log = logging.getLogger(__name__)

CHUNK = 1 << 18  # bytes; a connection that breaks off loses no more than this
TIMEOUT_S = (5.0, 30.0)  # to connect, and to wait for the next byte
RETRIES = 3
BACKOFF_S = 0.5  # doubled from the second retry on; the first follows at once

# Where torch.hub finds the start of a file's SHA256, as in resnet18-f37072fd.pth; a date like 20240131 is not a hash.
NAMED_HASH = re.compile(
    r"-(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\.)([0-9a-f]{8,64})\.pth?(?:\.tar)?$"
)
CHECKSUM = re.compile(r"(md5):([0-9a-f]{32})|(sha256):([0-9a-f]{64})")
CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(?:(\d+)|\*)")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)

Expected = tuple[str, str]  # algorithm and the hex digits a hash has to start with


def fetch(url: str, target: Path, *, checksum: str | None = None, hint: str = "") -> Path:
    """Return `target`; if it is not there, download it from `url` (http, https), going on where the last try ended.

    `checksum` is md5:<hex> or sha256:<hex>; without one, the hash in a name like resnet18-f37072fd.pth counts. If the
    download fails or the file does not match, a UserError says what to put where, followed by `hint` ("or give
    x=/path").
    """
    expected = _expected(checksum, target.name)
    remedy = ", ".join(filter(None, [f"put {target.name} at {target}", hint]))
    with _in_one_sentence(f"{public(url)} cannot be downloaded", remedy):
        if not target.is_file():
            with _locked(target):
                if not target.is_file():
                    _download(url, target, expected, remedy)
                    return target
        _require(target, expected, str(target), f"delete it, or {remedy}")
    return target


def extract(archive: Path, folder: Path) -> None:
    """Unpack a .zip or a tar of any compression into `folder`, unless it exists; it appears when it is complete.

    A damaged archive, or one with a member that would lie outside of `folder`, is a UserError.
    """
    try:
        if not folder.exists():
            with _locked(folder):
                if not folder.exists():
                    _unpack_aside(archive, folder)
    except tarfile.FilterError as error:
        raise UserError(_outside(archive, error.tarinfo.name)) from error
    except (*DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the decompressors raise OSError without a number
            raise UserError(f"{archive} cannot be unpacked to {folder} ({_reason(error)}).") from error
        raise UserError(f"{archive} is damaged or no archive; delete it and try again.") from error


def public(url: str) -> str:
    """Return an address without user, password, query and fragment, which may be secret."""
    return re.split(r"[?#]", re.sub(r"(?<=://)[^/]*@", "", url), maxsplit=1)[0]


def _expected(checksum: str | None, name: str) -> Expected | None:
    if checksum is None:
        named = NAMED_HASH.search(name)
        return ("sha256", named[1]) if named else None
    match = CHECKSUM.fullmatch(checksum.lower())
    if match is None:
        raise UserError(f"the checksum {checksum} of {name} is neither md5:<32 hex digits> nor sha256:<64 hex digits>.")
    return cast(Expected, tuple(group for group in match.groups() if group))


def _require(path: Path, expected: Expected | None, what: str, remedy: str) -> None:
    """Compare a file with its checksum."""
    if expected is None:
        return
    algorithm, digits = expected
    with path.open("rb") as file:
        # FIPS systems refuse MD5 unless the caller says that no security depends on it.
        found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
    if not found.startswith(digits):
        raise UserError(f"{what} has the {algorithm} {found[: len(digits)]} instead of {digits}; {remedy}.")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock beside `path`, so that one process at a time makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another process that makes %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _in_one_sentence(failure: str, remedy: str) -> Iterator[None]:
    """Turn what goes wrong with the network or the disk into a UserError."""
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (OSError, HTTPError) as error:  # every error of requests is an OSError too
        raise UserError(f"{failure} ({_reason(error)}); {remedy}.") from error


def _reason(error: BaseException) -> str:
    """Say in a few words why; the innermost error knows, while the errors around it may repeat the address."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return " ".join(f"{error.strerror}{named}".split())
    if isinstance(error, ValueError):
        return "that is no http or https address"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split()) if isinstance(error, OSError) else "the connection breaks off"


def _download(url: str, target: Path, expected: Expected | None, remedy: str) -> None:
    part, tag = (target.with_name(f"{target.name}{suffix}") for suffix in (".part", ".part.etag"))
    if expected is None and not tag.exists():
        part.unlink(missing_ok=True)  # nothing would show whether the rest came from another version of the file
    log.info("downloading %s to %s", public(url), target)
    _receive_all(url, part, tag)
    try:
        _require(part, expected, f"what {public(url)} sends", f"try again, or {remedy}")
    except UserError:
        part.unlink()
        raise
    finally:
        tag.unlink(missing_ok=True)
    part.replace(target)


def _receive_all(url: str, part: Path, tag: Path) -> None:
    """Fill `part`, resuming after every break unless too many in a row brought nothing new."""
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import HTTPError

    patience = _patience()
    with requests.Session() as session, _urllib3_silent():
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=patience))
        while True:
            before = _size(part)
            try:
                return _receive(session, url, part, tag)
            except HTTPError as error:
                patience = _patience() if _size(part) > before else patience.increment("GET", public(url), error=error)
                patience.sleep()


@contextmanager
def _urllib3_silent() -> Iterator[None]:
    """Keep urllib3's messages about retries out of the log: they hold the whole address, secrets included."""
    loggers = [logging.getLogger(f"urllib3.{name}") for name in ("connectionpool", "util.retry")]

    def nothing(_: logging.LogRecord) -> bool:
        return False

    for logger in loggers:
        logger.addFilter(nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)


def _patience() -> Retry:
    from urllib3 import Retry

    # Retry-After is not obeyed, as it may be hours.
    return Retry(
        RETRIES,
        backoff_factor=BACKOFF_S,
        status_forcelist=(500, 502, 503, 504),
        raise_on_status=False,
        respect_retry_after_header=False,
    )


def _receive(session: Session, url: str, part: Path, tag: Path) -> None:
    """Ask for the rest of `part` and append it; raise urllib3's HTTPError if the connection breaks off."""
    from urllib3.exceptions import ProtocolError

    have = _size(part)
    # Uncompressed: a compressed answer could not be resumed, and a file that is itself a .gz would be unpacked.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.exists():
            headers["If-Range"] = tag.read_text()
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as response:
        start, total = _extent(response)
        if response.status_code == 416 and total == have:
            return
        if start not in (0, have):
            part.unlink(missing_ok=True)
            raise ProtocolError("the server has another file than the one that was begun")
        if start == 0:
            part.write_bytes(b"")  # first, or a process killed in between would leave old bytes with a new ETag
            _keep_validator(response, tag)
        _append(response, part, start, total)
    if total is not None and _size(part) < total:
        raise ProtocolError("the connection was closed early")  # which urllib3 before 2 does not notice


def _extent(response: Response) -> tuple[int, int | None]:
    """Return the position of an answer's first byte in the file, and the file's size if the answer says it (bytes)."""
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return 0, int(length) if length.isdigit() else None
    match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    start, total = (None if group is None else int(group) for group in (match.groups() if match else (None, None)))
    if response.status_code == 206 and start is not None:
        return start, total
    if response.status_code == 416:  # there is nothing after the position that was asked for
        return -1 if total is None else total, total
    raise OSError(f"HTTP {response.status_code} {response.reason}")


def _keep_validator(response: Response, tag: Path) -> None:
    """Keep what identifies the version of a file; a weak ETag does not promise the same bytes."""
    etag = response.headers.get("ETag", "W/")
    validator = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
    if validator:
        tag.write_text(validator)
    else:
        tag.unlink(missing_ok=True)


def _append(response: Response, part: Path, start: int, total: int | None) -> None:
    with part.open("ab") as file, tqdm(initial=start, **_bar_options(part.stem, total)) as bar:
        for chunk in response.raw.stream(CHUNK, decode_content=False):
            file.write(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())


def _bar_options(name: str, total: int | None) -> dict[str, Any]:
    return {"desc": name, "total": total, "unit": "B", "unit_scale": True, "disable": None, "leave": False}


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _unpack_aside(archive: Path, folder: Path) -> None:
    """Unpack beside `folder`, then rename, so that the folder is complete as soon as it exists."""
    aside = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)  # left by a process that was killed
    aside.mkdir()
    try:
        (_unzip if archive.suffix.lower() == ".zip" else _untar)(archive, aside)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _untar(archive: Path, folder: Path) -> None:
    with (
        archive.open("rb") as raw,
        tqdm.wrapattr(raw, "read", **_bar_options(archive.name, _size(archive))) as counted,
        tarfile.open(fileobj=cast(IO[bytes], counted), mode="r:*") as tar,
    ):
        tar.extractall(folder, filter="data")
        _require_end(tar)


def _require_end(tar: tarfile.TarFile) -> None:
    """Read to the very end: tarfile takes a broken header for the end, and gzip compares its checksum only there."""
    assert tar.fileobj is not None
    while block := tar.fileobj.read(CHUNK):
        if block.strip(b"\0"):
            raise tarfile.ReadError("there is more behind the end")


def _unzip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        with tqdm(**_bar_options(archive.name, sum(member.file_size for member in members))) as bar:
            for member in members:
                if not (folder / member.filename).resolve().is_relative_to(folder.resolve()):
                    raise UserError(_outside(archive, member.filename))
                file.extract(member, folder)
                bar.update(member.file_size)


def _outside(archive: Path, member: str) -> str:
    return f"{archive} is not unpacked: its member {member!r} would lie or point outside; get it from another source."
