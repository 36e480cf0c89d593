"""Finetuning: encoder and linear head on labels (method.md, Finetuning recipe; augmentation and EMA are timm's).

Four things the authors' release gets wrong are right here: images are normalized as in pretraining, drop path reaches the
model, the EMA model is evaluated, and the headline is the last epoch's test accuracy. A best epoch is reported only where
`holdout` keeps part of train aside to choose it on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from PIL.Image import Image
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from aps.data.load import ArraySplit, FileSplit, load_split
from aps.data.manifest import Manifest
from aps.errors import UserError
from aps.models.encoder import Encoder
from aps.models.weights import load_encoder, save_encoder
from aps.results import StageJob, StageRun
from aps.runtime.compiling import compile_module
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.settings.blocks import FinetuneSettings
from aps.training.classify import accuracy, seed_everything
from aps.training.features import Normalization
from aps.training.loop import Line, Loop, finite
from aps.training.order import IMAGE, KeyedLoader, Order, held_out
from aps.training.schedule import finetuning_lr


def run(job: StageJob) -> None:
    """The stage. Outputs model.safetensors (the last epoch's), history.jsonl, metrics.json.

    Raises:
        UserError: settings that do not fit the data, the encoder or the processes; a loss that is no longer finite.
        Preempted: asked to stop; the state is saved.
    """
    with processes() as distributed, StageRun(job) as stage:
        learner = Finetuning(job, distributed)
        settings, epoch = job.settings.finetune, learner.order.batches
        loop = Loop(
            job, stage, distributed, learner.state_dict, learner.load_state_dict,
            total=settings.epochs * epoch, images=settings.batch_size,
        )  # fmt: skip
        loop.train(learner, epoch)
        metrics = learner.evaluate() | {"epochs": settings.epochs, "images_per_second": loop.rate}
        if distributed.main:
            learner.save(stage)
            stage.finish(metrics, headline="test_top1", precision=learner.tuner.precision.name)


class Finetuning:
    """Batches of labelled images into steps, and an epoch's line."""

    note = ""

    def __init__(self, job: StageJob, distributed: Distributed) -> None:
        self.job, self.distributed, self.settings = job, distributed, job.settings.finetune
        seed, size = job.settings.seed, job.settings.encoder.image_size
        self.manifest = Manifest.read(job.manifest)
        self.normalization = self.manifest.normalization(job.settings.dataset.statistics)
        train = load_split(job.manifest, "train", job.settings.dataset.train_limit)
        rows, held_rows = held_out(len(train), self.settings.holdout, seed)
        self.held = train.select(held_rows) if len(held_rows) else None
        self.order = Order(rows, self.settings.batch_size, seed, distributed, "finetune")
        self.loader = KeyedLoader(Augmented(train, self.settings, size, seed), job.workers, distributed.device)
        self.tuner = Finetuner(job, len(self.manifest.classes), self.normalization, distributed)
        self.sums, self.loss = torch.zeros(2, device=distributed.device), math.nan  # of this epoch, of the last one
        self.best = {"epoch": -1, "accuracy": -1.0}

    def batches(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.loader.epoch(epoch, self.order.epoch(epoch)[first:])

    def step(self, batch: tuple[Tensor, Tensor], done: int) -> None:
        seed_everything(self.job.settings.seed, done, self.distributed.rank)
        images, labels = (x.to(self.distributed.device) for x in batch)
        self.sums += self.tuner.step(images, labels, finetuning_lr(self.settings, done // self.order.batches))

    def lines(self, done: int) -> Iterator[Line]:
        if done % self.order.batches:
            return
        epoch = done // self.order.batches
        loss, right = (self.distributed.mean(self.sums) / self.order.batches).tolist()
        self.sums.zero_()
        self.loss = finite(loss, "finetuning", "finetune")
        lr = finetuning_lr(self.settings, epoch - 1)
        line = {"epoch": epoch, "lr": lr, "loss": loss, "train_top1_augmented": 100 * right}
        if self.held is not None:
            line["holdout_top1"] = self.tuner.accuracy(self.tuner.model, self.held, self.job.workers)
            if line["holdout_top1"] > self.best["accuracy"]:
                self.best = {"epoch": epoch, "accuracy": line["holdout_top1"]}
                self.tuner.remember()
        yield line

    def evaluate(self) -> dict[str, float]:
        """Final figures: of the last epoch's weights, of their average, of the best epoch's on the held-out part."""
        tuner, workers = self.tuner, self.job.workers
        test = load_split(self.job.manifest, "test")
        metrics = {"test_top1": tuner.accuracy(tuner.model, test, workers), "loss": self.loss}
        if tuner.ema is not None:
            metrics["test_top1_ema"] = tuner.accuracy(tuner.ema.module, test, workers)
        if self.held is not None:
            metrics |= {"holdout_top1": self.best["accuracy"], "holdout_epoch": self.best["epoch"]}
            metrics["test_top1_holdout_epoch"] = tuner.accuracy(tuner.remembered(), test, workers)
        return metrics

    def save(self, stage: StageRun) -> None:
        """Stage the last epoch's model."""
        settings, (mean, std) = self.job.settings, self.normalization
        info = {"experiment": settings.experiment, "stage": "finetune", "digest": settings.digest,
                "classes": list(self.manifest.classes), "mean": mean, "std": std}  # fmt: skip
        save_encoder(self.tuner.model, settings.encoder, stage.staging("model.safetensors"), info)

    def state_dict(self) -> dict[str, Any]:
        return {"tuner": self.tuner.state_dict(), "sums": self.sums, "loss": self.loss, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tuner.load_state_dict(state["tuner"])
        self.sums.copy_(state["sums"])
        self.loss, self.best = state["loss"], state["best"]


class Finetuner:
    """Model, its EMA, optimizer, mixup: everything that one optimizer step touches."""

    def __init__(self, job: StageJob, classes: int, normalization: Normalization, distributed: Distributed) -> None:
        self.settings: FinetuneSettings = job.settings.finetune
        self.size, self.normalization, self.distributed = job.settings.encoder.image_size, normalization, distributed
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
        self.ema = ModelEmaV3(self.model, decay=self.settings.ema) if self.settings.ema else None
        mixes = self.settings.mixup > 0 or self.settings.cutmix > 0
        if mixes and self.settings.batch_size // distributed.world % 2:
            raise UserError(
                f"finetune.batch_size {self.settings.batch_size} gives each of the {distributed.world} processes an odd number "
                "of images, and mixup pairs them; make it even, or set finetune.mixup and finetune.cutmix to 0"
            )
        self.mixup = (
            Mixup(
                self.settings.mixup, self.settings.cutmix, switch_prob=self.settings.mixup_switch,
                label_smoothing=self.settings.label_smoothing, num_classes=classes,
            )
            if mixes
            else None
        )  # fmt: skip
        self.erase = RandomErasing(self.settings.erasing, mode="pixel", device=str(distributed.device))
        self._mean, self._std = (torch.tensor(x, device=distributed.device).view(3, 1, 1) for x in normalization)
        self._criterion = nn.CrossEntropyLoss(label_smoothing=0.0 if mixes else self.settings.label_smoothing)
        self._forward: nn.Module = self.model
        if distributed.world > 1:
            self._forward = DistributedDataParallel(self.model)
        if self.settings.compile:
            self._forward = compile_module(self._forward, "finetune.compile", distributed.device)
        self._best: dict[str, Tensor] = {}

    def step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """images: (B, 3, S, S) uint8, labels: (B,) int64 -> (2,) loss and share of right guesses, on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        x = self.erase((images.float() / 255 - self._mean) / self._std)
        targets = labels
        if self.mixup is not None:
            x, targets = self.mixup(x, labels)
        with self.precision.autocast():
            logits = self._forward(x)
        loss = self._criterion(logits.float(), targets)
        self.precision.scaler.scale(loss).backward()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.model)
        return torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])

    def accuracy(self, model: nn.Module, split: ArraySplit | FileSplit, workers: int | None) -> float:
        """Top-1 in percent, in eval mode."""
        training = model.training
        model.eval()
        result = accuracy(model, split, self.size, self.normalization, self.distributed, self.precision, workers)
        model.train(training)
        return float(result)

    def remember(self) -> None:
        """Keep the present weights as those of the best epoch on the held-out part."""
        self._best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def remembered(self) -> nn.Module:
        """A model of its own with the remembered weights."""
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
        self.precision.scaler.load_state_dict(state["scaler"])
        self._best = state["best"]


class Augmented(Dataset):
    """Crop, flip and RandAugment of one image, as timm does it on PIL images; all random numbers from (seed, epoch, image).

    Erasing, mixup and normalization follow on the whole batch.
    """

    def __init__(self, split: ArraySplit | FileSplit, settings: FinetuneSettings, size: int, seed: int) -> None:
        self.split, self.seed = split, seed
        steps: list[Any] = []
        if settings.crop == "pad":
            steps += [v2.Resize([size, size]), v2.RandomCrop(size, padding=max(1, size // 8))]  # 4 pixels at 32
        else:
            steps += [v2.RandomResizedCrop(size, interpolation=v2.InterpolationMode.BICUBIC)]
        steps += [v2.RandomHorizontalFlip(settings.flip)]
        if settings.rand_augment is not None:
            fill = {"translate_const": int(size * 0.45), "img_mean": (124, 116, 104)}  # as timm.data.create_transform
            fill["magnitude_max"] = 9.999  # at 10 timm posterizes to 0 bits, which Pillow refuses
            steps += [rand_augment_transform(settings.rand_augment, fill)]
        elif settings.color_jitter:
            steps += [v2.ColorJitter(*(3 * [settings.color_jitter]))]
        self.transform = v2.Compose(steps)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        """key: (epoch, image) -> (3, S, S) uint8, label."""
        epoch, index = key
        seed_everything(self.seed, IMAGE, epoch, index)
        image: Image = functional.to_pil_image(self.split.read(index))
        return functional.pil_to_tensor(self.transform(image)), int(self.split.labels[index])
