"""What a long step shows: lines in logs, a moving bar on a terminal, nothing on other ranks."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import termios

import pytest

import aps.progress
from aps.progress import BAR_LETTERS, LINE_SECONDS, Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds, moved by the test."""
    now = [100.0]
    monkeypatch.setattr(aps.progress.time, "monotonic", lambda: now[0])
    return now


def run(clock: list[float], updates: int, seconds: float, label: str = "pretrain aps/seed0", done: int = 0) -> None:
    with Progress(label, 80, "batches", done) as progress:
        for _ in range(updates):
            clock[0] += seconds
            progress.update(1, 128, "loss 1.234")


def test_a_log_gets_a_line_with_bar_share_count_rate_note_and_time_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 32, 10.0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == (
        "pretrain aps/seed0        [########------------]  40%  32/80 batches  13 images/s  loss 1.234  8:00 left"
    )


def test_lines_come_every_ten_seconds_after_a_first_early_one(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 79, 1.0)
    counts = [int(n) for n in re.findall(r"(\d+)/80", capsys.readouterr().err)]
    assert counts == list(range(2, 80, int(LINE_SECONDS)))


def test_the_last_line_says_how_long_it_took(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 80, 60.0)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"[{'#' * BAR_LETTERS}] 100%  80/80 batches" in last and last.endswith("1:20:00 in all")


def test_a_resumed_step_counts_from_where_it_was_and_times_what_is_new(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run(clock, 20, 6.0, done=40)
    last = capsys.readouterr().err.splitlines()[-1]
    assert " 73%  59/80 batches  21 images/s" in last and last.endswith("2:06 left")


def test_nearly_all_is_not_called_all(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("knn", 1000, "images") as progress:
        clock[0] += 60
        progress.update(999)
    line = capsys.readouterr().err
    assert " 99%  999/1000 images  " in line and "images/s" not in line


def test_nothing_to_do_is_no_division_by_zero(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("knn", 0, "images") as progress:
        progress.update(0)
    assert "100%  0/0 images" in capsys.readouterr().err


def test_lines_of_several_jobs_stand_under_each_other(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for label in ("knn aps/seed0", "finetune random/seed12"):
        run(clock, 3, 10.0, label)
    assert len({line.index("[") for line in capsys.readouterr().err.splitlines()}) == 1


def test_other_ranks_are_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("pretrain", 10, "batches", shown=False) as progress:
        clock[0] += 100
        progress.update(10)
    assert capsys.readouterr().err == ""


def test_a_log_has_no_control_characters(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    run(clock, 80, 10.0)
    text = capsys.readouterr().err
    assert text.endswith("\n") and all(c.isprintable() or c == "\n" for c in text)


def test_a_terminal_gets_a_bar_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Progress("pretrain aps/seed0", 4, "batches") as progress:
            for _ in range(4):
                progress.update(1, 128, "loss 1.234")
        terminal.flush()
        shown = ""
        while "100%" not in shown and select.select([ours], [], [], 5)[0]:  # a terminal hands it over in pieces
            shown += os.read(ours, 100_000).decode()
    os.close(ours)
    assert "pretrain aps/seed0" in shown and "\r" in shown and "100%" in shown
