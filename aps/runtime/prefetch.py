"""Feeds a GPU without waiting: the next batch is made on a side stream, and small tensors are sent from pinned memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

Batch = TypeVar("Batch")


def send(table: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to the device without waiting for the device; a copy from pageable memory would wait."""
    if torch.device(device).type == "cuda" and table.device.type == "cpu":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches; on a GPU each is made, on a side stream, while the one before it is used.

    Args:
        batches: tuples (of tuples) of tensors.
    """
    return _prefetch(batches, device) if device.type == "cuda" else batches


def _prefetch(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    side, main = _side_stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)

    def make() -> tuple[Batch, torch.cuda.Event] | None:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            return None if batch is None else (batch, side.record_event())

    upcoming = make()
    while upcoming is not None:
        batch, ready = upcoming
        upcoming = make()
        main.wait_event(ready)
        for tensor in tensors(batch):
            tensor.record_stream(main)
        yield batch


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all epochs, because freed memory is kept for the stream on which it was allocated."""
    return torch.cuda.Stream(device)


def tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of nested tuples and lists."""
    if isinstance(batch, Tensor):
        yield batch
    else:
        for part in batch:
            yield from tensors(part)
