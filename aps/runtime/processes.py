"""The processes of one stage: rank, world and device, decided here and passed on.

torchrun starts them (`aps.runtime.launch`); without it there is one. CUDA talks NCCL, CPUs gloo.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from aps.runtime.ranks import ranks


@dataclass(frozen=True)
class Distributed:
    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def rows(self, batch: int) -> slice:
        """This process's rows of a global batch of `batch` images."""
        own = batch // self.world
        return slice(self.rank * own, (self.rank + 1) * own)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """Mean over processes of a detached tensor, on every process."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def processes() -> Iterator[Distributed]:
    """Joins the process group that torchrun set up, if it did, and leaves it at the end.

    The device is this process's GPU where there is one and the CPU otherwise; `APS_DEVICE` overrides it.
    """
    rank, local, world = ranks()
    kind = os.environ.get("APS_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(kind)
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    try:
        yield Distributed(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()
