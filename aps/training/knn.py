"""kNN: classifies test images by the labels of their nearest train images in feature space.

Neighbours are found by cosine similarity, and votes are weighted by exp(similarity / temperature) (arXiv 1805.01978).
Every k is reported, and the temperature, because accuracies depend on both.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aps.data.load import ArraySplit, FileSplit, spread_rows
from aps.errors import UserError
from aps.models.encoder import Encoder
from aps.models.weights import check_finite
from aps.results import StageJob, StageRun
from aps.runtime.precision import Precision, full_products
from aps.runtime.processes import Distributed, processes
from aps.training.features import BROKEN_ENCODER, Normalization, features, labelled_features, pixels
from aps.training.order import HOLDOUT, seeded
from aps.training.watch import spread

CHUNK = 1024  # test images compared at once with
BLOCK = 65_536  # train images, so that memory does not grow with the dataset
EXAMPLES, NEIGHBOURS = 6, 5  # test images in the picture, and training images beside each
MONITOR_K, MONITOR_TEMPERATURE, MONITOR_IMAGES = 20, 0.07, 10_000


def run(job: StageJob) -> None:
    """Run the stage. It writes metrics.json (top-1 for every k) and history.jsonl (one line for each k, step = k)."""
    with processes() as distributed, StageRun(job) as stage:
        settings = job.settings.knn
        bank, labels, queries, truth = labelled_features(job, distributed, settings.precision)
        bank, queries = _unit_vectors(bank, queries)
        accuracies = _accuracy(bank, labels, queries, truth, settings.k, settings.temperature)
        if distributed.main and max(settings.k) > len(bank):
            print(
                f"warning: {job.label}: knn.k {max(settings.k)} is more than the {len(bank)} train images, all of which vote then",
                file=sys.stderr,
            )
        for k, accuracy in accuracies.items():
            stage.log(k, knn_top1=accuracy)
        by_k = {f"knn_top1_k{k}": accuracy for k, accuracy in accuracies.items()}
        stage.finish(
            {
                **by_k,
                "temperature": settings.temperature,
                "train_images": len(bank),
                "test_images": len(queries),
            },
            pixels=pixels(job),
            examples=_examples(bank, queries),
        )


def _examples(bank: Tensor, queries: Tensor) -> list[dict[str, Any]]:
    """A few test images, spread over the split, with the training images most similar to each: rows and cosines.

    bank, queries: unit vectors.
    """
    rows = spread_rows(len(queries), EXAMPLES)
    similarity, nearest = neighbours(queries[rows], bank, min(NEIGHBOURS, len(bank)))
    return [
        {"test": row, "train": train_rows, "similarity": [round(x, 4) for x in cosines]}
        for row, train_rows, cosines in zip(rows, nearest.tolist(), similarity.tolist(), strict=True)
    ]


def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: tuple[int, ...], temperature: float
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k; a k above the number of train images means all of them.

    bank: (M, D) float32, bank_labels: (M,) int64, queries: (Q, D), labels: (Q,).

    Raises:
        UserError: a feature is not a finite number.
    """
    bank, queries = _unit_vectors(bank, queries)
    return _accuracy(bank, bank_labels, queries, labels, ks, temperature)


@torch.inference_mode()
def _unit_vectors(bank: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    for x, what in ((bank, "features of the train images"), (queries, "features of the test images")):
        check_finite(x, what, BROKEN_ENCODER)
    return F.normalize(bank, dim=1), F.normalize(queries, dim=1)


@torch.inference_mode()
def _accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: tuple[int, ...], temperature: float
) -> dict[int, float]:
    """`knn_accuracy` of unit vectors."""
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    right = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), CHUNK):
        similarity, nearest = neighbours(queries[start : start + CHUNK], bank, min(max(ks), len(bank)))  # (q, most)
        # Weights are relative to the nearest neighbour's, because exp(1 / temperature) overflows float32 for temperatures
        # up to 0.0113. In float64 the order of addition, which differs between runs on GPUs, does not change a vote.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = weights.new_zeros(len(weights), classes)
        counted = 0
        for k in sorted(set(ks)):
            added = slice(counted, k)
            votes.scatter_add_(1, bank_labels[nearest[:, added]], weights[:, added])
            counted = k
            right[k] += int((votes.argmax(1) == labels[start : start + CHUNK]).sum())
    return {k: 100 * n / len(queries) for k, n in right.items()}


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarity (q, k), descending, and rows (q, k) of the nearest vectors of `bank` (M, D), block by block."""
    similarity = queries.new_empty(len(queries), 0)
    nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BLOCK):
        with full_products():
            block = queries @ bank[start : start + BLOCK].T
        highest, rows = block.topk(min(k, block.shape[1]), dim=1)
        similarity, nearest = torch.cat([similarity, highest], 1), torch.cat([nearest, rows + start], 1)
        if start:
            similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
            nearest = nearest.gather(1, best)
    return similarity, nearest


def monitor(
    encoder: Encoder,
    split: ArraySplit | FileSplit,
    normalization: Normalization,
    distributed: Distributed,
    workers: int | None = None,
) -> dict[str, float]:
    """Figures during pretraining on at most 10,000 train images, never the test set: the spread of the features and, where
    images have labels, kNN accuracy on a tenth of the images, with the others as neighbours.

    Raises:
        UserError: a feature is not finite, or there are fewer than 10 labelled images.
    """
    order = torch.randperm(len(split), generator=seeded(0, HOLDOUT))[:MONITOR_IMAGES]
    chosen = split.select(order)
    precision = Precision("auto", distributed.device)
    bank = features(encoder, chosen, normalization, distributed, precision, workers, label="kNN")
    check_finite(bank, "features of the train images", BROKEN_ENCODER)
    figures = spread(bank)
    if not split.classes:
        return figures
    held = len(order) // 10
    if not held:
        raise UserError(
            f"kNN during pretraining (pretrain.knn_every, knn_readings) holds out a tenth of {len(order)} train images, which is "
            "none; set pretrain.knn_every: 0 and knn_readings: null"
        )
    accuracy = knn_accuracy(
        bank[held:], chosen.labels[held:], bank[:held], chosen.labels[:held], (MONITOR_K,), MONITOR_TEMPERATURE
    )
    return {"knn_train_top1": accuracy[MONITOR_K], **figures}
