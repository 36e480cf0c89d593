"""Exchanges rows of the batch, and sums, between processes within a step. A single process exchanges nothing.

Design: methods and norms are written as for one process and use these functions. Functions named `_with_gradient` pass
gradients, as if one process had computed the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_alone = False


def is_distributed() -> bool:
    """Whether this process exchanges with others."""
    return not _alone and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def single_process() -> Iterator[None]:
    """A context in which this process exchanges nothing, for a step that is counted and not trained."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def gather(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """tensors: (B, d), of one shape -> each (B*world, d) in order of rank, and the index of this process's first row.

    Every process must have the same B. Gradients are not passed.
    """
    if not is_distributed():
        return list(tensors), 0
    local = torch.stack(tensors)
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, local)
    return list(torch.stack(gathered, dim=1).flatten(1, 2)), dist.get_rank() * len(tensors[0])


def gather_with_gradient(x: Tensor) -> tuple[Tensor, int]:
    """x: (B, d) -> (B*world, d) in order of rank, and the index of this process's first row.

    The gradient of a row is the sum of its gradients in the losses of all processes. So the mean of gradients over
    processes, which DistributedDataParallel takes, is the gradient of the mean of their losses.
    """
    if not is_distributed():
        return x, 0
    return _GatherWithGradient.apply(x), dist.get_rank() * len(x)


def mean(x: Tensor) -> Tensor:
    """Mean over processes, without gradient; x: any shape."""
    x = x.detach()
    return sum_with_gradient(x) / dist.get_world_size() if is_distributed() else x


def sum_with_gradient(x: Tensor) -> Tensor:
    """Sum over processes; gradients are summed too, because the loss of every process depends on the sum."""
    return _SumWithGradient.apply(x)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total
