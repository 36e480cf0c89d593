"""Texts are read and written alike whatever the locale is, and what a stream can't take ends no verb."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aps import cli

ROOT = Path(__file__).parent.parent
NO_LETTERS = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
STUDY = """
study: letters
question: Wie viele Äpfel, für…?
experiments: {e: {dataset: digits, stages: [pretrain], encoder: {arch: micro, image_size: 16, patch_size: 4}}}
"""


def calls_without_encoding(code: str) -> Iterator[str]:
    """Each call that opens a text file without saying its encoding, which would be the locale's."""
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name, receiver = getattr(node.func, "attr", getattr(node.func, "id", "")), getattr(node.func, "value", None)
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if name == "write_text" and len(modes) == 1 and not node.keywords and modes[0].isascii():
            continue  # such a text is the same in every locale
        of_library = ast.unparse(receiver).split(".")[-1] in ("os", "Image", "tarfile", "zip") if receiver else False
        if name in ("read_text", "write_text") or (
            name == "open" and not of_library and modes and "b" not in modes[-1]
        ):
            yield f"{node.lineno}: {ast.unparse(node)}"


def test_every_text_file_of_the_package_has_an_encoding() -> None:
    files = [*(ROOT / "aps").rglob("*.py"), *(ROOT / "workflow").rglob("*.py")]
    found = [f"{file}:{call}" for file in files for call in calls_without_encoding(file.read_text(encoding="utf-8"))]
    assert len(files) > 100 and found == []


def test_a_call_without_encoding_would_be_seen() -> None:
    for code in ("path.read_text()", "path.write_text('x', errors='replace')", "path.open('w')", "open(path, 'a')"):
        assert len(list(calls_without_encoding(code))) == 1, code
    assert not list(calls_without_encoding("open(path, 'rb'); os.open(path, flags); path.open('w', encoding='utf-8')"))


def aps(folder: Path, *arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = f'"$@" {redirect}'
    return subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-m", "aps", *arguments],
        cwd=folder, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("environment", [NO_LETTERS, {"PYTHONIOENCODING": "ascii:strict"}], ids=["locale", "strict"])
def test_letters_that_a_stream_does_not_have_are_escaped(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    done = aps(tmp_path, "results", "--configfile", "s.yaml", **environment)
    assert done.returncode == 0 and rb"Wie viele \xc4pfel, f\xfcr\u2026?" in done.stdout, done
    done = aps(tmp_path, "check", "--configfile", "ö.yaml", **environment)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr, done


def test_messages_for_a_closed_stderr_do_not_land_in_stdout(tmp_path: Path) -> None:
    done = aps(tmp_path, "check", "--configfile", "gone.yaml", redirect="2>&-")
    assert (done.returncode, done.stdout) == (2, b"")


def test_a_full_disk_under_standard_output_is_named(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    for unbuffered, what in (("", b"standard output"), ("1", b"a file, or standard output")):
        command = ("results", "--configfile", "s.yaml")
        done = aps(tmp_path, *command, redirect=">/dev/full", PYTHONUNBUFFERED=unbuffered)
        said = b"error: %s: No space left on device; free space or choose another folder\n" % what
        assert (done.returncode, done.stderr) == (2, said)


def test_a_reader_that_has_enough_is_no_message(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(STUDY, encoding="utf-8")
    assert aps(tmp_path, "results", "--configfile", "s.yaml", redirect="| true", PYTHONUNBUFFERED="").stderr == b""


def test_streams_that_cannot_be_changed_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO())
    assert cli.main(["check", "--configfile", "gone.yaml"]) == 2
    assert "gone.yaml" in sys.stderr.getvalue()  # type: ignore[attr-defined]


def test_a_mistake_with_a_name_of_no_letters_is_noted(tmp_path: Path) -> None:
    note = tmp_path / "mistake"
    for attempt in ("1", "2"):
        arguments = ["--configfile", "gone\udcff.yaml", "--mistake", str(note), "--attempt", attempt]
        assert cli.main(["knn", *arguments]) == 2
        assert r"gone\udcff.yaml: cannot be read" in note.read_text(encoding="utf-8")
