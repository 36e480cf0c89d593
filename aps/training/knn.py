"""kNN: classify test images by the labels of their nearest train images in feature space.

Cosine similarity, votes weighted by exp(similarity / temperature) (arXiv 1805.01978). All k are reported; k and the
temperature stand with the numbers because they move them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.models.encoder import Encoder
from aps.models.weights import load_encoder
from aps.results import StageJob, StageRun
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.training.features import Normalization, features
from aps.training.order import HOLDOUT, seeded

CHUNK = 1024  # test images compared at once, fewer where the train images are many:
SIMILARITIES = 2**26  # numbers held at once, a quarter of a GiB
MONITOR_K, MONITOR_TEMPERATURE, MONITOR_IMAGES = 20, 0.07, 10_000


def run(job: StageJob) -> None:
    """The stage. Outputs metrics.json (top-1 for every k) and history.jsonl (a line a k, step = k)."""
    with processes() as distributed, StageRun(job) as stage:
        settings = job.settings.knn
        normalization = Manifest.read(job.manifest).normalization(job.settings.dataset.statistics)
        torch.manual_seed(job.settings.seed)
        encoder = load_encoder(job.encoder_spec, job.settings.encoder).to(distributed.device)
        precision = Precision(settings.precision, distributed.device)
        train = load_split(job.manifest, "train", job.settings.dataset.train_limit)
        test = load_split(job.manifest, "test")
        bank, queries = (
            features(encoder, split, normalization, distributed, precision, job.workers, f"{job.label} {name}")
            for split, name in ((train, "train features"), (test, "test features"))
        )
        accuracies = knn_accuracy(bank, train.labels, queries, test.labels, settings.k, settings.temperature)
        for k, accuracy in accuracies.items():
            stage.log(k, knn_top1=accuracy)
        best_reported = {f"knn_top1_k{k}": accuracy for k, accuracy in accuracies.items()}
        stage.finish(
            {**best_reported, "temperature": settings.temperature, "train_images": len(train), "test_images": len(test)}
        )


@torch.inference_mode()
def knn_accuracy(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, ks: tuple[int, ...], temperature: float
) -> dict[int, float]:
    """Top-1 accuracy in percent for each k; a k above the number of train images means all of them.

    bank: (M, D) float32, bank_labels: (M,) int64, queries: (Q, D), labels: (Q,).
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    bank_labels, labels = bank_labels.to(bank.device), labels.to(bank.device)
    classes = int(max(bank_labels.max(), labels.max())) + 1
    most = min(max(ks), len(bank))
    right = dict.fromkeys(ks, 0)
    chunk = max(1, min(CHUNK, SIMILARITIES // len(bank)))
    for start in range(0, len(queries), chunk):
        similarity, nearest = (queries[start : start + chunk] @ bank.T).topk(most, dim=1)  # (q, most), descending
        # Less the nearest's, which changes no order: exp would overflow at a low temperature. In float64, in which it
        # does not matter in what order a GPU adds up.
        weights = ((similarity - similarity[:, :1]).double() / temperature).exp()
        voted = bank_labels[nearest]
        votes, counted = weights.new_zeros(len(voted), classes), 0
        for k in sorted(ks):
            new = slice(counted, counted := min(k, most))
            votes.scatter_add_(1, voted[:, new], weights[:, new])
            right[k] += int((votes.argmax(1) == labels[start : start + chunk]).sum())
    return {k: 100 * n / len(queries) for k, n in right.items()}


def monitor(
    encoder: Encoder, split: ArraySplit | FileSplit, normalization: Normalization, distributed: Distributed
) -> dict[str, float]:
    """kNN during pretraining: a tenth of (at most 10,000) train images classified by the others; never the test set."""
    order = torch.randperm(len(split), generator=seeded(0, HOLDOUT))[:MONITOR_IMAGES]
    few = split.select(order)
    found = features(encoder, few, normalization, distributed, Precision("auto", distributed.device), label="kNN")
    held = len(order) // 10
    accuracy = knn_accuracy(
        found[held:], few.labels[held:], found[:held], few.labels[:held], (MONITOR_K,), MONITOR_TEMPERATURE
    )
    return {"knn_train_top1": accuracy[MONITOR_K]}
