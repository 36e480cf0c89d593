"""A checkpoint that can't be written: one sentence, and the state before it intact."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from aps.errors import UserError
from aps.runtime.checkpoint import Checkpoints


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond fails as on a full disk (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def state(size: int) -> dict[str, Any]:
    return {"state": {"x": torch.arange(size)}}


@pytest.mark.parametrize("size", [100, 4096, 300_000])
def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_the_state_before_it_stays(
    size: int, tmp_path: Path
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(3))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with files_of_at_most(size), pytest.raises(UserError, match=r"state-000000002.pt: cannot be written \(.+\); free"):
        checkpoints.save(2, state(100_000))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    loaded = checkpoints.load()
    assert loaded is not None and loaded["step"] == 1


def two_states(folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, state(3))
    return checkpoints


@pytest.mark.parametrize("part", [".pt", ".json"])
def test_a_damaged_state_is_left_for_the_one_before(part: str, tmp_path: Path) -> None:
    checkpoints = two_states(tmp_path)
    (tmp_path / f"state-000000002{part}").write_bytes(b"{}")
    loaded = checkpoints.load()
    assert loaded is not None and loaded["step"] == 1


@pytest.mark.parametrize("kind", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_does_not_answer_is_no_damage(kind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Going back to the state before would lose work; of several processes, one alone would go back."""
    checkpoints = two_states(tmp_path)

    def fails(*_: object) -> None:
        raise OSError(kind, os.strerror(kind))

    monkeypatch.setattr(hashlib, "file_digest", fails)
    with pytest.raises(OSError, match=r"state-000000002\.pt") as raised:
        checkpoints.load()
    assert raised.value.errno == kind


def test_all_processes_go_on_from_the_state_that_the_first_one_chose(tmp_path: Path) -> None:
    first, other = two_states(tmp_path), Checkpoints(tmp_path, writes=False)
    chosen: list[Any] = []
    first.load(lambda choice: chosen.append(choice) or choice)
    first.save(3, state(3))  # the other one comes late
    loaded = other.load(lambda _: chosen[0])
    assert loaded is not None and loaded["step"] == 2
    (tmp_path / "state-000000002.pt").write_bytes(b"another")
    with pytest.raises(OSError, match=r"not the state that the first process goes on from.*state-000000002\.pt"):
        other.load(lambda _: chosen[0])
    assert other.load(lambda _: None) is None
