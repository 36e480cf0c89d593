"""The length of pretraining, in epochs, operations or minutes, and the progress of a run.

Design: a run with a budget is a run of `epochs` that is stretched or shrunk to another length. Learning rate, weight decay,
momenta and temperatures follow the same schedule from start to end, warmup included. Operations are counted on the method's
step (`aps.training.cost`), so the number of steps is known beforehand, and such a run repeats bit for bit.

A run of minutes ends by the clock, and its schedule follows the time that has passed. The number of steps depends on the
machine and its load, so such a run does not repeat. The clock stops between two attempts and during kNN readings, whose
time is counted apart; it runs during compiling, waiting for data and saving checkpoints.

It does not know what a step is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from aps.errors import BrokenContract
from aps.runtime.processes import Distributed
from aps.training.cost import batches_within, step_flops


class Pace:
    """Length and progress of one run.

    Args:
        settings: of the run.
        batches: batches of an epoch.
        steps: optimizer steps of a batch.

    Raises:
        UserError: the budget of operations is less than one batch, or the method's step can't be counted.

    Attributes:
        total: batches of the whole run; for a budget of minutes, the current estimate.
        readings: seconds of kNN readings, over all attempts.
    """

    def __init__(self, settings: Any, batches: int, steps: int, distributed: Distributed) -> None:
        self.batches, self.steps, self.distributed = batches, steps, distributed
        self._epochs, self._budget = settings.pretrain.epochs, settings.pretrain.budget
        self._seconds = 0.0  # seconds of training before the clock was last started
        self._since: float | None = None  # when the clock was last started; None: it is stopped
        self.readings = 0.0
        # Processes exchange the time on the CPU, so that no device is waited for
        self._group: Any = dist.new_group(backend="gloo") if distributed.world > 1 and self._minutes else None
        # Share of the minutes that had passed when the last batch was done, and the one before
        self._share = self._before = 0.0
        self._last: torch.cuda.Event | None = None  # the end of the last batch, on the device
        self.step_flops = self._count(settings)
        self.total = self._epochs * batches
        if self._budget is not None and self._budget.flops is not None:
            self.total = batches_within(self._budget.flops, settings, steps)

    @property
    def _minutes(self) -> float | None:
        return self._budget.minutes if self._budget is not None else None

    @property
    def known(self) -> bool:
        """Whether the length is known before the run's end."""
        return not self._minutes

    @property
    def positions(self) -> int:
        """At how many positions of the schedule there are steps. A clock is read once a batch."""
        return self.total * (self.steps if self.known else 1)

    def _count(self, settings: Any) -> float | None:
        """Operations of an optimizer step; None where they can't be counted and the budget does not need them."""
        try:
            return step_flops(settings)
        except BrokenContract:
            raise
        except Exception as error:  # a method may do anything that tensors without data do not support
            if self._budget is not None and self._budget.flops is not None:
                raise
            if self.distributed.main:
                print(f"no operations in this run's journal: {error}", file=sys.stderr)
            return None

    def progress(self, step: int) -> float:
        """Share of the run that is done before optimizer step `step`, in [0, 1)."""
        return self._share if self._minutes else step / (self.total * self.steps)

    def ends_part(self, done: int, parts: int) -> bool:
        """Whether one of `parts` equal parts of the run has ended with the last batch, after which `done` are done."""
        if self._minutes:
            return int(self._share * parts) > int(self._before * parts)
        return done * parts // self.total > (done - 1) * parts // self.total

    def epoch(self, step: int) -> float:
        """The position in the schedule of `epochs` at an optimizer step, in epochs."""
        if self._budget is None:
            return step / (self.batches * self.steps)
        return self.progress(step) * self._epochs

    def so_far(self, done: int) -> dict[str, float]:
        """Operations and seconds of training after `done` batches, for the journal."""
        flops = {} if self.step_flops is None else {"flops": done * self.steps * self.step_flops}
        return {**flops, "seconds": self.seconds}

    # Clock

    @property
    def seconds(self) -> float:
        """Seconds of training, over all attempts."""
        return self._seconds + (time.monotonic() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        """Start the clock."""
        if self._since is None:
            self._since = time.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context in which the clock is stopped; it runs afterwards."""
        self._wait()
        self._seconds, self._since, stopped = self.seconds, None, time.monotonic()
        yield
        self._wait()
        self.readings += time.monotonic() - stopped
        self.start()

    def batch_done(self, done: int) -> None:
        """Call it after each batch; `done` batches are done. A run of minutes then estimates its number of batches.

        A GPU's last batch is only queued by then: the clock is read when the batch before it ends, so that the GPU has work
        while the host makes the next one.
        """
        if not self._minutes:
            return
        if self.distributed.device.type == "cuda":
            before, self._last = self._last, torch.cuda.Event()
            self._last.record()
            if before is not None:
                before.synchronize()
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        if self._group is not None:  # all processes use the clock of the first
            dist.broadcast(seconds, 0, self._group)
        self._before, self._share = self._share, float(seconds) / (60 * self._minutes)
        self.total = done if self._share >= 1 else max(done + 1, round(done / self._share))

    def _wait(self) -> None:
        """Wait for the device, because its queued work is not done yet."""
        if self.distributed.device.type == "cuda":
            torch.cuda.synchronize(self.distributed.device)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "readings": self.readings, "share": self._share, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seconds, self._share, self.total = state["seconds"], state["share"], state["total"]
        self.readings = state.get("readings", 0.0)  # version 0.2 has no such entry
