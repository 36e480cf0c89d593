"""Asked to stop: the training loops poll `stop_requested`, save their state and raise `Preempted`.

Who asks: Slurm before the time limit (SIGUSR1, see `aps.runtime.launch`), Slurm on preemption and scancel (SIGTERM), Ctrl-C
(SIGINT; a second one stops at once), a terminal that is closed (SIGHUP, but for `nohup`).

SIGUSR1 is blocked and looked up among the pending signals instead of handled: its default action kills, a handler is
lost in every process that is started afresh (decoding workers, their server), a blocked signal is blocked there too.
SIGTERM and SIGINT keep their ordinary meaning until a loop polls for the first time, so that a stage that never does
ends like any program.

This module imports no torch: `listen` has to run before any thread exists.
"""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aps.runtime.processes import Distributed

WARNING = signal.SIGUSR1
EXCHANGE_SECONDS = 2.0  # between two exchanges of all processes; Slurm warns minutes ahead

_received: signal.Signals | None = None
_polled = False
_agreement: _Agreement | None = None


def listen() -> None:
    """Call first thing in a process of a stage: undo what the shell's trap and the launcher's mask left behind."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def received() -> signal.Signals | None:
    """The first signal by which this process was asked to stop, if it was. Cheap enough for every step."""
    global _received
    if _received is None and WARNING in signal.sigpending():
        _received = WARNING
    return _received


def stop_requested(distributed: Distributed) -> bool:
    """Whether to save and raise `Preempted` now; every process gets the same answer at the same call.

    Call it once a step, on all processes, only where the state can be saved.
    """
    global _polled, _agreement
    if not _polled:
        _polled = True
        signal.signal(signal.SIGTERM, _handle)
        signal.signal(signal.SIGINT, _handle)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, _handle)
    if distributed.world == 1:
        return received() is not None
    if _agreement is None:
        _agreement = _Agreement()
    return _agreement.asked()


def remember(number: int) -> None:
    """Remember a signal that was taken elsewhere."""
    global _received
    _received = _received or signal.Signals(number)


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _received == signal.SIGINT:
        raise KeyboardInterrupt
    remember(number)


class _Agreement:
    """One small exchange on the CPU every EXCHANGE_SECONDS, however long a step takes: no step waits for a device."""

    def __init__(self) -> None:
        import torch.distributed as dist

        # The default group may be NCCL's, whose answer would cost a synchronization with the GPU.
        self.group: Any = dist.new_group(backend="gloo")
        self.calls, self.next, self.since = 0, 1, time.monotonic()

    def asked(self) -> bool:
        self.calls += 1
        if self.calls < self.next:
            return False
        import torch
        import torch.distributed as dist

        seconds = max(1e-6, (time.monotonic() - self.since) / self.calls)
        calls = max(1, min(10 * self.calls, int(EXCHANGE_SECONDS / seconds)))
        message = torch.tensor([received() is not None, -calls], dtype=torch.int64)
        dist.all_reduce(message, dist.ReduceOp.MAX, self.group)
        self.calls, self.next, self.since = 0, -int(message[1]), time.monotonic()
        return bool(message[0])
