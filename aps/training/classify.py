"""Accuracy and confusion matrix of a classifier on a split, for finetuning and linear probing."""

from __future__ import annotations

from collections.abc import Callable

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
    confusion: Tensor | None = None,
    classifiers: tuple[int, ...] = (),
) -> Tensor:
    """Top-1 accuracy in percent over the whole split, which the processes divide among themselves.

    Args:
        classify: (B, 3, S, S) normalized -> logits (*classifiers, B, C).
        classifiers: shape of the classifiers that are scored at once, which a process without an image has to know too.
        confusion: int64 (C, C) on the device, for a single classifier; counts are added to it, rows are true classes,
            columns predicted ones.

    Returns:
        (*classifiers) float64 on the CPU.
    """
    part = -(-len(split) // distributed.world)
    rows = range(min(len(split), distributed.rank * part), min(len(split), (distributed.rank + 1) * part))
    right, start = torch.zeros(classifiers, dtype=torch.int64, device=distributed.device), rows.start
    for images in images_of(split, size, distributed.device, rows, workers):
        with precision.autocast():
            guesses = classify(normalize(images, normalization)).argmax(-1)
        labels = split.labels[start : start + len(images)].to(distributed.device)
        right += (guesses == labels).sum(-1)
        if confusion is not None:
            pairs = torch.bincount(labels * len(confusion) + guesses, minlength=confusion.numel())
            confusion += pairs.view_as(confusion)
        start += len(images)
    if distributed.world > 1:
        dist.all_reduce(right)
        if confusion is not None:
            dist.all_reduce(confusion)
    return 100 * right.double().cpu() / len(split)
