"""Joins the processes of one stage, and decides their rank, world size and device.

torchrun starts them (`aps.runtime.launch`); without it there is one. GPUs communicate by NCCL, CPUs by gloo.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from aps.errors import UserError
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
        local_batch = batch // self.world
        return slice(self.rank * local_batch, (self.rank + 1) * local_batch)

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


def _device(asked: str) -> torch.device:
    """Raises UserError where `APS_DEVICE` names a device that this machine does not have."""
    available = torch.cuda.is_available()
    if not asked:
        return torch.device("cuda" if available else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", asked):
        raise UserError(f"APS_DEVICE={asked}: is none of cpu and cuda; set it to one of them, or unset it")
    if asked != "cpu" and not available:
        raise UserError(f"APS_DEVICE={asked}: torch sees no GPU here; set APS_DEVICE=cpu, or unset it")
    return torch.device(asked)


@contextmanager
def processes() -> Iterator[Distributed]:
    """Join the process group that torchrun set up, if any, and leave it at the end.

    The device is this process's GPU where there is one and the CPU otherwise; `APS_DEVICE` overrides it.

    Raises:
        UserError: `APS_DEVICE` names a device that this machine does not have.
    """
    rank, local, world = ranks()
    device = _device(os.environ.get("APS_DEVICE", ""))
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
