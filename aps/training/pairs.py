"""Batches of view pairs for pretraining, the same ones however many processes share them.

Images that fit in memory live on the training device as uint8 and nothing is done for one image at a time. Image files
are decoded and cropped by workers; the rest is batched on the device too. On a GPU the next batch is made on a stream of
its own while the current one trains.

Everything random is a function of (seed, epoch, batch) or (seed, epoch, image), so nothing has to be saved to go on
from the middle of an epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aps.data.load import ArraySplit, FileSplit
from aps.runtime.processes import Distributed
from aps.sampling import Geometry
from aps.settings.blocks import ViewSettings
from aps.training.order import VIEWS, KeyedLoader, Order, seeded
from aps.views import apply_crops, apply_view, crop_pair, draw_parameters


class Pair(NamedTuple):
    view1: Tensor  # (B, 3, S, S) float32, normalized
    view2: Tensor  # (B, 3, S, S)
    geometry1: Geometry
    geometry2: Geometry


class Pairs:
    """Two augmented views of every image, batch by batch; the last, smaller batch of an epoch is dropped.

    Args:
        split: the training images.
        views: how to augment.
        size: S, side of a view in pixels.
        batch_size: over all processes.
        normalization: mean and std, each of 3 channels in [0, 1] units.
        workers: decoding processes for image files.

    Raises:
        UserError: the batch exceeds the images or does not divide among the processes.
    """

    def __init__(
        self,
        split: ArraySplit | FileSplit,
        views: ViewSettings,
        size: int,
        batch_size: int,
        normalization: tuple[tuple[float, ...], tuple[float, ...]],
        seed: int,
        distributed: Distributed,
        workers: int = 0,
    ) -> None:
        self.views, self.size, self.batch_size, self.seed = views, size, batch_size, seed
        self.mean, self.std = normalization
        self.distributed = distributed
        self._order = Order(torch.arange(len(split)), batch_size, seed, distributed, "pretrain")
        self.batches = self._order.batches
        self._array = split.images.to(distributed.device) if isinstance(split, ArraySplit) else None
        self._loader = (
            None
            if isinstance(split, ArraySplit)
            else KeyedLoader(_Crops(split, views, size, seed), workers, distributed.device)
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Pair]:
        """Batches `first`, `first`+1, ... of an epoch, this process's rows of each."""
        device = self.distributed.device
        batches = self._from_memory(epoch, first) if self._array is not None else self._from_files(epoch, first)
        return _ahead(batches, device) if device.type == "cuda" else batches

    def _from_memory(self, epoch: int, first: int) -> Iterator[Pair]:
        assert self._array is not None
        device = self.distributed.device
        rows = self._order.epoch(epoch).to(device)
        height, width = self._array.shape[2:]
        for batch in range(first, self.batches):
            images = self._array[rows[batch]]
            parameters = self._parameters(epoch, batch, height, width)
            view1, view2 = (apply_view(images, p, self.size, self.mean, self.std) for p in parameters)
            yield Pair(view1, view2, *(p.geometry(device) for p in parameters))

    def _from_files(self, epoch: int, first: int) -> Iterator[Pair]:
        assert self._loader is not None
        device = self.distributed.device
        loaded = self._loader.epoch(epoch, self._order.epoch(epoch)[first:])
        for batch, (crops, boxes) in enumerate(loaded, first):
            crops = crops.to(device, non_blocking=True)
            parameters = [
                p._replace(boxes=boxes[:, v])
                for v, p in enumerate(self._parameters(epoch, batch, self.size, self.size))
            ]
            view1, view2 = (apply_crops(crops[:, v], p, self.mean, self.std) for v, p in enumerate(parameters))
            yield Pair(view1, view2, *(p.geometry(device) for p in parameters))

    def _parameters(self, epoch: int, batch: int, height: int, width: int) -> list:
        """Of this process's rows, drawn for the global batch."""
        generator = seeded(self.seed, VIEWS, epoch, batch)
        drawn = [draw_parameters(view, self.batch_size, height, width, self.views, generator) for view in (1, 2)]
        return [p.rows(self.distributed.rows(self.batch_size)) for p in drawn]


class _Crops(Dataset):
    """Decodes one image file and cuts its two crops; runs in a worker."""

    def __init__(self, split: FileSplit, views: ViewSettings, size: int, seed: int) -> None:
        self.split, self.views, self.size, self.seed = split, views, size, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """key: (epoch, image) -> crops (2, 3, S, S) uint8, boxes (2, 4) int64."""
        epoch, index = key
        return crop_pair(self.split.read(index), self.size, self.views, (self.seed, epoch, index))


def _ahead(batches: Iterator[Pair], device: torch.device) -> Iterator[Pair]:
    """Make each batch one ahead, on a side stream, so that the device's main stream never waits for it."""
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)

    def make() -> tuple[Pair, torch.cuda.Event] | None:
        with torch.cuda.stream(side):
            pair = next(batches, None)
            return None if pair is None else (pair, side.record_event())

    upcoming = make()
    while upcoming is not None:
        pair, ready = upcoming
        upcoming = make()
        main.wait_event(ready)
        for tensor in (pair.view1, pair.view2, *pair.geometry1, *pair.geometry2):
            tensor.record_stream(main)
        yield pair
