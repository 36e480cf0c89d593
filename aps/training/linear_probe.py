"""Linear probe: linear classifiers on a frozen encoder, one for each learning rate, all trained in one pass.

The encoder runs in eval mode and is by far the dearest part; every head reads the same features, so a sweep costs little
more than one run. All learning rates are reported; the one in the headline is picked on a held-out part of train.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.errors import Preempted
from aps.models.heads import synchronize_batch_norm
from aps.models.weights import load_encoder, save_tensors
from aps.progress import Progress
from aps.results import StageJob, StageRun
from aps.runtime.checkpoint import Checkpoints
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.runtime.signals import stop_requested
from aps.runtime.trace import Trace
from aps.settings.blocks import LinearProbeSettings, ViewSettings
from aps.training.classify import accuracy
from aps.training.features import normalize
from aps.training.order import IMAGE, VIEWS, KeyedLoader, Order, held_out, seeded
from aps.training.schedule import cosine, scaled_lr
from aps.views import crop_resize, draw_boxes


def run(job: StageJob) -> None:
    """The stage. Outputs heads.safetensors, history.jsonl, metrics.json.

    Raises:
        UserError: settings that do not fit the data, the encoder or the processes.
        Preempted: asked to stop; the state is saved.
    """
    with processes() as distributed, StageRun(job) as stage:
        _probe(job, stage, distributed)


def _probe(job: StageJob, stage: StageRun, distributed: Distributed) -> None:
    settings, seed, size = job.settings.linear_probe, job.settings.seed, job.settings.encoder.image_size
    device = distributed.device
    manifest = Manifest.read(job.manifest)
    normalization = manifest.normalization(job.settings.dataset.statistics)
    train = load_split(job.manifest, "train", job.settings.dataset.train_limit)
    rows, held_rows = held_out(len(train), settings.holdout, seed)
    order = Order(rows, settings.batch_size, seed, distributed, "linear_probe")
    crops = Crops(train, settings, size, seed, job.workers, distributed)
    precision = Precision(settings.precision, device)
    torch.manual_seed(seed)
    encoder = load_encoder(job.encoder_spec, job.settings.encoder).to(device).eval().requires_grad_(False)
    heads = Heads(encoder.embed_dim, len(manifest.classes), len(settings.lrs), settings.batch_norm).to(device)
    if distributed.world > 1 and settings.batch_norm:
        synchronize_batch_norm(heads)
    forward: nn.Module = DistributedDataParallel(heads) if distributed.world > 1 else heads
    peaks = [scaled_lr(lr, settings.batch_size, 256) for lr in settings.lrs]
    optimizer = torch.optim.SGD(
        [{"params": own.parameters(), "lr": lr, "peak": lr} for own, lr in zip(heads.heads, peaks, strict=True)],
        momentum=settings.momentum,
    )

    checkpoints = Checkpoints(job.checkpoints, job.checkpoint_minutes, writes=distributed.main)
    done, total = 0, settings.epochs * order.batches
    losses = torch.zeros(len(peaks), device=device)
    if (state := checkpoints.load()) is not None:
        done = state["step"]
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        losses.copy_(state["losses"])
        stage.resume(done)

    def save() -> None:
        checkpoints.save(done, {"heads": heads.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses})
        stage.save_clock()

    with (
        Progress(job.label, total, "batches", done, shown=distributed.main) as progress,
        Trace(job.profile, distributed.device, distributed.main) as trace,
    ):
        while done < total:
            epoch, first = divmod(done, order.batches)
            for images, labels in crops.epoch(epoch, order.epoch(epoch), first):
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * cosine(done / total)
                with torch.no_grad(), precision.autocast():
                    features = encoder(normalize(images, normalization)).float()
                logits = forward(features)  # (heads, B, classes)
                each = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
                each = each.view(len(logits), -1).mean(1)
                each.sum().backward()  # the heads share nothing, so each gets its own gradient
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses += each.detach()
                done += 1
                progress.update(1, settings.batch_size)
                if done % order.batches == 0:  # before any save: a checkpoint of this moment has the epoch behind it
                    means = (distributed.mean(losses) / order.batches).tolist()
                    losses.zero_()
                    named = {
                        f"loss_lr{lr:g}": value
                        for lr, value in zip(settings.lrs, means, strict=True)
                        if math.isfinite(value)
                    }
                    stage.log(done, epoch=epoch + 1, **named)
                trace.batch_done()
                if stop_requested(distributed):
                    save()
                    raise Preempted(f"{job.label} after {done} of {total} batches; run it again to go on")
                if checkpoints.due():
                    save()
    save()

    heads.eval()

    def classify(x: Tensor) -> Tensor:
        return heads(encoder(x).float())

    held, test = train.select(held_rows), load_split(job.manifest, "test")
    on_held, on_test = (
        accuracy(classify, split, size, normalization, distributed, precision, job.workers).tolist()
        for split in (held, test)
    )
    pick = max(range(len(peaks)), key=lambda i: on_held[i])
    metrics = {"test_top1": on_test[pick], "holdout_top1": on_held[pick], "lr": settings.lrs[pick]}
    for lr, held_top1, test_top1 in zip(settings.lrs, on_held, on_test, strict=True):
        metrics |= {f"holdout_top1_lr{lr:g}": held_top1, f"test_top1_lr{lr:g}": test_top1}
    metrics |= {"epochs": settings.epochs, "images_per_second": progress.rate}
    if distributed.main:
        save_tensors(heads.state_dict(), stage.staging("heads.safetensors"))
        stage.finish(metrics, headline="test_top1", precision=precision.name)


class Heads(nn.Module):
    """Linear classifiers side by side, behind one optional BatchNorm without affine (MAE, appendix A.1)."""

    def __init__(self, dim: int, classes: int, count: int, batch_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6) if batch_norm else nn.Identity()
        self.heads = nn.ModuleList(self._head(dim, classes) for _ in range(count))

    @staticmethod
    def _head(dim: int, classes: int) -> nn.Linear:
        head = nn.Linear(dim, classes)
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (heads, B, classes); one product for all heads."""
        x = self.norm(features)
        weight, bias = (torch.cat([getattr(head, name) for head in self.heads]) for name in ("weight", "bias"))
        return F.linear(x, weight, bias).view(len(x), len(self.heads), -1).transpose(0, 1)


class Crops:
    """Random resized crops with flips, in [0, 1], on the device: batched for arrays, by workers for files."""

    def __init__(
        self, split: ArraySplit | FileSplit, settings: LinearProbeSettings, size: int, seed: int, workers: int,
        distributed: Distributed,
    ) -> None:  # fmt: skip
        self.size, self.seed, self.device, self.flip = size, seed, distributed.device, settings.flip
        self.batch_size, self.own = settings.batch_size, distributed.rows(settings.batch_size)
        self.views = ViewSettings(crop_scale=settings.crop_scale)
        self.labels = split.labels.to(self.device)
        self._images = split.images.to(self.device) if isinstance(split, ArraySplit) else None
        self._loader = (
            None
            if isinstance(split, ArraySplit)
            else KeyedLoader(_FileCrops(split, self.views, size, seed), workers, self.device)
        )

    def epoch(self, epoch: int, rows: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from `first` on; rows: (batches, B) -> (B, 3, S, S) in [0, 1], labels (B,)."""
        loaded = self._loader.epoch(epoch, rows[first:]) if self._loader is not None else None
        for batch in range(first, len(rows)):
            own = rows[batch].to(self.device)
            generator = seeded(self.seed, VIEWS, epoch, batch)  # drawn for the global batch
            flips = (torch.rand(self.batch_size, generator=generator) < self.flip)[self.own].to(self.device)
            if loaded is not None:
                crops = next(loaded).to(self.device, non_blocking=True).float() / 255
                yield torch.where(flips[:, None, None, None], crops.flip(3), crops), self.labels[own]
                continue
            assert self._images is not None
            heights, widths = (torch.full((self.batch_size,), side) for side in self._images.shape[2:])
            boxes = draw_boxes(heights, widths, self.views, generator)[self.own].float().to(self.device)
            yield crop_resize(self._images[own], boxes, flips, self.size), self.labels[own]


class _FileCrops(Dataset):
    def __init__(self, split: FileSplit, views: ViewSettings, size: int, seed: int) -> None:
        self.split, self.views, self.size, self.seed = split, views, size, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """key: (epoch, image) -> (3, S, S) uint8."""
        epoch, index = key
        image = self.split.read(index)
        sizes = (torch.tensor([image.shape[1]]), torch.tensor([image.shape[2]]))
        (box,) = draw_boxes(*sizes, self.views, seeded(self.seed, IMAGE, epoch, index)).tolist()
        return functional.resized_crop(image, *box, [self.size, self.size], antialias=True)
