"""What a finished run cost: seconds, GPU hours, operations, peak memory; its pretraining's share included.

An evaluation is as dear as the pretraining that it needs, so its cost is the cost so far. What several evaluations share is
counted in each of them.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Any

from aps.cost import Counts
from aps.registry import resolve
from aps.settings.study import StageSettings
from aps.stages import STAGES

SUMMED, PEAKS = ("seconds", "gpu_hours", "flops"), ("peak_gpu_gb", "peak_memory_gb")


def spent(
    settings: StageSettings,
    counts: Counts | None,
    seconds: float,
    hardware: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
    flops: float | None = None,
) -> dict[str, float]:
    """The cost of a run so far, for metrics.json.

    Args:
        counts: of its dataset; None where they are unknown.
        seconds: that it worked, over all its attempts.
        hardware: `aps.results.hardware`.
        made: `cost` in metrics.json of the pretraining that made its encoder.
        flops: what the run itself counted, where its settings do not say it.
    """
    counted = _flops(settings, counts)
    own: dict[str, float | None] = {
        "seconds": seconds,
        "gpu_hours": seconds * hardware["processes"] / 3600 if "gpu" in hardware else None,
        "flops": flops if counted is None else counted,
        "peak_gpu_gb": hardware["peak_gpu_bytes"] / 1e9 if "peak_gpu_bytes" in hardware else None,
        "peak_memory_gb": _peak_memory(),
    }
    made = made or {}
    total = {key: _sum(own[key], made.get(key), bool(made)) for key in SUMMED}
    peak = {key: max((x for x in (own[key], made.get(key)) if x is not None), default=None) for key in PEAKS}
    return {key: float(f"{value:.6g}") for key, value in (total | peak).items() if value is not None}


def _sum(own: float | None, made: float | None, needed: bool) -> float | None:
    """None where a share that counts is unknown: a part of a sum is no sum."""
    if own is None or (needed and made is None):
        return None
    return own + (made or 0.0)


def _flops(settings: StageSettings, counts: Counts | None) -> float | None:
    path = STAGES[settings.stage].cost
    if path is None or counts is None:
        return None
    try:
        return float(resolve(path)(settings, counts).flops)
    except Exception:  # what can't be counted is unknown, and the run is finished
        return None


def _peak_memory() -> float:
    """Gigabytes of this process, its decoding workers not among them."""
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes * (1 if sys.platform == "darwin" else 1024) / 1e9
