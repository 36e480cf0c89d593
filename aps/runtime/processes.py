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
from typing import Any

import torch
import torch.distributed as dist

from aps.errors import Preempted, UserError
from aps.runtime.ranks import ranks
from aps.text import number_of


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

    def of_first(self, value: Any) -> Any:
        """The value that the first process gives, on every process: plain data."""
        told = [value]
        if self.world > 1:
            dist.broadcast_object_list(told, 0)
        return told[0]

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
    device, count = torch.device(asked), torch.cuda.device_count() if available else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"APS_DEVICE={asked}: torch sees {number_of(count, 'GPU')} here, the first is cuda:0")
    return device


def _check_count(world: int) -> None:
    """Raises UserError where processes would share a GPU, which NCCL refuses."""
    here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if world > 1 and here > count:
        raise UserError(
            f"{here} processes on a machine with {number_of(count, 'GPU')}: each needs its own; start {count}, or set "
            "APS_DEVICE=cpu"
        )


@contextmanager
def processes() -> Iterator[Distributed]:
    """Join the process group that torchrun set up, if any, and leave it at the end.

    The device is this process's GPU where there is one and the CPU otherwise; `APS_DEVICE` overrides it. The number in
    `APS_DEVICE=cuda:1` is for a single process; of several, each has the GPU of its rank.

    Raises:
        UserError: `APS_DEVICE` names a device that this machine does not have, or several processes would share a GPU.
    """
    rank, local, world = ranks()
    device = _device(os.environ.get("APS_DEVICE", ""))
    if device.type == "cuda":
        _check_count(world)
        device = torch.device("cuda", local if world > 1 else device.index or 0)
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    together = device.type == "cpu"  # whether the end may wait for the other processes
    try:
        yield Distributed(rank, world, device)
        together = True
    except Preempted:  # all of them stop after the same batch
        together = True
        raise
    finally:
        # NCCL's group ends when all processes end it. After an error they may wait for this one, which has to exit.
        if world > 1 and together:
            dist.destroy_process_group()
