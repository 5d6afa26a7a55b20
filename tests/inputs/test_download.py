"""Downloads: a file is whole and right or not there at all, whatever happens to the server or to the process."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
from commands import HEAVY, imported, said
from conftest import python, refused
from filelock import FileLock

from pq_sweep.inputs import download
from pq_sweep.inputs.download import CHUNK, RETRIES, extract, fetch, public
from pq_sweep.types import UserError

CONTENT = random.Random(0).randbytes(8 * CHUNK + 12345)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Server:
    """A real server on this machine, which counts what it sends and misbehaves as told."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.ranges = True  # understands Range
        self.etag = '"first"'  # "" for none
        self.validates = True  # obeys If-Range
        self.breaks = 0  # how many answers are cut off ...
        self.after = 3 * CHUNK + 100  # ... after so many bytes
        self.statuses: list[int] = []  # of the next answers; then 200
        self.says_length = True
        self.waits = threading.Event()  # after `after` bytes, unless set
        self.waits.set()
        self.asked: list[str | None] = []  # the Range of every request
        self.sent: list[int] = []  # body bytes of every answer
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"told": self}))
        self.url = f"http://127.0.0.1:{self.http.server_port}/files/some.bin"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.waits.set()
        self.http.shutdown()
        self.http.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers GET as its server is told."""

    told: Server

    def do_GET(self) -> None:
        told = self.told
        wanted = self.headers["Range"]
        told.asked.append(wanted)
        status = told.statuses.pop(0) if told.statuses else 200
        changed = told.validates and self.headers["If-Range"] not in (None, told.etag)
        start = int(wanted[len("bytes=") : -1]) if wanted and told.ranges and not changed else 0
        if start and start >= len(told.content):
            status = 416
        elif status == 200 and start:
            status = 206
        self.answer(status, b"" if status >= 400 else told.content[start:], start)

    def answer(self, status: int, body: bytes, start: int) -> None:
        told, size = self.told, len(self.told.content)
        self.send_response(status)
        if told.says_length:
            self.send_header("Content-Length", str(len(body)))
        if status in (206, 416):
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}" if body else f"bytes */{size}")
        if told.etag:
            self.send_header("ETag", told.etag)
        self.end_headers()
        told.sent.append(0)
        index = len(told.sent) - 1
        if told.breaks and body:
            told.breaks -= 1
            body = body[: told.after]
        for position in range(0, len(body), CHUNK // 4):
            if position >= told.after:
                told.waits.wait(60)
            part = body[position : position + CHUNK // 4]
            self.wfile.write(part)
            told.sent[index] += len(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_S", 0.0)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "new" / "some.bin"


def assert_fetched(target: Path, content: bytes = CONTENT) -> None:
    """The file is right, and nothing but the lock is left beside it."""
    assert target.read_bytes() == content
    assert {path.name for path in target.parent.iterdir()} == {target.name, f".{target.name}.lock"}


def begin(target: Path, size: int = 5 * CHUNK, etag: str | None = '"first"') -> Path:
    """Leave what a killed download leaves."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    part.write_bytes(CONTENT[:size])
    if etag:
        target.with_name(f"{target.name}.part.etag").write_text(etag)
    return part


# Downloading.


@pytest.mark.parametrize("checksum", [None, MD5, SHA256, SHA256.upper()])
def test_file_is_fetched_once(server: Server, target: Path, checksum: str | None) -> None:
    assert fetch(server.url, target, checksum=checksum) == target
    assert_fetched(target)
    assert fetch(server.url, target, checksum=checksum) == target
    assert server.asked == [None]


@pytest.mark.parametrize("content", [b"", b"x", CONTENT[:CHUNK]], ids=len)
@pytest.mark.parametrize("says_length", [True, False])
def test_any_size_is_fetched(server: Server, target: Path, content: bytes, says_length: bool) -> None:
    server.content, server.says_length = content, says_length
    fetch(server.url, target)
    assert_fetched(target, content)


def test_gzip_file_stays_packed(server: Server, target: Path) -> None:
    """Some servers label a .tgz as a compressed answer."""
    server.content = gzip.compress(b"inner" * 1000)
    server.etag = '"x"\r\nContent-Encoding: gzip'
    fetch(server.url, target, checksum=f"md5:{hashlib.md5(server.content).hexdigest()}")
    assert_fetched(target, server.content)


def test_present_file_needs_no_network_and_no_right_to_write(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    target.parent.chmod(0o500)
    try:
        assert fetch("http://127.0.0.1:1/some.bin", target, checksum=MD5) == target
        assert list(target.parent.iterdir()) == [target]
    finally:
        target.parent.chmod(0o700)


# Resuming.


@pytest.mark.parametrize("etag", ['"first"', ""], ids=["with ETag", "without ETag"])
def test_broken_connection_is_resumed(server: Server, target: Path, etag: str) -> None:
    server.breaks, server.etag = 2, etag
    fetch(server.url, target)
    assert_fetched(target)
    assert server.asked[0] is None
    starts = [int(re.sub(r"\D", "", asked)) for asked in server.asked[1:] if asked]
    assert len(starts) == 2
    assert server.after - CHUNK <= starts[0] < starts[1]
    assert sum(server.sent) <= len(CONTENT) + 2 * CHUNK


def test_many_breaks_are_resumed_as_long_as_something_comes(server: Server, target: Path) -> None:
    server.breaks, server.after = 3 * RETRIES, CHUNK + 1
    server.content = CONTENT * 2
    fetch(server.url, target)
    assert_fetched(target, CONTENT * 2)


def test_breaks_without_progress_end(server: Server, target: Path) -> None:
    server.breaks, server.after = 1000, 0
    text = refused(lambda: fetch(server.url, target))
    assert f"{server.url} cannot be downloaded (the connection breaks off); put some.bin at {target}." == text
    assert len(server.asked) == RETRIES + 1


@pytest.mark.parametrize(("etag", "checksum"), [('"first"', None), ('"first"', MD5), (None, MD5)])
def test_begun_download_is_continued(server: Server, target: Path, etag: str | None, checksum: str | None) -> None:
    begin(target, 5 * CHUNK, etag)
    fetch(server.url, target, checksum=checksum)
    assert_fetched(target)
    assert server.asked == [f"bytes={5 * CHUNK}-"]
    assert server.sent == [len(CONTENT) - 5 * CHUNK]


def test_begun_download_of_unknown_version_starts_anew(server: Server, target: Path) -> None:
    """Without ETag and checksum nothing would tell a file mixed from two versions."""
    begin(target, etag=None).write_bytes(b"other" * CHUNK)
    fetch(server.url, target)
    assert_fetched(target)
    assert server.asked == [None]


@pytest.mark.parametrize("breaks", [0, 1])
def test_server_without_range_starts_anew(server: Server, target: Path, breaks: int) -> None:
    server.ranges, server.breaks = False, breaks
    begin(target)
    fetch(server.url, target, checksum=MD5)
    assert_fetched(target)


def test_changed_file_starts_anew(server: Server, target: Path) -> None:
    begin(target, etag='"older"').write_bytes(b"older and longer" * CHUNK)
    fetch(server.url, target)
    assert_fetched(target)


@pytest.mark.parametrize("checksum", [None, MD5])
def test_complete_download_is_only_renamed(server: Server, target: Path, checksum: str | None) -> None:
    begin(target, len(CONTENT))
    fetch(server.url, target, checksum=checksum)
    assert_fetched(target)
    assert sum(server.sent) == 0


def test_too_long_download_starts_anew(server: Server, target: Path) -> None:
    begin(target).write_bytes(CONTENT + b"more")
    fetch(server.url, target)
    assert_fetched(target)


def test_killed_download_is_resumed(server: Server, target: Path) -> None:
    server.waits.clear()
    imports = "from pathlib import Path; from pq_sweep.inputs.download import fetch"
    code = f"{imports}; fetch({server.url!r}, Path({str(target)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code])
    part = target.with_name("some.bin.part")
    until(lambda: part.exists() and part.stat().st_size >= 3 * CHUNK)
    process.send_signal(signal.SIGKILL)
    process.wait()
    server.waits.set()
    assert not target.exists()
    kept = part.stat().st_size
    fetch(server.url, target)
    assert_fetched(target)
    assert server.asked == [None, f"bytes={kept}-"]
    assert server.sent[1] == len(CONTENT) - kept


def until(condition: Callable[[], bool], limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_two_processes(call: str, made: Path) -> None:
    """Run `call` in two processes that both found `made` absent before either could begin."""
    setting = "import logging; logging.basicConfig(level='INFO'); from pathlib import Path"
    code = f"{setting}; from pq_sweep.inputs.download import extract, fetch; {call}"
    made.parent.mkdir(exist_ok=True)
    with FileLock(made.with_name(f".{made.name}.lock")):
        run = partial(subprocess.Popen, [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
        processes = [run(), run()]
        for process in processes:
            assert process.stderr is not None
            assert f"waiting for another process that makes {made}" in process.stderr.readline()
    for process in processes:
        _, printed = process.communicate(timeout=60)
        assert process.returncode == 0, printed


def test_two_processes_fetch_once(server: Server, target: Path) -> None:
    in_two_processes(f"fetch({server.url!r}, Path({str(target)!r}), checksum={MD5!r})", target)
    assert_fetched(target)
    assert server.asked == [None]


# Checksums.


@pytest.mark.parametrize("checksum", [f"md5:{'0' * 32}", f"sha256:{'0' * 64}"])
def test_wrong_download_is_no_file(server: Server, target: Path, checksum: str) -> None:
    text = refused(lambda: fetch(server.url, target, checksum=checksum, hint="or give dataset.root=/path"))
    algorithm, digits = checksum.split(":")
    found = hashlib.new(algorithm, CONTENT).hexdigest()
    assert text == (
        f"what {server.url} sends has the {algorithm} {found} instead of {digits};"
        f" try again, or put some.bin at {target}, or give dataset.root=/path."
    )
    assert [path.name for path in target.parent.iterdir()] == [".some.bin.lock"]
    fetch(server.url, target, checksum=MD5)
    assert_fetched(target)


def test_resumed_part_of_another_file_is_seen(server: Server, target: Path) -> None:
    server.validates = False
    begin(target, etag=None).write_bytes(b"other" * CHUNK)
    assert "try again" in refused(lambda: fetch(server.url, target, checksum=MD5))
    fetch(server.url, target, checksum=MD5)
    assert_fetched(target)


@pytest.mark.parametrize("checksum", [f"md5:{'0' * 32}", f"sha256:{'0' * 64}"])
def test_wrong_file_is_named_and_kept(server: Server, target: Path, checksum: str) -> None:
    fetch(server.url, target)
    text = refused(lambda: fetch(server.url, target, checksum=checksum))
    assert text.startswith(f"{target} has the {checksum.split(':')[0]} ")
    assert text.endswith(f"; delete it, or put some.bin at {target}.")
    assert_fetched(target)


@pytest.mark.parametrize("suffix", ["pth", "pt", "pth.tar"])
def test_hash_in_a_name_is_checked(server: Server, tmp_path: Path, suffix: str) -> None:
    """As torch.hub does."""
    right = tmp_path / f"net-{SHA256[7:15]}.{suffix}"
    fetch(server.url, right)
    assert right.read_bytes() == CONTENT
    wrong = tmp_path / f"net-{'0' * 8}.{suffix}"
    assert "instead of 00000000; try again" in refused(lambda: fetch(server.url, wrong))
    assert not wrong.exists()
    wrong.write_bytes(CONTENT)
    assert "instead of 00000000; delete it" in refused(lambda: fetch(server.url, wrong))
    fetch(server.url, wrong, checksum=SHA256)


@pytest.mark.parametrize("name", ["net-20240131.pth", "net-1234567.pth", "net-cafecafe.tgz", "net-v2.pth", "net.pth"])
def test_other_names_have_no_hash(server: Server, tmp_path: Path, name: str) -> None:
    assert fetch(server.url, tmp_path / name).read_bytes() == CONTENT


def test_every_name_of_torchvision_has_a_hash() -> None:
    import torchvision
    from torchvision.models import get_model_weights, list_models

    models = list_models(torchvision.models)
    names = [public(weights.url).rpartition("/")[2] for model in models for weights in get_model_weights(model)]
    assert len(names) > 100
    assert [name for name in names if not download.NAMED_HASH.search(name)] == []


@pytest.mark.parametrize("checksum", ["", "md5", "md5:12", f"sha1:{'0' * 40}", "0" * 32, f"md5:{'g' * 32}"])
def test_checksum_that_is_none_is_refused(target: Path, checksum: str) -> None:
    assert "sha256:<64 hex digits>" in refused(lambda: fetch("http://127.0.0.1:1/x", target, checksum=checksum))


# Failures.


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_offline_says_what_to_put_where(target: Path) -> None:
    url = f"http://127.0.0.1:{closed_port()}/files/some.bin"
    assert refused(lambda: fetch(url, target, hint="or give dataset.root=/path")) == (
        f"{url} cannot be downloaded (Connection refused); put some.bin at {target}, or give dataset.root=/path."
    )
    assert not target.exists()


def test_offline_keeps_what_was_begun(server: Server, target: Path) -> None:
    part = begin(target)
    refused(lambda: fetch(f"http://127.0.0.1:{closed_port()}/files/some.bin", target))
    assert part.stat().st_size == 5 * CHUNK
    fetch(server.url, target)
    assert_fetched(target)
    assert server.asked == [f"bytes={5 * CHUNK}-"]


@pytest.mark.parametrize("status", [403, 404])
def test_missing_file_is_not_asked_for_again(server: Server, target: Path, status: int) -> None:
    server.statuses = [status] * 10
    assert f"cannot be downloaded (HTTP {status} " in refused(lambda: fetch(server.url, target))
    assert len(server.asked) == 1


def test_failing_server_is_asked_again(server: Server, target: Path) -> None:
    server.statuses = [500, 503]
    fetch(server.url, target)
    assert_fetched(target)
    assert len(server.asked) == 3


def test_broken_server_is_given_up(server: Server, target: Path) -> None:
    server.statuses = [503] * 100
    assert "(HTTP 503 Service Unavailable)" in refused(lambda: fetch(server.url, target))
    assert len(server.asked) == RETRIES + 1


def test_silent_server_is_given_up(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "TIMEOUT_S", (0.1, 0.1))
    server.waits.clear()
    server.after = 0
    assert "(no answer in time)" in refused(lambda: fetch(server.url, target))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///etc/hostname", "that is no http or https address"),
        ("s3://bucket/some.bin", "that is no http or https address"),
        ("some.bin", "that is no http or https address"),
        ("http://[::1/some.bin", "that is no http or https address"),
        (f"http://{'a' * 70}/some.bin", "that is no http or https address"),
        ("http:///some.bin", "that is no http or https address"),
    ],
)
def test_other_addresses_are_refused(target: Path, url: str, reason: str) -> None:
    assert f"({reason})" in refused(lambda: fetch(url, target))


SECRETS = "me:|pa55w|t0ken|fr4gment"


@pytest.mark.parametrize("statuses", [[404], [200], [503] * 9], ids=str)
def test_secrets_of_an_address_are_not_told(
    server: Server, target: Path, caplog: pytest.LogCaptureFixture, statuses: list[int]
) -> None:
    caplog.set_level("DEBUG")
    server.statuses = statuses
    url = f"{server.url.replace('//', '//me:pa55w@')}?key=t0ken#fr4gment"
    shown = refused(lambda: fetch(url, target, checksum=f"md5:{'0' * 32}")) + caplog.text
    assert server.url in shown
    assert not re.search(SECRETS, shown)


def test_secrets_are_not_told_when_nobody_answers(target: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://me:pa55w@127.0.0.1:{closed_port()}/some.bin?key=t0ken"
    assert not re.search(SECRETS, refused(lambda: fetch(url, target)) + caplog.text)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a@b/c.tgz", "https://host/a@b/c.tgz"),
        ("https://me:pw@host:80/c.tgz?x=1&y=@#z", "https://host:80/c.tgz"),
        ("https://me:p?w@host/c.tgz", "https://host/c.tgz"),
    ],
)
def test_public_address(url: str, shown: str) -> None:
    assert public(url) == shown


def test_full_disk_is_one_sentence(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = refused(lambda: fetch(server.url, target))
    assert text == f"{server.url} cannot be downloaded (No space left on device); put some.bin at {target}."
    monkeypatch.undo()
    fetch(server.url, target)
    assert_fetched(target)


def test_folder_that_is_a_file_is_one_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert f"(File exists: {tmp_path}/file)" in refused(lambda: fetch(server.url, tmp_path / "file" / "some.bin"))


def test_unwritable_folder_is_one_sentence(server: Server, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write everywhere")
        assert "(Permission denied: " in refused(lambda: fetch(server.url, tmp_path / "some.bin"))
    finally:
        tmp_path.chmod(0o700)


def test_a_bug_is_no_sentence(server: Server, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests.Session, "get", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch(server.url, target)


def test_importing_imports_no_framework(tmp_path: Path, environment: dict[str, str]) -> None:
    done = python(["-X", "importtime", "-c", "import pq_sweep.inputs.download"], tmp_path, environment)
    assert done.returncode == 0, said(done.stderr)
    assert "filelock" in imported(done.stderr)
    assert not (HEAVY | {"requests", "urllib3", "numpy"}) & imported(done.stderr)


def test_nothing_is_drawn_without_a_terminal(server: Server, target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(server.url, target)
    assert capfd.readouterr() == ("", "")


# Archives.

FILES = {"top/train/a/1.txt": b"one" * 100_000, "top/train/b/2.txt": b"two", "top/val/a/3.txt": b""}


def pack(archive: Path, files: dict[str, bytes] = FILES, links: dict[str, str] | None = None) -> Path:
    """Write an archive of the kind that its name says."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for name, content in files.items():
                zipped.writestr(name, content)
        return archive
    kind = {".tgz": "gz", ".gz": "gz", ".xz": "xz", ".bz2": "bz2"}.get(archive.suffix, "")
    with tarfile.open(archive, f"w:{kind}") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, to in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, to
            tar.addfile(member)
    return archive


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


KINDS = pytest.mark.parametrize("name", ["a.tgz", "a.tar", "a.tar.gz", "a.tar.xz", "a.tar.bz2", "a.zip"])


@KINDS
def test_archive_is_unpacked_once(tmp_path: Path, name: str) -> None:
    archive, folder = pack(tmp_path / name), tmp_path / "new" / "folder"
    extract(archive, folder)
    assert content_of(folder) == FILES
    assert {path.name for path in folder.parent.iterdir()} == {"folder", ".folder.lock"}
    archive.unlink()
    extract(archive, folder)


@KINDS
@pytest.mark.parametrize("member", ["../outside.txt", "top/../../outside.txt", "{tmp}/outside.txt"])
def test_member_outside_is_refused(tmp_path: Path, name: str, member: str) -> None:
    archive = pack(tmp_path / name, FILES | {member.format(tmp=tmp_path): b"evil"})
    folder = tmp_path / "in" / "folder"
    if name != "a.zip" and "{tmp}" in member:  # tarfile takes absolute names as relative ones
        extract(archive, folder)
    else:
        text = refused(lambda: extract(archive, folder))
        assert text.startswith(f"{archive} is not unpacked: its member ")
        assert "outside.txt" in text
        assert [path.name for path in folder.parent.iterdir()] == [".folder.lock"]
    assert not list(tmp_path.glob("outside.txt"))
    assert not list(tmp_path.glob("in/outside.txt"))


@pytest.mark.parametrize("to", ["../../..", "/etc"])
def test_link_outside_is_refused(tmp_path: Path, to: str) -> None:
    archive = pack(tmp_path / "a.tgz", FILES, {"top/link": to})
    assert "'top/link' would lie or point outside" in refused(lambda: extract(archive, tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def cut_off(archive: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-200])


def no_archive(archive: Path) -> None:
    archive.write_bytes(b"<html>please log in</html>" * 100)


def empty(archive: Path) -> None:
    archive.write_bytes(b"")


def bits_flipped(archive: Path) -> None:
    content = bytearray(archive.read_bytes())
    position = content.find(b"top/train/b/2.txt")  # in a plain tar the header, which names a file; else the middle
    position = len(content) // 2 if position < 0 else position
    content[position] ^= 0xFF
    archive.write_bytes(content)


@KINDS
@pytest.mark.parametrize("damage", [cut_off, no_archive, empty, bits_flipped])
def test_damaged_archive_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    archive = pack(tmp_path / name, FILES | {"top/noise.bin": CONTENT[:10_000], "top/z.txt": b"z"})
    if damage is cut_off and name == "a.tar":
        archive.write_bytes(archive.read_bytes()[:200_000])
    else:
        damage(archive)
    folder = tmp_path / "in" / "folder"
    assert refused(lambda: extract(archive, folder)) == f"{archive} is damaged or no archive; delete it and try again."
    assert [path.name for path in folder.parent.iterdir()] == [".folder.lock"]
    pack(archive)
    extract(archive, folder)
    assert content_of(folder) == FILES


def test_missing_archive_is_named(tmp_path: Path) -> None:
    text = refused(lambda: extract(tmp_path / "none.tgz", tmp_path / "folder"))
    assert f"(No such file or directory: {tmp_path / 'none.tgz'})" in text


KILLED = """
import tarfile, time
from pathlib import Path
from pq_sweep.inputs.download import extract
whole = tarfile.TarFile.extractall
def stop(self, path, **options):
    whole(self, path, **options)
    print("unpacked", flush=True)
    time.sleep(60)
tarfile.TarFile.extractall = stop
extract(Path("a.tgz"), Path("folder"))
"""


def test_killed_extraction_is_no_folder(tmp_path: Path) -> None:
    archive, folder = pack(tmp_path / "a.tgz"), tmp_path / "folder"
    process = subprocess.Popen([sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "unpacked\n"
    process.kill()
    process.communicate()
    assert not folder.exists()
    (tmp_path / ".folder.unpacking" / "left.txt").touch()
    extract(archive, folder)
    assert content_of(folder) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"a.tgz", "folder", ".folder.lock"}


def test_two_processes_unpack_once(tmp_path: Path) -> None:
    archive, folder = pack(tmp_path / "a.tgz"), tmp_path / "folder"
    in_two_processes(f"extract(Path({str(archive)!r}), Path({str(folder)!r}))", folder)
    assert content_of(folder) == FILES
    assert {path.name for path in tmp_path.iterdir()} == {"a.tgz", "folder", ".folder.lock"}


def test_full_disk_is_not_a_damaged_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    archive = pack(tmp_path / "a.tgz")
    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(UserError, match=r"cannot be unpacked to .* \(No space left on device\)\.$"):
        extract(archive, tmp_path / "folder")
    assert archive.exists()
