"""What finetuning and linear probing share: accuracy of a classifier on a split, and what it takes for what."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from aps.data.load import ArraySplit, FileSplit
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed
from aps.training.features import Normalization, images_of, normalize


@torch.inference_mode()
def accuracy(
    classify: Callable[[Tensor], Tensor],
    split: ArraySplit | FileSplit,
    size: int,
    normalization: Normalization,
    distributed: Distributed,
    precision: Precision,
    workers: int | None = None,
) -> Tensor:
    """Top-1 in percent over the whole split, the work shared among processes.

    classify: (B, 3, S, S) normalized -> logits (..., B, C); leading dimensions are several classifiers at once
    -> (...) float64 on the CPU.
    """
    right = torch.zeros((), dtype=torch.int64, device=distributed.device)
    for guesses, labels in _guesses(classify, split, size, normalization, distributed, precision, workers):
        right = right + (guesses == labels).sum(-1)
    if distributed.world > 1:
        dist.all_reduce(right)
    return 100 * right.double().cpu() / len(split)


@torch.inference_mode()
def confusion(
    classify: Callable[[Tensor], Tensor],
    split: ArraySplit | FileSplit,
    size: int,
    normalization: Normalization,
    distributed: Distributed,
    precision: Precision,
    workers: int | None = None,
) -> Tensor:
    """How many images of each class, a row, are taken for each class, a column: int64 (C, C) on the CPU.

    classify: (B, 3, S, S) normalized -> logits (B, C).
    """
    C = len(split.classes)
    counts = torch.zeros(C * C, dtype=torch.int64, device=distributed.device)
    for guesses, labels in _guesses(classify, split, size, normalization, distributed, precision, workers):
        counts += torch.bincount(labels * C + guesses, minlength=C * C)
    if distributed.world > 1:
        dist.all_reduce(counts)
    return counts.view(C, C).cpu()


def _guesses(
    classify: Callable[[Tensor], Tensor],
    split: ArraySplit | FileSplit,
    size: int,
    normalization: Normalization,
    distributed: Distributed,
    precision: Precision,
    workers: int | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Classes int64 (..., B) and labels (B) of this process's share of the split."""
    part = -(-len(split) // distributed.world)
    rows = range(min(len(split), distributed.rank * part), min(len(split), (distributed.rank + 1) * part))
    start = rows.start
    for images in images_of(split, size, distributed.device, rows, workers):
        with precision.autocast():
            guesses = classify(normalize(images, normalization)).argmax(-1)
        yield guesses, split.labels[start : start + len(images)].to(distributed.device)
        start += len(images)
