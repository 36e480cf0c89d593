"""Pretraining by asymmetric patch sampling (arXiv 2306.02854; method.md's Views, Sampling, Loss).

One loaded batch gives T sequential optimizer steps: the same two views, another subset of patches each time. There is
no momentum encoder, so a step is one forward and one backward of the kept patches.

A run can be killed anywhere: it goes on from its last checkpoint with the same batches, views, samplings and learning
rates, on any number of processes that divides the batch.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from aps.data.load import load_split
from aps.data.manifest import Manifest
from aps.errors import Preempted, UserError
from aps.models.encoder import build_encoder
from aps.models.heads import synchronize_batch_norm
from aps.models.model import APS, build_heads
from aps.models.weights import save_encoder, save_tensors
from aps.progress import Progress
from aps.results import StageJob, StageRun
from aps.runtime.checkpoint import Checkpoints
from aps.runtime.compiling import compile_module
from aps.runtime.memory import keep_memory
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.runtime.signals import stop_requested
from aps.runtime.trace import Trace
from aps.sampling import sample
from aps.training.knn import monitor
from aps.training.loss import contrastive_loss
from aps.training.order import SAMPLING, seeded
from aps.training.pairs import Pairs
from aps.training.schedule import pretraining_lr

LOG_BATCHES = 50  # batches between two log lines, within an epoch


def run(job: StageJob) -> None:
    """The stage. Outputs encoder.safetensors, heads.safetensors, history.jsonl, metrics.json.

    Raises:
        UserError: settings that do not fit the data or the processes; a loss that is no longer finite.
        Preempted: asked to stop; the state is saved.
    """
    with processes() as distributed, StageRun(job) as stage:
        _pretrain(job, stage, distributed)


def _pretrain(job: StageJob, stage: StageRun, distributed: Distributed) -> None:
    settings, seed = job.settings.pretrain, job.settings.seed
    sampling, grid, samplings = job.settings.sampling, job.settings.encoder.grid, job.settings.sampling.samplings
    normalization = Manifest.read(job.manifest).normalization(job.settings.dataset.statistics)
    split = load_split(job.manifest, "train", job.settings.dataset.train_limit)
    pairs = Pairs(
        split, job.settings.views, job.settings.encoder.image_size, settings.batch_size, normalization, seed, distributed,
        job.workers,
    )  # fmt: skip
    trainer = Trainer(job, distributed)
    meter = Meter(distributed)
    checkpoints = Checkpoints(job.checkpoints, job.checkpoint_minutes, writes=distributed.main)
    total, done = settings.epochs * pairs.batches, 0  # batches
    if (state := checkpoints.load()) is not None:
        done = state["step"]
        trainer.load_state_dict(state["trainer"])
        meter.load_state_dict(state["meter"])
        stage.resume(done * samplings)

    def save() -> None:
        checkpoints.save(done, {"trainer": trainer.state_dict(), "meter": meter.state_dict()})
        stage.save_clock()

    with (
        Progress(job.label, total, "batches", done, shown=distributed.main) as progress,
        Trace(job.profile, distributed.device, distributed.main) as trace,
    ):
        while done < total:
            epoch, first = divmod(done, pairs.batches)
            batches = pairs.epoch(epoch, first)
            while (pair := meter.fetch(batches)) is not None:
                generator = seeded(seed, SAMPLING, epoch, done, device=distributed.device)
                kept = sample(
                    sampling, grid, pair.geometry1, pair.geometry2, generator, distributed.rank, distributed.world
                )
                for t in range(samplings):
                    lr = pretraining_lr(settings, done * samplings + t, pairs.batches * samplings)
                    meter.add(*trainer.step(pair.view1, pair.view2, kept.view1[t], kept.view2[t], lr))
                done += 1
                progress.update(1, settings.batch_size, meter.note)
                if done % pairs.batches == 0 or (done % pairs.batches) % LOG_BATCHES == 0:
                    stage.log(done * samplings, epoch=done / pairs.batches, lr=lr, **meter.read(settings.batch_size))
                if settings.knn_every and done % (settings.knn_every * pairs.batches) == 0:
                    stage.log(done * samplings, **monitor(trainer.model.encoder, split, normalization, distributed))
                trace.batch_done()
                if stop_requested(distributed):
                    save()
                    raise Preempted(f"{job.label} after {done} of {total} batches; run it again to go on")
                if checkpoints.due():
                    save()
    save()
    _finish(job, stage, trainer, meter, distributed, progress.rate)


class Trainer:
    """Model, optimizer and precision: everything that one optimizer step touches."""

    def __init__(self, job: StageJob, distributed: Distributed) -> None:
        self.settings = job.settings.pretrain
        own = self.settings.batch_size // distributed.world
        if own % self.settings.accumulate:
            raise UserError(
                f"pretrain.accumulate {self.settings.accumulate} does not divide the {own} images of a process "
                "(pretrain.batch_size over the processes); change either"
            )
        if distributed.device.type == "cpu":
            keep_memory()
        torch.manual_seed(job.settings.seed)
        encoder = build_encoder(job.settings.encoder)
        encoder.set_grad_checkpointing(self.settings.activation_checkpointing)
        self.model = APS(encoder, *build_heads(encoder.embed_dim, self.settings)).to(distributed.device).train()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=self.settings.betas, weight_decay=self.settings.weight_decay, fused=True
        )
        self.precision = Precision(self.settings.precision, distributed.device)
        self._forward: nn.Module = self.model
        if distributed.world > 1:
            synchronize_batch_norm(self.model)
            self._forward = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        if self.settings.compile:
            self._forward = compile_module(self._forward, "pretrain.compile", distributed.device)

    def step(self, view1: Tensor, view2: Tensor, kept1: Tensor, kept2: Tensor, lr: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on one sampling. Views (B, 3, S, S), kept (B, n) -> loss, mean positive cosine, on the device.

        With `accumulate` the batch is cut into that many parts, each with its own negatives and BatchNorm statistics.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        parts = self.settings.accumulate
        loss_sum = cosine_sum = torch.zeros((), device=view1.device)
        chunks = zip(*(x.chunk(parts) for x in (view1, view2, kept1, kept2)), strict=True)
        for part, (v1, v2, k1, k2) in enumerate(chunks, 1):
            with self._sync_gradients(part == parts):
                with self.precision.autocast():
                    p1, z1, p2, z2 = self._forward(v1, v2, k1, k2)
                loss, cosine = contrastive_loss(p1, z1, p2, z2, self.settings.temperature)
                self.precision.scaler.scale(loss / parts).backward()
            loss_sum, cosine_sum = loss_sum + loss.detach() / parts, cosine_sum + cosine / parts
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_sum, cosine_sum

    def _sync_gradients(self, last: bool) -> Any:
        """Processes exchange gradients with the last part only."""
        from contextlib import nullcontext

        forward = getattr(self._forward, "_orig_mod", self._forward)
        return forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.scaler.load_state_dict(state["scaler"])


class Meter:
    """Sums on the device, read (and synchronized) only to log: loss, positive cosine, speed, share of waiting for input."""

    def __init__(self, distributed: Distributed) -> None:
        self.distributed = distributed
        self.sums = torch.zeros(2, device=distributed.device)
        self.steps = 0
        self.waited = 0.0
        self.note = ""
        self._mark = time.perf_counter()
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.last: dict[str, float] = {}

    def fetch(self, batches: Any) -> Any:
        """The next batch, or None at the end of the epoch, counting the time that training waits for it."""
        if (
            self.distributed.device.type == "cuda"
        ):  # on the device's clock: from the last step's end to the batch being there
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            pair = next(batches, None)
            after.record()
            self._events.append((before, after))
            return pair
        before_cpu = time.perf_counter()
        pair = next(batches, None)
        self.waited += time.perf_counter() - before_cpu
        return pair

    def add(self, loss: Tensor, cosine: Tensor) -> None:
        self.sums += torch.stack([loss, cosine])
        self.steps += 1

    def read(self, batch_size: int) -> dict[str, float]:
        """Means since the last reading; the only host synchronization of the loop.

        Raises:
            UserError: the loss is not finite.
        """
        loss, cosine = (self.distributed.mean(self.sums) / self.steps).tolist()
        if not math.isfinite(loss):
            raise UserError(f"the pretraining loss became {loss}; lower pretrain.lr, or set pretrain.precision: fp32")
        now = time.perf_counter()
        if self._events:
            torch.cuda.synchronize()
            self.waited = sum(a.elapsed_time(b) for a, b in self._events) / 1000
        seconds = max(1e-9, now - self._mark)
        values = {
            "loss": loss,
            "positive_cosine": cosine,
            "step_ms": 1000 * seconds / self.steps,
            "input_share": self.waited / seconds,
        }
        self.note = f"loss {loss:.3f}"
        self.sums.zero_()
        self.steps, self.waited, self._events, self._mark = 0, 0.0, [], now
        self.last = values
        return values

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "steps": self.steps, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.steps, self.last = state["steps"], state["last"]


def _finish(
    job: StageJob, stage: StageRun, trainer: Trainer, meter: Meter, distributed: Distributed, rate: float
) -> None:
    if not distributed.main:
        return
    settings = job.settings
    mean, std = Manifest.read(job.manifest).normalization(settings.dataset.statistics)
    info = {"experiment": settings.experiment, "stage": "pretrain", "digest": settings.digest, "mean": mean, "std": std}
    save_encoder(trainer.model.encoder, settings.encoder, stage.staging("encoder.safetensors"), info)
    heads = {k: v for k, v in trainer.model.state_dict().items() if not k.startswith("encoder.")}
    save_tensors(heads, stage.staging("heads.safetensors"))
    stage.finish(
        {**meter.last, "images_per_second": rate, "epochs": settings.pretrain.epochs},
        precision=trainer.precision.name,
    )
