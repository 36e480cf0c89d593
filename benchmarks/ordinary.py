"""The baseline: one image at a time through PIL, torchvision's and timm's transforms and a NumPy sampler.

It is written as such code usually is. A loader's worker makes both views and all T samplings of an image. The sampler
loops over images and samplings, and computes the overlaps of all pairs of cells in one NumPy expression. For
finetuning, a worker makes an image; timm's erasing and mixup follow on the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import functional

from aps.settings.blocks import FinetuneSettings

Box = tuple[int, int, int, int]  # top, left, height, width in source pixels


def cell_corners(box: Box, flip: bool, grid: int) -> np.ndarray:
    """(N, 4) top, left, bottom, right of a view's cells in source pixels, row-major as seen in the view."""
    top, left, height, width = box
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    if flip:
        columns = grid - 1 - columns
    y, x = top + rows * height / grid, left + columns * width / grid
    return np.stack([y, x, y + height / grid, x + width / grid], 1)


def sample_image(
    box1: Box, flip1: bool, box2: Box, flip2: bool, grid: int, ratio: float, samplings: int, gamma: float,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Kept cells of both views of one image, (T, n) each (method.md, Sampling)."""
    cells, kept = grid * grid, int(grid * grid * ratio)
    order = random.permutation(cells)
    corners1, corners2 = cell_corners(box1, flip1, grid), cell_corners(box2, flip2, grid)
    area = box2[2] * box2[3] / cells
    chosen1, chosen2 = [], []
    for t in range(samplings):
        cells1 = order[t * kept : (t + 1) * kept]
        kept1 = corners1[cells1]
        tall = np.minimum(corners2[:, None, 2], kept1[:, 2]) - np.maximum(corners2[:, None, 0], kept1[:, 0])
        wide = np.minimum(corners2[:, None, 3], kept1[:, 3]) - np.maximum(corners2[:, None, 1], kept1[:, 1])
        covered = (tall.clip(0) * wide.clip(0)).sum(1) / area
        weights = (1 - covered).clip(0, 1) ** gamma
        if (positive := np.count_nonzero(weights)) < kept:
            first = np.flatnonzero(weights)
            rest = random.choice(np.flatnonzero(weights == 0), kept - positive, replace=False)
            cells2 = np.concatenate([first, rest])
        else:
            cells2 = random.choice(cells, kept, replace=False, p=weights / weights.sum())
        chosen1.append(cells1)
        chosen2.append(cells2)
    return np.stack(chosen1), np.stack(chosen2)


class OrdinaryPairs(Dataset):
    """images: (M, H, W, 3) uint8 -> view1, view2 (3, S, S) normalized, kept1, kept2 (T, n)."""

    def __init__(
        self, images: np.ndarray, size: int, mean: tuple[float, ...], std: tuple[float, ...], grid: int, samplings: int
    ) -> None:
        self.images, self.size, self.grid, self.samplings = images, size, grid, samplings
        self.colours = transforms.Compose(
            [
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def view(self, image: Image.Image) -> tuple[Tensor, Box, bool]:
        box = transforms.RandomResizedCrop.get_params(image, (0.15, 1.0), (3 / 4, 4 / 3))
        crop = functional.resized_crop(image, *box, [self.size, self.size])
        if flip := bool(torch.rand(()) < 0.5):
            crop = functional.hflip(crop)
        return self.colours(crop), box, flip

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        image = Image.fromarray(self.images[i])
        (view1, box1, flip1), (view2, box2, flip2) = self.view(image), self.view(image)
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        kept = sample_image(box1, flip1, box2, flip2, self.grid, 0.25, self.samplings, 3.0, random)
        return view1, view2, *map(torch.from_numpy, kept)


class OrdinaryExamples(Dataset):
    """images: (M, H, W, 3) uint8, labels: (M,) -> image (3, S, S) uint8, label; the finetuning recipe up to RandAugment.

    seeded: whether the three generators that the transforms use are seeded for each image, so that an interrupted run
    goes on with the same images, as ours does.
    """

    def __init__(self, images: np.ndarray, labels: Tensor, settings: FinetuneSettings, size: int, seeded: bool) -> None:
        self.images, self.labels, self.seeded = images, labels, seeded
        steps: list[Callable] = []
        if images.shape[1:3] != (size, size):
            steps += [transforms.Resize([size, size])]
        steps += [transforms.RandomCrop(size, padding=max(1, size // 8))]
        if settings.flip:
            steps += [transforms.RandomHorizontalFlip(settings.flip)]
        if settings.rand_augment is not None:
            steps += [
                rand_augment_transform(settings.rand_augment, {"img_mean": (124, 116, 104), "magnitude_max": 9.999})
            ]
        self.transform = transforms.Compose([*steps, transforms.PILToTensor()])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if self.seeded:
            seed = int(np.random.SeedSequence((0, i)).generate_state(1)[0])
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


def finished(
    settings: FinetuneSettings, classes: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The rest of the recipe on a batch: normalization, timm's erasing, timm's mixup and cutmix."""
    erase = RandomErasing(settings.erasing, mode="pixel", device=str(device)) if settings.erasing else None
    mixes = settings.mixup > 0 or settings.cutmix > 0
    mixup = (
        Mixup(
            settings.mixup, settings.cutmix, switch_prob=settings.mixup_switch,
            label_smoothing=settings.label_smoothing, num_classes=classes,
        )
        if mixes
        else None
    )  # fmt: skip
    mean_, std_ = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))

    def finish(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = (images.to(device, non_blocking=True).float() / 255 - mean_) / std_
        x = erase(x) if erase is not None else x
        labels = labels.to(device, non_blocking=True)
        return mixup(x, labels) if mixup is not None else (x, labels)

    return finish
