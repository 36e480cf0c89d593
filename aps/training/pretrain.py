"""Pretraining by any method of `aps.methods`: the parts that all methods share, from the views to the files.

A run can be killed at any point: it resumes from its last checkpoint with the same batches, views, draws and learning
rates, on any number of processes that divides the batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from aps.data.load import load_split
from aps.errors import UserError
from aps.methods import Method, Sampled
from aps.models.encoder import Encoder
from aps.models.heads import synchronize_batch_norm
from aps.models.weights import save_encoder, save_tensors
from aps.registry import METHODS
from aps.results import StageJob, StageRun
from aps.runtime.compiling import compile_module
from aps.runtime.memory import keep_memory
from aps.runtime.precision import Precision
from aps.runtime.processes import Distributed, processes
from aps.sampling import global_noise
from aps.spent import Memory
from aps.training import contract
from aps.training.batches import Batch, Batches
from aps.training.features import normalization, pixels
from aps.training.knn import monitor
from aps.training.loop import Line, Loop, all_finite, weights_not_finite
from aps.training.meter import Meter
from aps.training.networks import at_least_float32, build_method, build_networks
from aps.training.order import SAMPLING, STEP, seed_of, seeded
from aps.training.pace import Pace
from aps.training.schedule import endless_warmup, pretraining_lr, single_step
from aps.training.watch import Watch, collapsed

LOG_BATCHES = 50  # batches between two log lines, within an epoch


def run(job: StageJob) -> None:
    """Run the stage. It writes encoder.safetensors, heads.safetensors, history.jsonl and metrics.json.

    Raises:
        UserError: the settings do not fit the data or the processes; the loss is not finite.
        Preempted: the run was asked to stop; its state is saved.
    """
    with contract.blaming(job.settings.pretrain.method), processes() as distributed, StageRun(job) as stage:
        learner = Pretraining(job, distributed, stage.memory)
        settings, epoch = job.settings.pretrain, learner.data.batches
        loop = Loop(
            job, stage, distributed, learner.state_dict, learner.load_state_dict,
            total=lambda: learner.pace.total, images=settings.batch_size, steps=learner.trainer.method.steps,
            defect=learner.defect,
        )  # fmt: skip
        loop.train(learner, epoch)
        if not learner.pace.known:
            learner.check_length()
        if distributed.main:
            learner.save(stage)
            length = {
                "epochs": loop.total / epoch,
                "steps": loop.total * loop.steps,
                **(learner.length or learner.so_far(loop.total)),
            }
            speed = {"images_per_second": loop.total * settings.batch_size / max(1e-9, length["seconds"])}
            if settings.reads:
                speed["reading_seconds"] = learner.pace.readings
            metrics = {**learner.meter.last, **speed, **length}
            stage.finish(metrics, precision=learner.trainer.precision.name)


class Pretraining:
    """The learner of pretraining: its batches, steps, log lines and files."""

    def __init__(self, job: StageJob, distributed: Distributed, memory: Memory | None = None) -> None:
        self.job, self.distributed, self.settings = job, distributed, job.settings.pretrain
        self.memory = memory or Memory()
        method = build_method(job.settings)
        views = contract.views(method)
        self.normalization = normalization(job)
        self.split = load_split(job.manifest, "train", job.settings.dataset.train_limit)
        self.data = Batches(
            self.split, views, self.settings.batch_size, self.normalization, job.settings.seed, distributed,
            job.workers,
        )  # fmt: skip
        self.trainer = Trainer(job, distributed, method)  # first, since it says what is wrong with a method
        self.pace = Pace(job.settings, self.data.batches, method.steps, distributed)
        self.meter = Meter(distributed, METHODS.described(self.settings.method))
        self.length: dict[str, float] = {}
        self.watch = Watch("pretraining", "pretrain", distributed, job.manifest, self.normalization)
        if self.pace.known:
            self.check_length()
        clause = endless_warmup("pretrain", self.settings) if self.settings.schedule == "cosine" else None
        self._say(clause)

    def _say(self, clause: str | None) -> None:
        if self.distributed.main and clause is not None:
            print(f"warning: {self.job.label}: {clause}", file=sys.stderr)

    def check_length(self) -> None:
        """Say where the learning rate of a single step is low. Raises UserError where it is 0."""
        if self.pace.positions == 1:
            self._say(single_step(self.settings))

    @property
    def note(self) -> str:
        return self.meter.note

    def batches(self, epoch: int, first: int) -> Iterator[Batch]:
        self.pace.start()
        batches = self.data.epoch(epoch, first)
        while (batch := self.meter.fetch(batches)) is not None:
            yield batch

    def close(self) -> None:
        self.data.close()

    def step(self, batch: Batch, done: int) -> None:
        seed, distributed, per_epoch = self.job.settings.seed, self.distributed, self.data.batches
        steps = self.trainer.method.steps
        generator = seeded(seed, SAMPLING, done // per_epoch, done, device=distributed.device)
        noise = global_noise(len(batch.views[0]), distributed.device, generator, distributed.rank, distributed.world)
        sampled = self.trainer.method.sample(batch.geometries, noise)
        if self.trainer.first:
            contract.sampled(self.trainer.method, sampled, len(batch.views[0]))
        for step, drawn in zip(range(done * steps, (done + 1) * steps), sampled, strict=True):
            torch.manual_seed(seed_of(seed, STEP, step, distributed.rank))  # for drop path and other global draws
            self.lr = pretraining_lr(self.settings, self.pace.epoch(step), 1)
            figures = self.trainer.step(batch.views, drawn, self.lr, self.pace.progress(step))
            self.watch.add(figures["loss"], step, batch.views)
            self.meter.add(figures)
        self.pace.batch_done(done + 1)

    def lines(self, done: int) -> Iterator[Line]:
        per_epoch, last = self.data.batches, done == self.pace.total
        if done % per_epoch == 0 or (done % per_epoch) % LOG_BATCHES == 0 or last:
            self.watch.check()
            yield {"epoch": done / per_epoch, "lr": self.lr, **self.meter.read(), **self.so_far(done)}
        if self.settings.reads and (last or self._due(done)):
            with self.pace.stopped(), self.meter.stopped(), self.memory.aside():
                found = monitor(
                    self.trainer.encoder, self.split, self.normalization, self.distributed, self.job.workers
                )
            self._warn(found, done)
            yield {**found, **self.so_far(done)}

    def _due(self, done: int) -> bool:
        """Whether kNN is to be read after `done` batches."""
        parts = self.settings.knn_readings
        return self.pace.ends_part(done, parts) if parts else done % (self.settings.knn_every * self.data.batches) == 0

    def _warn(self, found: dict[str, float], done: int) -> None:
        """Warn of a collapsed representation, in which all images have nearly the same features."""
        clause = collapsed(found, self.meter.last.get("positive_cosine"))
        if clause is not None and self.distributed.main:
            print(
                f"warning: {self.job.label}: after {done} batches its representation has collapsed ({clause}); lower "
                "pretrain.lr, or look at the views and the temperature",
                file=sys.stderr,
            )

    def so_far(self, done: int) -> dict[str, float]:
        """Operations and seconds; the last line's are metrics.json's too, so that a figure has one value."""
        self.length = self.pace.so_far(done)
        return self.length

    def state_dict(self) -> dict[str, Any]:
        return {
            "trainer": self.trainer.state_dict(),
            "meter": self.meter.state_dict(),
            "pace": self.pace.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state["trainer"])
        self.meter.load_state_dict(state["meter"])
        self.pace.load_state_dict(state["pace"])

    def defect(self, state: dict[str, Any]) -> str | None:
        """What in a state is not finite, as a clause. A buffer or a method's own tensor may be infinite, as a least value yet
        to be found is; only `nan` is a mistake there."""
        trainer, who = state["trainer"], METHODS.described(self.settings.method)
        buffers = {
            name: trainer["networks"][name]
            for name, _ in self.trainer.networks.named_buffers()
            if name in trainer["networks"]
        }
        weights = {name: x for name, x in trainer["networks"].items() if name not in buffers}
        if not all_finite([weights, trainer["optimizer"]]):
            return weights_not_finite("pretrain")
        for kind, tensors in (("buffer", buffers), ("state", trainer["method"])):
            for name, value in tensors.items():
                if any(bool(x.isnan().any()) for x in tree_leaves(value) if isinstance(x, Tensor)):
                    return f"the {kind} '{name}' of {who} is nan; see where its numbers come from"
        figures = dict(zip(self.meter.names, self.meter.sums.tolist(), strict=True)) if self.meter.steps else {}
        names = [name for name, value in figures.items() if not math.isfinite(value)]
        return (
            f"the figure '{names[0]}' of {who} is no finite number; return finite ones from `loss`" if names else None
        )

    def save(self, stage: StageRun) -> None:
        """Write the encoder that is evaluated, and the other networks as a second file."""
        settings = self.job.settings
        info = {"experiment": settings.experiment, "stage": "pretrain", "digest": settings.digest, **pixels(self.job)}
        save_encoder(self.trainer.encoder, settings.encoder, stage.staging("encoder.safetensors"), info)
        encoder, networks = f"{self.trainer.method.evaluated}.", self.trainer.networks.state_dict()
        heads = {name: value for name, value in networks.items() if not name.startswith(encoder)}
        save_tensors(heads, stage.staging("heads.safetensors"))


class Trainer:
    """Networks, optimizer and precision: everything that an optimizer step changes."""

    def __init__(self, job: StageJob, distributed: Distributed, method: Method | None = None) -> None:
        self.method = method or build_method(job.settings)
        self.settings, self.device = job.settings.pretrain, distributed.device
        local_batch = self.settings.batch_size // distributed.world
        if local_batch % self.settings.accumulate:
            raise UserError(
                f"pretrain.accumulate {self.settings.accumulate} does not divide the {local_batch} images of a process "
                "(pretrain.batch_size over the processes); change either"
            )
        if self.device.type == "cpu":
            keep_memory()
        torch.manual_seed(job.settings.seed)
        self.networks = build_networks(self.method).to(self.device)
        groups = contract.groups(self.method, self.networks)
        contract.start(self.method)
        self.first = True  # whether the next step is the first of this process, which checks what the method returns
        self._scheduled = ["weight_decay" not in group for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups, betas=self.settings.betas, weight_decay=self.settings.weight_decay, fused=True
        )
        self.precision = Precision(self.settings.precision, self.device)
        self.precision.prepare(self.networks)
        self._forward: nn.Module = Forward(self.method, self.networks)
        if distributed.world > 1:
            synchronize_batch_norm(self.networks)
            self._forward = DistributedDataParallel(self._forward, gradient_as_bucket_view=True)
        if self.settings.compile:
            self._forward = compile_module(self._forward, "pretrain.compile", self.device)

    @property
    def encoder(self) -> Encoder:
        """The encoder that is evaluated and saved."""
        return self.networks[self.method.evaluated]  # type: ignore[return-value]

    def step(self, views: tuple[Tensor, ...], sampled: Sampled, lr: float, progress: float = 0.0) -> dict[str, Tensor]:
        """One optimizer step -> the loss and the method's figures, on the device, without gradient.

        With `accumulate` the batch is cut into parts, and each part has separate negatives and BatchNorm statistics.

        Args:
            views: V of (B, 3, S, S).
            sampled: the method's draws, each (B, ...).
            progress: share of the run's steps that are done.
        """
        decay = self.method.weight_decay(progress)
        for group, scheduled in zip(self.optimizer.param_groups, self._scheduled, strict=True):
            group["lr"] = lr * group.get("lr_scale", 1.0)
            if scheduled:
                group["weight_decay"] = decay
        parts, before = self.settings.accumulate, contract.memory(self.method, self.networks) if self.first else {}
        sums: dict[str, Tensor] = {}
        chunks = zip(*(x.chunk(parts) for x in (*views, *sampled)), strict=True)
        for part, tensors in enumerate(chunks, 1):
            with self._sync_gradients(part == parts):
                with self.precision.autocast():
                    outputs = self._forward(tensors[: len(views)], tensors[len(views) :])
                result = self.method.loss(map_tensors(at_least_float32, outputs), progress)
                loss, figures = contract.loss(self.method, result) if self.first else result
                self.precision.scaler.scale(loss / parts).backward()
            for name, value in ({"loss": loss} | figures).items():
                sums[name] = sums.get(name, 0.0) + value.detach() / parts
        if self.first:
            contract.gradients(self.method, self.networks)
        self._update(progress)
        if self.first:
            contract.remembered(self.method, self.networks, before)
            self.first = False
        return sums

    @torch.no_grad()
    def _update(self, progress: float) -> None:
        if type(self.method).before_step is not Method.before_step:
            self.precision.scaler.unscale_(self.optimizer)
            self.method.before_step(self.networks, progress)
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.networks, progress)

    def _sync_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """A context in which processes exchange gradients for the last part of the batch only."""
        forward = getattr(self._forward, "_orig_mod", self._forward)
        return forward.no_sync() if isinstance(forward, DistributedDataParallel) and not last else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {
            "networks": self.networks.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.networks.load_state_dict(state["networks"])
        self.method.load_state_dict(map_tensors(lambda x: x.to(self.device), state["method"]))
        self.optimizer.load_state_dict(state["optimizer"])
        self.precision.load_scaler(state["scaler"])


class Forward(nn.Module):
    """A method's forward pass as a module, which can be compiled and wrapped by DistributedDataParallel."""

    def __init__(self, method: Method, networks: nn.ModuleDict) -> None:
        super().__init__()
        self.method, self.networks = method, networks

    def forward(self, views: tuple[Tensor, ...], sampled: Sampled) -> Any:
        return self.method.forward(self.networks, views, sampled)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """`function` applied to every tensor in nested tuples, lists and dictionaries; other values stay as they are."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):  # a NamedTuple
        return type(tree)(*(map_tensors(function, value) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(map_tensors(function, value) for value in tree)
    return tree
