"""The contract of the functions that count the cost of a stage. It imports no torch, because planning reads it.

A stage's cost function is `(settings, counts, gpus, gpu) -> Cost`:

    settings  of the experiment, or of one run of the stage; the function reads the blocks that the stage reads
    counts    the size of the stage's dataset
    gpus      how many processes share the run
    gpu       whether they run on GPUs, where `precision: auto` means 16 bits; on CPUs it means float32

The functions of the project's stages are in `aps.training.cost` and `aps.detection.cost`; `aps.estimate` makes the
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Counts(NamedTuple):
    """Size of a dataset."""

    train: int  # images
    test: int  # images; of detection datasets the split val; 0 where images have no labels
    classes: int
    gigabytes: float  # on disk: the prepared dataset, and its archives where it is downloaded
    masks: bool = True  # for detection: false where instances have only boxes


@dataclass(frozen=True)
class Cost:
    """The cost of one run of a stage."""

    flops: float  # of matrix products, convolutions and attention, over all processes; a multiply-add counts as two
    memory: float  # peak bytes of each process, without data that is kept on the device
    disk: float  # bytes of the results and of the two checkpoints that are kept while it runs
    # Operations of kNN during pretraining: they take time, but no budget or comparison counts them.
    readings: float = 0.0


class CostFunction(Protocol):
    def __call__(self, settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost: ...


def half_precision(setting: str, gpu: bool) -> bool:
    """Whether a stage with `precision: setting` computes in 16 bits (aps.runtime.precision)."""
    return setting in ("bf16", "fp16") or (setting == "auto" and gpu)
