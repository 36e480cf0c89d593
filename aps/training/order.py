"""The order of images: shuffling, shares of processes and random seeds as pure functions of the position in a run.

No random state outlives a batch, so a run resumes at any point, on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate

from aps.errors import UserError
from aps.runtime.cores import loading
from aps.runtime.processes import Distributed

# Independent streams of random numbers from one seed.
ORDER, VIEWS, SAMPLING, STEP, IMAGE, HOLDOUT, NOISE = range(7)


def seed_of(seed: int, stream: int, *position: int) -> int:
    """A 63-bit seed for one position in a run."""
    return int(np.random.SeedSequence((seed, stream, *position)).generate_state(1, np.uint64)[0] >> 1)


def seeded(seed: int, stream: int, *position: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for one position in a run."""
    return torch.Generator(device).manual_seed(seed_of(seed, stream, *position))


class Order:
    """The batches of every epoch: each image once, shuffled; the last, smaller batch is dropped.

    Args:
        rows: (M,) int64 indices of the images to use.
        batch_size: over all processes.
        where: the name of the block of settings, for error messages.

    Raises:
        UserError: the batch exceeds the images or does not divide among the processes.
    """

    def __init__(self, rows: Tensor, batch_size: int, seed: int, distributed: Distributed, where: str) -> None:
        if batch_size > len(rows):
            raise UserError(f"{where}.batch_size {batch_size} exceeds the {len(rows)} training images; lower it")
        if batch_size % distributed.world:
            raise UserError(
                f"{where}.batch_size {batch_size} is not a multiple of the {distributed.world} processes; change either"
            )
        self.batches = len(rows) // batch_size
        self._rows, self._batch_size, self._seed, self._distributed = rows, batch_size, seed, distributed

    def epoch(self, epoch: int) -> Tensor:
        """Indices of images, (batches, B), B of this process."""
        shuffled = self._rows[torch.randperm(len(self._rows), generator=seeded(self._seed, ORDER, epoch))]
        batches = shuffled[: self.batches * self._batch_size].view(self.batches, self._batch_size)
        return batches[:, self._distributed.rows(self._batch_size)]


def held_out(images: int, share: float, seed: int, key: str = "holdout") -> tuple[Tensor, Tensor]:
    """Indices of the images to train on, and of those held out: int64, ascending, disjoint, together all images.

    key: of the share in a study, for error messages.

    Raises:
        UserError: the share is positive but too small to hold out an image, or so large that none is left.
    """
    shuffled = torch.randperm(images, generator=seeded(seed, HOLDOUT))
    held = round(images * share)
    if share and not held:
        raise UserError(f"a {key} of {share} of {images} training images keeps none aside; raise it")
    if held == images:
        raise UserError(f"a {key} of {share} of {images} training images leaves none to train on; lower it")
    return shuffled[held:].sort().values, shuffled[:held].sort().values


class KeyedLoader:
    """A DataLoader whose dataset takes keys (epoch, image), with workers that are kept for all epochs.

    Args:
        batch_size: over all processes.
        sizes: sides of the pictures that the dataset makes of an image, so that batches made ahead fit in shared memory.
    """

    def __init__(
        self, dataset: Dataset, workers: int | None, distributed: Distributed, batch_size: int, sizes: Iterable[int]
    ) -> None:
        options: Any = loading(workers, batch_size // distributed.world * sum(3 * size**2 for size in sizes))
        self._keys = _Keys()
        self._loader: DataLoader[Any] | None = DataLoader(
            dataset,
            batch_sampler=self._keys,
            collate_fn=collated,
            persistent_workers=options["num_workers"] > 0,
            pin_memory=distributed.device.type == "cuda",
            **options,
        )

    def epoch(self, epoch: int, rows: Tensor) -> Iterator[Any]:
        """Collated batches; rows: (batches, B) indices."""
        assert self._loader is not None, "closed"
        self._keys.epoch, self._keys.rows = epoch, rows
        return iter(self._loader)

    def close(self) -> None:
        """Let the workers end. As long as there are any, torch raises an error in this process, wherever it is, when one is
        killed from outside."""
        self._loader = None


def collated(samples: list[Any]) -> Any:
    """As torch's default_collate. Pixels, (3, S, S) of each sample, become (B, 3, S, S) without a change of their order in
    memory: the channels of each lie side by side, as decoders leave them, and moving them takes as long as resizing a crop."""
    samples = tree_map_only(Tensor, lambda x: x.permute(1, 2, 0) if x.dim() == 3 else x, samples)
    return tree_map_only(Tensor, lambda x: x.permute(0, 3, 1, 2) if x.dim() == 4 else x, default_collate(samples))


class MayDecode:
    """What makes batches of a split: images in memory, or files that decoding workers read."""

    _loader: KeyedLoader | None

    def close(self) -> None:
        """Let the decoding workers end."""
        if self._loader is not None:
            self._loader.close()


class _Keys:
    """The batch sampler. It makes the keys batch by batch, because a list of a million keys takes 100 MB."""

    def __init__(self) -> None:
        self.epoch, self.rows = 0, torch.empty(0, 0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        return ([(epoch, i) for i in batch.tolist()] for batch in self.rows)
