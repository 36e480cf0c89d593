"""What processes exchange within a step: rows of the whole batch, and sums. One process exchanges nothing.

Design: for methods and norms, which are written as for one process and have no handle on the others. Gradients pass
where a name says so, and as if one process had computed the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_apart = False


def several() -> bool:
    """Whether this process is one of several."""
    return not _apart and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def apart() -> Iterator[None]:
    """Within it this process is as if alone: for a step that is counted and not trained."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def gather(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """tensors: (B, d), of one shape -> each (B*world, d) in order of rank, and the index of this process's first row.

    Every process must bring the same B. Gradients do not pass.
    """
    if not several():
        return list(tensors), 0
    own = torch.stack(tensors)
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return list(torch.stack(everyone, dim=1).flatten(1, 2)), dist.get_rank() * len(tensors[0])


def gather_with_gradient(x: Tensor) -> tuple[Tensor, int]:
    """x: (B, d) -> (B*world, d) in order of rank, and the index of this process's first row.

    The gradient of a row is the sum of what all processes' losses have for it, so that the mean of gradients over
    processes, which DistributedDataParallel takes, is the gradient of the mean of their losses.
    """
    if not several():
        return x, 0
    return _GatherWithGradient.apply(x), dist.get_rank() * len(x)


def mean(x: Tensor) -> Tensor:
    """Mean over processes, without gradient."""
    x = x.detach()
    return sum_with_gradient(x) / dist.get_world_size() if several() else x


def sum_with_gradient(x: Tensor) -> Tensor:
    """Sum over processes; the gradient is summed likewise, since every process's loss depends on the sum."""
    return _SumWithGradient.apply(x)


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x.contiguous())
        return torch.cat(everyone)

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
