"""The interface of engines: one Mask R-CNN on our encoder that trains, resumes, predicts and scores.

An engine is a file in aps/detection/engines with a class `Engine`; its name in the settings is the file's name. The same
settings mean the same thing in every engine: what they share (data order, seeds, schedule, evaluation) is here and in
`aps.detection.annotations`; docs/detection.md lists what differs.

It knows neither the files of results nor tracking: `aps.detection.stage` does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from aps.data.manifest import RGB
from aps.detection.annotations import CocoSplit, result_rows
from aps.runtime.processes import Distributed
from aps.settings.blocks import DetectionSettings, EncoderSettings

WARMUP_FACTOR = 0.001  # share of the learning rate at which warmup starts (ViTDet)
ANCHOR_STRIDES = 8  # side of an anchor in cells of its pyramid level: 32 pixels at 4 pixels a cell
LOG_EVERY = 20  # iterations between copies of the losses to the host

# Called after each iteration with the number of iterations done, and the losses where they were copied to the host.
After = Callable[[int, dict[str, float] | None], None]


@dataclass(frozen=True)
class Task:
    """What an engine is built from."""

    settings: DetectionSettings
    encoder: EncoderSettings
    seed: int
    train: CocoSplit
    val: CocoSplit
    mean: RGB  # of the normalization that the encoder was trained with, in [0, 1] units
    std: RGB
    workers: int
    processes: Distributed


@dataclass(frozen=True)
class Prediction:
    """Detections on one image, best first."""

    boxes: Tensor  # float (K, 4): left, top, right, bottom in pixels of the image as given
    scores: Tensor  # (K,)
    labels: Tensor  # int64 (K,), in [0, classes)
    masks: Tensor | None  # bool (K, H, W); None where the dataset has boxes only


class Engine(ABC):
    """A detector with its optimizer. Where training images have boxes only (`task.train.masks`), it has no mask head.

    Attributes:
        model: the detector; its encoder's parameters are under `backbone.net.` with timm's names.
    """

    model: nn.Module

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def train(self, start: int, after: After) -> None:
        """Train from iteration `start` (0, or what `resume` returned) to the end of the schedule."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that `resume` needs, as plain data and tensors; to be called from `after`."""

    @abstractmethod
    def resume(self, state: dict[str, Any]) -> int:
        """Load `state` and return the number of iterations done."""

    @abstractmethod
    def predict(self, images: list[Tensor]) -> list[Prediction]:
        """Detections of images, uint8 (3, H, W) of any sizes."""

    @abstractmethod
    def score(self, results: list[dict[str, Any]]) -> dict[str, Any]:
        """COCO metrics of detections in COCO's result format on val; keys as in `aps.detection.score`."""

    def evaluate(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics and detections on all of val, divided among the processes; both empty on ranks other than 0."""
        processes, val = self.task.processes, self.task.val
        local = range(processes.rank, len(val), processes.world)
        # Image by image: workers that read batches ahead would hold thousands of images, each with an open file.
        images = iter(DataLoader(_Images(val, local), batch_size=None, num_workers=self.task.workers))
        size = max(1, self.task.settings.batch_size // processes.world)
        rows: list[dict[str, Any]] = []
        training = self.model.training
        self.model.eval()
        while batch := list(islice(images, size)):
            for (index, _), found in zip(batch, self.predict([image for _, image in batch]), strict=True):
                rows += result_rows(val, val.ids[index], found.boxes, found.scores, found.labels, found.masks)
        self.model.train(training)
        if processes.world > 1:
            parts: list[Any] | None = [None] * processes.world if processes.main else None
            dist.gather_object(rows, parts)
            if parts is None:
                return {}, []
            rows = [row for part in parts for row in part]
        rows.sort(key=lambda row: row["image_id"])  # a stable sort, so any number of processes gives the same order
        return self.score(rows), rows


class _Images(Dataset[tuple[int, Tensor]]):
    """Images of a split by index, for workers to decode."""

    def __init__(self, split: CocoSplit, indices: range) -> None:
        self.split, self.indices = split, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        return self.indices[number], self.split.read(self.indices[number])


def milestones(settings: DetectionSettings) -> list[int]:
    """Iterations at which the learning rate drops, as far as the run reaches them."""
    drops = (round(share * settings.iterations) for share in settings.lr_drops)
    return [iteration for iteration in drops if iteration < settings.iterations]


def lr_factor(settings: DetectionSettings, iteration: int) -> float:
    """Learning rate of an iteration (from 0) as a share of the peak: linear warmup, then divided by 10 at each drop."""
    if iteration < settings.warmup_iterations:
        return WARMUP_FACTOR + (1 - WARMUP_FACTOR) * iteration / settings.warmup_iterations
    return 0.1 ** bisect_right(milestones(settings), iteration)


def seed_step(seed: int) -> None:
    """Seed the random draws of an iteration (drop path, sampled anchors and regions), whatever ran before."""
    torch.manual_seed(seed)
