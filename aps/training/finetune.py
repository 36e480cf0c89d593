"""Finetuning: trains encoder and linear head on labels (method.md, Finetuning recipe; EMA and augmentation as in timm).

Four mistakes of the authors' release are corrected: images are normalized as in pretraining, drop path is applied to the
model, the EMA model is evaluated, and the headline is the last epoch's test accuracy. A best epoch is reported only where
`holdout` keeps part of train aside, on which it is chosen.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.models.encoder import Encoder
from aps.models.weights import load_encoder, save_encoder
from aps.results import StageJob, StageRun
from aps.runtime.compiling import compile_module
from aps.runtime.memory import keep_memory
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.settings.blocks import FinetuneSettings
from aps.training.classify import accuracy
from aps.training.examples import AugmentedExamples, Examples
from aps.training.features import Normalization, normalization, pixels
from aps.training.loop import Line, Loop, all_finite, finite, weights_not_finite
from aps.training.order import STEP, held_out, seed_of
from aps.training.schedule import above_peak, finetuning_lr, oddities
from aps.training.watch import Watch

MOST_CONFUSED = 100  # classes up to which metrics.json holds the confusion matrix


def run(job: StageJob) -> None:
    """Run the stage. It writes model.safetensors (of the last epoch), history.jsonl and metrics.json.

    Raises:
        UserError: the settings do not fit the data, the encoder or the processes; the loss is not finite.
        Preempted: the run was asked to stop; its state is saved.
    """
    with processes() as distributed, StageRun(job) as stage:
        learner = Finetuning(job, distributed)
        settings, epoch = job.settings.finetune, learner.examples.batches
        loop = Loop(
            job, stage, distributed, learner.state_dict, learner.load_state_dict,
            total=settings.epochs * epoch, images=settings.batch_size, defect=learner.defect,
        )  # fmt: skip
        loop.train(learner, epoch)
        metrics = learner.evaluate() | {"epochs": settings.epochs, "images_per_second": loop.rate}
        if distributed.main:
            learner.save(stage)
            stage.finish(metrics, headline="test_top1", precision=learner.tuner.precision.name, **learner.mistakes)


class Finetuning:
    """The learner of finetuning: its batches, steps, log lines, evaluation and files."""

    note = ""

    def __init__(self, job: StageJob, distributed: Distributed) -> None:
        self.job, self.distributed, self.settings = job, distributed, job.settings.finetune
        seed, size = job.settings.seed, job.settings.encoder.image_size
        self.manifest = Manifest.read(job.manifest)
        self.normalization = normalization(job)
        train = load_split(job.manifest, "train", job.settings.dataset.train_limit, labelled=True)
        rows, held_rows = held_out(len(train), self.settings.holdout, seed, "finetune.holdout")
        self.held = train.select(held_rows) if len(held_rows) else None
        classes = len(self.manifest.classes)
        self.examples = AugmentedExamples(
            train, rows, self.settings, size, classes, self.normalization, seed, distributed, job.workers
        )
        self.tuner = Finetuner(job, classes, self.normalization, distributed)
        self.rate = " and finetune.".join(["lr", *above_peak(self.settings)])  # the keys of the highest learning rate
        self.watch = Watch("finetuning", "finetune", distributed, job.manifest, self.normalization, self.rate)
        self.sums = torch.zeros(2, device=distributed.device)  # this epoch's loss and right share, of all processes
        self.loss = math.nan  # the last epoch's
        self.best = {"epoch": -1, "accuracy": -1.0}
        self.mistakes: dict[str, Any] = {}  # the confusion matrix, for metrics.json
        for clause in oddities("finetune", self.settings) if distributed.main else ():
            print(f"warning: {job.label}: {clause}", file=sys.stderr)

    def batches(self, epoch: int, first: int) -> Iterator[Examples]:
        return self.examples.epoch(epoch, first)

    def close(self) -> None:
        self.examples.close()

    def step(self, batch: Examples, done: int) -> None:
        torch.manual_seed(seed_of(self.job.settings.seed, STEP, done, self.distributed.rank))  # for drop path
        figures = self.tuner.step(batch, finetuning_lr(self.settings, done // self.examples.batches))
        self.watch.add(figures[0], done, (batch.images,))
        self.sums += self.distributed.mean(figures)  # every time: a checkpoint holds one process's sums

    def lines(self, done: int) -> Iterator[Line]:
        if done % self.examples.batches:
            return
        self.watch.check()
        epoch = done // self.examples.batches
        loss, right = (self.sums / self.examples.batches).tolist()
        self.sums.zero_()
        self.loss = finite(loss, "finetuning", "finetune", self.rate)
        lr = finetuning_lr(self.settings, epoch - 1)
        line = {"epoch": epoch, "lr": lr, "loss": loss, "train_top1_augmented": 100 * right}
        if self.held is not None:
            line["holdout_top1"] = self.tuner.accuracy(self.tuner.model, self.held, self.job.workers)
            if line["holdout_top1"] > self.best["accuracy"]:
                self.best = {"epoch": epoch, "accuracy": line["holdout_top1"]}
                self.tuner.remember()
        yield line

    def evaluate(self) -> dict[str, float]:
        """Final metrics: of the last epoch's weights, of their EMA, and of the best epoch on the held-out images."""
        tuner, workers = self.tuner, self.job.workers
        test = load_split(self.job.manifest, "test")
        C = len(test.classes)
        confusion = torch.zeros(C, C, dtype=torch.int64, device=self.distributed.device) if C <= MOST_CONFUSED else None
        metrics = {"test_top1": tuner.accuracy(tuner.model, test, workers, confusion), "loss": self.loss}
        if confusion is not None:
            self.mistakes = {"confusion": {"classes": list(test.classes), "counts": confusion.tolist()}}
        if tuner.ema is not None:
            metrics["test_top1_ema"] = tuner.accuracy(tuner.ema.module, test, workers)
        if self.held is not None:
            metrics |= {"holdout_top1": self.best["accuracy"], "holdout_epoch": self.best["epoch"]}
            metrics["test_top1_holdout_epoch"] = tuner.accuracy(tuner.remembered(), test, workers)
        return metrics

    def save(self, stage: StageRun) -> None:
        """Write the last epoch's model."""
        settings = self.job.settings
        info = {"experiment": settings.experiment, "stage": "finetune", "digest": settings.digest,
                "classes": list(self.manifest.classes), **pixels(self.job)}  # fmt: skip
        save_encoder(self.tuner.model, settings.encoder, stage.staging("model.safetensors"), info)

    def defect(self, state: dict[str, Any]) -> str | None:
        """What in a state is not finite, as a clause."""
        return None if all_finite(state) else weights_not_finite("finetune", self.rate)

    def state_dict(self) -> dict[str, Any]:
        return {"tuner": self.tuner.state_dict(), "sums": self.sums, "loss": self.loss, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuner.load_state_dict(state["tuner"])
        self.sums.copy_(state["sums"])
        self.loss, self.best = state["loss"], state["best"]


class Finetuner:
    """Model, EMA and optimizer: everything that an optimizer step changes."""

    def __init__(self, job: StageJob, classes: int, normalization: Normalization, distributed: Distributed) -> None:
        self.settings: FinetuneSettings = job.settings.finetune
        self.size, self.normalization, self.distributed = job.settings.encoder.image_size, normalization, distributed
        if distributed.device.type == "cpu":
            keep_memory()
        torch.manual_seed(job.settings.seed)
        self.model: Encoder = load_encoder(job.encoder_spec, job.settings.encoder, self.settings.drop_path)
        self.model.reset_classifier(classes)
        self.model.to(distributed.device).train()
        groups = (
            param_groups_weight_decay(self.model, self.settings.weight_decay, self.model.no_weight_decay())
            if self.settings.layer_decay == 1
            else param_groups_layer_decay(
                self.model,
                self.settings.weight_decay,
                self.model.no_weight_decay(),
                layer_decay=self.settings.layer_decay,
            )
        )
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.precision = Precision(self.settings.precision, distributed.device)
        self.precision.prepare(self.model)
        self.ema = ModelEmaV3(self.model, decay=self.settings.ema) if self.settings.ema else None
        self._forward: nn.Module = self.model
        if distributed.world > 1:
            self._forward = DistributedDataParallel(self.model)
        if self.settings.compile:
            self._forward = compile_module(self._forward, "finetune.compile", distributed.device)
        self._best: dict[str, Tensor] = {}

    def step(self, batch: Examples, lr: float) -> Tensor:
        """One optimizer step -> (2,) loss and share of right predictions, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        with self.precision.autocast():
            logits = self._forward(batch.images)
        loss = F.cross_entropy(logits.float(), batch.targets)
        self.precision.scaler.scale(loss).backward()
        if self.settings.clip_grad:
            self.precision.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return torch.stack([loss.detach(), (logits.argmax(1) == batch.labels).float().mean()])

    def accuracy(
        self, model: nn.Module, split: ArraySplit | FileSplit, workers: int | None, confusion: Tensor | None = None
    ) -> float:
        """Top-1 accuracy in percent, in eval mode. confusion: (C, C), to which counts are added."""
        training = model.training
        model.eval()
        result = accuracy(
            model, split, self.size, self.normalization, self.distributed, self.precision, workers, confusion
        )
        model.train(training)
        return float(result)

    def remember(self) -> None:
        """Keep the current weights as those of the best epoch on the held-out images."""
        self._best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def remembered(self) -> nn.Module:
        """A copy of the model with the remembered weights."""
        model = copy.deepcopy(self.model)
        model.load_state_dict(self._best)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "best": self._best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_scaler(state["scaler"])
        self._best = state["best"]
