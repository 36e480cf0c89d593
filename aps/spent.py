"""The cost of a finished run, with that of its pretraining: seconds, GPU hours, operations, peak memory.

An evaluation needs its pretraining, so its cost includes it. A pretraining that several evaluations share is counted in
each of them.

kNN readings during pretraining are no part of its cost: neither their seconds, nor their operations, nor their memory, for
they read all tokens of many images, which a step on a share of the tokens never does. What other stages evaluate while
they train (finetuning's held-out images, detection's `evaluate_every`) is their work, and counts in all three.
"""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from aps.cost import Counts
from aps.errors import UserError
from aps.registry import resolve
from aps.settings.study import StageSettings
from aps.stages import STAGES

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
SUMMED, PEAKS = ("seconds", "gpu_hours", "flops"), ("peak_gpu_gb", "peak_memory_gb")


def spent(
    settings: StageSettings,
    counts: Counts | None,
    seconds: float,
    hardware: Mapping[str, Any],
    peaks: Mapping[str, float],
    pretraining: Mapping[str, Any] | None = None,
    flops: float | None = None,
    process_seconds: float | None = None,
    readings: float = 0.0,
) -> dict[str, float]:
    """The cost of a run and of its pretraining, for metrics.json.

    Args:
        counts: size of its dataset; None if unknown.
        seconds: how long it worked, over all its attempts.
        hardware: from `aps.results.hardware`.
        peaks: the largest of all its attempts.
        pretraining: `cost` in metrics.json of the pretraining that made its encoder.
        flops: operations that the run counted; used where they do not follow from its settings.
        process_seconds: sum of the seconds of its processes, whose number may have changed from attempt to attempt; None:
            it was that of `hardware` throughout.
        readings: seconds of them that read kNN during pretraining: no part of the cost, as their operations are none.
    """
    of_processes = seconds * hardware["processes"] if process_seconds is None else process_seconds
    run: dict[str, float | None] = {
        "seconds": seconds - readings,
        "gpu_hours": (of_processes - readings * hardware["processes"]) / 3600 if "gpu" in hardware else None,
        "flops": _flops(settings, counts, flops),
    }
    before = pretraining or {}
    total = {key: _sum(run[key], before.get(key), bool(before)) for key in SUMMED}
    return {
        key: float(f"{value:.6g}") for key, value in {**total, **larger(peaks, before)}.items() if value is not None
    }


def _sum(run: float | None, pretraining: float | None, has_pretraining: bool) -> float | None:
    """None if either part is unknown."""
    if run is None or (has_pretraining and pretraining is None):
        return None
    return run + (pretraining or 0.0)


def _flops(settings: StageSettings, counts: Counts | None, counted_by_the_run: float | None) -> float | None:
    path = STAGES[settings.stage].cost
    if path is None or counts is None:
        return counted_by_the_run
    try:
        return float(resolve(path)(settings, counts).flops)
    except UserError:  # they do not follow from the settings
        return counted_by_the_run
    except Exception as error:  # the run is finished: it does not fail because its cost can't be counted
        words = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"warning: its operations can't be counted and are left out of its cost ({words[:200]})", file=sys.stderr)
        return None


def peaks() -> dict[str, float]:
    """The most memory that this process has used so far, without its decoding workers, and its GPU; gigabytes, by PEAKS."""
    found = {"peak_memory_gb": high_water() / 1e9}
    torch = sys.modules.get("torch")  # only if the stage has imported it: importing it takes seconds
    if torch is not None and torch.cuda.is_initialized():  # not where APS_DEVICE=cpu leaves it alone
        found["peak_gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def high_water() -> int:
    """The most bytes of memory that this process has had. `ru_maxrss` has those of the process that started it too."""
    with suppress(OSError):  # no Linux
        if found := re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(encoding="utf-8"), re.MULTILINE):
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Memory:
    """The peaks of this process and its GPU, without those of what is done `aside`.

    A GPU's allocator starts its peak anew when told to, and so does Linux. Elsewhere the process's only rises, and its rise
    while something was done aside is taken off from then on.
    """

    def __init__(self) -> None:
        self._before: dict[str, float] = {}  # the peaks when something was last done aside
        self._rise = 0.0  # gigabytes

    def peaks(self) -> dict[str, float]:
        found = peaks()
        return larger(found | {"peak_memory_gb": found["peak_memory_gb"] - self._rise}, self._before)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A context whose memory is no part of the peaks; the device has nothing queued at its start and end."""
        self._before = self.peaks()
        try:
            yield
        finally:
            with suppress(OSError):  # no Linux, or a container that keeps it closed
                RESET.write_text("5")  # proc(5): the peak is what the process has now
            after = peaks()
            self._rise = max(0.0, after["peak_memory_gb"] - self._before["peak_memory_gb"])
            if "peak_gpu_gb" in after:
                sys.modules["torch"].cuda.reset_peak_memory_stats()


def larger(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    """Of each peak the larger one."""
    return {key: max(x[key] for x in (a, b) if key in x) for key in PEAKS if key in a or key in b}
