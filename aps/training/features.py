"""Computes class-token features of a split with a frozen encoder, and prepares images for evaluation, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.models.encoder import Encoder
from aps.models.weights import load_encoder, trained_with
from aps.progress import Progress
from aps.results import StageJob
from aps.runtime.cores import loading
from aps.runtime.precision import Precision
from aps.runtime.prefetch import send
from aps.runtime.processes import Distributed
from aps.training.order import collated

BATCH = 256
CENTRE = 256 / 224  # the shorter side of a file's image over S before the centre crop (usual for ImageNet)

BROKEN_ENCODER = (
    "the encoder is broken or overflows: compute in precision fp32, or train it again with a lower learning rate"
)

Normalization = tuple[tuple[float, ...], tuple[float, ...]]


def normalization(job: StageJob) -> Normalization:
    """Mean and std with which a stage normalizes every image, by the setting `dataset.statistics`.

    Raises:
        UserError: the dataset is not prepared, or has no such statistics.
    """
    which = job.settings.dataset.statistics
    if which == "encoder":
        if (known := trained_with(job.encoder_spec)) is not None:
            return known
        which = "measured"
    return Manifest.read(job.manifest).normalization(which)


def pixels(job: StageJob) -> dict[str, Any]:
    """How evaluation prepares images, stored with the weights for later use: mean, std, and the crop, which is the `whole`
    image (of a dataset in memory) or its `centre` (of a dataset of files).

    Raises:
        UserError: as `normalization`.
    """
    mean, std = normalization(job)
    in_memory = Manifest.read(job.manifest).splits["train"].tensors is not None
    return {"mean": mean, "std": std, "crop": "whole" if in_memory else "centre"}


def normalize(images: Tensor, normalization: Normalization) -> Tensor:
    """Normalize images, (B, 3, S, S) in [0, 1]."""
    mean, std = (send(torch.tensor(x), images.device).view(3, 1, 1) for x in normalization)
    return (images - mean) / std


def resized(images: Tensor, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, S, S) float32 in [0, 1]; the whole image of an array dataset."""
    images = images.float() / 255
    if images.shape[2:] == (size, size):
        return images
    return functional.resize(images, [size, size], antialias=True)


def centred(image: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 of any size -> (3, S, S) uint8; the centre of a file dataset's image."""
    image = functional.resize(image, [round(size * CENTRE)], antialias=True)
    return functional.center_crop(image, [size, size])


def images_of(
    split: ArraySplit | FileSplit, size: int, device: torch.device, rows: range, workers: int | None = None
) -> Iterator[Tensor]:
    """Batches (B, 3, S, S) in [0, 1] on the device, in the order of `rows`."""
    if isinstance(split, ArraySplit):
        for start in range(rows.start, rows.stop, BATCH):
            yield resized(split.images[start : min(start + BATCH, rows.stop)].to(device), size)
    else:
        options: Any = loading(workers, BATCH * 3 * size**2)
        pinned = device.type == "cuda"
        loader = DataLoader(_Centred(split, size, rows), BATCH, pin_memory=pinned, collate_fn=collated, **options)
        for batch in loader:
            yield batch.to(device, non_blocking=True).contiguous().float() / 255


class _Centred(Dataset):
    def __init__(self, split: FileSplit, size: int, rows: range) -> None:
        self.split, self.size, self.rows = split, size, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Tensor:
        return centred(self.split.read(self.rows[i]), self.size)


@torch.inference_mode()
def features(
    encoder: Encoder,
    split: ArraySplit | FileSplit,
    normalization: Normalization,
    distributed: Distributed,
    precision: Precision,
    workers: int | None = None,
    label: str = "features",
) -> Tensor:
    """Features (M, D) float32 of every image, on every process. Each process computes a contiguous part of them."""
    training = encoder.training
    encoder.eval()
    size = encoder.patch_embed.img_size[0]
    part = -(-len(split) // distributed.world)
    rows = range(min(len(split), distributed.rank * part), min(len(split), (distributed.rank + 1) * part))
    local = torch.empty(len(rows), encoder.embed_dim, device=distributed.device)
    done = 0
    with Progress(label, len(rows), "images", shown=distributed.main) as progress:
        for images in images_of(split, size, distributed.device, rows, workers):
            with precision.autocast():
                batch = encoder(normalize(images, normalization))
            local[done : done + len(images)] = batch  # copied: a view of the class token holds all tokens in memory
            done += len(images)
            progress.update(len(images), len(images))
    encoder.train(training)
    if distributed.world == 1:
        return local
    padded = torch.nn.functional.pad(local, (0, 0, 0, part - len(local)))
    whole = padded.new_empty(distributed.world * part, padded.shape[1])
    dist.all_gather(list(whole.chunk(distributed.world)), padded)  # into its place: the parts are not held beside it
    return whole[: len(split)]


def labelled_features(job: StageJob, distributed: Distributed, precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels of a stage's images with its frozen encoder: train (M, D), (M,), test (Q, D), (Q,).

    Args:
        precision: the stage's setting.

    Raises:
        UserError: the dataset is not prepared or has no labels, or the encoder's file is broken or does not fit.
    """
    torch.manual_seed(job.settings.seed)  # for an encoder with random weights
    encoder = load_encoder(job.encoder_spec, job.settings.encoder).to(distributed.device)
    mean_and_std, computing = normalization(job), Precision(precision, distributed.device)
    limit, found = job.settings.dataset.train_limit, []
    for name, split in (
        ("train", load_split(job.manifest, "train", limit, labelled=True)),
        ("test", load_split(job.manifest, "test")),
    ):
        label = f"{job.label} {name} features"
        computed = features(encoder, split, mean_and_std, distributed, computing, job.workers, label)
        found += [computed, split.labels.to(computed.device)]
    bank, labels, queries, truth = found
    return bank, labels, queries, truth
