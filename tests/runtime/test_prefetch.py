"""Batches one ahead of the training that uses them, on a stand-in for a GPU's streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from aps.runtime import prefetch as module
from aps.runtime.prefetch import prefetch, send, tensors


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """A stand-in's stream is no other test's."""
    module._side_stream.cache_clear()
    yield
    module._side_stream.cache_clear()


class Stream:
    def __init__(self, *_: Any) -> None:
        self.waited: list[Any] = []

    def wait_stream(self, other: Any) -> None:
        self.waited.append(other)

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)

    def record_event(self) -> object:
        return object()


def numbered(made: list[int]) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    for i in range(4):
        made.append(i)
        yield (torch.tensor(i), torch.tensor(10 * i)), torch.tensor(100 * i)


def test_on_a_gpu_the_next_batch_is_made_before_this_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    main, recorded, made = Stream(), [], []  # type: ignore[var-annotated]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: main)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: recorded.append((int(tensor), stream)))
    for i, batch in enumerate(prefetch(numbered(made), torch.device("cuda"))):
        assert int(batch[0][0]) == i and len(main.waited) == i + 1
        assert made == list(range(min(4, i + 2)))
        assert recorded[-3:] == [(i, main), (10 * i, main), (100 * i, main)]  # its memory is not given away too early
    assert i == 3


def test_epochs_share_the_side_stream_whose_memory_they_use_again(monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[Stream] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: streams.append(Stream()) or streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    for _ in range(3):
        assert len(list(prefetch(numbered([]), torch.device("cuda")))) == 4
    assert len(streams) == 1 and len(streams[0].waited) == 3  # each epoch waits for what was queued before it


def test_on_a_cpu_nothing_is_made_ahead() -> None:
    made: list[int] = []
    batches = prefetch(numbered(made), torch.device("cpu"))
    next(batches)
    assert made == [0] and len(list(batches)) == 3


def test_every_tensor_of_a_batch_is_found() -> None:
    a, b, c = (torch.zeros(i) for i in (1, 2, 3))
    assert [len(x) for x in tensors(((a, [b]), c, ()))] == [1, 2, 3]
    assert send(a, "cpu") is a
