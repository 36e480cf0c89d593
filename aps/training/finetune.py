"""Finetuning: encoder and linear head on labels (method.md, Finetuning recipe; augmentation and EMA are timm's).

Four things the authors' release gets wrong are right here: images are normalized as in pretraining, drop path reaches the
model, the EMA model is evaluated, and the headline is the last epoch's test accuracy. A best epoch is reported only where
`holdout` keeps part of train aside to choose it on.
"""

from __future__ import annotations

import copy
import math
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
from aps.errors import Preempted, UserError
from aps.models.encoder import Encoder
from aps.models.weights import load_encoder, save_encoder
from aps.progress import Progress
from aps.results import StageJob, StageRun
from aps.runtime.checkpoint import Checkpoints
from aps.runtime.compiling import compile_module
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.runtime.signals import stop_requested
from aps.runtime.trace import Trace
from aps.settings.blocks import FinetuneSettings
from aps.training.classify import accuracy, seed_everything
from aps.training.features import Normalization
from aps.training.order import IMAGE, KeyedLoader, Order, held_out
from aps.training.schedule import finetuning_lr


def run(job: StageJob) -> None:
    """The stage. Outputs model.safetensors (the last epoch's), history.jsonl, metrics.json.

    Raises:
        UserError: settings that do not fit the data, the encoder or the processes; a loss that is no longer finite.
        Preempted: asked to stop; the state is saved.
    """
    with processes() as distributed, StageRun(job) as stage:
        _finetune(job, stage, distributed)


def _finetune(job: StageJob, stage: StageRun, distributed: Distributed) -> None:
    settings, seed, size = job.settings.finetune, job.settings.seed, job.settings.encoder.image_size
    manifest = Manifest.read(job.manifest)
    normalization = manifest.normalization(job.settings.dataset.statistics)
    train = load_split(job.manifest, "train", job.settings.dataset.train_limit)
    rows, held_rows = held_out(len(train), settings.holdout, seed)
    held = train.select(held_rows) if len(held_rows) else None
    order = Order(rows, settings.batch_size, seed, distributed, "finetune")
    loader = KeyedLoader(Augmented(train, settings, size, seed), job.workers, distributed.device)
    tuner = Finetuner(job, len(manifest.classes), normalization, distributed)

    checkpoints = Checkpoints(job.checkpoints, job.checkpoint_minutes, writes=distributed.main)
    done, total = 0, settings.epochs * order.batches
    sums, loss, best = torch.zeros(2, device=distributed.device), math.nan, {"epoch": -1, "accuracy": -1.0}
    if (state := checkpoints.load()) is not None:
        done, loss, best = state["step"], state["loss"], state["best"]
        sums.copy_(state["sums"])
        tuner.load_state_dict(state["tuner"])
        stage.resume(done)

    def save() -> None:
        checkpoints.save(done, {"tuner": tuner.state_dict(), "sums": sums, "loss": loss, "best": best})
        stage.save_clock()

    with (
        Progress(job.label, total, "batches", done, shown=distributed.main) as progress,
        Trace(job.profile, distributed.device, distributed.main) as trace,
    ):
        while done < total:
            epoch, first = divmod(done, order.batches)
            lr = finetuning_lr(settings, epoch)
            for images, labels in loader.epoch(epoch, order.epoch(epoch)[first:]):
                seed_everything(seed, done, distributed.rank)
                sums += tuner.step(images.to(distributed.device), labels.to(distributed.device), lr)
                done += 1
                progress.update(1, settings.batch_size)
                if done % order.batches == 0:  # before any save: a checkpoint of this moment has the epoch behind it
                    loss, right = (distributed.mean(sums) / order.batches).tolist()
                    sums.zero_()
                    if not math.isfinite(loss):
                        raise UserError(
                            f"the finetuning loss became {loss}; lower finetune.lr, or set finetune.precision: fp32"
                        )
                    line = {"epoch": epoch + 1, "lr": lr, "loss": loss, "train_top1_augmented": 100 * right}
                    if held is not None:
                        line["holdout_top1"] = tuner.accuracy(tuner.model, held, job.workers)
                        if line["holdout_top1"] > best["accuracy"]:
                            best = {"epoch": epoch + 1, "accuracy": line["holdout_top1"]}
                            tuner.remember()
                    stage.log(done, **line)
                trace.batch_done()
                if stop_requested(distributed):
                    save()
                    raise Preempted(f"{job.label} after {done} of {total} batches; run it again to go on")
                if checkpoints.due():
                    save()
    save()
    test = load_split(job.manifest, "test")
    metrics = {"test_top1": tuner.accuracy(tuner.model, test, job.workers), "loss": loss}
    if tuner.ema is not None:
        metrics["test_top1_ema"] = tuner.accuracy(tuner.ema.module, test, job.workers)
    if held is not None:
        metrics |= {"holdout_top1": best["accuracy"], "holdout_epoch": best["epoch"]}
        metrics["test_top1_holdout_epoch"] = tuner.accuracy(tuner.remembered(), test, job.workers)
    metrics |= {"epochs": settings.epochs, "images_per_second": progress.rate}
    if distributed.main:
        mean, std = normalization
        info = {"experiment": job.settings.experiment, "stage": "finetune", "digest": job.settings.digest,
                "classes": list(manifest.classes), "mean": mean, "std": std}  # fmt: skip
        save_encoder(tuner.model, job.settings.encoder, stage.staging("model.safetensors"), info)
        stage.finish(metrics, headline="test_top1", precision=tuner.precision.name)


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

    def accuracy(self, model: nn.Module, split: ArraySplit | FileSplit, workers: int) -> float:
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
