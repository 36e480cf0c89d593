"""kNN: classify test images by the labels of their nearest train images in feature space.

Cosine similarity, votes weighted by exp(similarity / temperature) (arXiv 1805.01978). All k are reported; k and the
temperature stand with the numbers because they move them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aps.data.load import ArraySplit, FileSplit
from aps.errors import UserError
from aps.models.encoder import Encoder
from aps.models.weights import check_finite
from aps.results import StageJob, StageRun
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.training.features import BROKEN_ENCODER, Normalization, features, labelled_features, pixels
from aps.training.order import HOLDOUT, seeded
from aps.training.watch import spread

CHUNK = 1024  # test images compared at once,
BLOCK = 65_536  # with so many train images at once: memory does not grow with either
EXAMPLES, NEIGHBOURS = 6, 5  # test images in the picture, and training images beside each
MONITOR_K, MONITOR_TEMPERATURE, MONITOR_IMAGES = 20, 0.07, 10_000


def run(job: StageJob) -> None:
    """The stage. Outputs metrics.json (top-1 for every k) and history.jsonl (a line a k, step = k)."""
    with processes() as distributed, StageRun(job) as stage:
        settings = job.settings.knn
        bank, labels, queries, truth = labelled_features(job, distributed, settings.precision)
        accuracies = knn_accuracy(bank, labels, queries, truth, settings.k, settings.temperature)
        for k, accuracy in accuracies.items():
            stage.log(k, knn_top1=accuracy)
        best_reported = {f"knn_top1_k{k}": accuracy for k, accuracy in accuracies.items()}
        stage.finish(
            {
                **best_reported,
                "temperature": settings.temperature,
                "train_images": len(bank),
                "test_images": len(queries),
            },
            pixels=pixels(job),
            examples=_examples(bank, queries),
        )


def _examples(bank: Tensor, queries: Tensor) -> list[dict[str, Any]]:
    """A few test images, spread over the split, with the training images most similar to each: rows and cosines."""
    rows = torch.linspace(0, len(queries) - 1, min(EXAMPLES, len(queries))).round().long()
    few, bank = F.normalize(queries[rows.to(queries.device)], dim=1), F.normalize(bank, dim=1)
    similarity, nearest = neighbours(few, bank, min(NEIGHBOURS, len(bank)))
    return [
        {"test": row, "train": found, "similarity": [round(x, 4) for x in cosines]}
        for row, found, cosines in zip(rows.tolist(), nearest.tolist(), similarity.tolist(), strict=True)
    ]


@torch.inference_mode()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: tuple[int, ...], temperature: float
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k; a k above the number of train images means all of them.

    bank: (M, D) float32, bank_labels: (M,) int64, queries: (Q, D), labels: (Q,).

    Raises:
        UserError: a feature is not a finite number.
    """
    for x, what in ((bank, "features of the train images"), (queries, "features of the test images")):
        check_finite(x, what, BROKEN_ENCODER)
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    right = dict.fromkeys(ks, 0)
    for start in range(0, len(queries), CHUNK):
        similarity, nearest = neighbours(queries[start : start + CHUNK], bank, min(max(ks), len(bank)))  # (q, most)
        # Of the nearest 1: exp(1 / temperature) itself is beyond float32 from 0.0113 down. Float64, in which an order of
        # addition that differs between runs (on GPUs) decides no vote.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        votes = weights.new_zeros(len(weights), classes)
        counted = 0
        for k in sorted(set(ks)):
            few = slice(counted, k)
            votes.scatter_add_(1, bank_labels[nearest[:, few]], weights[:, few])
            counted = k
            right[k] += int((votes.argmax(1) == labels[start : start + CHUNK]).sum())
    return {k: 100 * n / len(queries) for k, n in right.items()}


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarity (q, k), descending, and rows (q, k) of the nearest vectors of `bank` (M, D), block by block."""
    similarity = queries.new_empty(len(queries), 0)
    nearest = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), BLOCK):
        block = queries @ bank[start : start + BLOCK].T
        found, rows = block.topk(min(k, block.shape[1]), dim=1)
        similarity, nearest = torch.cat([similarity, found], 1), torch.cat([nearest, rows + start], 1)
        if start:
            similarity, best = similarity.topk(min(k, similarity.shape[1]), dim=1)
            nearest = nearest.gather(1, best)
    return similarity, nearest


def monitor(
    encoder: Encoder, split: ArraySplit | FileSplit, normalization: Normalization, distributed: Distributed
) -> dict[str, float]:
    """During pretraining, on at most 10,000 train images, never the test set: how far the features spread, and kNN, a tenth of
    the images classified by the others, where they have labels."""
    order = torch.randperm(len(split), generator=seeded(0, HOLDOUT))[:MONITOR_IMAGES]
    few = split.select(order)
    found = features(encoder, few, normalization, distributed, Precision("auto", distributed.device), label="kNN")
    check_finite(found, "features of the train images", BROKEN_ENCODER)
    figures = spread(found)
    if not split.classes:
        return figures
    held = len(order) // 10
    if not held:
        raise UserError(
            f"pretrain.knn_every holds out a tenth of {len(order)} train images, which is none; set pretrain.knn_every: 0"
        )
    accuracy = knn_accuracy(
        found[held:], few.labels[held:], found[:held], few.labels[:held], (MONITOR_K,), MONITOR_TEMPERATURE
    )
    return {"knn_train_top1": accuracy[MONITOR_K], **figures}
