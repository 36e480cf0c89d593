"""Linear probe: linear classifiers on a frozen encoder, one for each learning rate, all trained in one pass.

The encoder runs in eval mode and takes nearly all of the time. All heads read the same features, so a sweep costs little
more than one run. All learning rates are reported; the one in the headline is chosen on a held-out part of train. A head
that diverged, so that its weights or answers are no finite numbers, has no accuracy and is not chosen.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.models.heads import synchronize_batch_norm
from aps.models.weights import INFO_KEY, load_encoder, save_tensors
from aps.results import StageJob, StageRun
from aps.runtime.precision import Precision
from aps.runtime.prefetch import prefetch, send
from aps.runtime.processes import Distributed, processes
from aps.settings.blocks import LinearProbeSettings, ViewSettings
from aps.text import number_of
from aps.training.classify import accuracy
from aps.training.features import BROKEN_ENCODER, normalization, normalize, pixels
from aps.training.loop import Line, Loop
from aps.training.order import IMAGE, VIEWS, KeyedLoader, MayDecode, Order, held_out, seeded
from aps.training.schedule import cosine, scaled_lr
from aps.views import crop_resize, cut, draw_boxes

FEW = 10  # held-out images on which no learning rate can be told from another


def run(job: StageJob) -> None:
    """Run the stage. It writes heads.safetensors, history.jsonl and metrics.json.

    Raises:
        UserError: the settings do not fit the data, the encoder or the processes; every head diverged.
        Preempted: the run was asked to stop; its state is saved.
    """
    with processes() as distributed, StageRun(job) as stage:
        learner, settings = Probing(job, distributed), job.settings.linear_probe
        loop = Loop(
            job, stage, distributed, learner.state_dict, learner.load_state_dict,
            total=learner.total, images=settings.batch_size,
            may_diverge=True,  # a head whose learning rate is too large; another head is chosen then
        )  # fmt: skip
        loop.train(learner, learner.order.batches)
        metrics = learner.evaluate() | {"epochs": settings.epochs, "images_per_second": loop.rate}
        if distributed.main:
            learner.save(stage, metrics["lr"])
            stage.finish(metrics, headline="test_top1", precision=learner.precision.name)


class Probing:
    """The learner of the linear probe: its batches, steps, log lines, evaluation and files."""

    note = ""

    def __init__(self, job: StageJob, distributed: Distributed) -> None:
        self.job, self.distributed, self.settings = job, distributed, job.settings.linear_probe
        settings, seed, device = self.settings, job.settings.seed, distributed.device
        self.manifest = manifest = Manifest.read(job.manifest)
        self.normalization = normalization(job)
        train = load_split(job.manifest, "train", job.settings.dataset.train_limit, labelled=True)
        rows, held_rows = held_out(len(train), settings.holdout, seed, "linear_probe.holdout")
        self.held = train.select(held_rows)
        self.order = Order(rows, settings.batch_size, seed, distributed, "linear_probe")
        self.crops = Crops(train, settings, job.settings.encoder.image_size, seed, job.workers, distributed)
        self.precision = Precision(settings.precision, device)
        torch.manual_seed(seed)
        self.encoder = load_encoder(job.encoder_spec, job.settings.encoder).to(device).eval().requires_grad_(False)
        count = len(settings.lrs)
        self.heads = Heads(self.encoder.embed_dim, len(manifest.classes), count, settings.batch_norm).to(device)
        if distributed.world > 1 and settings.batch_norm:
            synchronize_batch_norm(self.heads)
        self._forward: nn.Module = DistributedDataParallel(self.heads) if distributed.world > 1 else self.heads
        peaks = [scaled_lr(lr, settings.batch_size, 256) for lr in settings.lrs]
        self.optimizer = torch.optim.SGD(
            [
                {"params": head.parameters(), "lr": lr, "peak": lr}
                for head, lr in zip(self.heads.heads, peaks, strict=True)
            ],
            momentum=settings.momentum,
        )
        self.losses = torch.zeros(count, device=device)  # of each head, all processes; summed over the epoch
        self.means: list[float] = []  # those of the last epoch, a mean for each head
        self.total = settings.epochs * self.order.batches

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.crops.epoch(epoch, self.order.epoch(epoch), first)

    def close(self) -> None:
        self.crops.close()

    def step(self, batch: tuple[Tensor, Tensor], done: int) -> None:
        images, labels = batch
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(done / self.total)
        with torch.no_grad(), self.precision.autocast():
            features = self.encoder(normalize(images, self.normalization)).float()
        logits = self._forward(features)  # (heads, B, classes)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)), reduction="none")
        losses = losses.view(len(logits), -1).mean(1)  # (heads,)
        losses.sum().backward()  # heads share no parameters, so each gets the gradient of its loss alone
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses += self.distributed.mean(losses.detach())  # every time: a checkpoint holds one process's sums

    def lines(self, done: int) -> Iterator[Line]:
        if done % self.order.batches:
            return
        self.means = (self.losses / self.order.batches).tolist()
        self.losses.zero_()
        named = {f"loss_lr{lr:g}": value for lr, value in zip(self.settings.lrs, self.means, strict=True)}
        finite = {name: value for name, value in named.items() if math.isfinite(value)}
        yield {"epoch": done // self.order.batches, **finite}

    def evaluate(self) -> dict[str, float]:
        """Accuracies of every head on test and on the held-out part of train, on which the headline's head is chosen.

        Raises:
            UserError: every head diverged.
        """
        self.heads.eval()
        finite = torch.ones((), dtype=torch.bool, device=self.distributed.device)
        diverged = torch.zeros(len(self.settings.lrs), device=self.distributed.device)  # above 0 where a head did

        def classify(x: Tensor) -> Tensor:
            features = self.encoder(x).float()
            finite.logical_and_(features.isfinite().all())
            with torch.autocast(x.device.type, enabled=False):  # in float32, as they were trained
                logits = self.heads(features)
            diverged.logical_or_(~logits.isfinite().all(dim=2).all(dim=1))
            return logits

        size, lrs = self.job.settings.encoder.image_size, self.settings.lrs
        on_held, on_test = (
            accuracy(
                classify,
                split,
                size,
                self.normalization,
                self.distributed,
                self.precision,
                self.job.workers,
                classifiers=(len(lrs),),
            ).tolist()
            for split in (self.held, load_split(self.job.manifest, "test"))
        )
        if not finite:
            raise UserError(f"features of the held-out or test images are NaN or infinite; {BROKEN_ENCODER}")
        whole = [i for i, share in enumerate(self.distributed.mean(diverged).tolist()) if share == 0]
        self._warn(whole)
        pick = max(whole, key=lambda i: on_held[i])
        metrics = {"test_top1": on_test[pick], "holdout_top1": on_held[pick], "lr": lrs[pick]}
        for i in whole:
            metrics |= {f"holdout_top1_lr{lrs[i]:g}": on_held[i], f"test_top1_lr{lrs[i]:g}": on_test[i]}
        return metrics

    def _warn(self, whole: list[int]) -> None:
        """Warn of heads that diverged, and of a choice among the others that means little.

        whole: the heads that did not.

        Raises:
            UserError: there is none.
        """
        lrs, classes = self.settings.lrs, len(self.manifest.classes)
        if not whole:
            raise UserError("every head of linear_probe.lrs diverged; name lower learning rates")
        clauses = []
        if lost := ", ".join(f"{lr:g}" for i, lr in enumerate(lrs) if i not in whole):
            clauses.append(f"its heads at {lost} of linear_probe.lrs diverged and have no accuracy; leave these out")
        guessing = math.log(classes)  # the loss of equal answers
        if self.means and not any(self.means[i] <= guessing for i in whole):
            clauses.append(
                f"every head's loss is above {guessing:.3g}, that of guessing, so its accuracy says nothing of the encoder; choose "
                "other linear_probe.lrs, or raise linear_probe.epochs"
            )
        if len(whole) > 1 and len(self.held) < FEW:
            clauses.append(
                f"its learning rate is chosen on {number_of(len(self.held), 'held-out image')}, too few to tell; "
                "raise linear_probe.holdout, or name one rate in linear_probe.lrs"
            )
        for clause in clauses if self.distributed.main else ():
            print(f"warning: {self.job.label}: {clause}", file=sys.stderr)

    def state_dict(self) -> dict[str, Any]:
        return {
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "means": self.means,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses.copy_(state["losses"])
        self.means = state.get("means", [])  # version 0.2 has no such entry

    def save(self, stage: StageRun, lr: float) -> None:
        """Write the heads, with what a later user of the head of learning rate `lr` needs."""
        settings = self.job.settings
        info = {"experiment": settings.experiment, "stage": "linear_probe", "digest": settings.digest,
                "classes": list(self.manifest.classes), "lrs": self.settings.lrs, "lr": lr,
                **pixels(self.job)}  # fmt: skip
        save_tensors(self.heads.state_dict(), stage.staging("heads.safetensors"), {INFO_KEY: json.dumps(info)})


class Heads(nn.Module):
    """Parallel linear classifiers, after one optional BatchNorm without affine (MAE, appendix A.1)."""

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


class Crops(MayDecode):
    """Random resized crops with flips, in [0, 1], on the device; cut in batches for arrays, by workers for files."""

    def __init__(
        self, split: ArraySplit | FileSplit, settings: LinearProbeSettings, size: int, seed: int, workers: int | None,
        distributed: Distributed,
    ) -> None:  # fmt: skip
        self.size, self.seed, self.device, self.flip = size, seed, distributed.device, settings.flip
        self.batch_size, self.local_rows = settings.batch_size, distributed.rows(settings.batch_size)
        self.views = ViewSettings(crop_scale=settings.crop_scale)
        self.labels = split.labels.to(self.device)
        self._images = split.images.to(self.device) if isinstance(split, ArraySplit) else None
        self._loader = (
            None
            if isinstance(split, ArraySplit)
            else KeyedLoader(
                _FileCrops(split, self.views, size, seed), workers, distributed, settings.batch_size, [size]
            )
        )

    def epoch(self, epoch: int, rows: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches from `first` on: images (B, 3, S, S) in [0, 1], labels (B,); rows: (batches, B) indices of images."""
        return prefetch(self._epoch(epoch, rows, first), self.device)

    def _epoch(self, epoch: int, rows: Tensor, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        loaded = self._loader.epoch(epoch, rows[first:]) if self._loader is not None else None
        rows = rows.to(self.device)
        for batch in range(first, len(rows)):
            indices = rows[batch]
            generator = seeded(self.seed, VIEWS, epoch, batch)  # drawn for the global batch
            flips = torch.rand(self.batch_size, generator=generator) < self.flip
            if loaded is not None:
                crops = next(loaded).to(self.device, non_blocking=True).contiguous().float() / 255
                mirrored = send(flips[self.local_rows], self.device)[:, None, None, None]
                yield torch.where(mirrored, crops.flip(3), crops), self.labels[indices]
                continue
            assert self._images is not None
            heights, widths = (torch.full((self.batch_size,), side) for side in self._images.shape[2:])
            boxes = draw_boxes(heights, widths, self.views, generator)
            table = send(torch.cat([boxes, flips[:, None]], 1)[self.local_rows].float(), self.device)
            crops = crop_resize(self._images[indices], table[:, :4], table[:, 4] > 0, self.size)
            yield crops, self.labels[indices]


class _FileCrops(Dataset):
    def __init__(self, split: FileSplit, views: ViewSettings, size: int, seed: int) -> None:
        self.split, self.views, self.size, self.seed = split, views, size, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        """key: (epoch, image) -> (3, S, S) uint8."""
        epoch, index = key
        image = self.split.read(index)
        sizes = (torch.tensor([image.shape[1]]), torch.tensor([image.shape[2]]))
        (box,) = draw_boxes(*sizes, self.views, seeded(self.seed, IMAGE, epoch, index)).tolist()
        return cut(image, box, self.size)
