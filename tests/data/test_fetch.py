import io
import os
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from miniatures import md5, tar

from aps.data import fetch
from aps.errors import UserError
from aps.settings.blocks import SourceSettings

CONTENT = os.urandom(3_000_000)


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT; breaks off after `cut` bytes of each answer while `cuts` last; `ranges` False ignores Range."""

    cut = 0
    cuts = 0
    ranges = True
    status = 200
    asked: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        kind = type(self)
        asked = self.headers.get("Range")
        kind.asked.append(asked)
        if kind.status != 200:
            self.send_error(kind.status)
            return
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and kind.ranges else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        if kind.cuts > 0:
            kind.cuts -= 1
            body = body[: kind.cut]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture()
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Server]]:
    kind = type("OneServer", (Server,), {"asked": []})
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as http:
        kind.url = f"http://127.0.0.1:{http.server_port}/file.bin"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield kind
        http.shutdown()
        thread.join()


def published(server: type[Server], checksum: str = md5(CONTENT)) -> fetch.Published:
    return fetch.Published("file.bin", server.url, checksum)


def test_a_download_is_whole_and_verified(server: type[Server], tmp_path: Path) -> None:
    path = fetch.download(published(server), tmp_path / "download")
    assert path.read_bytes() == CONTENT
    assert fetch.download(published(server), tmp_path / "download") == path
    assert len(server.asked) == 1  # the second call found it
    assert [file.name for file in (tmp_path / "download").iterdir()] == ["file.bin"]


def test_a_broken_connection_is_resumed_where_it_broke(server: type[Server], tmp_path: Path) -> None:
    server.cut, server.cuts = 1_000_000, 2
    assert fetch.download(published(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=1000000-", "bytes=2000000-"]


def test_a_killed_download_is_resumed_by_the_next_run(server: type[Server], tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:2_500_000])
    assert fetch.download(published(server), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=2500000-"]


def test_a_download_killed_just_before_its_end_is_taken_as_it_is(server: type[Server], tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch.download(published(server), tmp_path).read_bytes() == CONTENT


def test_a_server_that_cannot_resume_sends_all_of_it_again(server: type[Server], tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:2_500_000])
    assert fetch.download(published(server), tmp_path).read_bytes() == CONTENT


def test_a_download_with_another_checksum_is_discarded(server: type[Server], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=f"the download's md5 is {md5(CONTENT)} instead of the published 0123; it was discarded"
    ):
        fetch.download(published(server, "0123"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"sha256 is .* instead of the published 4567"):
        fetch.download(published(server)._replace(sha256="4567"), tmp_path)


def test_a_download_that_keeps_failing_says_what_to_do_and_keeps_what_came(
    server: type[Server], tmp_path: Path
) -> None:
    server.cut, server.cuts = 100_000, 99
    with pytest.raises(UserError, match=r"failed after 500,000 bytes \(the server closed after .*run again to go on"):
        fetch.download(published(server), tmp_path)
    assert (tmp_path / "file.bin.part").stat().st_size == 500_000


def test_a_missing_file_on_the_server_is_not_asked_for_again(server: type[Server], tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(UserError, match=r"file.bin: download failed after 0 bytes \(Not Found\)"):
        fetch.download(published(server), tmp_path)
    assert len(server.asked) == 1


def test_no_server_at_all_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "RETRY_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"download failed after 0 bytes .*put file.bin in a folder"):
        fetch.download(fetch.Published("file.bin", "http://127.0.0.1:1/file.bin", ""), tmp_path)


def test_a_source_that_does_not_exist_names_its_key() -> None:
    with pytest.raises(UserError, match=r"sources.cifar10.path: /no/such does not exist; do this"):
        fetch.source_path("cifar10", SourceSettings(path="/no/such"), "do this")
    with pytest.raises(
        UserError, match=r"sources.cifar10.download is false and sources.cifar10.path is not set; do this"
    ):
        fetch.source_path("cifar10", SourceSettings(download=False), "do this")


def test_a_checksum_is_taken_once_and_again_when_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "a.tar"
    archive.write_bytes(CONTENT)
    file = fetch.Published("a.tar", None, md5(CONTENT))
    fetch.verify(archive, file, tmp_path)
    real = fetch._checksum
    monkeypatch.setattr(fetch, "_checksum", None)  # would fail if called
    fetch.verify(archive, file, tmp_path)
    monkeypatch.setattr(fetch, "_checksum", real)
    archive.write_bytes(CONTENT[:-1])
    with pytest.raises(
        UserError, match=f"a.tar: its md5 is {md5(CONTENT[:-1])}, but the publisher's a.tar has {md5(CONTENT)}"
    ):
        fetch.verify(archive, file, tmp_path)


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../up", "..\\up", "C:/up", "a/b\0c", ""])
def test_a_member_outside_its_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"points outside its folder; refused"):
        fetch.safe_name(Path("a.tar"), name)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_an_archive_are_refused(kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        member = tarfile.TarInfo("images/0001.JPEG")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with (
        tarfile.open(fileobj=io.BytesIO(out.getvalue())) as archive,
        pytest.raises(UserError, match=r"is a link or device"),
    ):
        fetch.regular_members(Path("a.tar"), archive)


def test_a_window_reads_like_the_file_it_shows(tmp_path: Path) -> None:
    inner = tar({"a": b"1" * 1000, "b": b"2" * 2000})
    (tmp_path / "outer").write_bytes(b"x" * 777 + inner + b"y" * 50)
    with open(tmp_path / "outer", "rb") as file:
        window = fetch.Window(file, 777, len(inner))
        assert window.read() == inner and window.read(5) == b""
        window.seek(-3, os.SEEK_END)
        assert window.tell() == len(inner) - 3
        window.seek(0)
        with tarfile.open(fileobj=window, mode="r:") as archive:
            assert archive.extractfile("b").read() == b"2" * 2000


def test_the_first_error_of_a_parallel_job_stops_the_rest() -> None:
    started: list[int] = []

    def work(i: int) -> None:
        started.append(i)
        if i == 3:
            raise UserError("three")

    with pytest.raises(UserError, match=r"three"):
        fetch.parallel(work, range(10_000), "work", workers=2)
    assert len(started) < 10_000


def test_an_error_stops_the_rest_before_its_turn() -> None:
    """Item 0 takes long, and errors are raised in order: what comes after the error must not run meanwhile."""
    started: list[int] = []

    def work(i: int) -> None:
        started.append(i)
        if i == 0:
            until = time.monotonic() + 1
            while len(started) < 300 and time.monotonic() < until:
                time.sleep(0.01)
        elif i == 3:
            raise UserError("three")
        else:
            time.sleep(0.001)

    with pytest.raises(UserError, match=r"three"):
        fetch.parallel(work, range(10_000), "work", workers=2)
    assert len(started) < 300


def test_damaged_archives_of_every_kind_are_one_sentence(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"neither tar nor zip")
    with pytest.raises(UserError, match=r"truncated or damaged archive"), fetch.archive_errors(bad):
        tarfile.TarFile.open(bad, "r:").close()
    with pytest.raises(UserError, match=r"truncated or damaged archive"), fetch.archive_errors(bad):
        zipfile.ZipFile(bad)
    bad.write_bytes(tar({"a": os.urandom(5000)}, "w:gz")[:3000])
    with pytest.raises(UserError, match=r"truncated or damaged archive"), fetch.archive_errors(bad):
        tarfile.TarFile.open(bad, "r:gz").extractfile("a").read()
