"""Collects pretraining's figures between two log lines: means, speed, and the time that training waited for its input."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from aps.errors import UserError
from aps.runtime.processes import Distributed
from aps.training.batches import Batch
from aps.training.loop import finite


class Meter:
    """Sums figures on the device, and reads them (which synchronizes) only to log.

    Each step's figures are averaged over processes, because a checkpoint holds the sums of one.

    Its clock starts with the first batch, and goes on after a kill where the checkpoint left it.

    Args:
        method: the name of the method that returns them, for messages.
    """

    def __init__(self, distributed: Distributed, method: str) -> None:
        self.distributed, self.method = distributed, method
        self.names: list[str] = []
        self.sums = torch.zeros(0, device=distributed.device)
        self.steps = 0
        self.waited = 0.0
        self.note = ""
        self._mark: float | None = None  # when the steps since the last reading began; None before the first batch
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.last: dict[str, float] = {}

    def fetch(self, batches: Iterator[Batch]) -> Batch | None:
        """The next batch, or None at the end of the epoch; measures the time that training waits for it."""
        if self._mark is None:
            self._mark = time.perf_counter()
        if self.distributed.device.type == "cuda":
            # On the device's clock: from the end of the last step until the batch is ready.
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            batch = next(batches, None)
            after.record()
            self._events.append((before, after))
            return batch
        before_cpu = time.perf_counter()
        batch = next(batches, None)
        self.waited += time.perf_counter() - before_cpu
        return batch

    def add(self, figures: dict[str, Tensor]) -> None:
        """Add a step's figures: the same names every time, scalars on the device. Raises UserError for other names."""
        if not self.steps:
            self.names = list(figures)
            self.sums = torch.zeros(len(figures), device=self.distributed.device)
        elif len(figures) != len(self.names) or not all(name in figures for name in self.names):
            raise UserError(
                f"{self.method}: a step has the figures {', '.join(figures)} and one before it had {', '.join(self.names)}; "
                "return the same names from `loss` at every step"
            )
        self.sums += self.distributed.mean(torch.stack([figures[name].float() for name in self.names]))
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means since the last reading, milliseconds a step, and the share of time that training waited for input.

        This is the only host synchronization of the loop.

        Raises:
            UserError: the loss or a figure is not finite.
        """
        means = dict(zip(self.names, (self.sums / self.steps).tolist(), strict=True))
        finite(means["loss"], "pretraining", "pretrain")
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise UserError(f"{self.method}: its figure '{name}' became {mean}; return finite numbers from `loss`")
        now = time.perf_counter()
        self._settle()
        seconds = max(1e-9, now - (self._mark or now))
        self.last = {**means, "step_ms": 1000 * seconds / self.steps, "input_share": self.waited / seconds}
        self.note = f"loss {means['loss']:.3f}"
        self.steps, self.waited, self._mark = 0, 0.0, now
        return self.last

    def _settle(self) -> None:
        """Add up what the device's clock has measured."""
        if self._events:
            torch.cuda.synchronize()
            self.waited += sum(a.elapsed_time(b) for a, b in self._events) / 1000
            self._events = []

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context whose time belongs to no step."""
        before = time.perf_counter()
        yield
        if self._mark is not None:
            self._mark += time.perf_counter() - before

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        seconds = time.perf_counter() - self._mark if self._mark is not None else 0.0
        clock = {"seconds": seconds, "waited": self.waited}
        return {"names": self.names, "sums": self.sums, "steps": self.steps, "last": self.last, "clock": clock}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.names, self.sums = state["names"], state["sums"].to(self.distributed.device)
        self.steps, self.last = state["steps"], state["last"]
        if "clock" in state:  # version 0.2 has no such entry
            self._mark, self.waited = time.perf_counter() - state["clock"]["seconds"], state["clock"]["waited"]
