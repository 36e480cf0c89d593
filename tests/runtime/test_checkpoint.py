"""A checkpoint that can't be written: one sentence, and the state before it intact."""

from __future__ import annotations

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
