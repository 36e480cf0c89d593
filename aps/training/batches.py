"""Makes batches of views for pretraining, the same for any number of processes.

Images that fit in memory are kept on the training device as uint8, and all operations are batched. Image files are
decoded and cropped by workers; the other operations are batched on the device too. On a GPU the next batch is made on a
side stream while the current one trains.

Every random draw is a function of (seed, epoch, batch) or (seed, epoch, image), so a run resumes in the middle of an
epoch without saved random state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from aps.data.load import ArraySplit, FileSplit
from aps.runtime.prefetch import prefetch
from aps.runtime.processes import Distributed
from aps.sampling import Geometry
from aps.training.order import VIEWS, KeyedLoader, MayDecode, Order, seeded
from aps.views import View, ViewParameters, apply_crops, apply_view, cut_crops, draw_parameters

# Values of pixels that one operation on views may have. On a CPU more leave its caches: two views of 128 images of 32 pixels
# take 1.2 times as long together, six of 16 pixels 0.6 times. A GPU starts an operation in 8 us, in which it changes a
# million values.
JOINED = {"cpu": 2**19, "cuda": 2**24}


class Batch(NamedTuple):
    """V views of the same B images."""

    views: tuple[Tensor, ...]  # each (B, 3, S, S) float32, normalized; S is the view's
    geometries: tuple[Geometry, ...]  # one for each view


class Batches(MayDecode):
    """The augmented views of every image, batch by batch; the last, smaller batch of an epoch is dropped.

    Args:
        split: the training images.
        views: the views made of each image, in order.
        batch_size: over all processes.
        normalization: mean and std, each of 3 channels in [0, 1] units.
        workers: decoding processes for image files; None: as many as cores.

    Raises:
        UserError: the batch exceeds the images or does not divide among the processes.
    """

    def __init__(
        self,
        split: ArraySplit | FileSplit,
        views: Sequence[View],
        batch_size: int,
        normalization: tuple[tuple[float, ...], tuple[float, ...]],
        seed: int,
        distributed: Distributed,
        workers: int | None = None,
    ) -> None:
        self.views, self.batch_size, self.seed = tuple(views), batch_size, seed
        self.mean, self.std = normalization
        self.distributed = distributed
        self._order = Order(torch.arange(len(split)), batch_size, seed, distributed, "pretrain")
        self.batches = self._order.batches
        self._array = split.images.to(distributed.device) if isinstance(split, ArraySplit) else None
        self._loader = (
            None
            if isinstance(split, ArraySplit)
            else KeyedLoader(
                _Crops(split, self.views, seed), workers, distributed, batch_size, [view.size for view in self.views]
            )
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This process's rows of the batches `first`, `first`+1, ... of an epoch."""
        batches = self._from_memory(epoch, first) if self._array is not None else self._from_files(epoch, first)
        return prefetch(batches, self.distributed.device)

    def _from_memory(self, epoch: int, first: int) -> Iterator[Batch]:
        assert self._array is not None
        rows = self._order.epoch(epoch).to(self.distributed.device)
        sides = [tuple(self._array.shape[2:])] * len(self.views)
        for batch in range(first, self.batches):
            images = self._array[rows[batch]]
            yield self._batch([images] * len(self.views), self._parameters(epoch, batch, sides))

    def _from_files(self, epoch: int, first: int) -> Iterator[Batch]:
        assert self._loader is not None
        sides = [(view.size, view.size) for view in self.views]
        loaded = self._loader.epoch(epoch, self._order.epoch(epoch)[first:])
        for batch, (crops, boxes) in enumerate(loaded, first):
            parameters = [p._replace(boxes=boxes[:, v]) for v, p in enumerate(self._parameters(epoch, batch, sides))]
            pixels = [x.to(self.distributed.device, non_blocking=True) for x in crops]
            yield self._batch(pixels, parameters)

    def _batch(self, sources: list[Tensor], parameters: list[ViewParameters]) -> Batch:
        """sources: for each view the images, or its crops, (B, 3, H, W) uint8."""
        pixels: list[Tensor] = []
        for group in together([view.size for view in self.views], len(sources[0]), self.distributed.device):
            x, drawn, size = sources[group][0], parameters[group][0], self.views[group.start].size
            if group.stop - group.start > 1:
                x, drawn = torch.cat(sources[group]), ViewParameters.joined(parameters[group])
            made = (
                apply_view(x, drawn, size, self.mean, self.std)
                if self._loader is None
                else apply_crops(x, drawn, self.mean, self.std)
            )
            pixels += made.split(len(sources[0]))
        return Batch(tuple(pixels), tuple(p.geometry(self.distributed.device) for p in parameters))

    def _parameters(self, epoch: int, batch: int, sides: Sequence[tuple[int, ...]]) -> list[ViewParameters]:
        """Parameters of this process's rows, drawn for the global batch; sides: (H, W) of each view's source image."""
        generator = seeded(self.seed, VIEWS, epoch, batch)
        drawn = [
            draw_parameters(view.chances, self.batch_size, height, width, view.augmentation, generator)
            for view, (height, width) in zip(self.views, sides, strict=True)
        ]
        return [p.rows(self.distributed.rows(self.batch_size)) for p in drawn]


def together(sizes: Sequence[int], images: int, device: torch.device) -> Iterator[slice]:
    """Which views are made as one batch: neighbours of one size, as many as `JOINED` allows.

    It changes no value. The operations of one view are some 400 calls; where pixels are few, these take the time.
    """
    start = 0
    for size, views in groupby(sizes):
        end = start + len(list(views))
        count = max(1, JOINED.get(device.type, JOINED["cpu"]) // (3 * images * size**2))
        yield from (slice(first, min(first + count, end)) for first in range(start, end, count))
        start = end


class _Crops(Dataset):
    """Decodes one image file and cuts its crops; runs in a worker."""

    def __init__(self, split: FileSplit, views: Sequence[View], seed: int) -> None:
        self.split, self.views, self.seed = split, views, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
        """key: (epoch, image) -> crops, V of (3, S, S) uint8, boxes (V, 4) int64."""
        epoch, index = key
        return cut_crops(self.split.read(index), self.views, (self.seed, epoch, index))
