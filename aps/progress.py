"""Progress of a long step: a moving bar on a terminal, elsewhere a line every few seconds.

A moving bar redraws itself with carriage returns. In the logs of Snakemake and Slurm that would be unreadable.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0
BAR_LETTERS = 20


class Progress:
    """Counts up to `total` units, named `unit` on the screen. `done` of them were done before.

    shown: whether anything is printed.
    """

    def __init__(self, label: str, total: int, unit: str, done: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, done
        self.shown = shown
        self._first, self._start, self._items = done, time.monotonic(), 0
        self._last_line = self._start - LINE_SECONDS + 2  # the first line comes after two seconds
        self._bar = (
            tqdm(total=total, initial=done, desc=label, unit=f" {unit}", dynamic_ncols=True)
            if shown and sys.stderr.isatty()
            else None
        )

    def update(self, steps: int = 1, items: int = 0, note: str = "", total: int | None = None) -> None:
        """Count `steps` more units, which took `items` images. `total` replaces the total so far."""
        self.done += steps
        self.total = self.total if total is None else total
        self._items += items
        if not self.shown:
            return
        rate = f"{self.rate:,.0f} images/s" if self._items else ""
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.set_postfix_str("  ".join(x for x in (rate, note) if x), refresh=False)
            self._bar.update(steps)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or self.done >= self.total:
            self._last_line = time.monotonic()
            print(self._line(rate, note), file=sys.stderr, flush=True)

    def _line(self, rate: str, note: str) -> str:
        share = self.done / self.total if self.total else 1.0
        filled = int(BAR_LETTERS * share)
        seconds = time.monotonic() - self._start
        left = (self.total - self.done) * seconds / max(1, self.done - self._first)
        duration = f"{clock(left)} left" if self.done < self.total else f"{clock(seconds)} in all"
        bar = f"[{'#' * filled}{'-' * (BAR_LETTERS - filled)}] {int(100 * share):3d}%"
        parts = (f"{self.label:<24}", bar, f"{self.done}/{self.total} {self.unit}", rate, note, duration)
        return "  ".join(part for part in parts if part)

    @property
    def rate(self) -> float:
        """Images a second since the start."""
        return self._items / max(1e-9, time.monotonic() - self._start)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """`H:MM:SS`, or `M:SS` under an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
