"""Counts what pretraining, finetuning, linear probe, kNN and embed cost, on the modules that the stages run.

There is one function a stage, of the type `aps.cost.CostFunction`. Counts are cached by the settings that they depend on,
so that a study of many experiments counts each network once.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from aps.cost import Cost, Counts, half_precision
from aps.errors import UserError
from aps.models.encoder import build_encoder
from aps.runtime.counting import Counted, autocast, count
from aps.sampling import Geometry, global_noise
from aps.settings.blocks import EncoderSettings
from aps.settings.study import blocks_of, stage_model
from aps.training import contract
from aps.training.features import BATCH
from aps.training.knn import BLOCK, CHUNK, MONITOR_IMAGES
from aps.training.linear_probe import Heads
from aps.training.networks import at_least_float32, build_method, build_networks

# ----------------------------------------------------------------------------------------------------------------------
# Pretraining

# Settings that do not change the operations of a step.
SCHEDULE = (
    "epochs",
    "budget",
    "lr",
    "warmup_epochs",
    "schedule",
    "weight_decay",
    "betas",
    "precision",
    "compile",
    "knn_every",
    "knn_readings",
)


def step_flops(settings: Any) -> float:
    """Operations of one optimizer step of pretraining on the whole batch, for any number of processes.

    If the steps of a batch differ, it is their mean. Making views and sampling are not counted, because they are inputs.

    Args:
        settings: of an experiment or a run.

    Raises:
        UserError: the method's step can't be counted.
    """
    return settings.pretrain.accumulate * _pretraining_part(settings).flops


def batches_within(flops: float, settings: Any, steps: int) -> int:
    """Number of whole batches, of `steps` optimizer steps each, in a budget of operations.

    Raises:
        UserError: the budget is less than one batch, or the method's step can't be counted.
    """
    batch = steps * step_flops(settings)
    if flops < batch:
        raise UserError(
            f"pretrain.budget.flops {flops:g} is less than the {batch:.4g} operations of one batch; raise it"
        )
    return int(flops / batch)


def pretrain(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    """The cost of pretraining.

    Raises:
        UserError: the step can't be counted, the budget is less than one batch, or it is in minutes, so that its operations
            depend on the machine.
    """
    s, train = settings.pretrain, _train_images(settings, "pretrain", counts)
    part = _pretraining_part(settings, half_precision(s.precision, gpu))
    method = build_method(settings)
    epoch = train // s.batch_size
    batches = s.epochs * epoch
    if s.budget is not None:
        if s.budget.flops is None:
            raise UserError(
                f"pretrain.budget.minutes {s.budget.minutes:g} is as many operations as the machine makes in that time; "
                "give pretrain.budget.flops for a number that is known beforehand"
            )
        batches = batches_within(s.budget.flops, settings, method.steps)
    flops = batches * method.steps * s.accumulate * part.flops
    readings = 0.0
    if s.reads and epoch:
        # The last one at the end
        times = min(s.knn_readings, batches) if s.knn_readings else -(-batches // (s.knn_every * epoch))
        readings = times * min(MONITOR_IMAGES, train) * _image_flops(settings.encoder)
    pixels = sum(4 * 3 * view.size**2 for view in method.views())  # of one image's views
    waiting = (2 * s.batch_size - s.batch_size / s.accumulate) * pixels / gpus  # the batch's other parts and the next
    return Cost(flops, part.training_memory(gpus) + waiting, 4 * part.parameters * (1 + 2 * 3), readings)


def _pretraining_part(settings: Any, half: bool = False) -> Counted:
    """Forward and backward of one part of a batch; there is one unless `pretrain.accumulate` cuts it."""
    block = settings.pretrain
    blocks: dict[str, Any] = {
        name: getattr(settings, name) for name in blocks_of("pretrain", block.method) if name != "dataset"
    }
    blocks["encoder"] = _shape(settings.encoder)
    plain = {name: value.model_dump(mode="json") for name, value in blocks.items()}
    for name in SCHEDULE:
        plain["pretrain"].pop(name, None)
    with contract.blaming(block.method):
        return _count_pretraining(_Chosen(json.dumps(plain, sort_keys=True), blocks), half)


@dataclass(frozen=True)
class _Chosen:
    """Blocks that pretraining reads, equal to others that differ only in settings that do not change the operations."""

    key: str
    blocks: dict[str, Any] = field(compare=False)


@cache
def _count_pretraining(settings: _Chosen, half: bool) -> Counted:
    blocks = settings.blocks | {"stage": "pretrain", "experiment": "", "seed": 0}
    chosen = stage_model(blocks["pretrain"].method)(**blocks)
    method, B = build_method(chosen), chosen.pretrain.batch_size // chosen.pretrain.accumulate
    sizes = [view.size for view in contract.views(method)]
    # Sampling depends on values, so it is done with real tensors, for two images; only the shapes are used.
    whole = [Geometry(torch.tensor([[0.0, 0.0, S, S]] * 2), torch.zeros(2, dtype=torch.bool)) for S in sizes]
    drawn = method.sample(whole, global_noise(2, torch.device("cpu"), torch.Generator().manual_seed(0)))
    contract.sampled(method, drawn, 2)
    kinds = Counter(tuple((x.shape[1:], x.dtype) for x in sampled) for sampled in drawn)

    def step(networks: Any, kind: tuple[tuple[torch.Size, torch.dtype], ...]) -> None:
        views = tuple(torch.empty(B, 3, S, S) for S in sizes)
        sampled = tuple(torch.empty(B, *shape, dtype=dtype) for shape, dtype in kind)
        with autocast(half):
            outputs = method.forward(networks, views, sampled)
        loss, _ = contract.loss(method, method.loss(tree_map_only(Tensor, at_least_float32, outputs), 0.0))
        loss.backward()

    parts = [(n, count(lambda: build_networks(method), partial(step, kind=kind))) for kind, n in kinds.items()]
    flops = sum(n * part.flops for n, part in parts) / len(drawn)
    return max((part for _, part in parts), key=lambda part: part.peak)._replace(flops=flops)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluations


def finetune(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    s, train, encoder = settings.finetune, _train_images(settings, "finetune", counts), _shape(settings.encoder)
    part = _count_finetuning(encoder, counts.classes, s.batch_size, half_precision(s.precision, gpu))
    tested = _image_flops(encoder) + _head_flops(_width(encoder), counts.classes)
    tests = 1 + (s.ema > 0) + (s.holdout > 0)  # last epoch, its average, best epoch on what was held out
    flops = s.epochs * train * (1 - s.holdout) * part.flops / s.batch_size
    flops += (s.epochs * train * s.holdout + tests * counts.test) * tested
    copies = 4 * part.parameters * (s.ema > 0)
    return Cost(flops, part.training_memory(gpus) + copies, 4 * part.parameters * (1 + 2 * 3) + 2 * copies)


@cache
def _count_finetuning(encoder: EncoderSettings, classes: int, batch: int, half: bool) -> Counted:
    def build() -> nn.Module:
        model = build_encoder(encoder)
        model.reset_classifier(classes)
        return model

    def run(model: nn.Module) -> None:
        with autocast(half):
            logits = model(torch.empty(batch, 3, encoder.image_size, encoder.image_size))
        F.cross_entropy(logits.float(), torch.empty(batch, classes)).backward()

    return count(build, run)


def linear_probe(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    s, train, encoder = settings.linear_probe, _train_images(settings, "linear_probe", counts), _shape(settings.encoder)
    frozen = _count_frozen(encoder, half_precision(s.precision, gpu))
    heads = _count_probing(_width(encoder), counts.classes, len(s.lrs), s.batch_norm, s.batch_size)
    seen, probed = frozen.flops / BATCH, heads.flops / s.batch_size
    flops = s.epochs * train * (1 - s.holdout) * (seen + probed) + (train * s.holdout + counts.test) * seen
    memory = frozen.memory(s.batch_size / gpus / BATCH) + heads.training_memory(gpus)
    return Cost(flops, memory, 4 * heads.parameters * (1 + 2 * 2))


@cache
def _count_probing(width: int, classes: int, heads: int, batch_norm: bool, batch: int) -> Counted:
    return count(
        lambda: Heads(width, classes, heads, batch_norm),
        lambda model: model(torch.empty(batch, width)).sum().backward(),
    )


def knn(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    train, encoder = _train_images(settings, "knn", counts), _shape(settings.encoder)
    frozen, width = _count_frozen(encoder, half_precision(settings.knn.precision, gpu)), _width(encoder)
    flops = (train + counts.test) * frozen.flops / BATCH + 2.0 * train * counts.test * width
    features, similarities = 4.0 * width * (train + counts.test), 4.0 * min(BLOCK, train) * min(CHUNK, counts.test)
    return Cost(flops, features + max(frozen.peak, 4 * frozen.parameters + similarities), 1e5)


def embed(settings: Any, counts: Counts, gpus: int = 1, gpu: bool = True) -> Cost:
    """The test images pass the encoder, and every two of them are compared."""
    encoder = _shape(settings.encoder)
    frozen, width = _count_frozen(encoder, half_precision("auto", gpu)), _width(encoder)
    flops = counts.test * frozen.flops / BATCH + 2.0 * counts.test**2 * width
    return Cost(flops, frozen.peak, 4.0 * counts.test * (width + 16) + 1e6)


# ----------------------------------------------------------------------------------------------------------------------
# Parts that stages share


@cache
def _count_frozen(encoder: EncoderSettings, half: bool) -> Counted:
    """The cost of BATCH images in the encoder, without a backward pass."""

    @torch.no_grad()
    def run(model: nn.Module) -> None:
        with autocast(half):
            model.eval()(torch.empty(BATCH, 3, encoder.image_size, encoder.image_size))

    return count(lambda: build_encoder(encoder), run)


def _image_flops(encoder: EncoderSettings) -> float:
    return _count_frozen(_shape(encoder), True).flops / BATCH


@cache
def _head_flops(width: int, classes: int) -> float:
    return count(lambda: nn.Linear(width, classes), lambda model: model(torch.empty(1, width))).flops


@cache
def _width(encoder: EncoderSettings) -> int:
    with torch.device("meta"):
        return build_encoder(encoder).embed_dim


def _shape(encoder: EncoderSettings) -> EncoderSettings:
    """The settings without the origin of the weights, which does not change the cost."""
    return encoder.model_copy(update={"weights": "random"})


def _train_images(settings: Any, stage: str, counts: Counts) -> int:
    return min(counts.train, settings.dataset_settings(stage).train_limit or counts.train)
