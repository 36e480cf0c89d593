from __future__ import annotations

from pathlib import Path

import pytest

from aps.journal import read_history

GOOD = '{"step": 1, "loss": 2.0}'


@pytest.mark.parametrize(
    "bad", ["", "{", "[1, 2]", "null", "7", '{"loss": 1}', '{"step": "1"}', '{"step": true}', "[" * 5000, "\x00"]
)
def test_a_damaged_line_is_passed_over_with_a_warning_and_the_good_ones_are_kept(
    bad: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text(f"{bad}\n{GOOD}\n{bad}\n" + GOOD.replace("1", "2") + "\n")
    assert [line["step"] for line in read_history(file)] == [1, 2]
    assert [line["step"] for line in read_history(file, skip=1)] == [2]
    warned = capsys.readouterr().err.splitlines()
    assert warned == [f"warning: {file}: line 1 and 1 more damaged and passed over; the others are kept"]


def test_a_last_line_cut_off_by_a_kill_is_left_out_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "history.jsonl"
    file.write_text(f"{GOOD}\n{GOOD[:9]}")
    assert len(read_history(file)) == 1 and not capsys.readouterr().err


def test_bytes_that_are_no_text_are_a_damaged_line(tmp_path: Path) -> None:
    file = tmp_path / "history.jsonl"
    file.write_bytes(b"\xff\xfe\n" + GOOD.encode() + b"\n")
    assert len(read_history(file)) == 1
