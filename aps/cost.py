"""What the cost of a stage is: the contract of the functions that count it. No torch here: planning reads this file.

A stage's cost function is `(settings, counts, gpus, gpu) -> Cost`:

    settings  the experiment's, or those of one run of the stage; it reads the blocks that the stage reads
    counts    of the dataset that the stage reads
    gpus      processes that share the run
    gpu       whether they are GPUs, where `precision: auto` means 16 bits; on CPUs it means float32

`aps.training.cost` and `aps.detection.cost` hold those of the project's own stages, `aps.estimate` makes the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol


class Counts(NamedTuple):
    """Size of a dataset."""

    train: int  # images
    test: int  # val of detection datasets; 0 of images without labels
    classes: int
    gigabytes: float  # of the prepared dataset and, where it is downloaded, its archives
    masks: bool = True  # detection: false where instances have boxes only


@dataclass(frozen=True)
class Cost:
    """Of one run of a stage."""

    flops: float  # operations of matrix products, convolutions and attention, over all processes; a multiply-add is two
    memory: float  # bytes of each process at its peak, data kept on the device not among them
    disk: float  # bytes of results and of the two checkpoints kept while it runs


class CostFunction(Protocol):
    def __call__(self, settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost: ...


def half_precision(setting: str, gpu: bool) -> bool:
    """Whether a stage with `precision: setting` computes in 16 bits (aps.runtime.precision)."""
    return setting in ("bf16", "fp16") or (setting == "auto" and gpu)
