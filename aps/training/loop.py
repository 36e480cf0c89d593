"""The loop of every stage that trains: restore, step, log, trace, stop, save.

A run can be killed at any point: it resumes from its last checkpoint with the same results, and its journal holds each
line once. After every batch, in this order: log lines are written (an epoch's line, an evaluation), so that a checkpoint
comes after them; a request to stop is handled; a checkpoint is saved, if one is due or this was the last batch. Whatever
a stage does after the loop is done again after a kill.

It knows no model, data or loss: a stage gives it a `Learner`, or calls `Loop.advance` from a library's loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any, Protocol

from torch import Tensor

from aps.errors import Preempted, UserError
from aps.journal import read_history
from aps.progress import Progress
from aps.results import StageJob, StageRun
from aps.runtime.checkpoint import Checkpoints
from aps.runtime.processes import Distributed
from aps.runtime.signals import stop_requested
from aps.runtime.trace import Trace

Line = dict[str, float]  # a line of the journal, without its step


class Learner(Protocol):
    """What a stage trains: everything that changes from batch to batch."""

    @property
    def note(self) -> str:
        """Text beside the progress bar."""

    def batches(self, epoch: int, first: int) -> Iterator[Any]:
        """Batches `first`, `first`+1, ... of an epoch."""

    def close(self) -> None:
        """End what serves training alone, such as decoding workers."""

    def step(self, batch: Any, done: int) -> None:
        """Train on a batch; `done` is the number of batches before it."""

    def lines(self, done: int) -> Iterable[Line]:
        """Lines to log after `done` batches; each is written before the next one is computed."""

    def state_dict(self) -> dict[str, Any]:
        """The state, equal on all processes; without an exchange between them, because the first one saves alone."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Loop:
    """A run, from its last checkpoint to its end.

    Args:
        state: returns the argument of `restore`, plain data and tensors.
        total: batches of the whole run; a function where a clock ends the run, so that the number can change.
        images: images of a batch, over all processes.
        unit: what a batch is called in messages.
        steps: steps of the journal for each batch.
        may_diverge: whether the state may hold numbers that are not finite.
        defect: a clause about what else in the state forbids to save it, or None; without it every number has to be finite.
    """

    def __init__(
        self,
        job: StageJob,
        stage: StageRun,
        distributed: Distributed,
        state: Callable[[], dict[str, Any]],
        restore: Callable[[dict[str, Any]], Any],
        *,
        total: int | Callable[[], int],
        images: int,
        unit: str = "batches",
        steps: int = 1,
        may_diverge: bool = False,
        defect: Callable[[dict[str, Any]], str | None] | None = None,
    ) -> None:
        self.job, self.stage, self.distributed = job, stage, distributed
        self._total, self.images, self.unit, self.steps = total, images, unit, steps
        self._state, self._may_diverge, self._defect = state, may_diverge, defect or self._not_finite
        self._checkpoints = Checkpoints(job.checkpoints, job.checkpoint_minutes, writes=distributed.main)
        saved = self._checkpoints.load(distributed.of_first)
        self.resumed = saved is not None
        self.done, self._rate = 0, 0.0
        if saved is not None:
            self.done, self._rate = saved["step"], saved.get("rate", 0.0)
            restore(saved["state"])
        stage.resume(self.done * steps)  # a killed run may have logged without leaving a checkpoint

    @property
    def total(self) -> int:
        return self._total if isinstance(self._total, int) else self._total()

    def train(self, learner: Learner, batches: int) -> None:
        """Train for epochs of `batches` batches until the run is done; the last epoch may be shorter."""
        with closing(learner), self.running():
            while self.done < self.total:
                epoch, first = divmod(self.done, batches)
                for batch in learner.batches(epoch, first):
                    learner.step(batch, self.done)
                    self.advance(learner.lines, learner.note)
                    if self.done == self.total:
                        break

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context for all calls of `advance`."""
        with (
            Progress(self.job.label, self.total, self.unit, self.done, shown=self.distributed.main) as self._progress,
            Trace(self.job.profile, self.distributed.device, self.distributed.main) as self._trace,
        ):
            yield

    def advance(self, lines: Callable[[int], Iterable[Line]], note: str = "") -> None:
        """Log, trace, stop or save after a batch.

        Raises:
            Preempted: the run was asked to stop; its state is saved.
            UserError: the state to save is not finite.
        """
        self.done += 1
        self._progress.update(1, self.images, note, total=self.total)
        for line in lines(self.done):
            self.stage.log(self.done * self.steps, **line)
        self._trace.batch_done()
        if stop_requested(self.distributed):
            self._save()
            raise Preempted(f"{self.job.label} after {self.done} of {self.total} {self.unit}; run it again to go on")
        if self._checkpoints.due() or self.done == self.total:
            self._save()

    def log_end(self, **values: float) -> None:
        """Log a line of the finished run, once, even if the run is killed after it and comes here again."""
        step = self.total * self.steps
        written = read_history(self.stage.journal) if self.stage.writes else []
        if not any(line["step"] == step and values.keys() <= line.keys() for line in written):
            self.stage.log(step, **values)

    @property
    def rate(self) -> float:
        """Images per second of this attempt, or of the one before if this one had nothing left to train."""
        return self._progress.rate or self._rate

    def _save(self) -> None:
        state = self._state()
        if self.distributed.main and not self._may_diverge and (defect := self._defect(state)) is not None:
            raise UserError(f"{self.job.label}: after {self.done} {self.unit} {defect}; the checkpoint before is kept")
        self._checkpoints.save(self.done, {"state": state, "rate": self.rate})
        self.stage.save_clock()

    def _not_finite(self, state: object) -> str | None:
        return None if all_finite(state) else weights_not_finite(self.job.settings.stage)


def weights_not_finite(block: str, rate: str = "lr") -> str:
    """The clause for weights that are not finite; `block` and `rate` are as in `not_finite`."""
    return f"its weights are no finite numbers; lower {block}.{rate}, or set {block}.precision: fp32"


def not_finite(loss: float, name: str, block: str, where: str = "", rate: str = "lr") -> str:
    """The sentence for a loss that is not finite.

    Args:
        name: the training's.
        block: the name of its settings.
        where: the step, and the last finite loss.
        rate: the key of `block` that sets the highest learning rate; more keys with their block.
    """
    more = f" ({where})" if where else ""
    return f"the {name} loss became {loss}; lower {block}.{rate}, or set {block}.precision: fp32{more}"


def finite(loss: float, name: str, block: str, rate: str = "lr") -> float:
    """Return `loss`. Raises UserError where it is not finite; `name`, `block` and `rate` are as in `not_finite`."""
    if not math.isfinite(loss):
        raise UserError(not_finite(loss, name, block, rate=rate))
    return loss


def all_finite(tree: object) -> bool:
    """Whether every floating-point tensor in nested dictionaries, lists and tuples is finite."""
    if isinstance(tree, Tensor):
        return not tree.is_floating_point() or bool(tree.isfinite().all())
    if isinstance(tree, dict):
        return all(all_finite(value) for value in tree.values())
    return not isinstance(tree, list | tuple) or all(all_finite(value) for value in tree)
