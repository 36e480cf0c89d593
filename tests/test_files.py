"""Files that are whole or not there, and messages where the disk refuses."""

from __future__ import annotations

import json
import os
import pwd
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from aps.errors import UserError
from aps.files import append, atomic_path, expanded, read_json, sweep, write_bytes, write_json
from aps.inference import figures
from aps.models.weights import save_encoder, save_tensors
from aps.runtime.checkpoint import Checkpoints
from aps.settings.blocks import EncoderSettings


def test_what_is_written_is_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None], "ü": {"b": True}}
    write_json(tmp_path / "new" / "folder" / "file.json", content)
    assert read_json(tmp_path / "new" / "folder" / "file.json") == content


def test_an_error_within_the_block_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_content_that_is_no_json_leaves_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, 1)
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == 1 and list(tmp_path.iterdir()) == [file]


def test_others_can_read_what_was_written(tmp_path: Path) -> None:
    write_json(tmp_path / "file", 1)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


def replaced_by_a_private_file(file: Path) -> None:
    """What safetensors' `save_file` does, and any library that writes through `tempfile`."""
    handle, other = tempfile.mkstemp(dir=file.parent)
    os.write(handle, b"new")
    os.close(handle)
    os.replace(other, file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "bytes": lambda file: write_bytes(file, b"new"),
    "json": lambda file: write_json(file, 1),
    "tensors": lambda file: save_tensors({"x": torch.zeros(2)}, file),
    "encoder": lambda file: save_encoder(torch.nn.Linear(2, 2), EncoderSettings(), file),
    "torch": lambda file: written(file, lambda temporary: torch.save(torch.zeros(2), temporary)),
    "checkpoint": lambda file: Checkpoints(file.parent / "states").save(1, {}),
    "parquet": lambda file: written(file, lambda temporary: pq.write_table(pa.table({"x": [1]}), temporary)),
    "picture": lambda file: figures.grid(file, [("", [figures.Cell(None)])]),
    "private": lambda file: written(file, replaced_by_a_private_file),
}


def written(file: Path, write: Callable[[Path], object]) -> None:
    with atomic_path(file) as temporary:
        write(temporary)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
@pytest.mark.parametrize("kind", WRITERS)
def test_the_umask_decides_who_may_read_whatever_library_writes(tmp_path: Path, kind: str, umask: int) -> None:
    before = os.umask(umask)
    try:
        WRITERS[kind](tmp_path / "file")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}


@pytest.mark.parametrize("name", [".", "..", "/", "folder", "folder/", "folder/.."])
def test_a_folder_in_place_of_a_file_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"cannot be written, because it is a folder; name a file") as caught:
        write_json(Path(name), 1)
    assert str(caught.value).startswith(f"{Path(name)}: ") and list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process rewrites a file as fast as it can and is killed, again and again; a reader never sees a part."""
    file, size = tmp_path / "file.json", 20_000
    write_json(file, [0] * size)
    code = (
        "import sys; from pathlib import Path; from aps.files import write_json; n = 1\n"
        f"while True: write_json(Path(sys.argv[1]), [n] * {size}); n += 1"
    )
    for _ in range(3):
        before = file.stat().st_mtime_ns
        writer = subprocess.Popen([sys.executable, "-c", code, str(file)])
        while file.stat().st_mtime_ns == before and writer.poll() is None:
            time.sleep(0.01)
        for _ in range(20):
            values = json.loads(file.read_text())
            assert len(values) == size and len(set(values)) == 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        values = read_json(file)
        assert len(values) == size and values[0] > 0


@pytest.mark.parametrize("act", [lambda file: write_json(file, 1), read_json])
def test_a_path_through_a_file_is_one_sentence(tmp_path: Path, act: object) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x.json: cannot be (written|read) \((Not a directory|File exists)\)"):
        act(tmp_path / "file" / "x.json")  # type: ignore[operator]


def test_a_full_disk_is_one_sentence_and_keeps_the_old_content(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    said = r"file: cannot be written \(No space left on device\); free space or choose"
    with pytest.raises(UserError, match=said), atomic_path(file) as temporary:
        temporary.unlink()
        os.symlink("/dev/full", temporary)
        temporary.write_text("new")
    assert file.read_text() == "old"


def test_a_missing_and_a_broken_file_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.json: cannot be read \(No such file or directory\); run the stage"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"broken.json: not valid JSON; delete it and run the stage"):
        read_json(tmp_path / "broken.json")


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    append(file, "first\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # a part of the second line fits
    try:
        with pytest.raises(UserError, match=r"history.jsonl: cannot be written \(File too large\); free space"):
            append(file, "second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "first\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "history.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"history.jsonl: cannot be written \(No space left on device\); free space"):
        append(tmp_path / "history.jsonl", "line\n")


def test_what_a_killed_write_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    left = [".run.json.123-0a1b2c3d", ".state-000000001.pt.9-ffffffff"]
    others = ["run.json", ".claim", ".run.json.new", ".hidden.123-xyz", "name.1-0a1b2c3d"]
    for name in left + others:
        (tmp_path / name).touch()
    sweep(tmp_path, seconds=3600)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(left + others)
    sweep(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(others)


def test_a_home_folder_that_nobody_has_is_one_sentence_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == Path("/home/me/x") and expanded("y~") == Path("y~")
    with pytest.raises(UserError, match=r"^key: ~nobody-here/x: there is no user 'nobody-here' on this machine; write"):
        expanded("~nobody-here/x", "key")

    def nobody(number: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(UserError, match=r"^~/x: HOME is not set; write the path in full"):
        expanded("~/x")
