"""Handles requests to stop: training loops poll `stop_requested`, save their state and raise `Preempted`.

Requests come from Slurm before the time limit (SIGUSR1, see `aps.runtime.launch`), from Slurm on preemption and scancel
(SIGTERM), from Ctrl-C (SIGINT; a second one stops at once), and from a terminal that is closed (SIGHUP, unless under
`nohup`).

SIGUSR1 has no handler. It is blocked, and looked up among the pending signals: its default action kills, and a new
process (a decoding worker or its server) inherits a blocked signal, but not a handler. SIGTERM and SIGINT keep their
ordinary meaning until a loop polls for the first time, so that a stage without a loop ends like any program. But during
imports Ctrl-C ends the process itself: C and Rust code that builds classes then, such as pydantic's, drops exceptions.

This module imports little and no torch, because `listen` has to run before any thread exists, and Ctrl-C before it is a
traceback of Python's.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aps.runtime.processes import Distributed

WARNING = signal.SIGUSR1
PARENT = "APS_PARENT"  # the number of the process that started this one
PR_SET_PDEATHSIG = 1
STOPPED = "stopped by the keyboard; the same command goes on from the last checkpoint"
STOPPED_STATUS = 130
EXCHANGE_SECONDS = 2.0  # between two exchanges of all processes; Slurm's warning comes minutes before the limit

_received: signal.Signals | None = None
_polled = False
_agreement: _Agreement | None = None


def listen() -> None:
    """Block SIGUSR1, and undo the shell's trap and the launcher's signal mask; the first call of a stage's process."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {WARNING})
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, _interrupt)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def end_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, in whatever way (Linux; elsewhere nothing).

    A process that torchrun has started has a session of its own, which a kill of the stage's process group does not reach.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):  # it had ended before
            os.kill(os.getpid(), number)


def received() -> signal.Signals | None:
    """The first signal that asked this process to stop, if any. Cheap enough for every step."""
    global _received
    if _received is None and WARNING in signal.sigpending():
        _received = WARNING
    return _received


def stop_requested(distributed: Distributed) -> bool:
    """Whether to save and raise `Preempted` now; every process gets the same answer at the same call.

    Call it once a step, on all processes, at a point where the state can be saved.
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
    """Record a signal that another module received."""
    global _received
    _received = _received or signal.Signals(number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C before the first poll: KeyboardInterrupt, or the end of the process where that would be lost."""
    remember(number)  # for the first poll, should the exception be dropped after all
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package in ("importlib", "pydantic"):
            with suppress(Exception):  # it may be in the middle of a print, or nobody reads it
                sys.stdout.flush()
                print(STOPPED, file=sys.stderr, flush=True)
            os._exit(STOPPED_STATUS)
        frame = frame.f_back
    raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and _received == signal.SIGINT:
        raise KeyboardInterrupt
    remember(number)


class _Agreement:
    """Lets processes agree on whether to stop, by one small exchange on the CPU every EXCHANGE_SECONDS.

    The number of steps between two exchanges follows from their duration. No step waits for a device."""

    def __init__(self) -> None:
        import torch.distributed as dist

        # The default group may use NCCL, and reading its result would wait for the GPU.
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
