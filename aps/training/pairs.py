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

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aps.config import ViewSettings
from aps.data.load import ArraySplit, FileSplit
from aps.errors import UserError
from aps.sampling import Geometry
from aps.training.distributed import Distributed
from aps.views import apply_crops, apply_view, crop_pair, draw_parameters

ORDER, VIEWS, SAMPLING = 0, 1, 2  # streams of random numbers


class Pair(NamedTuple):
    view1: Tensor  # (B, 3, S, S) float32, normalized
    view2: Tensor  # (B, 3, S, S)
    geometry1: Geometry
    geometry2: Geometry


def seeded(seed: int, stream: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one place of a run: independent streams, no state to save."""
    state = np.random.SeedSequence((seed, stream, *position)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state >> 1))


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
        if batch_size > len(split):
            raise UserError(f"pretrain.batch_size {batch_size} exceeds the {len(split)} training images; lower it")
        if batch_size % distributed.world:
            raise UserError(f"pretrain.batch_size {batch_size} is not a multiple of the {distributed.world} processes; change either")
        self.views, self.size, self.batch_size, self.seed = views, size, batch_size, seed
        self.mean, self.std = normalization
        self.distributed = distributed
        self.images = len(split)
        self.batches = len(split) // batch_size
        self._array = split.images.to(distributed.device) if isinstance(split, ArraySplit) else None
        self._keys: list[list[tuple[int, int]]] = []
        self._loader = (
            None
            if isinstance(split, ArraySplit)
            else DataLoader(
                _Crops(split, views, size, seed),
                batch_sampler=self._keys,  # filled anew for each epoch
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=distributed.device.type == "cuda",
                prefetch_factor=4 if workers else None,
            )
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Pair]:
        """Batches `first`, `first`+1, ... of an epoch, this process's rows of each."""
        device = self.distributed.device
        batches = self._from_memory(epoch, first) if self._array is not None else self._from_files(epoch, first)
        return _ahead(batches, device) if device.type == "cuda" else batches

    def _rows(self, epoch: int) -> Tensor:
        """(batches, B of this process) indices of images."""
        order = torch.randperm(self.images, generator=seeded(self.seed, ORDER, epoch))
        order = order[: self.batches * self.batch_size].view(self.batches, self.batch_size)
        return order[:, self.distributed.rows(self.batch_size)]

    def _from_memory(self, epoch: int, first: int) -> Iterator[Pair]:
        assert self._array is not None
        device, rows = self.distributed.device, self._rows(epoch).to(self.distributed.device)
        height, width = self._array.shape[2:]
        for batch in range(first, self.batches):
            images = self._array[rows[batch]]
            parameters = self._parameters(epoch, batch, height, width)
            view1, view2 = (apply_view(images, p, self.size, self.mean, self.std) for p in parameters)
            yield Pair(view1, view2, *(p.geometry(device) for p in parameters))

    def _from_files(self, epoch: int, first: int) -> Iterator[Pair]:
        assert self._loader is not None
        device = self.distributed.device
        self._keys[:] = [[(epoch, int(i)) for i in rows] for rows in self._rows(epoch)[first:]]
        for batch, (crops, boxes) in enumerate(self._loader, first):
            crops = crops.to(device, non_blocking=True)
            parameters = [
                p._replace(boxes=boxes[:, v]) for v, p in enumerate(self._parameters(epoch, batch, self.size, self.size))
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
