"""Records a profiler trace of a few batches of a training loop (`--profile FILE`), for ui.perfetto.dev.

Two batches are recorded, after two that are skipped and one on which the profiler warms up. Results do not change.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from aps.files import make_folder

PASSED, WARM_UP, RECORDED = 2, 1, 2  # batches
NEEDED = PASSED + WARM_UP + RECORDED


class Trace:
    """Records inside `with`; call `batch_done` after every batch. With no file it does nothing.

    Args:
        file: the trace's, in Chrome's format; None: no trace.
        device: the training's; a GPU's kernels are recorded too.
        writes: false on all ranks but the first.
    """

    def __init__(self, file: Path | None, device: torch.device, writes: bool = True) -> None:
        self.file, self._profile, self._batches = file, None, 0
        if file is None or not writes:
            return
        make_folder(file.parent)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        plan = schedule(wait=PASSED, warmup=WARM_UP, active=RECORDED, repeat=1)
        self._profile = profile(
            activities=activities,
            schedule=plan,
            on_trace_ready=self._write,
            record_shapes=True,
        )

    def batch_done(self) -> None:
        if self._profile is not None:
            self._batches += 1
            self._profile.step()

    def _write(self, recorded: profile) -> None:
        """The profiler calls this after the last batch that it records, and when it is stopped earlier."""
        if self._batches >= NEEDED:
            recorded.export_chrome_trace(str(self.file))

    def __enter__(self) -> Trace:
        if self._profile is not None:
            self._profile.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            return
        if self._batches < NEEDED:
            print(
                f"{self.file}: no trace, {self._batches} batches were left to train and it takes {NEEDED}; "
                "profile a longer run",
                file=sys.stderr,
            )
        self._profile.stop()
