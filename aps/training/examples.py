"""Makes batches of augmented, labelled images for finetuning, the same for any number of processes.

Images that fit in memory are kept on the training device as uint8, and all operations are batched. Image files are
decoded and cut to size by workers; the other operations are batched on the device too. On a GPU the next batch is made on
a side stream while the current one trains.

Every random draw is a function of (seed, epoch, batch) or (seed, epoch, image), so a run resumes in the middle of an
epoch without saved random state.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode

from aps.data.load import ArraySplit, FileSplit
from aps.errors import UserError
from aps.runtime.prefetch import prefetch
from aps.runtime.processes import Distributed
from aps.settings.blocks import FinetuneSettings
from aps.training import augment
from aps.training.features import Normalization
from aps.training.order import IMAGE, NOISE, VIEWS, KeyedLoader, MayDecode, Order, seeded
from aps.views import cut

# Pixels that are augmented at once: of small images, several batches, which takes less time for each.
PIXELS_AT_ONCE = 2**20


class Examples(NamedTuple):
    """A batch of one process."""

    images: Tensor  # (B, 3, S, S) float32, normalized
    targets: Tensor  # (B, C) float32: smoothed labels, mixed as the images are
    labels: Tensor  # (B,) int64


class AugmentedExamples(MayDecode):
    """Every image of `rows` once an epoch, shuffled, batch by batch; the last, smaller batch is dropped.

    Args:
        split: the training images.
        rows: (M,) int64 indices of the images to use.
        size: S, side of an image in pixels.
        classes: C.
        normalization: mean and std, each of 3 channels in [0, 1] units.
        workers: decoding processes for image files; None: as many as cores.

    Raises:
        UserError: the batch exceeds the images, or can't be divided evenly among the processes or, for mixup, into pairs.
    """

    def __init__(
        self,
        split: ArraySplit | FileSplit,
        rows: Tensor,
        settings: FinetuneSettings,
        size: int,
        classes: int,
        normalization: Normalization,
        seed: int,
        distributed: Distributed,
        workers: int | None = None,
    ) -> None:
        self.settings, self.size, self.classes, self.seed = settings, size, classes, seed
        self.distributed, device = distributed, distributed.device
        self._order = Order(rows, settings.batch_size, seed, distributed, "finetune")
        self.batches = self._order.batches
        if (settings.mixup or settings.cutmix) and settings.batch_size // distributed.world % 2:
            raise UserError(
                f"finetune.batch_size {settings.batch_size} gives each of the {distributed.world} processes an odd number "
                "of images, and mixup pairs them; make it even, or set finetune.mixup and finetune.cutmix to 0"
            )
        self._draw = augment.Draw(settings, size)
        self._pads = settings.crop == "pad"
        self._crop = augment.pad_crop if self._pads else augment.resized_crop
        self._batches_at_once = max(1, PIXELS_AT_ONCE * distributed.world // (settings.batch_size * size**2))
        self._mean, self._std = (torch.tensor(x, device=device).view(3, 1, 1) for x in normalization)
        self._fill = (255 * self._mean).round().flatten()  # moves fill empty pixels with the mean colour, as in timm
        self._labels = split.labels.to(device)
        self._array = split.images.to(device) if isinstance(split, ArraySplit) else None
        self._loader = (
            None
            if isinstance(split, ArraySplit)
            else KeyedLoader(_Decoded(split, self._draw, size, seed), workers, distributed, settings.batch_size, [size])
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Examples]:
        """This process's rows of the batches `first`, `first`+1, ... of an epoch."""
        return prefetch(self._epoch(epoch, first), self.distributed.device)

    def _epoch(self, epoch: int, first: int) -> Iterator[Examples]:
        rows = self._order.epoch(epoch)
        loaded = self._loader.epoch(epoch, rows[first:]) if self._loader is not None else None
        rows = rows.to(self.distributed.device)
        for start in range(first, self.batches, self._batches_at_once):
            batches = range(start, min(start + self._batches_at_once, self.batches))
            yield from self._augmented(epoch, batches, rows[start : batches.stop], loaded)

    def _augmented(
        self, epoch: int, batches: range, rows: Tensor, loaded: Iterator[Tensor] | None
    ) -> Iterator[Examples]:
        """rows: (batches, B) indices of images."""
        device, local = self.distributed.device, self.distributed.rows(self.settings.batch_size)
        height, width = (self.size, self.size) if self._array is None else self._array.shape[2:]
        generators = [seeded(self.seed, VIEWS, epoch, batch) for batch in batches]
        drawn = [self._draw(self.settings.batch_size, height, width, generator) for generator in generators]
        boxes, flips, program = augment.joined([parameters.rows(local) for parameters in drawn])
        boxes, flips = augment.on_device(boxes, flips, device)
        if loaded is None:
            assert self._array is not None
            images = self._crop(self._array[rows.flatten()], boxes, flips, self.size)
        else:
            # Each is sent from pinned memory; joined on the CPU they would be in memory that is not pinned.
            images = torch.cat([next(loaded).to(device, non_blocking=True).contiguous() for _ in batches])
            images = augment.pad_crop(images, boxes, flips, self.size) if self._pads else augment.flip(images, flips)
        images = augment.run_program(images, program, self._fill)
        for batch, pixels, parameters, row in zip(batches, images.chunk(len(batches)), drawn, rows, strict=True):
            x = pixels.float().div_(255).sub_(self._mean).div_(self._std)
            if parameters.erased is not None:
                noise = seeded(self.seed, NOISE, epoch, batch, device=device)
                x = augment.erase(x, parameters.erased, local, noise)
            labels = self._labels[row]
            targets = augment.soft_targets(labels, self.classes, self.settings.label_smoothing, parameters.mix)
            yield Examples(augment.mix_images(x, parameters.mix), targets, labels)


class _Decoded(Dataset):
    """Decodes one image file and cuts it to size; runs in a worker."""

    def __init__(self, split: FileSplit, draw: augment.Draw, size: int, seed: int) -> None:
        self.split, self.draw, self.size, self.seed = split, draw, size, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """key: (epoch, image) -> (3, S, S) uint8."""
        epoch, index = key
        image = self.split.read(index)
        height, width = image.shape[1:]
        if self.draw.settings.crop == "pad":
            return cut(image, (0, 0, height, width), self.size)
        sides = torch.tensor([height]), torch.tensor([width])
        (box,) = self.draw.boxes(*sides, seeded(self.seed, IMAGE, epoch, index)).tolist()
        return cut(image, box, self.size, InterpolationMode.BICUBIC)
